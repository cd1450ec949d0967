"""One record of each layout (messages, alpaca, sharegpt, plain text) to conversations. Message trees: `oasst.py`.

The project's own layout (messages) has a strict reader for training. Foreign layouts, and everything that `convert` reads,
are tidied by fixed rules, and each removal is counted:

- an exchange (a user turn up to the next one) that holds an empty user or assistant turn is removed, so an empty answer is
  never a target; so are turns after the last answer and an empty system prompt. Of turns before the first user turn the system
  prompt stays;
- a conversation that has no answer left, or whose roles are out of order, is dropped.

A record that does not have the layout's shape is an error with file:line, never skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping

from .conversation import (
    ROLE_ALIASES,
    ROLES,
    Conversation,
    DataError,
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
    with_weight,
)
from .files import Record, loads
from .tally import Tally

_CHAT_ROLES = {**{role: role for role in ROLES}, "developer": "system", "function": "tool"}

_CALLS = {"tool_calls", "function_call"}
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


# keys of question and answer in relatives of the alpaca layout, beside instruction, input (or context), output (or response)
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"))
_CONTEXT = ("input", "context")
_ANSWER = ("output", "response", "completion", "answer")


def layout_of(value: object) -> str | None:
    """The layout that a record's keys tell, "oasst" included, or None."""
    if not isinstance(value, Mapping):
        return None
    if (
        isinstance(value.get("prompt"), Mapping)
        or _is_linear(value)
        or ("thread_id" in value and "thread" in value)
        or ("message_id" in value and ("replies" in value or "text" in value))
    ):
        return "oasst"
    if "messages" in value:
        return "messages"
    if "conversations" in value:
        return "sharegpt"
    if any(all(key in value for key in pair) for pair in (("instruction",), *_PAIRS)):
        return "alpaca"
    if isinstance(value.get("text"), str):
        return "text"
    return None


def _is_linear(value: Mapping[str, object]) -> bool:
    """Whether it is a conversation that was made from a message tree. The role prompter tells it: an id by the name of
    conversation_id may stand in any record of messages."""
    entries = value.get("messages")
    if "conversation_id" not in value or not isinstance(entries, list):
        return False
    return any(isinstance(entry, Mapping) and entry.get("role") == "prompter" for entry in entries)


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
    raise _place(record).error(cause, fix, f"no {layout} record")


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
            if name not in entry and not (name == "content" and _CALLS & entry.keys()):
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
        text = "" if entry.get(text_key) is None else parse_content(entry[text_key], what, place)
        text = "\n".join(part for part in (text, *_calls(entry, what, place)) if part)
        weight = entry.get("weight")
        if weight is not None and role != "assistant":
            fix = "only assistant messages carry loss"
            raise place.error(f"{what} ({role}) has a weight", fix, "weight on a context message")
        turns.append(Message(role, text, None if weight is None else parse_weight(weight, what, place)))
    return turns


def _calls(entry: Mapping[str, object], what: str, place: Place) -> list[str]:
    """Tool calls of a turn as JSON text, `{"name", "arguments"}`, one a line: the form that sharegpt sets write them in."""
    calls = entry.get("tool_calls") or ([{"function": entry["function_call"]}] if entry.get("function_call") else [])
    lines = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise place.error(f"a tool call of {what} has no function name", 'write {"function": {"name": …}}', "bad tool call")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = loads(arguments)
            except ValueError:
                pass  # kept as the text that it is
            except RecursionError:
                raise _too_deep(f"a tool call of {what}", place) from None
        line = _dumps({"name": function["name"], "arguments": arguments}, f"a tool call of {what}", place)
        lines.append(check_text(line, f"a tool call of {what}", place))
    return lines


def _dumps(value: object, what: str, place: Place) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise _too_deep(what, place) from None


def _too_deep(what: str, place: Place) -> DataError:
    return place.error(f"{what} is nested too deeply", "write it with fewer levels", "nested too deeply")


def _tidied(turns: list[Message], value: Mapping[str, object], place: Place, tally: Tally) -> Iterator[Conversation]:
    """The conversation of `turns` after the rules at the top of this file, if anything is left of it.

    `id`, `task` and `weight` of the record `value` mean the same in every layout.
    """
    id_, task = parse_label(value.get("id"), "id", place), parse_label(value.get("task"), "task", place)
    turns = with_weight(turns, value, place)
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
    whole = [e for e in exchanges if _is_whole(e)]
    if len(whole) < len(exchanges):
        if not any(turn.role == "assistant" for exchange in whole for turn in exchange):
            return tally.drop("nothing but empty turns", place)
        number = next(n for n, t in enumerate(turns, 1) if t.role in ("user", "assistant") and not t.content.strip())
        tally.change("exchange with an empty turn removed", place, f"turn {number} ({turns[number - 1].role}) is empty")
    lead = [] if _is_whole(exchanges[0]) else exchanges[0]
    prompt = [turn for turn in lead if turn.role == "system" and turn.content.strip()]
    turns = prompt + [turn for exchange in whole for turn in exchange]
    end = max(index for index, turn in enumerate(turns) if turn.role == "assistant") + 1
    if end < len(turns):
        tally.change("unanswered turns at the end removed", place, f"the last turn ({turns[-1].role}) has no answer")
        turns = turns[:end]
    fault = order_fault([turn.role for turn in turns])
    if fault:
        return tally.drop(fault[2], place, fault[0])
    if all(turn.weight == 0 for turn in turns if turn.role == "assistant"):
        return tally.drop("no trained turn", place)
    yield Conversation(tuple(turns), id_, task)


