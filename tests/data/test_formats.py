"""C28: files of any known layout to conversations."""

from __future__ import annotations

import errno
import json
import os
import tracemalloc

import pytest

from lumina_engine.data.container import container
from lumina_engine.data.conversation import Conversation, DataError, Message, TextDocument
from lumina_engine.data.files import digest_files, expand, unread_note
from lumina_engine.data.formats import convert, convert_to_conversation_format, detect_format, read_conversations
from lumina_engine.data.tally import Tally

ALPACA = {"instruction": "add", "input": "1 1", "output": "2"}
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
MESSAGES = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


def turns(conversation):
    return [(x.role, x.content) for x in conversation.messages]


def read(path, format="auto", **more):
    return list(read_conversations(path, format, **more))


def sharegpt(*pairs, **more):
    return {"conversations": [{"from": role, "value": text} for role, text in pairs], **more}


@pytest.mark.parametrize(
    ("name", "content", "kind", "layout"),
    [
        ("a.json", [ALPACA, ALPACA], "json", "alpaca"),
        ("a.jsonl", [ALPACA, ALPACA], "jsonl", "alpaca"),
        ("s.json", [SHAREGPT], "json", "sharegpt"),
        ("s.jsonl", [SHAREGPT], "jsonl", "sharegpt"),
        ("one.json", json.dumps(SHAREGPT, indent=2), "json", "sharegpt"),
        ("oneline", json.dumps(SHAREGPT), "jsonl", "sharegpt"),
        ("jsonl-called.json", json.dumps(SHAREGPT) + "\n" + json.dumps(SHAREGPT), "jsonl", "sharegpt"),
        ("list-called.jsonl", json.dumps([SHAREGPT]), "json", "sharegpt"),
        ("m.txt", [MESSAGES], "jsonl", "messages"),
        ("bom.jsonl", "\ufeff\n \n" + json.dumps(MESSAGES), "jsonl", "messages"),
        ("crlf.jsonl", json.dumps(MESSAGES) + "\r\n\r\n" + json.dumps(MESSAGES) + "\r\n", "jsonl", "messages"),
        ("t.jsonl", [{"text": "once"}], "jsonl", "text"),
        ("book.txt", "Once upon a time.\n", "text", "text"),
        ("bracket.txt", "[Chapter 1]\nOnce.\n", "text", "text"),
    ],
)
def test_c028_layout_is_told_by_content(write, name, content, kind, layout):
    path = write(name, content)
    assert (container(path), detect_format(path)) == (kind, layout)
    assert read(path)


