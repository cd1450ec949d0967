"""`lumina-engine data …`."""

from __future__ import annotations

import argparse
import json

import pytest

from lumina_engine.commands import data as command
from lumina_engine.commands.common import report
from lumina_engine.data.conversation import DataError
from lumina_engine.data.files import expand
from lumina_engine.data.formats import convert
from lumina_engine.data.report import require_suffix

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
    assert "neither 'prompt'" in run("convert", source, "n.jsonl", "--format", "oasst")[2]
    assert run("convert", "nowhere.json", "n.jsonl")[0] == 2
    code, out, err = run("convert", write("bad.jsonl", '{"messages": 1}\n{'), tmp_path / "q.jsonl")
    assert code == 65 and err.count("\n") == 1 and "bad.jsonl:1: " in err and not (tmp_path / "q.jsonl").exists()


def test_c031_what_a_filter_keeps_and_drops_adds_up(run, write, tmp_path):
    """A conversation that training tidies is judged as training has it; what is none is dropped, with its reason."""
    turns = [{"from": "human", "value": "What is red?"}, {"from": "gpt", "value": "A colour of the sunset in the evening."}]
    rows = [{"conversations": turns}, {"conversations": [*turns, turns[0]]}, {"conversations": turns[:1]}, {"conversations": 3}]
    source = write("s.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    words = ("report", source, "--tokenizer", "lumina-1k", "--out", tmp_path / "r.json", "--filter", "k.jsonl", "d.jsonl")
    code, out, err = run(*words, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and found["total_conversations"] == 2 and sum(found["problem_counts"].values()) == 3
    kept, dropped = ((tmp_path / name).read_text().splitlines() for name in ("k.jsonl", "d.jsonl"))
    judged = [json.loads(line) for line in (*kept, *dropped) if "messages" in json.loads(line)]
    lost = [json.loads(line) for line in dropped if "messages" not in json.loads(line)]
    assert len(kept) + len(dropped) == 4 and [len(record["messages"]) for record in judged] == [2, 2]
    assert [record["line"] for record in lost] == [3, 4] and lost[0]["rules"] == ["no assistant turn"]
    code, out, _ = run("validate", source, "--json")
    assert code == 1 and json.loads(out)["total_conversations"] == 2


@pytest.mark.parametrize("words", [("report", "x.jsonl"), ("convert", "x.jsonl", "o.jsonl")])
def test_c031_a_language_is_a_code(run, words):
    code, _, err = run(*words, "--languages", "en,english")
    assert code == 2 and "--languages english: give codes of two or three letters, such as en,de" in err


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


def test_c028_what_conversion_writes_into_a_folder_can_be_trained_on(run, write, tmp_path):
    """Its list of rejects lies there, too. Files that are not read are told once by each command."""
    raw, note = write("raw.json", [ROW, NO_ANSWER]), "not read: 1 file whose names"
    write("dd/notes.md", "no data")
    assert run("convert", raw, "dd/train.jsonl")[0] == 0 and (tmp_path / "dd" / "train.jsonl.rejects.jsonl").exists()
    keys = ("train_data_path=dd", "tokenizer=lumina-1k", "eval_split=0", f"data_cache_dir={tmp_path / 'cache'}")
    code, out, err = run("prepare", *keys, "--json")
    assert code == 0, err
    assert [line[: len(note)] for line in json.loads(out)["notes"] if "not read" in line] == [note]
    for words in (("convert", "dd", "o.jsonl"), ("validate", "dd"), ("report", "dd", "--tokenizer", "lumina-1k")):
        code, out, err = run(*words)
        assert code == 0 and out.count(note) == 1, (words, out, err)
    assert len(json.loads(run("validate", "dd", "--json")[1])["not_read"]) == 1
    assert len(json.loads(run("report", "dd", "--tokenizer", "lumina-1k", "--json")[1])["not_read"]) == 1
    assert len(json.loads(run("convert", "dd", "p.jsonl", "--json")[1])["not_read"]) == 1


@pytest.mark.parametrize("url", ["s3://bucket/x/out.jsonl", "file:///tmp/out.jsonl"])
def test_c028_an_output_is_no_url(run, write, tmp_path, url):
    """Its path would be a folder `s3:` here."""
    raw = write("raw.json", [ROW])
    report_at = url.replace(".jsonl", ".html")
    for words in (
        ("convert", raw, url),
        ("convert", raw, url, "--force"),
        ("convert", raw, "o.jsonl", "--rejects", url),
        ("report", raw, "--out", report_at),
        ("report", raw, "--filter", url, "d.jsonl"),
        ("sample", url),
    ):
        code, _, err = run(*words)
        assert code == 2 and "name a local file" in err, words
    with pytest.raises(DataError, match="name a local file"):
        convert(raw, url)
    with pytest.raises(DataError, match="name a local file"):
        require_suffix(report_at)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw.json"]


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_c028_an_input_that_is_named_by_a_file_url_is_not_written_over(run, write, scheme):
    path = write("loc/w0.jsonl", talk("x", 3))
    before = path.read_bytes()
    code, _, err = run("convert", f"{scheme}://{path}", path, "--force")
    assert code == 2 and "the output is one of the inputs" in err and path.read_bytes() == before
    code, _, err = run("report", f"{scheme}://{path}", "--tokenizer", "lumina-1k", "--filter", path, "d.jsonl", "--force")
    assert code == 2 and "is one of the inputs" in err and path.read_bytes() == before
    assert expand(f"{scheme}://{path.parent}") == expand(f"{scheme}://{path.parent}/*.jsonl") == [path]


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


def talk(about, count, **more):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"an answer of {about}"}]
    return [{"messages": turns, **more}] * count


