"""One conversation, and the strict reader of the project's own layout.

A record is one JSON object: `{"messages": [{"role", "content"}], "id"?, "task"?, "weight"?}`. Roles are system, user,
assistant and tool; content is a text or a list of text parts. `weight` (on an assistant message, or on the record for all
of its assistant messages) scales the loss of those messages; 0 keeps a message as context only.

Nothing is repaired here: whatever does not fit raises `DataError` with file, line, cause and what to do.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
MAX_WEIGHT = 10.0
# Part of the name of what is made of data files. Raise it when equal files give other conversations, so that nothing
# tokenised by older rules is taken from the cache.
READING_VERSION = 4

# names of other layouts and tools for the four roles; used to suggest, never to translate in silence
ROLE_ALIASES = {
    "human": "user",
    "prompter": "user",
    "customer": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "developer": "system",
    "instruction": "system",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}


class DataError(Exception):
    """Bad input data. `str()` is one line: "file:line: message; fix".

    `reason` is a short name of the kind of fault, equal for equal faults, for counting. `exit_code` is 65 (the data are
    refused), or 2 where the name or the setting is wrong. `excerpt` is what stands there, made visible: (the text before
    the fault, the text from the fault on); None where no single place is at fault. `rest_lost`: the rest of the file cannot
    be read, because where the next record begins cannot be told.
    """

    rest_lost = False

    def __init__(
        self,
        message: str,
        *,
        path: object = None,
        line: int | None = None,
        fix: str = "",
        reason: str = "",
        exit_code: int = 65,
        excerpt: tuple[str, str] | None = None,
    ) -> None:
        self.message = message
        self.path = None if path is None else str(path)
        self.line = line
        self.fix = fix
        self.reason = reason or message
        self.exit_code = exit_code
        self.excerpt = excerpt
        self._given = {"path": self.path, "line": line, "fix": fix, "reason": reason, "exit_code": exit_code}
        place = "" if self.path is None else self.path if line is None else f"{self.path}:{line}"
        super().__init__((f"{place}: " if place else "") + message + (f"; {fix}" if fix else ""))

    def to_dict(self) -> dict[str, Any]:
        """What another process needs to raise the same error: `DataError(**entry)`."""
        return {"message": self.message, "excerpt": self.excerpt, **self._given}

    def at_line(self, line: int) -> DataError:
        """The same fault at another line."""
        return DataError(**{**self.to_dict(), "line": line})


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight`: factor on the loss of an assistant turn; None means 1."""

    role: str
    content: str
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation that may be trained on: roles in order, the last message an assistant's."""

    messages: tuple[Message, ...]
    id: str | None = None
    task: str | None = None

    def to_record(self) -> dict[str, Any]:
        """The JSON object that `parse_conversation` reads back to an equal conversation."""
        messages: list[dict[str, Any]] = []
        for message in self.messages:
            entry: dict[str, Any] = {"role": message.role, "content": message.content}
            if message.weight is not None:
                entry["weight"] = message.weight
            messages.append(entry)
        record: dict[str, Any] = {"messages": messages}
        if self.id is not None:
            record["id"] = self.id
        if self.task is not None:
            record["task"] = self.task
        return record

    def digest(self) -> bytes:
        """SHA-256 of roles and contents, the same whatever layout the conversation came in."""
        state = hashlib.sha256()
        for message in self.messages:
            content = message.content.encode("utf-8", "surrogatepass")
            state.update(f"{message.role} {len(content)}\n".encode())
            state.update(content)
        return state.digest()


@dataclass(frozen=True, slots=True)
class TextDocument:
    """Plain text without turns: every token but the first is a target."""

    text: str
    id: str | None = None
    task: str | None = None

    def to_record(self) -> dict[str, Any]:
        """The JSON object of the text layout."""
        record: dict[str, Any] = {"text": self.text}
        if self.id is not None:
            record["id"] = self.id
        if self.task is not None:
            record["task"] = self.task
        return record

    def digest(self) -> bytes:
        """SHA-256 of the text."""
        return hashlib.sha256(b"text\n" + self.text.encode("utf-8", "surrogatepass")).digest()