def test_c028_three_layouts_give_equal_conversations(write):
    """One set of conversations as messages, sharegpt (list and lines) and alpaca."""
    pairs = [("one?", "1"), ("two?\nreally", "2 é")]
    files = [
        write(
            "m.jsonl", [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
        ),
        write("s.json", [sharegpt(("human", q), ("gpt", a)) for q, a in pairs]),
        write("s.jsonl", [sharegpt(("user", q), ("assistant", a)) for q, a in pairs]),
        write("a.json", [{"instruction": q, "input": "", "output": a} for q, a in pairs]),
        write("a.jsonl", [{"instruction": q, "output": a} for q, a in pairs]),
    ]
    first = read(files[0])
    assert [turns(c) for c in first] == [[("user", q), ("assistant", a)] for q, a in pairs]
    assert all(read(path) == first for path in files)
    assert read([str(path) for path in files]) == first * 5


def test_c028_alpaca_input_history_system_instances(write):
    path = write(
        "a.json",
        [
            ALPACA,
            {"instruction": "", "input": "only input", "output": "x"},
            {"instruction": "now", "output": "b", "system": "be brief", "history": [["before", "a"]], "id": 4, "task": "t"},
            {"id": "s", "instruction": "i", "instances": [{"input": "1", "output": "one"}, {"input": "", "output": "none"}]},
        ],
    )
    found = read(path)
    assert [turns(c) for c in found] == [
        [("user", "add\n\n1 1"), ("assistant", "2")],
        [("user", "only input"), ("assistant", "x")],
        [("system", "be brief"), ("user", "before"), ("assistant", "a"), ("user", "now"), ("assistant", "b")],
        [("user", "i\n\n1"), ("assistant", "one")],
        [("user", "i"), ("assistant", "none")],
    ]
    assert (found[2].id, found[2].task, found[3].id) == ("4", "t", "s")


def test_c028_of_instances_each_bad_one_is_counted_and_the_others_stay(write, tmp_path):
    rows = [{"output": "one"}, {"input": "no answer"}, {"output": 5}, 7, {"output": ""}, {"input": "x", "output": "two"}]
    path = write("a.jsonl", [{"instruction": "i", "id": "s", "instances": rows}, {"instruction": "j", "instances": []}])
    result = convert(path, tmp_path / "o.jsonl")
    assert result.tally.read == 7 == result.written + result.tally.dropped.total()
    assert result.tally.dropped == {
        "no alpaca record": 2,
        "output is not text": 1,
        "nothing but empty turns": 1,
        "no instances": 1,
    }
    assert [(turns(c)[1][1], c.id) for c in read(tmp_path / "o.jsonl")] == [("one", "s"), ("two", "s")]
    assert [json.loads(line)["line"] for line in result.rejects.read_text().splitlines()] == [1, 1, 1, 1, 2]
    foreign = {**MESSAGES, "instances": rows}
    assert len(read(write("m.jsonl", [foreign]))) == 1  # of another layout it is a column that means nothing


@pytest.mark.parametrize(
    ("weight", "dropped"),
    [(None, {}), (1, {}), (0, {"text of weight 0": 1}), (0.5, {"weight of a text": 1}), ("x", {"bad weight": 1})],
)
def test_c028_weight_of_a_text_leaves_it_out_or_is_a_named_fault(write, tmp_path, weight, dropped):
    path = write("t.jsonl", [{"text": "once"}, {"text": "twice", "weight": weight}])
    result = convert(path, tmp_path / "o.jsonl")
    kept = [TextDocument("once")] + [TextDocument("twice")] * (not dropped)
    assert read(tmp_path / "o.jsonl") == kept and result.tally.dropped == dropped
    if dropped:
        (entry,) = map(json.loads, result.rejects.read_text().splitlines())
        assert (entry["line"], entry["reason"]) == (2, *dropped)
    if weight in (None, 1, 0):  # as training reads it
        assert read(path) == kept
    else:
        with pytest.raises(DataError, match=r"t\.jsonl:2: (a text has weight 0\.5|weight of the record)"):
            read(path)


@pytest.mark.parametrize("weight", [0.5, 2, 1, None])
def test_c028_weight_of_a_record_means_the_same_in_every_layout(write, weight):
    rows = {
        "messages": {**MESSAGES, "weight": weight},
        "sharegpt": {**SHAREGPT, "weight": weight},
        "alpaca": {**ALPACA, "weight": weight, "history": [["h", "i"]]},
        "instances": {"instruction": "i", "weight": weight, "instances": [{"output": "o"}]},
        "an instance": {"instruction": "i", "weight": 3, "instances": [{"output": "o", "weight": weight}]},
        "lists": {"prompt": MESSAGES["messages"][:1], "completion": MESSAGES["messages"][1:], "weight": weight},
    }
    for name, row in rows.items():
        for tidy in (False, True):
            (found,) = read(write(f"{name}.jsonl", [row]), tidy=tidy)
            weights = {1 if m.weight is None else m.weight for m in found.messages if m.role == "assistant"}
            assert weights == {weight or (3 if name == "an instance" else 1)}, name


def test_c028_a_repeated_key_costs_its_record_alone(write, tmp_path):
    good = json.dumps(ALPACA)
    twice = '{"instruction": "q", "output": "a", "output": "b"}'
    deep = '{"instruction": "q", "output": "a", "input": ' + '{"k": [{"x": 1, "y": 2, "x": 3}]}}'
    for name, text in (
        ("a.jsonl", "\n".join([good, twice, good, deep])),
        ("a.json", "[" + ",\n".join([good, twice, good, deep]) + "]"),
        ("many.json", json.dumps(ALPACA, indent=1) + "\n" + twice + good + deep),
    ):
        result = convert(write(name, text), tmp_path / "o.jsonl")
        assert (result.written, result.tally.read, result.tally.dropped) == (2, 4, {"repeated key": 2}), name
    call = {"name": "f", "arguments": '{"a": 1, "a": 2}'}
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    convert(write("c.jsonl", [record]), tmp_path / "o.jsonl")
    (found,) = read(tmp_path / "o.jsonl")
    assert found.messages[1].content == json.dumps(call)  # arguments as the text that they are, nothing of it lost


def test_c028_sharegpt_tools_become_calls_results_and_system_prompt(write):
    row = sharegpt(
        ("human", "q"), ("function_call", '{"f": 1}'), ("observation", "42"), ("gpt", "it is 42"), tools='[{"name": "f"}]'
    )
    (found,) = read(write("s.json", [row]))
    assert turns(found) == [
        ("system", 'Tools:\n[{"name": "f"}]'),
        ("user", "q"),
        ("assistant", '{"f": 1}'),
        ("tool", "42"),
        ("assistant", "it is 42"),
    ]
    (plain,) = read(write("t.json", [sharegpt(("system", "s"), ("human", "q"), ("gpt", "a"), tools="[]")]))
    assert turns(plain) == [("system", "s"), ("user", "q"), ("assistant", "a")]


EMPTY = "exchange with an empty turn removed"
END = "unanswered turns at the end removed"


@pytest.mark.parametrize(
    ("row", "kept", "dropped", "changed"),
    [
        (sharegpt(("human", "a"), ("gpt", "b"), ("human", "c")), "ab", None, END),
        (sharegpt(("human", "a"), ("gpt", ""), ("human", "c"), ("gpt", "d")), "cd", None, EMPTY),
        (sharegpt(("human", "a"), ("gpt", " \n"), ("human", "c"), ("gpt", "d")), "cd", None, EMPTY),
        (sharegpt(("human", "a"), ("gpt", None), ("human", "c"), ("gpt", "d")), "cd", None, EMPTY),
        (sharegpt(("human", ""), ("gpt", "b"), ("human", "c"), ("gpt", "d")), "cd", None, EMPTY),
        (sharegpt(("system", ""), ("human", "a"), ("gpt", "b")), "ab", None, "empty system prompt removed"),
        (sharegpt(("human", "a"), ("gpt", "")), None, "nothing but empty turns", None),
        (sharegpt(("human", "a")), None, "no assistant turn", None),
        (sharegpt(), None, "no turns", None),
        (sharegpt(("human", "a"), ("human", "b"), ("gpt", "c")), None, "wrong role order", None),
        (sharegpt(("gpt", "a"), ("human", "b"), ("gpt", "c")), "abc", None, None),
        (sharegpt(("system", "s"), ("gpt", ""), ("human", "b"), ("gpt", "c")), "sbc", None, EMPTY),
        (sharegpt(("human", "a"), ("gpt", "b"), weight=0), None, "no trained turn", None),
    ],
)
def test_c028_tidying_is_counted_and_an_empty_answer_is_never_a_target(write, row, kept, dropped, changed):
    tally = Tally()
    found = read(write("s.json", [row]), tally=tally)
    assert ["".join(x.content for x in c.messages) for c in found] == ([kept] if kept else [])
    assert dict(tally.dropped) == ({dropped: 1} if dropped else {})
    assert dict(tally.changed) == ({changed: 1} if changed else {})
    assert tally.read == 1 == tally.kept + tally.dropped.total()
    if dropped or changed:
        with pytest.raises(DataError, match=r"s\.json:2: "):
            read(write("s.json", [row]), tally=Tally(strict=True))


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.jsonl", json.dumps(MESSAGES) + "\n{broken\n", "a.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"messages": [\n' + json.dumps(MESSAGES) + "\n", "a.jsonl:1: not valid JSON"),
        ("a.jsonl", "hello\n" + json.dumps(MESSAGES) + "\n", "a.jsonl:1: not valid JSON"),
        ("a.jsonl", "hello\nworld\n", "a.jsonl:1: not valid JSON"),
        ("a.jsonl", json.dumps(MESSAGES) + '\n{"a": NaN}\n', "a.jsonl:2: not valid JSON: NaN"),
        ("a.jsonl", json.dumps(MESSAGES) + "\n" + "[" * 100_000 + "\n", "a.jsonl:2: not valid JSON: nested too deeply"),
        ("a.jsonl", json.dumps(MESSAGES).encode() + b'\n{"messages": "\xff"}\n', "a.jsonl:2: byte 15 is not UTF-8"),
        ("a.jsonl", json.dumps(MESSAGES) + "\n\n[1]\n", "a.jsonl:3: the record is list, not an object"),
        ("a.jsonl", json.dumps(MESSAGES) + "\n" + json.dumps(ALPACA), "a.jsonl:2: the record has no 'messages'"),
        ("a.json", "[\n" + json.dumps(ALPACA) + ",\n{broken}\n]", "a.json:3: not valid JSON"),
        ("a.json", "[\n" + json.dumps(ALPACA) + ",\n", "a.json:3: a comma without a value"),
        (
            "a.json",
            "[\n" + json.dumps(ALPACA) + "\n" + json.dumps(ALPACA) + "\n]",
            "a.json:3: the list is not closed or a comma",
        ),
        ("a.json", "[\n" + json.dumps(ALPACA) + "\n] x", "a.json:3: text after the end"),
        ("a.json", ("[\n" + json.dumps(ALPACA) + ',\n"').encode() + b"\xff", "a.json:3: not UTF-8"),
        ("a.json", [ALPACA, {"instruction": "x"}], "a.json:7: the record has no 'output'"),
        ("a.json", [ALPACA, SHAREGPT], "a.json:7: the record has the sharegpt layout among alpaca records"),
        ("a.json", [{**ALPACA, "output": 5}], "a.json:2: 'output' is 5, not text"),
        (
            "s.json",
            [sharegpt(("humna", "q"), ("gpt", "a"))],
            "s.json:2: turn 1 has unknown role 'humna'; did you mean 'human'?",
        ),
        ("s.json", [{"conversations": [{"from": "human", "text": "q"}]}], "s.json:2: turn 1 has no 'value'"),
        (
            "s.json",
            [sharegpt(("human", "q"), ("gpt", "a"), weight="heavy")],
            "s.json:2: weight of the record is 'heavy'; use a number from 0 to 10",
        ),
        ("a.json", [{"instruction": "i", "instances": []}], "a.json:2: no instances; add one"),
        (
            "a.json",
            [{"instruction": "i", "instances": [{"output": "o", "weight": -1}]}],
            "a.json:2: weight of an instance is -1",
        ),
        (
            "a.jsonl",
            json.dumps(MESSAGES) + '\n{"messages": [], "id": 1, "messages": []}\n',
            "a.jsonl:2: the key 'messages' comes twice in an object; keep one of them",
        ),
        ("a.json", "[\n" + json.dumps(ALPACA) + ',\n{"instruction": {"a": 1, "a": 1}}]', "a.json:3: the key 'a' comes twice"),
        ("s.json", [{"conversations": "q"}], "s.json:2: 'conversations' is 'q', not a list"),
        ("s.json", [sharegpt(("human", "q"), ("gpt", 3))], "s.json:2: the content of turn 2 is 3, not text"),
        ("x.jsonl", [{"ask": "q", "answer": "a"}], "x.jsonl:1: no known layout (found: 'answer, ask')"),
        ("x.json", "[]", "x.json: it holds no record"),
        ("x.json", "[1, 2]", "x.json:1: no known layout (found: '1')"),
        ("empty.jsonl", "", "empty.jsonl: the file is empty"),
        ("blank.jsonl", "\n \n", "blank.jsonl: the file is empty"),
        ("x.gz", b"\x1f\x8b\x08\x00rest", "x.gz: the packed file is damaged"),
        ("x.bin", b"ab\x00cd", "x.bin:1: binary content"),
        ("x.zip", b"PK\x03\x04rest", "x.zip: zip archives are not read; unpack it first"),
    ],
)
def test_c028_malformed_input_is_an_error_with_file_and_line(write, name, content, text):
    with pytest.raises(DataError) as caught:
        read(write(name, content))
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_c028_errors_can_be_collected(write):
    path = write("a.jsonl", json.dumps(MESSAGES) + "\n{broken\n" + json.dumps({"messages": []}) + "\n" + json.dumps(MESSAGES))
    errors: list[DataError] = []
    assert len(read(path, on_error=errors.append)) == 2
    assert [e.line for e in errors] == [2, 3]


@pytest.mark.parametrize(
    "broken",
    [
        ["{broken", "{broken too"],
        ['{"messages": [', '{"messages": [{"role": "user",'],  # cut off
        ['{"text": "' + "a" * 70_000, "{'text': 'b'}", "", '{"text"}'],  # longer than what is looked at first
        ["{"] * 150,
    ],
    ids=["two", "cut", "long", "many"],
)
def test_c028_broken_first_lines_of_json_lines_are_rejects_and_the_good_lines_stay(write, tmp_path, broken):
    path = write("a.jsonl", "\n".join([*broken, json.dumps(MESSAGES), "{again", json.dumps(MESSAGES)]))
    assert detect_format(path) == "messages"
    result = convert(path, tmp_path / "o.jsonl")
    bad = [number for number, line in enumerate(broken, 1) if line] + [len(broken) + 2]
    assert result.written == 2 and result.tally.dropped == {"malformed JSON": len(bad)}
    assert [json.loads(line)["line"] for line in result.rejects.read_text().splitlines()] == bad
    with pytest.raises(DataError, match=r"a\.jsonl:1: not valid JSON"):
        read(path)


def test_c028_the_look_ahead_for_a_good_line_is_bounded(write, monkeypatch):
    lines = ["{broken"] * 5 + [json.dumps(MESSAGES)]
    path = write("a.jsonl", "\n".join(lines))
    assert container(path) == "jsonl"
    monkeypatch.setattr("lumina_engine.data.container._AHEAD_LINES", 5)
    assert container(path) == "json"
    monkeypatch.setattr("lumina_engine.data.container._AHEAD_LINES", 6)
    monkeypatch.setattr("lumina_engine.data.container._MAX_PROBE", 5 * len("{broken\n") + 1)
    assert container(path) == "json"


@pytest.mark.parametrize("name", ["w.json", "w.jsonl"])
@pytest.mark.parametrize("closing", ["]}", "\n]}", ", 1]}"])
def test_c028_a_broken_record_makes_no_json_lines_of_a_document(write, tmp_path, name, closing):
    """Its last inner object is one by itself, too."""
    rows = [json.dumps(MESSAGES)] * 20
    text = '{"version": 1, "data": [\n' + ",\n".join([*rows, '{"messages": oops}', *rows]) + "\n" + closing
    path = write(name, text)
    assert container(path) == "json"
    with pytest.raises(DataError, match=rf"{name}:22: not valid JSON"):
        convert(path, tmp_path / "o.jsonl")


def test_c028_a_text_with_a_line_of_json_is_the_text_that_it_is_named(write, tmp_path):
    path = write("notes.txt", "{\\bf A text}\n{that begins so\n" + '{"text": "hello"}\n' + "and goes on\n" * 3)
    assert convert(path, tmp_path / "o.jsonl", format="text").written == 1
    assert "and goes on" in (tmp_path / "o.jsonl").read_text()


@pytest.mark.parametrize("rows", [1, 800])
@pytest.mark.parametrize("indent", [0, 2, "compact"])
def test_c028_objects_over_several_lines_stay_one_document_each(write, rows, indent):
    """Also where an inner object has a line of its own, and where the first object is longer than what is looked at first."""
    record = {"messages": MESSAGES["messages"] * rows}
    if indent == "compact":
        turns_text = ",\n".join(json.dumps(entry) for entry in record["messages"])
        text = f'{{"messages": [\n{turns_text}\n]}}\n'
    else:
        text = json.dumps(record, indent=indent) + "\n"
    assert container(write("a.jsonl", text * 2)) == "json"
    assert len(read(write("a.jsonl", text * 2))) == 2


@pytest.mark.parametrize("size", [1, 3, 7, 1 << 20])
def test_c028_a_json_list_is_read_in_pieces(write, monkeypatch, size):
    """Any chunk size gives the same records and lines, also inside escapes and characters of several bytes."""
    rows = [sharegpt(("human", f'q{i} é🫠 \\ " ]'), ("gpt", "a" * i + "b")) for i in range(6)]
    path = write("s.json", json.dumps(rows, indent=2, ensure_ascii=False))
    monkeypatch.setattr("lumina_engine.data.files._CHUNK", size)
    monkeypatch.setattr("lumina_engine.data.files._Window.more.__defaults__", (size,))
    assert [turns(c)[0][1] for c in read(path)] == [row["conversations"][0]["value"] for row in rows]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "i", "context": "c", "response": "r"}, [("user", "i\n\nc"), ("assistant", "r")]),
        ({"prompt": "p", "completion": "c"}, [("user", "p"), ("assistant", "c")]),
        ({"prompt": "p", "response": "r", "system": "s"}, [("system", "s"), ("user", "p"), ("assistant", "r")]),
        ({"question": "q", "answer": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"question": "q", "context": "c", "answer": "a"}, [("user", "q\n\nc"), ("assistant", "a")]),
        (
            {"query": "q", "response": "r", "history": [["h", "i"]]},
            [("user", "h"), ("assistant", "i"), ("user", "q"), ("assistant", "r")],
        ),
        (
            {"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "c"}]},
            [("user", "p"), ("assistant", "c")],
        ),
    ],
)
def test_c028_relatives_of_alpaca(write, record, expected):
    for name in ("a.json", "a.jsonl"):
        path = write(name, [record, record])
        assert detect_format(path) == "alpaca"
        assert [turns(c) for c in read(path)] == [expected] * 2


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def test_c028_tool_calls_and_tools_of_chat_records_become_text(write, tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    record = {
        "tools": tools,
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
            {"role": "assistant", "content": "one", "function_call": {"name": "f", "arguments": "not json"}},
            {"role": "function", "name": "f", "content": ""},
            {"role": "assistant", "content": [{"type": "text", "text": "done"}], "weight": 0.5},
        ],
    }
    convert(write("m.jsonl", [record]), tmp_path / "o.jsonl")
    (found,) = read(tmp_path / "o.jsonl")
    call = '{"name": "add", "arguments": {"a": 1}}'
    assert turns(found) == [
        ("system", f"s\n\nTools:\n{json.dumps(tools)}"),
        ("user", "q"),
        ("assistant", f"{call}\n{call}"),
        ("tool", "2"),
        ("assistant", 'one\n{"name": "f", "arguments": "not json"}'),
        ("tool", ""),
        ("assistant", "done"),
    ]
    assert found.messages[-1].weight == 0.5
    bad = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}
    with pytest.raises(DataError, match="a tool call of turn 2 has no function name"):
        convert(write("b.jsonl", [bad]), tmp_path / "p.jsonl")