def _is_whole(exchange: list[Message]) -> bool:
    return all(turn.role in ("tool", "system") or turn.content.strip() for turn in exchange)


def _messages(record: Record, tally: Tally) -> Iterator[Conversation]:
    value, place = _object(record, "messages", "messages"), _place(record)
    turns = _with_tools(_turns(value, "messages", place, _CHAT_ROLES), value, place)
    yield from _tidied(turns, value, place, tally)


def _sharegpt(record: Record, tally: Tally) -> Iterator[Conversation]:
    value, place = _object(record, "conversations", "sharegpt"), _place(record)
    turns = _with_tools(_turns(value, "conversations", place, _SHAREGPT_ROLES), value, place)
    yield from _tidied(turns, value, place, tally)


def _with_tools(turns: list[Message], value: Mapping[str, object], place: Place) -> list[Message]:
    """Put `system` and `tools` of the record before the turns: what the model may call belongs into what it reads, or the
    calls come from nowhere."""
    prompt, tools = value.get("system") or "", value.get("tools") or ""
    if not isinstance(prompt, str) or not isinstance(tools, (str, list)):
        raise place.error("'system' and 'tools' must be text", "write them as strings", "bad system or tools")
    if isinstance(tools, list):
        tools = _dumps(tools, "'tools'", place) if tools else ""
    if tools.strip() in ("", "[]", "{}"):
        tools = ""
    if not prompt and not tools:
        return turns
    if turns and turns[0].role == "system":
        prompt, turns = "\n\n".join(part for part in (prompt, turns[0].content) if part), turns[1:]
    text = "\n\n".join(part for part in (prompt, tools and f"Tools:\n{tools}") if part)
    return [Message("system", check_text(text, "the system prompt", place)), *turns]


def _alpaca(record: Record, tally: Tally) -> Iterator[Conversation]:
    """{instruction, input | context, output | response}, {prompt, completion}, {question, answer}, or instances of them."""
    value, place = record.value, _place(record)
    if layout_of(value) != "alpaca" or not isinstance(value, Mapping):
        value = _object(record, "instruction", "alpaca")
    ask = "instruction" if "instruction" in value else next(q for q, a in _PAIRS if q in value and a in value)
    if isinstance(value.get("prompt"), list) and isinstance(value.get("completion"), list):
        yield from _prompt_and_completion(value, place, tally)
        return
    nested = "instances" in value
    rows, what = (_instances(value, place), "an instance") if nested else ([value], "the record")
    for row in rows:
        answer = next((key for key in _ANSWER if key in row), None) if isinstance(row, Mapping) else None
        if not isinstance(row, Mapping) or answer is None:
            raise place.error(f"{what} has no 'output'", "add 'output', the answer", "no alpaca record")
        context = next((key for key in _CONTEXT if key in row), "input")
        question = _joined(_field(value, ask, place), _field(row, context, place))
        system = _field(value, "system", place)
        turns = [Message("system", system)] if system.strip() else []
        turns += [turn for pair in _history(value, place) for turn in pair]
        own = row.get("weight")
        weight = None if own is None else parse_weight(own, what, place)
        turns += [Message("user", question), Message("assistant", _field(row, answer, place), weight)]
        yield from _tidied(turns, value, place, tally)


def _instances(value: Mapping[str, object], place: Place) -> list[object]:
    rows = value["instances"]
    if not isinstance(rows, list):
        raise place.error("'instances' is not a list", "write [{input, output}]", "bad instances")
    if not rows:
        raise place.error("no instances", "add one [{input, output}], or remove the record", "no instances")
    return rows


def parts(record: Record) -> Iterator[Record]:
    """An alpaca record of several instances as a record for each, so that a bad one costs no other; any other as it is."""
    value = record.value
    rows = value.get("instances") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(rows, list) or len(rows) < 2:
        yield record
        return
    for row in rows:
        yield Record(record.path, record.line, value | {"instances": [row]}, record.offset)


def _field(holder: Mapping[str, object], name: str, place: Place) -> str:
    """A text of a record; null and absent are empty."""
    found = holder.get(name)
    if found is not None and not isinstance(found, str):
        raise place.error(f"{name!r} is {shown(found)}, not text", "write it as a string", f"{name} is not text")
    return check_text(found or "", name, place)


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part.strip())


def _prompt_and_completion(value: Mapping[str, object], place: Place, tally: Tally) -> Iterator[Conversation]:
    """Prompt and completion as two lists of messages."""
    turns = _turns(value, "prompt", place, _CHAT_ROLES) + _turns(value, "completion", place, _CHAT_ROLES)
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
    """A text. `weight` 0 leaves it out; each text that is trained on counts 1, so any other weight would be lost: an error."""
    value, place = _object(record, "text", "text"), _place(record)
    text = value["text"]
    if not isinstance(text, str):
        raise place.error(f"'text' is {shown(text)}, not text", "write it as a string", "text is not text")
    weight = 1.0 if value.get("weight") is None else parse_weight(value["weight"], "the record", place)
    if weight not in (0, 1):
        cause = f"a text has weight {weight:g}, and each text that is trained on counts 1"
        raise place.error(cause, "leave 'weight' out, or write 0 to leave the text out", "weight of a text")
    document = TextDocument(
        check_text(text, "'text'", place),
        parse_label(value.get("id"), "id", place),
        parse_label(value.get("task"), "task", place),
    )
    tally.read += 1
    if not text.strip():
        return tally.drop("empty text", place)
    if weight == 0:
        return tally.drop("text of weight 0", place)
    yield document


READERS: Mapping[str, Callable[[Record, Tally], Iterator[Document]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "text": _text,
}