@pytest.mark.parametrize("by_record", [False, True])
def test_c142_preview_of_a_mixed_run_shows_rows_of_each_task(run, write, by_record):
    """Not the built-in corpus, which nothing of it trains on."""
    if by_record:
        path = write("all.jsonl", talk("chat", 9, task="chat") + talk("code", 9, task="code") + talk("poem", 9, task="poem"))
        mix = {"train_data_path": str(path), "task_weights": {"chat": 1.0, "code": 2.0}}
    else:
        mix = {"task_data_paths": {name: str(write(f"{name}.jsonl", talk(name, 9))) for name in ("chat", "code")}}
    config = write("mix.yaml", json.dumps({"multi_task": True, "seq_length": 128, "tokenizer": "lumina-1k", **mix}))
    code, out, err = run("preview", "--config", config, "--rows", "1", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [row["task"] for row in found["rows"]] == ["chat", "code"] and found["conversations"] == 18
    for row in found["rows"]:
        trained = [piece["text"] for piece in row["pieces"] if piece["kind"] == "trained"]
        assert trained and set(trained) == {f"an answer of {row['task']}<|im_end|>"}
    for name in ("chat", "code"):
        assert f"task {name}: " in found["source"] and ("all.jsonl" if by_record else f"{name}.jsonl") in found["source"]
    code, out, _ = run("preview", "--config", config, "--rows", "1")
    assert code == 0 and out.count("row 0: ") == 2 and "built-in" not in out
    code, out, _ = run("preview", write("own.jsonl", talk("own", 3)), "--config", config, "--json")
    assert code == 0 and json.loads(out)["source"].endswith("own.jsonl") and "task" not in json.loads(out)["rows"][0]
    assert run("preview", "--config", config, "--first", "99")[0] == 2


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


def test_an_existing_file_is_replaced_only_by_force(run, write, tmp_path):
    source, mine = write("s.json", [ROW]), write("mine.jsonl", "mine\n")
    for words in (
        ("convert", source, mine),
        ("convert", source, tmp_path / "o.jsonl", "--rejects", mine),
        ("sample", mine, "--split", "eval"),
        ("report", source, "--tokenizer", "lumina-1k", "--filter", "kept.jsonl", mine),
        ("report", source, "--tokenizer", "lumina-1k", "--out", write("mine.json", "mine\n")),
    ):
        code, out, err = run(*words)
        assert code == 2 and out == "" and "exists: name another file, or add --force" in err and err.count("\n") == 1
        assert {path.read_text() for path in tmp_path.glob("mine.*")} == {"mine\n"}
        assert not (tmp_path / "o.jsonl").exists() and not (tmp_path / "kept.jsonl").exists()
        assert run(*words, "--force")[0] == 0
        for made in (tmp_path / "o.jsonl", tmp_path / "kept.jsonl"):
            made.unlink(missing_ok=True)
        mine.write_text("mine\n")
    (tmp_path / "folder").mkdir()
    assert "is a folder: name a file" in run("convert", source, "folder", "--force")[2]
    assert run("convert", source.as_uri(), mine, "--force")[0] == 0  # a URL is never the output


def test_no_input_is_written_over_even_by_force(run, write, tmp_path):
    source, other = write("s.json", [ROW] * 3), write("t.json", [ROW])
    before = source.read_bytes()
    for words in (
        ("convert", source, source, "--force"),
        ("report", source, "--filter", source, "d.jsonl", "--force"),
        ("report", source, "--filter", "k.jsonl", source, "--force"),
        ("report", source, "--out", source, "--force"),
        ("report", tmp_path, "--out", source, "--force"),
        ("report", other, "--against", source, "--filter", source, "d.jsonl", "--force"),
        ("report", other, "--against", other, "--against", tmp_path, "--filter", "k.jsonl", source, "--force"),
        ("report", "--against", source, "--out", source, "--force"),
        ("report", other, "--tokenizer", source, "--out", source, "--force"),
    ):
        code, out, err = run(*words)
        assert code == 2 and out == "" and "one of the inputs" in err and source.read_bytes() == before, words
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize("rows", [[ROW], [ROW, NO_ANSWER]])
def test_the_default_file_of_rejects_is_replaced_only_by_force(run, write, tmp_path, rows):
    source, mine = write("s.json", rows), write("c.jsonl.rejects.jsonl", "mine\n")
    code, out, err = run("convert", source, "c.jsonl")
    assert code == 2 and out == "" and "c.jsonl.rejects.jsonl exists: name another file, or add --force" in err
    assert mine.read_text() == "mine\n" and not (tmp_path / "c.jsonl").exists()
    assert run("convert", source, "c.jsonl", "--rejects", "other.jsonl")[0] == 0 and mine.read_text() == "mine\n"
    assert run("convert", source, "c.jsonl", "--force")[0] == 0
    assert "no assistant turn" in mine.read_text() if NO_ANSWER in rows else not mine.exists()


def test_two_outputs_are_two_files_by_any_spelling(run, write, tmp_path):
    source, there = write("s.json", [ROW, NO_ANSWER]), write("there.json", "mine\n")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "hard.json").hardlink_to(there)
    for words in (
        ("report", source, "--out", "o.json", "--filter", "o.json", "d.json"),
        ("report", source, "--out", "o.json", "--filter", "k.json", "link/o.json"),
        ("report", source, "--out", "o.json", "--filter", tmp_path / "x.json", "./link/../" + tmp_path.name + "/x.json"),
        ("report", source, "--out", there, "--filter", "k.json", "hard.json"),
        ("convert", source, "o.json", "--rejects", "./o.json"),
        ("convert", source, "hard.json", "--rejects", there),
    ):
        code, out, err = run(*words, "--force")
        assert code == 2 and out == "" and "are one file: name two" in err and err.count("\n") == 1, words
        assert {path.name for path in tmp_path.iterdir()} == {"s.json", "there.json", "hard.json", "link"}
        assert there.read_text() == "mine\n"