def test_c028_json_lines_are_not_loaded_whole(write):
    line = json.dumps({"messages": [{"role": "user", "content": "x" * 2000}, {"role": "assistant", "content": "y"}]}) + "\n"
    for name, text in (("big.jsonl", line * 4000), ("big.json", "[" + ",".join([line] * 4000) + "]")):
        path = write(name, text)
        tracemalloc.start()
        count = sum(1 for _ in read_conversations(path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 4000 and path.stat().st_size > 8_000_000
        assert peak < 6_000_000


@pytest.mark.parametrize("text", ["{\n  int x;\n}\n", "[1, 2]\n", '{"a": 1}\n'])
def test_text_may_look_like_json_where_it_is_named_text(write, text):
    assert read(write("x.txt", text), "text") == [TextDocument(text)]
    assert read(write("t.jsonl", [{"text": "a"}, {"text": "b"}]), "text") == [TextDocument("a"), TextDocument("b")]
    bad_first = write("b.jsonl", '{"text": null}\n{"text": "a"}\n')
    assert list(read_conversations(bad_first, "text", on_error=lambda error: None)) == [TextDocument("a")]
    with pytest.raises(DataError, match="plain text, not alpaca"):
        read(write("y.txt", "Once.\n"), "alpaca")


def test_text_files_are_cut_at_empty_lines_and_lose_nothing(write):
    text = "".join(f"Paragraph {i}. " + "word " * 100 + "\n\n" for i in range(300))
    found = read(write("book.txt", text))
    assert len(found) > 2 and all(isinstance(d, TextDocument) for d in found)
    assert "".join(d.text for d in found) == text
    assert all(d.text.startswith("Paragraph") for d in found)


# convert


def test_c028_convert_writes_what_it_counts(write, tmp_path):
    source = write(
        "s.json", [SHAREGPT, sharegpt(("human", "q")), sharegpt(("human", "a"), ("gpt", "b"), ("human", "c"), id="7")]
    )
    out = tmp_path / "new" / "out.jsonl"
    result = convert(source, out)
    tally = result.tally
    assert (tally.read, result.written, tally.dropped, tally.changed) == (3, 2, {"no assistant turn": 1}, {END: 1})
    assert read(out) == [
        Conversation((Message("user", "hi"), Message("assistant", "yo"))),
        Conversation((Message("user", "a"), Message("assistant", "b")), "7"),
    ]
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.jsonl", "out.jsonl.rejects.jsonl"]


def test_c028_public_name_returns_the_number_and_logs_losses(write, tmp_path, caplog):
    import lumina_engine

    source = write("s.json", [SHAREGPT, sharegpt(("human", "q"))])
    number = lumina_engine.convert_to_conversation_format(
        input_file=str(source), output_file=str(tmp_path / "o.jsonl"), format_type="sharegpt"
    )
    assert number == 1 and "1 of 2 conversations dropped: no assistant turn" in caplog.text


def test_c028_convert_is_all_or_nothing(write, tmp_path):
    out = write("out.jsonl", "old\n")
    for content in ('[{"conversations": [', [sharegpt(("human", "q"))]):
        with pytest.raises(DataError):
            convert(write("s.json", content), out)
    with pytest.raises(DataError, match="no assistant turn"):
        convert(write("s.json", [SHAREGPT, sharegpt(("human", "q"))]), out, strict=True)
    assert out.read_text() == "old\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "s.json"]


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [("e.jsonl", "", "auto"), ("e.jsonl", "", "messages"), ("e.jsonl", "\n \n", "auto"), ("e.json", "[]", "auto")],
)
def test_c028_an_empty_file_among_others_is_one_counted_reject(write, tmp_path, name, content, format):
    write("d/a.jsonl", [MESSAGES])
    empty = write(f"d/{name}", content)
    write("d/z.jsonl", [MESSAGES])
    result = convert(tmp_path / "d", tmp_path / "o.jsonl", format)
    assert (result.written, result.tally.read, result.tally.dropped) == (2, 3, {"empty file": 1})
    (reject,) = [json.loads(line) for line in result.rejects.read_text().splitlines()]
    assert (reject["file"], reject["reason"]) == (str(empty), "empty file")
    with pytest.raises(DataError, match=f"{name}: "):
        convert(tmp_path / "d", tmp_path / "o.jsonl", format, strict=True)
    with pytest.raises(DataError, match=f"{name}: "):
        convert(empty, tmp_path / "p.jsonl", format)


def test_c028_convert_does_not_overwrite_its_input(write):
    path = write("m.jsonl", [MESSAGES])
    with pytest.raises(DataError, match="the output is one of the inputs"):
        convert(path, path)


def test_c028_convert_messages_with_from_and_value(write, tmp_path):
    source = write("m.jsonl", [{"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "weight": 0.5}])
    convert(source, tmp_path / "o.jsonl")
    assert read(tmp_path / "o.jsonl") == [Conversation((Message("user", "q"), Message("assistant", "a", 0.5)))]


def test_c028_text_keeps_its_layout(write, tmp_path):
    source = write("t.jsonl", [{"text": "once", "id": "a"}, {"text": " "}])
    assert convert(source, tmp_path / "o.jsonl").to_dict()["dropped"] == {"empty text": 1}
    assert read(tmp_path / "o.jsonl") == [TextDocument("once", "a")]


@pytest.mark.parametrize(
    ("name", "text"), [("oasts", "did you mean oasst"), ("sharegtp", "did you mean sharegpt"), ("x", "formats: auto")]
)
def test_c028_format_names(write, tmp_path, name, text):
    with pytest.raises(DataError, match=text) as caught:
        convert_to_conversation_format(write("m.jsonl", [MESSAGES]), tmp_path / "o", name)
    assert caught.value.exit_code == 2


# paths


def test_c038_files_folders_globs_and_lists(write, tmp_path, monkeypatch):
    a, b, c = write("d/a.jsonl", [MESSAGES]), write("d/sub/b.json", [SHAREGPT]), write("d/c.jsonl", [MESSAGES])
    write("d/README.md", "no data")
    write("d/.hidden/x.jsonl", [MESSAGES])
    assert expand(str(a)) == [a]
    assert expand(tmp_path / "d") == [a, c, b]
    assert expand(str(tmp_path / "d" / "*.jsonl")) == [a, c]
    assert expand([str(c), str(tmp_path / "d")]) == [c, a, b]  # each file once, the first place counts
    assert expand(str(tmp_path / "**" / "b.json")) == [b]
    monkeypatch.chdir(tmp_path)
    assert [str(p) for p in expand("d/*.jsonl")] == ["d/a.jsonl", "d/c.jsonl"]


def test_c038_a_folder_is_read_with_its_linked_folders_and_without_rejects_and_the_rest_is_told(write, tmp_path):
    """Links may lead in a circle; each file is read once."""
    a, more = write("d/a.jsonl", [MESSAGES]), write("elsewhere/deep/more.jsonl", [MESSAGES] * 3)
    others = [write(f"d/{name}", "no data") for name in ("b.md", "c", "d.jsonl.lz4", "sub/e.csv")]
    write("d/a.jsonl.rejects.jsonl", [{"file": "x", "line": 1}])
    write("d/.hidden/f", "x")
    (tmp_path / "d" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "d")
    found = expand(tmp_path / "d")
    assert found[0] == a and [path.resolve() for path in found[1:]] == [more] and len(list(read_conversations(found))) == 4
    (line,) = unread_note([str(tmp_path / "d"), str(a)])
    assert (
        "4 files" in line and all(str(path) in line for path in others[:3]) and "and 1 more" in line and "rejects" not in line
    )
    assert unread_note(str(a)) == unread_note(None) == unread_note("s3://bucket/folder") == []
    rejects = tmp_path / "d" / "a.jsonl.rejects.jsonl"
    assert expand(f"{tmp_path}/d/*.jsonl") == [a] and expand(f"{tmp_path}/d/*.rejects.jsonl") == expand(rejects) == [rejects]


def test_c038_a_folder_that_cannot_be_listed_costs_only_what_is_in_it(write, tmp_path, monkeypatch):
    """As the lost+found of a disk. Root may list everything, so the refusal is that of the call."""
    a = write("d/a.jsonl", [MESSAGES])
    write("d/lost+found/b.jsonl", [MESSAGES])
    listed = os.scandir

    def refused(place):
        if os.fspath(place).endswith(closed):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(place))
        return listed(place)

    monkeypatch.setattr(os, "scandir", refused)
    closed = "lost+found"
    assert expand(tmp_path / "d") == [a]
    (line,) = unread_note(tmp_path / "d")
    assert "1 folder that cannot be listed" in line and str(tmp_path / "d" / closed) in line
    closed = "d"
    with pytest.raises(DataError, match="cannot be read"):
        expand(tmp_path / "d")


def test_c038_paths_that_name_nothing(write, tmp_path):
    write("d/train.jsonl", [MESSAGES])
    (tmp_path / "empty").mkdir()
    cases = [
        (tmp_path / "d" / "trian.jsonl", "did you mean"),
        (tmp_path / "no" / "x.jsonl", "there is no folder"),
        (tmp_path / "d" / "*.txt", "the pattern matches no file"),
        (tmp_path / "empty", "the folder holds no"),
        ([], "is an empty list"),
        ("a\0b", "no such file"),
        ("/dev/null", "not a regular file"),
    ]
    for path, text in cases:
        with pytest.raises(DataError, match=text) as caught:
            expand(path, "train_data_path")
        assert caught.value.exit_code == 2 and "train_data_path" in str(caught.value)


def test_digest_is_of_contents_in_order(write):
    a, b, copy = write("a", "x"), write("b", "y"), write("c", "x")
    assert digest_files([a, b]) == digest_files([copy, b])
    assert len({digest_files([a, b]), digest_files([b, a]), digest_files([a]), digest_files([a, b, copy])}) == 4
