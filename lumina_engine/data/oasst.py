"""Open Assistant exports: message trees, the same messages flat, one thread a line, and conversations already made linear.

A tree becomes one conversation, its best-ranked path, or with `paths="all"` one for each path. Every message that is left out
is counted with its reason, so that read = used + left out.

Rules: a message that is deleted, rejected in review or empty is not used, nor is anything below it; a reply is never hung onto
its grandparent. Of several usable replies the one with the smallest rank is followed, those without a rank last, equals in file
order. Turns after the last answer are cut. In flat files a message without its parent is left out with what hangs below it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from .conversation import Conversation, DataError, Message, Place, check_text, nearest, parse_label, shown
from .files import OnError, Record
from .tally import Tally

_ROLES = {"prompter": "user", "assistant": "assistant", "user": "user"}
_NO_PLACE = ("weight", "task", "tools", "tool_calls", "function_call")  # in a record or a message of other layouts
READY = "ready_for_export"
TREE_STATES = (
    READY,
    "initial_prompt_review",
    "growing",
    "ranking",
    "ready_for_scoring",
    "scoring_failed",
    "aborted_low_grade",
    "halted_by_moderator",
    "backlog_ranking",
    "prompt_lottery_waiting",
)


@dataclass(frozen=True, slots=True)
class OasstOptions:
    """What is taken from a tree.

    Args:
        paths: "best" (one conversation a tree) or "all" (one for each path that ends on an answer).
        languages: primary language subtags to keep, such as ("en", "de"); empty keeps all. A message without one fails.
        max_rank: answers with a higher rank are not used (0 is the best); those without a rank are. None: no bound.
        deleted, rejected: use messages that were deleted, or rejected in review, too.
        reviewed: use only messages with a positive review.
        synthetic: use messages written by a model, too.
        tree_states: states of trees to read; a tree without a state is always read.
    """

    paths: str = "best"
    languages: tuple[str, ...] = ()
    max_rank: int | None = None
    deleted: bool = False
    rejected: bool = False
    reviewed: bool = False
    synthetic: bool = True
    tree_states: tuple[str, ...] = (READY,)


@dataclass(slots=True)
class _Node:
    """One message of a tree. `fault`: why it is not used, or None."""

    id: str
    role: str
    text: str
    rank: float
    fault: str | None
    line: int
    replies: list[_Node] = field(default_factory=list)


@dataclass(slots=True)
class _Flat:
    """What a flat row says beside its message."""

    node: _Node
    parent: str | None
    tree: str | None
    state: str | None
    record: Record


class OasstReader:
    """Reads any number of files; a tree that came already is left out."""

    def __init__(self, options: OasstOptions, tally: Tally, on_error: OnError | None = None) -> None:
        self.options, self.tally, self.on_error = options, tally, on_error
        self._seen: set[str] = set()

    def read(self, records: Iterable[Record]) -> Iterator[tuple[Record, Conversation]]:
        """The conversations of one file. Flat rows are kept in memory until the file ends: a parent may come last."""
        flat: dict[str, _Flat] = {}
        for record in records:
            try:
                yield from self._one(record, flat)
            except DataError as error:
                if self.on_error is None:
                    raise
                self.on_error(error)
        for root in self._roots(flat):
            try:
                for conversation in self._tree(root.node, root.tree or root.node.id, root.state, _place(root.record)):
                    yield root.record, conversation
            except DataError as error:
                if self.on_error is None:
                    raise
                self.on_error(error)

    def _one(self, record: Record, flat: dict[str, _Flat]) -> Iterator[tuple[Record, Conversation]]:
        """What a record is, told by its keys."""
        value, place = record.value, _place(record)
        if not isinstance(value, Mapping):
            raise place.error(f"the record is {shown(value)}, not an object", "write one object per record", "not an object")
        if "prompt" in value or ("message_id" in value and "replies" in value):
            whole = value.get("prompt", value)
            root = self._nodes(whole, place, record.line)
            name = _name(value.get("message_tree_id"), "message_tree_id", place) or root.id
            for conversation in self._tree(root, name, value.get("tree_state"), place):
                yield record, conversation
        elif "conversation_id" in value and "messages" in value:
            yield from self._linear(record, value, "conversation_id", "messages", "content")
        elif "thread_id" in value and "thread" in value:
            yield from self._linear(record, value, "thread_id", "thread", "text")
        elif "message_id" in value:
            self._row(record, value, place, flat)
        else:
            keys = [key for key in value if isinstance(key, str)]
            like = nearest("message_id", keys)
            raise place.error(
                "no OASST record: neither 'prompt', 'messages', 'thread' nor 'message_id'",
                f"rename {like!r} to 'message_id'" if like else "give OASST trees, messages or conversations",
                "no oasst record",
            )

    # ---- messages -------------------------------------------------------------------------------------------------------

    def _node(self, value: object, place: Place, line: int, text_key: str = "text") -> _Node:
        """One message, without its replies."""
        if not isinstance(value, Mapping):
            raise place.error(f"a message is {shown(value)}, not an object", "write an object", "message is not an object")
        name = _name(value.get("message_id"), "message_id", place)
        if name is None:
            raise place.error("a message has no 'message_id'", "add it", "message without message_id")
        role = value.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            like = nearest(role, tuple(_ROLES)) if isinstance(role, str) else None
            known = "roles are prompter and assistant"
            raise place.error(
                f"message {shown(name)} has unknown role {shown(role)}",
                f"did you mean {like!r}? {known}" if like else known,
                "unknown role",
            )
        text = value.get(text_key)
        if text is not None and not isinstance(text, str):
            raise place.error(f"the text of message {shown(name)} is {shown(text)}", "write it as a string", "text is not text")
        text = check_text(text or "", f"message {shown(name)}", place)
        rank = _rank(value.get("rank"), name, place)
        return _Node(name, _ROLES[role], text, float("inf") if rank is None else rank, self._fault(value, text, rank), line)

    def _fault(self, value: Mapping[str, object], text: str, rank: float | None) -> str | None:
        """Why a message is not used, or None."""
        o = self.options
        if value.get("deleted") is True and not o.deleted:
            return "deleted"
        if value.get("review_result") is False and not o.rejected:
            return "rejected in review"
        if o.reviewed and value.get("review_result") is not True:
            return "not reviewed"
        if not text.strip():
            return "empty"
        if value.get("synthetic") is True and not o.synthetic:
            return "synthetic"
        if o.languages:
            language = value.get("lang")
            if not isinstance(language, str) or language.partition("-")[0].lower() not in o.languages:
                return "other language"
        if o.max_rank is not None and rank is not None and rank > o.max_rank:
            return f"rank above {o.max_rank}"
        return None

    def _nodes(self, value: object, place: Place, line: int) -> _Node:
        """A tree of nested replies, without recursion: how deep it is is the file's choice."""
        root = self._node(value, place, line)
        assert isinstance(value, Mapping)
        todo: list[tuple[Mapping[str, object], _Node]] = [(value, root)]
        while todo:
            holder, node = todo.pop()
            replies = holder.get("replies") or []
            if not isinstance(replies, list):
                raise place.error(
                    f"the replies of message {shown(node.id)} are {shown(replies)}", "write a list", "bad replies"
                )
            for reply in replies:
                child = self._node(reply, place, line)
                node.replies.append(child)
                assert isinstance(reply, Mapping)
                todo.append((reply, child))
        return root

    def _row(self, record: Record, value: Mapping[str, object], place: Place, flat: dict[str, _Flat]) -> None:
        """Keep one flat row."""
        node = self._node(value, place, record.line)
        parent = _name(value.get("parent_id"), "parent_id", place)
        tree = _name(value.get("message_tree_id"), "message_tree_id", place)
        state = value.get("tree_state")
        if node.id in flat:
            self.tally.leave_out("repeated message")
            return
        light = Record(record.path, record.line, None, record.offset)  # the row's other fields are not needed again
        flat[node.id] = _Flat(node, parent, tree, state if isinstance(state, str) else None, light)

    def _roots(self, flat: dict[str, _Flat]) -> list[_Flat]:
        """Link replies to their parents; the trees in the order of their roots. Counts what no root leads to."""
        roots = []
        for row in flat.values():
            if row.parent is None:
                roots.append(row)
            elif row.parent in flat:
                flat[row.parent].node.replies.append(row.node)
        reached = sum(1 for root in roots for _ in _walk(root.node))
        self.tally.leave_out("its parent is missing", len(flat) - reached)
        return roots

    # ---- trees ----------------------------------------------------------------------------------------------------------

    def _tree(self, root: _Node, name: str, state: object, place: Place) -> Iterator[Conversation]:
        """The conversations of a tree; counts it, and every message of it."""
        count = sum(1 for _ in _walk(root))
        if name in self._seen:
            return self._drop(count, "repeated tree", place, f"tree {shown(name)} came already")
        self._seen.add(name)
        if state is not None and state not in self.options.tree_states:
            return self._drop(count, f"tree state {shown(state)}", place, f"tree {shown(name)} is in state {shown(state)}")
        if root.role != "user":
            return self._drop(count, "tree begins with an answer", place, f"tree {shown(name)} begins with an answer")
        if root.fault:
            return self._drop(count, f"first message: {root.fault}", place, f"the first message is {root.fault}")
        for node in _walk(root):
            for reply in node.replies:
                if reply.fault is None and reply.role == node.role:
                    reply.fault = "same role as its parent"
        paths = [_best(root)] if self.options.paths == "best" else list(_leaves(root))
        paths = _answered(paths)
        if not paths:
            return self._drop(count, "no answer", place, f"tree {shown(name)} has no usable answer")
        self._count_messages(root, paths)
        for path in paths:
            self.tally.read += 1
            yield Conversation(tuple(Message(node.role, node.text) for node in path), name)

    def _drop(self, messages: int, reason: str, place: Place, detail: str) -> None:
        self.tally.read += 1
        self.tally.leave_out("its tree was dropped", messages)
        self.tally.drop(reason, place, detail)

    def _count_messages(self, root: _Node, paths: list[list[_Node]]) -> None:
        used = {id(node) for path in paths for node in path}
        self.tally.use(len(used))
        below = "below a message that is left out"
        todo: list[tuple[_Node, bool]] = [(root, False)]
        while todo:
            node, cut = todo.pop()
            fault = below if cut else node.fault
            todo += [(reply, fault is not None) for reply in node.replies]
            if id(node) not in used:
                self.tally.leave_out(fault or ("not on the best path" if self.options.paths == "best" else "without an answer"))

    def _linear(
        self, record: Record, value: Mapping[str, object], id_key: str, list_key: str, text_key: str
    ) -> Iterator[tuple[Record, Conversation]]:
        """A conversation that somebody made from a tree: a chain of messages."""
        place = _place(record)
        name = parse_label(value.get(id_key), "id", place)
        entries = value[list_key]
        if not isinstance(entries, list) or not entries:
            raise place.error(f"{list_key!r} is {shown(entries)}", "write a list of messages", f"bad {list_key}")
        for holder in (value, *(entry for entry in entries if isinstance(entry, Mapping))):
            for key in _NO_PLACE:
                if holder.get(key) not in (None, [], ""):
                    fix = f"leave {key!r} out, or use the messages layout with roles user and assistant"
                    raise place.error(f"an OASST conversation has no {key!r}, it would be lost", fix, f"{key} in a tree")
        numbered = ({"message_id": str(number), **e} if isinstance(e, Mapping) else e for number, e in enumerate(entries, 1))
        chain = [self._node(e, place, record.line, "text" if text_key not in e else text_key) for e in numbered]
        for parent, child in pairwise(chain):
            parent.replies.append(child)
        name = name or f"{_readable(str(record.path))}:{record.line}"
        for conversation in self._tree(chain[0], name, value.get("tree_state"), place):
            yield record, conversation


