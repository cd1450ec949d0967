"""`lumina-engine data …`."""

from __future__ import annotations

import argparse
import json

import pytest

from lumina_engine.commands import data as command
from lumina_engine.commands.common import report

ROW = {"conversations": [{"from": "human", "value": "hi \x1b[31m"}, {"from": "gpt", "value": "yo <|im_end|>"}]}
NO_ANSWER = {"conversations": [{"from": "human", "value": "hi"}]}


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """`run("convert", …)`: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        try:
            code = command.run(parser.parse_args([str(word) for word in argv]))
        except Exception as error:
            code = report(error)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_c028_convert(run, write, tmp_path):
    source = write("s.json", [ROW, NO_ANSWER])
    code, out, err = run("convert", source, tmp_path / "o.jsonl", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["read"], found["written"], found["dropped"], found["changed"]) == (2, 1, {"no assistant turn": 1}, {})
    reject = json.loads((tmp_path / "o.jsonl.rejects.jsonl").read_text())
    assert (reject["file"], reject["reason"]) == (str(source), "no assistant turn") and reject["line"] > 1
    code, out, _ = run("convert", source, write("t.json", [NO_ANSWER, ROW]), tmp_path / "p.jsonl")
    assert code == 0 and "2 of 4 conversations written" in out and "2 dropped: no assistant turn" in out
    assert run("convert", source, tmp_path / "q.jsonl", "--strict")[0] == 65
    assert "neither 'prompt'" in run("convert", source, "o.jsonl", "--format", "oasst")[2]
    assert run("convert", "nowhere.json", "o.jsonl")[0] == 2
    code, out, err = run("convert", write("bad.jsonl", '{"messages": 1}\n{'), tmp_path / "q.jsonl")
    assert code == 65 and err.count("\n") == 1 and "bad.jsonl:1: " in err and not (tmp_path / "q.jsonl").exists()


def test_c030_validate(run, write):
    good = write("good.json", [ROW])
    code, out, _ = run("validate", good, "--json")
    assert code == 0 and json.loads(out)["total_conversations"] == 1 and json.loads(out)["problems"] == []
    bad = write(
        "bad.jsonl", json.dumps({"messages": [{"role": "usr", "content": "q"}]}) + "\n{\n" + json.dumps({"messages": []}) + "\n"
    )
    code, out, _ = run("validate", good, bad)
    assert code == 1 and "3 problems" in out
    for text in (
        "bad.jsonl:1: message 1 has unknown role 'usr'; did you mean 'user'",
        "bad.jsonl:2: not valid JSON",
        "bad.jsonl:3: ",
    ):
        assert text in out
    code, out, _ = run("validate", bad, "--json", "--tokenizer", "lumina-1k")
    found = json.loads(out)
    assert code == 1 and [p["line"] for p in found["problems"]] == [1, 2, 3] and sum(found["problem_counts"].values()) == 3
    assert run("validate", "nowhere")[0] == 2


def test_c030_validate_lists_what_conversion_would_drop(run, write):
    code, out, _ = run("validate", write("s.json", [ROW, NO_ANSWER]), "--json")
    (problem,) = json.loads(out)["problems"]
    assert code == 1 and problem["reason"] == "no assistant turn" and problem["line"] == 14


def test_c142_preview_shows_real_rows(run, write):
    path = write("s.json", [ROW] * 4)
    code, out, _ = run("preview", path, "seq_length=64", "tokenizer=lumina-1k", "--rows", "1", "--json")
    (row,) = json.loads(out)["rows"]
    assert code == 0 and row["tokens"] + row["padding"] == 64 == sum(p["tokens"] for p in row["pieces"])
    trained = [p for p in row["pieces"] if p["kind"] == "trained"]
    assert len(trained) == row["documents"] and all(p["ends_turn"] and p["text"] == "yo <|im_end|><|im_end|>" for p in trained)
    assert sum(p["tokens"] for p in trained) == row["trained"]
    assert row["pieces"][-1]["kind"] == "padding"


def test_se04_preview_makes_text_safe(run, write):
    code, out, _ = run("preview", write("s.json", [ROW]), "seq_length=128", "--tokenizer", "lumina-1k")
    assert code == 0 and "\x1b" not in out and "hi ␛[31m" in out
    assert "trained | yo <|im_end|><|im_end|>" in out and "padding | " in out


def test_c036_prepare(run, write, tmp_path):
    path = write("s.json", [ROW, {**ROW, "conversations": ROW["conversations"] * 2}])
    words = ("prepare", f"train_data_path={path}", "eval_split=0", f"data_cache_dir={tmp_path / 'cache'}", "--json")
    code, out, _ = run(*words)
    found = json.loads(out)
    assert code == 0 and found["stores"]["train"]["conversations"] == 2 and (tmp_path / "cache").is_dir()
    assert json.loads(run(*words)[1])["stores"] == found["stores"]
    assert "train" in run(*words[:-1])[1]
    assert run("prepare", "train_data_path=nowhere.jsonl")[0] == 2


def test_c144_sample(run, tmp_path):
    code, out, _ = run("sample", tmp_path / "e.jsonl", "--split", "eval", "--json")
    written = json.loads(out)["written"]
    assert code == 0 and written == len((tmp_path / "e.jsonl").read_text().splitlines()) > 100
    code, out, _ = run("sample", "--split", "eval", "--skills", "addition, spelling")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and {row["task"] for row in rows} == {"addition", "spelling"}
    code, _, err = run("sample", "--skills", "additoin")
    assert code == 2 and "addition" in err and err.count("\n") == 1
    assert run("validate", tmp_path / "e.jsonl")[0] == 0


def test_every_action_is_shown():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    text = parser.format_help()
    assert all(name in text for name in ("convert", "validate", "report", "preview", "prepare", "sample"))