Document = Conversation | TextDocument


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands, for messages."""

    path: str | Path | None = None
    line: int | None = None

    def error(self, message: str, fix: str = "", reason: str = "") -> DataError:
        """The fault `message` at this place."""
        return DataError(message, path=self.path, line=self.line, fix=fix, reason=reason)


def shown(value: object, limit: int = 40) -> str:
    """A short, one-line form of a value from a file, for messages."""
    text = repr(value) if isinstance(value, str) else type(value).__name__ if isinstance(value, (list, dict)) else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def nearest(name: str, choices: Sequence[str], aliases: Mapping[str, str] | None = None) -> str | None:
    """The choice that `name` most likely means, or None."""
    lowered = name.strip().lower()
    if aliases and lowered in aliases:
        return aliases[lowered]
    found = difflib.get_close_matches(lowered, choices, n=1, cutoff=0.5)
    return found[0] if found else None


def check_text(text: str, what: str, place: Place) -> str:
    """`text`, if UTF-8 can hold it; a lone surrogate would silently become U+FFFD in the tokenizer."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise place.error(
                f"{what} holds half of a character (a lone \\ud800-\\udfff escape)",
                "repair or remove that escape",
                "lone surrogate",
            ) from None
    return text


def parse_content(value: object, what: str, place: Place) -> str:
    """The text of a content: a string, or text parts joined without a separator."""
    if isinstance(value, str):
        return check_text(value, what, place)
    if isinstance(value, list):
        parts = []
        for number, part in enumerate(value, 1):
            if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
                part = part["text"]
            if not isinstance(part, str):
                kind = part.get("type") if isinstance(part, Mapping) else part
                raise place.error(
                    f"part {number} of the content of {what} is not text: {shown(kind)}",
                    "only text parts can be trained on; remove it",
                    "content part is not text",
                )
            parts.append(check_text(part, what, place))
        return "".join(parts)
    raise place.error(
        f"the content of {what} is {'null' if value is None else shown(value)}, not text",
        "write it as a string or a list of text parts",
        "content is not text",
    )