def test_c031_a_report_replaces_a_report(run, write, tmp_path):
    source = write("s.json", [ROW] * 3)
    for out in ("r.html", "r.json"):
        for _ in range(2):
            code, out_text, _ = run("report", source, "--tokenizer", "lumina-1k", "--out", out)
            assert code == 0 and f"report: {out}" in out_text


def test_c031_a_bad_suffix_is_refused_before_anything_is_judged_or_written(run, write, tmp_path):
    source = write("s.json", [ROW] * 3)
    for out in ("r.pdf", "new/r", "r.html.gz"):
        code, told, err = run("report", source, "--tokenizer", "nowhere.json", "--out", out, "--filter", "k.jsonl", "d.jsonl")
        assert code == 2 and told == "" and f"{out}: a report is .html or .json, not " in err
        assert {path.name for path in tmp_path.iterdir()} == {"s.json"}


def test_c031_padding_truncation_and_trained_share_are_told(run, write):
    long = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word " * 80}]}
    short = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word " * 30}]}
    path = write("s.jsonl", [long] + [short] * 3)
    words = ("--tokenizer", "lumina-1k", "--seq-length", "64")
    for verb in ("validate", "report"):
        told, figures = run(verb, path, *words)[1], json.loads(run(verb, path, *words, "--json")[1])
        assert figures["cut"]["conversations"] >= 1 and 0 < figures["packing"]["padding_share"] < 1
        assert f"trained ({100 * figures['trained_share']:.1f} %)" in told
        assert f"{figures['cut']['lost_tokens']:,} tokens cut off (" in told
        assert f"{100 * figures['packing']['padding_share']:.1f} % padding" in told
    assert (
        "0 longer than 8,192: nothing is cut off" in run("report", path, "--tokenizer", "lumina-1k", "--seq-length", "8192")[1]
    )


def test_c031_nothing_to_report_on_is_an_error_that_names_the_file(run, write, tmp_path):
    code, out, err = run("report", write("bad.jsonl", "{\n"), "--tokenizer", "lumina-1k")
    assert code == 65 and out == "" and "bad.jsonl:2: not valid JSON" in err and not list(tmp_path.glob("*.html"))
    code, out, _ = run("report", write("half.jsonl", [{"messages": []}, {"messages": [{"role": "user", "content": "q"}]}]))
    assert code == 65
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    code, out, _ = run("report", write("half.jsonl", [{"messages": []}, good]), "--tokenizer", "lumina-1k")
    assert code == 0 and "1 record with a problem" in out and "half.jsonl:1: 'messages' is empty; " in out


def test_c036_prepare_says_where_a_path_goes(run, write):
    path = write("s.json", [ROW])
    code, _, err = run("prepare", path)
    assert code == 2 and f"write train_data_path={path}" in err


def test_c144_a_place_that_cannot_be_written_is_one_line(run, write):
    write("file", "x")
    code, _, err = run("sample", "file/x.jsonl", "--split", "eval")
    assert code == 2 and "file/x.jsonl: cannot be written (File exists); check the folder" in err and err.count("\n") == 1
