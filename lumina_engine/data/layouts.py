"""One record of each layout (messages, alpaca, sharegpt, plain text) to conversations.

The project's own layout (messages) has a strict reader for training. Foreign layouts, and everything that `convert` reads,
are tidied by fixed rules, and each removal is counted:

- an exchange (a user turn up to the next one) that holds an empty user or assistant turn is removed, so an empty answer is
  never a target; so are turns after the last answer and an empty system prompt;
- a conversation that has no answer left, or whose roles are out of order, is dropped.

A record that does not have the layout's shape is an error with file:line, never skipped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from .conversation import (
    ROLE_ALIASES,
    ROLES,
    Conversation,
    Document,
    Message,
    Place,
    TextDocument,
    check_text,
    nearest,
    order_fault,
    parse_content,
    parse_conversation,
    parse_label,
    parse_weight,
    shown,
)
from .files import Record

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "function_call": "assistant",  # the model writes the call …
    "observation": "tool",  # … and reads the result
    "tool": "tool",
}


@dataclass
class Tally:
    """What happened to the records: `read` = kept + sum of `dropped`. `changed` counts conversations that lost turns.

    With `strict` nothing is dropped or changed: the first such record is an error.
    """

    strict: bool = False
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        """Conversations that came through."""
        return self.read - self.dropped.total()

    def drop(self, reason: str, place: Place, detail: str = "") -> None:
        """Count a conversation that is left out."""
        if self.strict:
            fix = "correct the record, or let `lumina-engine data convert` drop and count it"
            raise place.error(detail or reason, fix, reason)
        self.dropped[reason] += 1

    def change(self, reason: str, place: Place, detail: str) -> None:
        """Count a conversation that loses turns; `detail` says what is wrong with it."""
        if self.strict:
            fix = "correct the record, or let `lumina-engine data convert` cut and count it"
            raise place.error(detail, fix, reason)
        self.changed[reason] += 1

    def lines(self) -> list[str]:
        """One line per kind of loss, for people."""
        lost = [f"{n:,} of {self.read:,} conversations dropped: {reason}" for reason, n in sorted(self.dropped.items())]
        return lost + [f"{n:,} of {self.read:,} conversations changed: {reason}" for reason, n in sorted(self.changed.items())]


def layout_of(value: object) -> str | None:
    """The layout that a record's keys tell, "oasst" included, or None."""
    if not isinstance(value, Mapping):
        return None
    if (
        isinstance(value.get("prompt"), Mapping)
        or ("conversation_id" in value and isinstance(value.get("messages"), list))
        or ("thread_id" in value and "thread" in value)
        or ("message_id" in value and ("replies" in value or "text" in value))
    ):
        return "oasst"
    if "messages" in value:
        return "messages"
    if "conversations" in value:
        return "sharegpt"
    if "instruction" in value:
        return "alpaca"
    if isinstance(value.get("text"), str):
        return "text"
    return None


def strict(record: Record, tally: Tally) -> Iterator[Conversation]:
    conversation = parse_conversation(record.value, record.path, record.line)
    tally.read += 1
    yield conversation


def _place(record: Record) -> Place:
    return Place(str(record.path), record.line)


def _object(record: Record, key: str, layout: str) -> Mapping[str, object]:
    """The record, if it is an object with `key`."""
    value = record.value
    if isinstance(value, Mapping) and key in value:
        return value
    found = layout_of(value)
    like = nearest(key, [k for k in value if isinstance(k, str)]) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping):
        cause, fix = f"the record is {shown(value)}, not an object", "write one object per record"
    elif found:
        cause, fix = f"the record has the {found} layout among {layout} records", "put each layout into its own file"
    else:
        cause, fix = f"the record has no {key!r}", f"rename {like!r} to {key!r}" if like else f"add {key!r}"
    raise _place(record).error(cause, fix, f"not a {layout} record")


def _turns(value: Mapping[str, object], key: str, place: Place, roles: Mapping[str, str]) -> list[Message]:
    """The turns of a list of {role, content} or {from, value}, empty ones included."""
    entries = value[key]
    if not isinstance(entries, list):
        raise place.error(f"{key!r} is {shown(entries)}, not a list", "write a list of turns", f"{key} is not a list")
    turns = []
    for number, entry in enumerate(entries, 1):
        what = f"turn {number}"
        if not isinstance(entry, Mapping):
            raise place.error(f"{what} is {shown(entry)}, not an object", "write an object per turn", "turn is not an object")
        role_key, text_key = ("from", "value") if "from" in entry else ("role", "content")
        for name in (role_key, text_key):
            if name not in entry:
                like = nearest(name, [k for k in entry if isinstance(k, str)])
                raise place.error(
                    f"{what} has no {name!r}",
                    f"rename {like!r} to {name!r}" if like else f"add {name!r}",
                    f"turn without {name}",
                )
        roles = _SHAREGPT_ROLES if role_key == "from" else roles
        role = roles.get(entry[role_key]) if isinstance(entry[role_key], str) else None
        if role is None:
            name = entry[role_key]
            like = nearest(name, tuple(roles), ROLE_ALIASES) if isinstance(name, str) else None
            known = "roles are " + ", ".join(roles)
            raise place.error(
                f"{what} has unknown role {shown(name)}", f"did you mean {like!r}? {known}" if like else known, "unknown role"
            )
        text = "" if entry[text_key] is None else parse_content(entry[text_key], what, place)
        weight = entry.get("weight")
        turns.append(Message(role, text, None if weight is None else parse_weight(weight, what, place)))
    return turns