def parse_weight(value: object, what: str, place: Place) -> float:
    """A loss weight: a number from 0 to 10."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_WEIGHT:  # NaN is not, either
        raise place.error(f"weight of {what} is {shown(value)}", f"use a number from 0 to {MAX_WEIGHT:g}", "bad weight")
    return float(value)


def with_weight(messages: list[Message], record: Mapping[str, object], place: Place) -> list[Message]:
    """`messages` with the `weight` of their record, if it has one, on every answer without its own."""
    if record.get("weight") is None:
        return messages
    whole = parse_weight(record["weight"], "the record", place)
    if whole == 1:
        return messages
    return [Message(m.role, m.content, whole) if m.role == "assistant" and m.weight is None else m for m in messages]


def parse_label(value: object, name: str, place: Place) -> str | None:
    """An optional `id` or `task`: text or (for ids) a whole number."""
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and name == "id":
        return str(value)
    if isinstance(value, str) and value.strip():
        return check_text(value, name, place)
    raise place.error(f"{name} is {shown(value)}", f"give {name} as text, or leave it out", f"bad {name}")


def order_fault(roles: Sequence[str]) -> tuple[str, str, str] | None:
    """What is wrong with the order of `roles`, as (message, fix, reason), or None.

    A system message may only come first; user and assistant alternate; tool results follow an assistant or another tool
    message and are answered by the assistant; the last message is an assistant's. Messages are counted from 1.
    """
    if "assistant" not in roles:
        return "no assistant message: nothing to learn from", "add an answer or remove the record", "no assistant turn"
    before = None
    for number, role in enumerate(roles, 1):
        if role == "system" and number > 1:
            return f"message {number} is a system message", "only the first message may be one", "wrong role order"
        if role == "tool" and before not in ("assistant", "tool"):
            what = f"a {before}" if before else "no"
            return (
                f"message {number} is a tool message after {what} message",
                "put the assistant's call before it",
                "wrong role order",
            )
        if role == before and role in ("user", "assistant"):
            return f"messages {number - 1} and {number} are both {role} messages", "join them into one", "wrong role order"
        if role == "user" and before == "tool":
            return (
                f"message {number} is a user message after a tool message",
                "the assistant answers tool results first",
                "wrong role order",
            )
        before = role
    if before != "assistant":
        return (
            f"the last message is a {before} message without an answer",
            "remove it or add the answer",
            "no answer at the end",
        )
    return None


def parse_message(value: object, number: int, place: Place) -> Message:
    """Message `number` (from 1) of a record."""
    what = f"message {number}"
    if not isinstance(value, Mapping):
        raise place.error(
            f"{what} is {shown(value)}, not an object", 'write {"role": …, "content": …}', "message is not an object"
        )
    for key in ("role", "content"):
        if key not in value:
            like = nearest(key, [name for name in value if isinstance(name, str)])
            fix = f"rename {like!r} to {key!r}" if like else f"add {key!r}"
            if "from" in value:
                fix = "turns of from and value are converted by `lumina-engine data convert`"
            raise place.error(f"{what} has no {key!r}", fix, f"message without {key}")
    role = value["role"]
    if role not in ROLES:
        like = nearest(role, ROLES, ROLE_ALIASES) if isinstance(role, str) else None
        choices = "roles are " + ", ".join(ROLES)
        raise place.error(
            f"{what} has unknown role {shown(role)}", f"did you mean {like!r}? {choices}" if like else choices, "unknown role"
        )
    if value.get("tool_calls") or value.get("function_call"):
        raise place.error(
            f"{what} calls a tool by a structure that is not trained on",
            "`lumina-engine data convert` writes calls into the content as text",
            "structured tool call",
        )
    content = parse_content(value["content"], what, place)
    if role != "tool" and not content.strip():  # a tool may well return nothing
        raise place.error(
            f"{what} ({role}) is empty",
            "remove that exchange, or let `lumina-engine data convert` drop and count such turns",
            "empty content",
        )
    weight = None
    if value.get("weight") is not None:
        weight = parse_weight(value["weight"], what, place)
        if role != "assistant":
            raise place.error(
                f"{what} ({role}) has a weight", "only assistant messages carry loss", "weight on a context message"
            )
    return Message(role, content, weight)


def parse_conversation(obj: object, path: object = None, line: int | None = None) -> Conversation:
    """The conversation of one record of the messages layout.

    Raises `DataError` with file:line for anything that does not fit; changes nothing in silence.
    """
    place = Place(None if path is None else str(path), line)
    if not isinstance(obj, Mapping):
        raise place.error(f"the record is {shown(obj)}, not an object", 'write {"messages": [...]}', "record is not an object")
    if "messages" not in obj:
        like = nearest("messages", [key for key in obj if isinstance(key, str)])
        fix = (
            f"rename {like!r} to 'messages'"
            if like
            else 'write {"messages": [...]}, or name its format (data_format, --format)'
        )
        raise place.error("the record has no 'messages'", fix, "no messages")
    entries = obj["messages"]
    if not isinstance(entries, list):
        raise place.error(f"'messages' is {shown(entries)}, not a list", "write a list of messages", "messages is not a list")
    if not entries:
        raise place.error("'messages' is empty", "add messages or remove the record", "no messages")
    messages = [parse_message(entry, number, place) for number, entry in enumerate(entries, 1)]
    fault = order_fault([message.role for message in messages])
    if fault:
        raise place.error(*fault)
    messages = with_weight(messages, obj, place)
    if all(m.weight == 0 for m in messages if m.role == "assistant"):
        raise place.error("every assistant message has weight 0", "give one a weight, or remove the record", "no trained turn")
    return Conversation(tuple(messages), parse_label(obj.get("id"), "id", place), parse_label(obj.get("task"), "task", place))