def _readable(name: str) -> str:
    """A file name as text that UTF-8 can hold: bytes that are none stand as \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _place(record: Record) -> Place:
    return Place(str(record.path), record.line)


def _rank(value: object, name: str, place: Place) -> float | None:
    """The rank of message `name`, None where it has none."""
    if value is None:
        return None
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
            return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        pass
    raise place.error(f"the rank of message {shown(name)} is {shown(value)}", "use a number or null", "bad rank")


def _name(value: object, key: str, place: Place) -> str | None:
    """An id; null and absent are None."""
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise place.error(f"{key} is {shown(value)}, not text", "write ids as strings", f"bad {key}")
    return check_text(value, key, place)


def _walk(root: _Node) -> Iterator[_Node]:
    todo = [root]
    while todo:
        node = todo.pop()
        yield node
        todo += node.replies


def _best(root: _Node) -> list[_Node]:
    """The path of best-ranked replies; `min` takes the first of equals."""
    path = [root]
    while usable := [reply for reply in path[-1].replies if reply.fault is None]:
        path.append(min(usable, key=lambda reply: reply.rank))
    return path


def _leaves(root: _Node) -> Iterator[list[_Node]]:
    """Every path from the root to a last usable message, in file order."""
    todo = [[root]]
    while todo:
        path = todo.pop()
        replies = [reply for reply in path[-1].replies if reply.fault is None]
        if replies:
            todo += [[*path, reply] for reply in reversed(replies)]
        else:
            yield path


def _answered(paths: list[list[_Node]]) -> list[list[_Node]]:
    """Paths cut after their last answer, each once; what has no answer is gone."""
    kept: dict[tuple[int, ...], list[_Node]] = {}
    for path in paths:
        while path and path[-1].role != "assistant":
            path = path[:-1]
        if len(path) > 1:
            kept.setdefault(tuple(map(id, path)), path)
    return list(kept.values())