def _tidied(turns: list[Message], value: Mapping[str, object], place: Place, tally: Tally) -> Iterator[Conversation]:
    """The conversation of `turns` after the rules at the top of this file, if anything is left of it."""
    tally.read += 1
    if not turns:
        return tally.drop("no turns", place)
    if not any(turn.role == "assistant" for turn in turns):
        return tally.drop("no assistant turn", place)
    if turns[0].role == "system" and not turns[0].content.strip():
        tally.change("empty system prompt removed", place, "the system prompt is empty")
        turns = turns[1:]
    exchanges: list[list[Message]] = [[]]
    for turn in turns:
        if turn.role == "user":
            exchanges.append([])
        exchanges[-1].append(turn)
    whole = [e for e in exchanges if all(t.role in ("tool", "system") or t.content.strip() for t in e)]
    if len(whole) < len(exchanges):
        if not any(turn.role == "assistant" for exchange in whole for turn in exchange):
            return tally.drop("nothing but empty turns", place)
        number = next(n for n, t in enumerate(turns, 1) if t.role in ("user", "assistant") and not t.content.strip())
        tally.change("exchange with an empty turn removed", place, f"turn {number} ({turns[number - 1].role}) is empty")
    turns = [turn for exchange in whole for turn in exchange]
    end = max(index for index, turn in enumerate(turns) if turn.role == "assistant") + 1
    if end < len(turns):
        tally.change("unanswered turns at the end removed", place, f"the last turn ({turns[-1].role}) has no answer")
        turns = turns[:end]
    fault = order_fault([turn.role for turn in turns])
    if fault:
        return tally.drop(fault[2], place, fault[0])
    if all(turn.weight == 0 for turn in turns if turn.role == "assistant"):
        return tally.drop("no trained turn", place)
    yield Conversation(tuple(turns), parse_label(value.get("id"), "id", place), parse_label(value.get("task"), "task", place))


def _messages(record: Record, tally: Tally) -> Iterator[Conversation]:
    value, place = _object(record, "messages", "messages"), _place(record)
    turns = _turns(value, "messages", place, {role: role for role in ROLES})
    weight = value.get("weight")
    if weight is not None:
        whole = parse_weight(weight, "the record", place)
        turns = [Message(t.role, t.content, whole) if t.role == "assistant" and t.weight is None else t for t in turns]
    yield from _tidied(turns, value, place, tally)


def _sharegpt(record: Record, tally: Tally) -> Iterator[Conversation]:
    value, place = _object(record, "conversations", "sharegpt"), _place(record)
    turns = _turns(value, "conversations", place, _SHAREGPT_ROLES)
    prompt = value.get("system") or ""
    tools = value.get("tools") or ""
    if not isinstance(prompt, str) or not isinstance(tools, (str, list)):
        raise place.error("'system' and 'tools' must be text", "write them as strings", "bad system or tools")
    if isinstance(tools, list):
        tools = json.dumps(tools, ensure_ascii=False) if tools else ""
    if tools.strip() in ("", "[]", "{}"):
        tools = ""
    if prompt or tools:  # what the model may call belongs into what it reads, or the calls come from nowhere
        if turns and turns[0].role == "system":
            prompt, turns = "\n\n".join(part for part in (prompt, turns[0].content) if part), turns[1:]
        text = "\n\n".join(part for part in (prompt, tools and f"Tools:\n{tools}") if part)
        turns = [Message("system", check_text(text, "the system prompt", place)), *turns]
    yield from _tidied(turns, value, place, tally)


def _alpaca(record: Record, tally: Tally) -> Iterator[Conversation]:
    value, place = _object(record, "instruction", "alpaca"), _place(record)
    rows: list[object] = [value]
    if "instances" in value:
        if not isinstance(value["instances"], list):
            raise place.error("'instances' is not a list", "write [{input, output}]", "bad instances")
        rows = value["instances"]
    for row in rows:
        if not isinstance(row, Mapping) or "output" not in row:
            raise place.error("the record has no 'output'", "add 'output', the answer", "not an alpaca record")
        texts_ = {}
        for name, holder in (("instruction", value), ("input", row), ("output", row), ("system", value)):
            found = holder.get(name)
            if found is not None and not isinstance(found, str):
                raise place.error(f"{name!r} is {shown(found)}, not text", "write it as a string", f"{name} is not text")
            texts_[name] = check_text(found or "", name, place)
        question = "\n\n".join(texts_[name] for name in ("instruction", "input") if texts_[name].strip())
        turns = [Message("system", texts_["system"])] if texts_["system"].strip() else []
        turns += [turn for pair in _history(value, place) for turn in pair]
        turns += [Message("user", question), Message("assistant", texts_["output"])]
        yield from _tidied(turns, value, place, tally)


def _history(value: Mapping[str, object], place: Place) -> list[tuple[Message, Message]]:
    """Earlier rounds of an alpaca record: `history` = [[question, answer], …]."""
    pairs = value.get("history")
    if pairs is None:
        return []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        raise place.error("'history' is not a list of [question, answer]", "correct or remove it", "bad history")
    checked = [[check_text(text, "history", place) for text in pair] for pair in pairs]
    return [(Message("user", question), Message("assistant", answer)) for question, answer in checked]


def _text(record: Record, tally: Tally) -> Iterator[TextDocument]:
    value, place = _object(record, "text", "text"), _place(record)
    text = value["text"]
    if not isinstance(text, str):
        raise place.error(f"'text' is {shown(text)}, not text", "write it as a string", "text is not text")
    tally.read += 1
    if not text.strip():
        return tally.drop("empty text", place)
    yield TextDocument(
        check_text(text, "'text'", place),
        parse_label(value.get("id"), "id", place),
        parse_label(value.get("task"), "task", place),
    )


READERS: Mapping[str, Callable[[Record, Tally], Iterator[Document]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "text": _text,
}
