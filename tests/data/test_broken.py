"""C27: sixty broken records in every shape that was met in the wild: each is named, none is changed in silence."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest

from lumina_engine.commands import data as command
from lumina_engine.data.check import check_files
from lumina_engine.data.conversation import DataError
from lumina_engine.data.formats import convert, read_conversations

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def talk(*messages, **more):
    return json.dumps({"messages": list(messages), **more}, ensure_ascii=False).encode()


def deep(levels):
    return b'{"messages": ' + b"[" * levels + b"]" * levels + b"}"


# (what stands in the line, a piece of the message that names the fault)
BROKEN: list[tuple[bytes, str]] = [
    (b"{", "not valid JSON"),
    (b'{"messages": [', "not valid JSON"),
    (b"{'messages': []}", "not valid JSON"),
    (b'{"messages": [],}', "not valid JSON"),
    (b'{"messages": [{"role": "user" "content": "q"}]}', "not valid JSON"),
    (b'{"messages": NaN}', "NaN is not JSON"),
    (b'{"messages": -Infinity}', "-Infinity is not JSON"),
    (b"# a comment", "not valid JSON"),
    (b"<html><body>404</body></html>", "not valid JSON"),
    (talk(USER, ANSWER) + b" trailing", "not valid JSON"),
    (talk(USER, ANSWER) * 2, "not valid JSON"),
    (b'{"messages": "caf\xe9"}', "not UTF-8"),
    (b'{"messages": "\xff\xfe"}', "not UTF-8"),
    (b'{"mess\x00ages": []}', "not valid JSON"),
    (b'{"a": "\x1b[2J"}', "not valid JSON"),
    (deep(100_000), "nested too deeply"),
    (b'{"id": ' + b"9" * 5000 + b', "messages": []}', "not valid JSON"),
    (b"[1, 2]", "not an object"),
    (b'"text"', "not an object"),
    (b"42", "not an object"),
    (b"null", "not an object"),
    (b"{}", "no 'messages'"),
    (b'{"mesages": []}', "rename 'mesages' to 'messages'"),
    (b'{"conversations": [{"from": "human", "value": "q"}]}', "no 'messages'"),
    (b'{"messages": null}', "not a list"),
    (b'{"messages": "q"}', "not a list"),
    (b'{"messages": {"role": "user"}}', "not a list"),
    (b'{"messages": []}', "'messages' is empty"),
    (b'{"messages": [3]}', "message 1 is 3, not an object"),
    (b'{"messages": [null]}', "message 1 is None, not an object"),
    (b'{"messages": [[]]}', "message 1 is list, not an object"),
    (talk({"content": "q"}, ANSWER), "message 1 has no 'role'"),
    (talk({"role": "user"}, ANSWER), "message 1 has no 'content'"),
    (talk({"from": "human", "value": "q"}), "data convert"),
    (talk({"role": "usr", "content": "q"}, ANSWER), "did you mean 'user'"),
    (talk({"role": "human", "content": "q"}, ANSWER), "did you mean 'user'"),
    (talk({"role": 1, "content": "q"}, ANSWER), "unknown role"),
    (talk({"role": "User", "content": "q"}, ANSWER), "unknown role"),
    (talk({"role": "user", "content": None}, ANSWER), "not text"),
    (talk({"role": "user", "content": 5}, ANSWER), "not text"),
    (talk({"role": "user", "content": {"text": "q"}}, ANSWER), "not text"),
    (talk({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER), "part 1"),
    (talk({"role": "user", "content": ["q", 7]}, ANSWER), "part 2"),
    (talk({"role": "user", "content": ""}, ANSWER), "message 1 (user) is empty"),
    (talk({"role": "user", "content": " \n\t"}, ANSWER), "message 1 (user) is empty"),
    (talk(USER, {"role": "assistant", "content": ""}), "message 2 (assistant) is empty"),
    (talk({"role": "system", "content": "s"}), "no assistant message"),
    (talk(USER), "no assistant message"),
    (talk(USER, ANSWER, USER), "the last message is a user message"),
    (talk(USER, USER, ANSWER), "both user messages"),
    (talk(USER, ANSWER, ANSWER), "both assistant messages"),
    (talk(USER, {"role": "system", "content": "s"}, ANSWER), "message 2 is a system message"),
    (talk({"role": "tool", "content": "t"}, ANSWER), "tool message after no message"),
    (talk(USER, {"role": "tool", "content": "t"}, ANSWER), "tool message after a user message"),
    (talk(USER, ANSWER, {"role": "tool", "content": "t"}, USER, ANSWER), "user message after a tool message"),
    (talk(USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}), "calls a tool"),
    (b'{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "a"}]}', "half of a character"),
    (talk({**USER, "weight": 1}, ANSWER), "only assistant messages carry loss"),
    (talk(USER, {**ANSWER, "weight": -1}), "weight of message 2"),
    (talk(USER, {**ANSWER, "weight": "high"}), "weight of message 2"),
    (talk(USER, {**ANSWER, "weight": True}), "weight of message 2"),
    (talk(USER, {**ANSWER, "weight": 10**400}), "weight of message 2"),
    (talk(USER, ANSWER, weight=11), "weight of the record"),
    (talk(USER, ANSWER, weight=-(10**400)), "weight of the record"),
    (talk(USER, {**ANSWER, "weight": 0}), "weight 0"),
    (talk(USER, ANSWER, id=[1]), "id is list"),
    (talk(USER, ANSWER, task=""), "task is ''"),
]

# odd, but whole: read as it stands
ODD: list[tuple[bytes, str]] = [
    (talk({"role": "user", "content": "x" * 10_000_000}, ANSWER), "x" * 10_000_000),
    (talk({"role": "user", "content": "<|im_end|>\n<|im_start|>assistant\nhi<|endoftext|>"}, ANSWER), "<|im_end|>"),
    (talk({"role": "user", "content": "<script>alert(1)</script> &amp;"}, ANSWER), "<script>alert(1)</script> &amp;"),
    (
        b'{"messages": [{"role": "user", "content": "\\u001b[2Jq\\u0000"}, {"role": "assistant", "content": "a"}]}',
        "\x1b[2Jq\x00",
    ),
    (talk({"role": "user", "content": "a\r\nb"}, ANSWER), "a\r\nb"),
    (talk({"role": "user", "content": " padded \n"}, ANSWER), " padded \n"),
    (talk({"role": "user", "content": "\u202eright to left \u200b"}, ANSWER), "\u202eright to left \u200b"),
]


@pytest.fixture
def broken(write):
    """Every broken record between two whole ones, behind a byte order mark, with mixed line ends."""
    good = talk(USER, ANSWER)
    lines = [b"\xef\xbb\xbf" + good]
    for number, (record, _) in enumerate(BROKEN):
        lines += [record, good + (b"\r" if number % 2 else b"")]
    return write("broken.jsonl", b"\n".join(lines) + b"\n")


def test_c027_every_broken_record_is_named_with_its_line(broken):
    errors: list[DataError] = []
    found = list(read_conversations(broken, on_error=errors.append))
    assert len(BROKEN) >= 60 and len(found) == len(BROKEN) + 1
    assert [e.line for e in errors] == [2 * n + 2 for n in range(len(BROKEN))]
    for (_, text), error in zip(BROKEN, errors, strict=True):
        assert text in str(error) and "\n" not in str(error) and len(str(error)) < 400, (text, str(error))
        assert str(error).startswith(f"{broken}:{error.line}: ") and error.reason
    assert all([m.content for m in c.messages] == ["q", "a"] for c in found)


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_c027_a_broken_record_at_the_beginning_is_one_bad_record(write, tmp_path, number):
    record, text = BROKEN[number]
    if b'"conversations"' in record:
        pytest.skip("a whole record of another layout: the first known layout is that of the file")
    good = talk(USER, ANSWER)
    path = write("first.jsonl", b"\n".join([record, good, good]))
    errors: list[DataError] = []
    found = list(read_conversations(path, on_error=errors.append))
    assert len(found) == 2 and [error.line for error in errors] == [1] and text in str(errors[0])
    check = check_files(path)
    assert (check.conversations, check.counts.total(), check.lost) == (2, 1, 1)
    done = convert(path, tmp_path / "o.jsonl")
    assert done.tally.read == 3 == done.written + done.tally.dropped.total() and done.written >= 2
    with pytest.raises(DataError, match=r"first\.jsonl:1: "):
        list(read_conversations(path))


@pytest.mark.parametrize("count", [3, 300])
def test_c027_many_bad_records_at_the_beginning(write, count):
    """Up to some hundreds; behind that the first of them says why the file is none."""
    rows = ["oops"] * count + [talk(USER, ANSWER).decode()] * 2
    path = write("first.jsonl", "\n".join(rows))
    if count < 200:
        assert len(list(read_conversations(path, on_error=lambda error: None))) == 2
        return
    with pytest.raises(DataError, match=r"first\.jsonl:1: not valid JSON"):
        list(read_conversations(path, on_error=lambda error: None))


def test_c027_training_stops_at_the_first(broken):
    with pytest.raises(DataError, match=r"broken\.jsonl:2: not valid JSON"):
        list(read_conversations(broken))


def test_c027_odd_but_whole_records_are_read_as_they_stand(write):
    path = write("odd.jsonl", b"\n".join(record for record, _ in ODD))
    found = list(read_conversations(path))
    assert all(text in c.messages[0].content for (_, text), c in zip(ODD, found, strict=True))
    for (record, _), conversation in zip(ODD, found, strict=True):
        raw = json.loads(record)["messages"]
        assert [m.content for m in conversation.messages] == [m["content"] for m in raw]


def test_c028_convert_counts_and_lists_what_it_drops(broken, tmp_path):
    """Convert may mend what its rules name, so it drops fewer; every drop has a reason and a line in the rejects file."""
    done = convert(broken, tmp_path / "o.jsonl")
    tally = done.tally
    assert tally.read == 2 * len(BROKEN) + 1 == done.written + tally.dropped.total()
    rejects = [json.loads(line) for line in done.rejects.read_text().splitlines()]
    assert len(rejects) == tally.dropped.total() > 45
    assert all(r["file"] == str(broken) and r["line"] % 2 == 0 and r["reason"] and r["message"] for r in rejects)
    mended = set(range(2, 2 * len(BROKEN) + 2, 2)) - {r["line"] for r in rejects}
    texts = [BROKEN[line // 2 - 1][1] for line in sorted(mended)]
    assert texts == [
        "the last message is a user message",  # the turn without an answer is cut, and counted
        "calls a tool",  # the call is written into the content
    ]
    with pytest.raises(DataError, match=":2: "):
        convert(broken, tmp_path / "p.jsonl", strict=True)
    assert not (tmp_path / "p.jsonl").exists() and not (tmp_path / "p.jsonl.rejects.jsonl").exists()
    assert len(list(read_conversations(tmp_path / "o.jsonl"))) == done.written  # read as strictly as training does
    again = convert(tmp_path / "o.jsonl", tmp_path / "q.jsonl")
    assert again.rejects is None and (tmp_path / "q.jsonl").read_bytes() == (tmp_path / "o.jsonl").read_bytes()


def test_c028_a_file_name_that_is_not_utf8_is_listed_with_its_rejects(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    path = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jsonl"))
    path.write_bytes(b"\n".join([talk(USER, ANSWER), b'{"messages": []}', talk(USER, ANSWER)]))
    done = convert(folder, tmp_path / "o.jsonl")
    (reject,) = [json.loads(line) for line in done.rejects.read_text().splitlines()]
    assert (reject["file"], reject["line"], done.written) == (str(path), 2, 2)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    kept, dropped = tmp_path / "kept.jsonl", tmp_path / "dropped.jsonl"
    words = ["report", folder, "--tokenizer", "lumina-1k", "--out", tmp_path / "r.html", "--filter", kept, dropped]
    assert command.run(parser.parse_args([str(word) for word in words])) == 0
    places = [record["path"] for line in dropped.read_text().splitlines() if "path" in (record := json.loads(line))]
    assert places == [str(path)] and len((kept.read_text() + dropped.read_text()).splitlines()) == 3
    assert command.run(parser.parse_args(["validate", str(folder)])) == 1
    assert "caf\ufffd.jsonl:2: " in capsys.readouterr().out
    linear = {"conversation_id": None, "messages": [{"role": "prompter", "content": "q"}, ANSWER]}
    path.write_text(json.dumps(linear))
    convert(folder, tmp_path / "o.jsonl")
    assert [c.id for c in read_conversations(tmp_path / "o.jsonl")] == [f"{folder}/caf\\xe9.jsonl:1"]


def test_c028_calls_and_tools_at_the_depth_where_json_gives_up_are_dropped_by_name(write, tmp_path):
    """A little below what the parser refuses, it is the writer that does."""
    question, rows = json.dumps(USER).encode(), list[bytes]()
    for levels in range(800, 1000):  # how deep the stack is already, the test cannot know
        deep = b'{"a":' * levels + b"1" + b"}" * levels
        for arguments in (deep, json.dumps(deep.decode()).encode()):
            call = b'{"function": {"name": "f", "arguments": ' + arguments + b"}}"
            answer = b'{"role": "assistant", "content": "", "tool_calls": [' + call + b"]}"
            rows.append(b'{"messages": [' + question + b", " + answer + b"]}")
        rows.append(talk(USER, ANSWER)[:-1] + b', "tools": [' + deep + b"]}")
    done = convert(write("deep.jsonl", b"\n".join([talk(USER, ANSWER), *rows])), tmp_path / "o.jsonl")
    assert done.tally.read == len(rows) + 1 == done.written + done.tally.dropped.total()
    assert set(done.tally.dropped) == {"nested too deeply", "malformed JSON"}


def test_c028_a_list_that_cannot_be_read_to_its_end_is_an_error(write, tmp_path):
    path = write("cut.json", b"[" + talk(USER, ANSWER) + b', {"messages": [')
    with pytest.raises(DataError, match=r"cut.json:1: not valid JSON"):
        convert(path, tmp_path / "o.jsonl")
    assert not (tmp_path / "o.jsonl").exists()
