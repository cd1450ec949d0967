"""C030: the check of data against counts made by hand, hostile files included."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lumina_engine.commands import data as command
from lumina_engine.data.check import Lengths, Sofar, check_files
from lumina_engine.data.conversation import Conversation, DataError, Message, TextDocument
from lumina_engine.data.cut import Samples
from lumina_engine.data.files import excerpt
from lumina_engine.data.rows import RowOptions, RowPlan
from lumina_engine.data.store import build_store
from lumina_engine.data.tokenizer import ConversationTokenizer
from tests.waiting import until

from .conftest import ByteTokenizer

TOKENIZER = ByteTokenizer()
TALKS = st.lists(
    st.lists(st.sampled_from(["a", "bb", "some longer text", "x" * 90]), min_size=2, max_size=8).map(
        lambda texts: texts[: len(texts) // 2 * 2]
    ),
    min_size=1,
    max_size=12,
)


@given(
    texts=st.lists(st.integers(0, 300), max_size=12),
    talks=st.lists(st.lists(st.integers(1, 60), min_size=2, max_size=4), max_size=12),
)
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_c030_rows_are_those_that_training_makes(tmp_path_factory, texts, talks):
    """Long texts, whose last pieces packing may cut, and conversations of which a row keeps the end."""
    conversations = [
        Conversation(tuple(Message(("user", "assistant")[n % 2], "x" * size) for n, size in enumerate([*sizes[:1], *sizes])))
        for sizes in talks
    ]
    documents = [*(TextDocument("y" * size + ".") for size in texts), *conversations]
    assume(documents)
    lengths = Lengths(TOKENIZER, 80)
    for document in documents:
        lengths.add(document)
    store = build_store(documents, TOKENIZER, tmp_path_factory.mktemp("c"), source_digest="x")
    plan = RowPlan(store, RowOptions(80, "fit"))
    kept = int(plan.samples.lengths.sum())
    assert lengths.rows == {"rows": plan.num_rows, "padding_share": 1 - kept / (80 * plan.num_rows)}


def record(turns: list[str]) -> dict[str, object]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]}


def conversation(turns: list[str]) -> Conversation:
    return Conversation(tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(turns)))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(talks=TALKS, others=TALKS, limit=st.integers(16, 300), width=st.integers(1, 4))
def test_c030_figures_equal_plain_loops_over_several_files(tmp_path_factory, talks, others, limit, width):
    folder = tmp_path_factory.mktemp("check")
    paths = [folder / f"{part}.jsonl" for part in range(width)]
    for part, path in enumerate(paths):
        path.write_text("\n" + "".join(json.dumps(record(t)) + "\n" for t in talks[part::width]))
    against = folder / "eval.jsonl"
    against.write_text("".join(json.dumps(record(t)) + "\n" for t in others))
    full = [path for path in paths if path.read_text().strip()]
    found = check_files(full, tokenizer=TOKENIZER, seq_length=limit, against=against).to_dict()

    order = [(str(path), line, t) for part, path in enumerate(paths) for line, t in enumerate(talks[part::width], 2)]
    sizes = [len(TOKENIZER.encode_with_mask(conversation(t))[0]) for _, _, t in order]
    trained = sum(sum(TOKENIZER.encode_with_mask(conversation(t))[1]) for _, _, t in order)
    assert found["total_conversations"] == len(talks) == found["sampled_conversations"]
    assert found["tokens"] == sum(sizes) and found["tokens_basis"] == "measured"
    assert found["trained_tokens"] == trained and found["longest"] == max(sizes)
    bars = found["lengths"]
    for low, high, count in zip(bars["edges"][:-1], bars["edges"][1:], bars["counts"], strict=True):
        assert count == sum(low < size <= high for size in sizes)
    assert sum(bars["counts"]) == len(sizes) and limit in bars["edges"]
    assert found["cut"]["conversations"] == sum(size > limit for size in sizes)
    samples = Samples(
        build_store((conversation(t) for _, _, t in order), TOKENIZER, folder / "cache", source_digest="x"), limit
    )
    assert found["cut"]["lost_tokens"] == samples.lost_tokens and found["cut"]["how"] == samples.shortened

    first: dict[tuple[str, ...], tuple[str, int]] = {}
    repeats = []
    for path, line, turns in order:
        if tuple(turns) in first:
            repeats.append(
                {"path": path, "line": line, **dict(zip(("first_path", "first_line"), first[tuple(turns)], strict=True))}
            )
        first.setdefault(tuple(turns), (path, line))
    assert found["duplicates"] == {"conversations": len(repeats), "examples": repeats}
    shared = [(path, line) for path, line, turns in order if turns in others]
    assert found["overlap"]["conversations"] == len(shared)
    assert [(e["path"], e["line"]) for e in found["overlap"]["examples"]] == shared


def test_c030_a_sample_gives_a_guess_that_says_so(write):
    path = write("a.jsonl", [record(["q", "a" * n]) for n in range(1, 201)])
    whole = check_files(path, tokenizer=TOKENIZER).to_dict()
    guess = check_files(path, tokenizer=TOKENIZER, sample=50).to_dict()
    assert guess["tokens_basis"] == "guessed" and guess["sampled_conversations"] == 50 and guess["total_conversations"] == 200
    assert guess["tokens"] == round(guess["avg_tokens"] * 200)
    assert abs(guess["tokens"] - whole["tokens"]) < 0.25 * whole["tokens"]
    assert check_files(path, tokenizer=TOKENIZER, sample=200).to_dict()["tokens_basis"] == "measured"
    assert "tokens" not in check_files(path).to_dict()


def test_c030_a_conversation_of_exactly_seq_length_is_not_cut_and_stands_before_the_mark(write):
    turns = ["q", "a" * 10]
    exact = len(TOKENIZER.encode_with_mask(conversation(turns))[0])
    path = write("a.jsonl", [record(turns), record(["q", "a" * 11])])
    found = check_files(path, tokenizer=TOKENIZER, seq_length=exact).to_dict()
    bars = dict(zip(found["lengths"]["edges"][1:], found["lengths"]["counts"], strict=True))
    assert bars[exact] == 1 and found["cut"] == {
        "seq_length": exact,
        "conversations": 1,
        "lost_tokens": 1,
        "how": {"question cut at its start": 1},
    }


@pytest.mark.parametrize("tokenizer", [TOKENIZER, ConversationTokenizer("lumina-1k")], ids=lambda tokenizer: tokenizer.name)
def test_c030_answers_of_weight_0_are_not_trained(write, talk, tokenizer):
    """The figure is that of the store, which training reads."""
    talks = [talk("q", "abc", "r", "de", weights={1: 0.0}), talk("q", "abcd", "r", "e", weights={3: 0.0}), talk("q", "ab")]
    path = write("w.jsonl", [t.to_record() for t in talks])
    found = check_files(path, tokenizer=tokenizer).to_dict()
    assert found["trained_tokens"] == sum(len(tokenizer.encode(text)) + 1 for text in ("de", "abcd", "ab"))
    store = build_store(talks, tokenizer, path.parent / "store", source_digest="x")
    assert (found["trained_tokens"], found["tokens"]) == (store.num_trained, store.num_tokens)


def test_c030_built_in_corpus_holds_nothing_of_its_own_evaluation(tokenizer):
    found = check_files(None, tokenizer=None).to_dict()
    assert found["total_conversations"] >= 20_000 and found["problems"] == []
    assert found["overlap"]["conversations"] == 0 and found["files"][0]["path"] == "built-in corpus"


GOOD = json.dumps(record(["q", "a"]))
HOSTILE = {
    "nul.jsonl": (b'{"messages"\x00: 1}\n', 1, "binary content", ['{"messages"', "\\x00: 1}\\x0a"]),
    "latin.jsonl": (
        GOOD.encode() + b'\n{"messages": "caf\xe9"}\n',
        2,
        "byte 18 is not UTF-8",
        ['{"messages": "caf', '\\xe9"}\\x0a'],
    ),
    "cut.jsonl": (GOOD.encode() + b'\n{"messages": [', 2, "not valid JSON", ['{"messages": [', ""]),
    "esc.jsonl": (GOOD.encode() + b'\n{"messages"\x1b[2J: 1}\n', 2, "not valid JSON", ['{"messages"', "␛[2J: 1}␊"]),
    "list.json": (f"[{GOOD}\n oops]".encode(), 2, "a comma is missing", None),
    "latin.json": (b'[\n{"instruction": "caf\xe9"}]', 2, "not UTF-8", ['[\\x0a{"instruction": "caf', '\\xe9"}]']),
    "latin.txt": (b"one\ncaf\xe9\n", 2, "not UTF-8", ["one\\x0acaf", "\\xe9\\x0a"]),
    "gz.jsonl": (b"\x1f\x8b\x08\x00abc", None, "the packed file is damaged", None),
    "empty.jsonl": (b"", None, "the file is empty", None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_c137_faults_show_the_first_bad_bytes_and_other_files_stay(write, name):
    content, line, cause, seen = HOSTILE[name]
    bad, good = write(name, content), write("good.jsonl", GOOD + "\n")
    check = check_files([bad, good], tokenizer=TOKENIZER)
    found = check.to_dict()
    assert found["files"][1]["conversations"] == 1 and found["files"][1]["format"] == "messages"
    problem = found["problems"][0]
    assert problem["path"] == str(bad) and problem["line"] == line and cause in problem["message"]
    if seen is not None:
        assert problem["excerpt"] == seen
    text = json.dumps(found, ensure_ascii=False)
    assert "\x1b" not in text and "\\u001b" not in text.replace("\\\\u001b", "")


def test_c030_crlf_bom_blank_lines_and_long_lines_are_no_problem(write):
    long = json.dumps(record(["q", "a" * 10_000_000]))
    path = write("ok.jsonl", b"\xef\xbb\xbf" + f"{GOOD}\r\n\r\n{GOOD}\r\n{long}\n".encode())
    found = check_files(path).to_dict()
    assert found["total_conversations"] == 3 and found["problems"] == []
    assert found["duplicates"]["examples"] == [{"path": str(path), "line": 3, "first_path": str(path), "first_line": 1}]


def test_c030_pipes_folders_and_vanished_files(tmp_path, write, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        check_files(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="holds no"):
        check_files(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    good = write("folder.jsonl/a.jsonl", GOOD)
    gone = write("folder.jsonl/b.jsonl", GOOD)
    from lumina_engine.data import check as module

    real = module.expand
    monkeypatch.setattr(module, "expand", lambda *args: (real(*args), gone.unlink())[0])
    found = check_files(tmp_path / "folder.jsonl").to_dict()
    assert found["files"][0]["conversations"] == 1 and found["files"][0]["path"] == str(good)
    assert found["problems"][0]["path"] == str(gone) and "No such file" in found["problems"][0]["message"]


def test_c137_progress_grows_to_the_whole(write):
    path = write("a.jsonl", [record(["q", str(n)]) for n in range(2000)])
    told: list[Sofar] = []
    check = check_files(path, tokenizer=TOKENIZER, progress=told.append)
    assert len(told) == 8 and [s.conversations for s in told] == sorted({s.conversations for s in told})
    assert all(0 < s.bytes <= s.total_bytes == path.stat().st_size for s in told)
    assert told[-1].tokens is not None and told[-1].tokens <= check.tokens


def test_c137_progress_is_json_lines_on_stderr_and_stdout_one_document(write, capsys):
    path = write("a.jsonl", [record(["q", str(n)]) for n in range(300)])
    for argv in (["validate", path], ["convert", path, path.with_name("o.jsonl")], ["preview", path, "tokenizer=lumina-1k"]):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        assert command.run(parser.parse_args([*map(str, argv), "--json", "--progress", "json"])) == 0
        out, err = capsys.readouterr()
        json.loads(out)
        lines = [json.loads(line) for line in err.splitlines()]
        assert argv[0] == "convert" or lines
        assert all(line["progress"] and line["conversations"] >= 0 for line in lines)


def test_c137_sigterm_ends_a_conversion_and_leaves_nothing(tmp_path, write):
    path = write("a.jsonl", [record(["q", "a" * 50 + str(n)]) for n in range(300_000)])
    argv = [sys.executable, "-m", "lumina_engine.cli", "data", "convert", str(path), str(tmp_path / "out" / "o.jsonl")]
    process = subprocess.Popen([*argv, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        until(lambda: list(tmp_path.glob("out/.*.tmp")) or process.poll() is not None, "the file being written", deadline=60)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143 and out == b"" and list((tmp_path / "out").iterdir()) == []


def test_c142_every_row_can_be_asked_for(write, capsys):
    path = write("a.jsonl", [record(["question", f"answer {n}" * 3]) for n in range(12)])

    def rows(first: int, count: int) -> dict:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        argv = ["preview", path, "seq_length=64", "tokenizer=lumina-1k", "--json", "--first", first, "--rows", count]
        assert command.run(parser.parse_args([str(word) for word in argv])) == 0
        return json.loads(capsys.readouterr().out)

    whole = rows(0, 100)
    assert whole["total_rows"] == len(whole["rows"]) > 3 and whole["conversations"] == 12
    assert rows(1, 2)["rows"] == whole["rows"][1:3] and rows(1, 2)["first"] == 1
    ends = Counter(p["ends_turn"] for row in whole["rows"] for p in row["pieces"] if p["kind"] == "trained")
    assert ends == {True: 12}


LAYOUTS = {
    "messages": [record(["q", "a", "r", "b"]), record(["q", "c"])],
    "sharegpt": [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}] * 2,
    "alpaca": [{"instruction": "q", "input": "more", "output": "a"}, {"instruction": "q", "output": "b"}],
}


def previewed(capsys, path, *words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert (
        command.run(parser.parse_args(["preview", str(path), "tokenizer=lumina-1k", *words, "--json", "--rows", "1000"])) == 0
    )
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_c142_every_answer_of_every_layout_ends_with_a_trained_end_of_turn(write, capsys, layout):
    path = write(f"{layout}.json", LAYOUTS[layout])
    answers = check_files(path).messages["assistant"]
    pieces = [p for row in previewed(capsys, path, "seq_length=128")["rows"] for p in row["pieces"] if p["kind"] == "trained"]
    assert len(pieces) == answers and all(p["ends_turn"] and p["text"].endswith("<|im_end|>") for p in pieces)


REAL = (
    "alpaca/instruction-data.json",
    "alpaca/seed_tasks.jsonl",
    "sharegpt/dummy_conversation.json",
    "sharegpt/glaive_toolcall_en_demo.json",
    "messages/oasst1_en_val_top1.messages.jsonl",
)


@pytest.mark.parametrize("path", REAL)
def test_c142_rows_of_real_data_end_their_answers(shared, capsys, path):
    found = previewed(capsys, shared / path, "seq_length=8192", "--sample=40")
    pieces = [p for row in found["rows"] for p in row["pieces"] if p["kind"] == "trained"]
    assert found["conversations"] == 40 and len(pieces) >= 40 and all(p["ends_turn"] for p in pieces)


def test_c030_a_file_without_rights_is_a_problem_of_its_own(write, monkeypatch):
    closed, good = write("closed.jsonl", GOOD), write("good.jsonl", GOOD)
    real = Path.open

    def refuse(self, *args, **kwargs):
        if self == closed:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    found = check_files([closed, good]).to_dict()
    assert found["total_conversations"] == 1 and found["problems"][0]["path"] == str(closed)
    assert "cannot be read (Permission denied)" in found["problems"][0]["message"]


def test_excerpt_makes_every_byte_visible():
    before, behind = excerpt(bytes(range(256)), 128)
    assert (before + behind).isprintable() and (before + behind).isascii()
    assert excerpt("a\x1b\u202eb\n", 1) == ("a", "␛\ufffdb␊")


def test_c030_of_many_repeats_all_are_counted_and_the_first_are_named(write):
    """The hundred that come first in the file, in its order, and no other has its place looked up."""
    lines = [json.dumps(record([f"question {number % 150}", "fine"])) for number in range(900)]
    found = check_files([write("many.jsonl", "\n".join(lines) + "\n")]).to_dict()["duplicates"]
    assert found["conversations"] == 750
    places = [(repeat["line"], repeat["first_line"]) for repeat in found["examples"]]
    assert places == [(line, line - 150) for line in range(151, 251)]
