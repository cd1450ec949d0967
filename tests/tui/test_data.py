"""C137, C142: the Data screen: sources, checks, rows with their loss mask, jobs in processes of their own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from lumina_tui import data_text, jobs
from lumina_tui.application import LuminaApp
from lumina_tui.data_sources import BUILT_IN, Look, Settings, Sources, look_at, output_name
from lumina_tui.data_work import wrong_output, wrong_path
from lumina_tui.form import Form
from lumina_tui.jobs import Job, JobState
from lumina_tui.path_completion import complete
from lumina_tui.screens.data import DataScreen
from lumina_tui.screens.path_prompt import PathPrompt
from lumina_tui.terminal import COLOURS
from lumina_tui.terminal import Look as Terminal
from lumina_tui.widgets.panel import State

from .helpers import screen_text, until

CSS = Path(__file__).resolve().parents[2] / "lumina_tui" / "app.tcss"
HOSTILE = "\x1b]0;x\x07[/bold]\u202e[@click=app.leave()]\x9b31m"


def record(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def lines(*records: Any) -> str:
    return "".join(json.dumps(item) + "\n" for item in records)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder to work in."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


class App(LuminaApp):
    CSS_PATH = CSS

    def __init__(self, **arguments: Any) -> None:
        super().__init__("runs", look=Terminal("braille", COLOURS, False, 10.0), **arguments)


async def opened(pilot: Any, *paths: str) -> DataScreen:
    """The screen with these paths added, once their files were looked at."""
    pilot.app.memory.set("data.paths", list(paths))
    screen = pilot.app.open_screen(8)
    await until(pilot, lambda: screen.is_current and all(s.look for s in screen.sources.rows.values()), what="a look")
    if paths:
        screen.table.move_to(paths[0])
        await until(pilot, lambda: screen.chosen is not None and screen.chosen.key == paths[0])
    return screen


def shown(panel: Any) -> str:
    return "\n".join("".join(text for text, _ in line) for line in panel._text)


# jobs


class Script(Job):
    """A job that runs a piece of Python instead of the engine."""

    def __init__(self, code: str, **arguments: Any) -> None:
        super().__init__(["data", "validate"], **arguments)
        self.code_text = code

    @property
    def argv(self) -> list[str]:
        return [sys.executable, "-c", self.code_text]


async def test_c137_a_job_tells_progress_and_gives_its_answer():
    seen: list[dict[str, Any]] = []
    code = """
import json, sys, os
print(json.dumps({"progress": "x", "conversations": 3}), file=sys.stderr, flush=True)
print("a word", file=sys.stderr)
print(json.dumps({"alone": os.getsid(0) == os.getpid(), "input": sys.stdin.read()}))
sys.exit(1)"""
    job = Script(code, changed=lambda job: seen.append(dict(job.progress)))
    await job.run()
    assert job.state is JobState.DONE and job.code == 1 and job.result == {"alone": True, "input": ""}
    assert job.progress == {"progress": "x", "conversations": 3} and seen[-1] == job.progress


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import sys; print('lumina-engine: a.jsonl:3: no', file=sys.stderr); sys.exit(65)", "a.jsonl:3: no"),
        ("import sys; sys.exit(2)", "exit code 2 and no answer"),
        ("import os; os.kill(os.getpid(), 9)", "signal SIGKILL"),
        ("print('{')", "no answer"),
        ("import sys; print('{}'); sys.exit(2)", "exit code 2"),
    ],
)
async def test_c137_a_failed_job_says_why(code, says):
    job = Script(code)
    await job.run()
    assert job.state is JobState.FAILED and says in job.error


async def test_c137_cancel_ends_the_whole_group_also_one_that_does_not_listen(monkeypatch, tmp_path):
    monkeypatch.setattr(jobs, "GRACE", 0.3)
    pids = tmp_path / "pids"
    code = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal,time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"])
open({str(pids)!r} + ".part", "w").write(f"{{os.getpid()}} {{child.pid}}")
os.rename({str(pids)!r} + ".part", {str(pids)!r})
time.sleep(600)"""
    job = Script(code)
    running = asyncio.ensure_future(job.run())
    while not pids.exists():
        await asyncio.sleep(0.01)
    own, child = map(int, pids.read_text().split())
    await job.cancel()
    await running
    assert job.state is JobState.CANCELLED and job.error == "" and job.over
    for pid in (own, child):
        for _ in range(200):
            if not _lives(pid):
                break
            await asyncio.sleep(0.02)
        assert not _lives(pid)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_c137_the_end_of_the_program_ends_checks_and_leaves_preparations(tmp_path):
    for keep in (False, True):
        begun, ended = tmp_path / f"begun{keep}", tmp_path / f"ended{keep}"
        code = f"""
import time, os
open({str(begun)!r}, "w").close()
for _ in range(200):
    time.sleep(0.01)
    if os.path.exists({str(tmp_path / "go")!r}): break
open({str(ended)!r}, "w").close()"""
        task = asyncio.ensure_future((job := Script(code, keep=keep)).run())
        while not begun.exists():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (tmp_path / "go").touch()
        assert await job._process.wait() == (0 if keep else -signal.SIGTERM)
        assert ended.exists() == keep
        (tmp_path / "go").unlink()


# sources


def settings(**changes: Any) -> Settings:
    form = Form.from_preset("debug")
    for name, value in changes.items():
        form.set_value(name, value)
    return Settings.of(form)


def test_c137_sources_are_those_of_the_configuration_the_corpus_and_the_users():
    sources = Sources(settings(), ["mine.jsonl"])
    assert [(s.key, s.use) for s in sources.rows.values()] == [(BUILT_IN, "train"), ("mine.jsonl", "added")]
    kept = sources.rows["mine.jsonl"]
    sources.configure(settings(train_data_path=["a.jsonl", "mine.jsonl"], eval_data_path="e.jsonl"))
    uses = {s.key: s.use for s in sources.rows.values()}
    assert uses == {"a.jsonl": "train", "mine.jsonl": "train", "e.jsonl": "eval", BUILT_IN: "built-in"}
    assert sources.rows["mine.jsonl"] is kept
    words = sources.validate(kept)
    assert words[words.index("--against=e.jsonl") + 1 :] == ["--", "mine.jsonl"]
    assert sources.prepare(kept) == ["data", "prepare", *sources.settings.arguments]
    assert sources.validate(sources.rows[BUILT_IN])[-1] == "--"


def test_c137_sources_of_a_mixed_run_are_those_of_its_tasks():
    paths = {"chat": "a.jsonl", "code": ["b.jsonl", "c.jsonl"]}
    sources = Sources(settings(multi_task=True, task_data_paths=paths))
    uses = {s.key: s.use for s in sources.rows.values()}
    assert uses == {"a.jsonl": "train", "b.jsonl": "train", "c.jsonl": "train", BUILT_IN: "built-in"}
    assert 'train_data_path="b.jsonl"' in sources.preview(sources.rows["b.jsonl"], 0)
    sources.took({key: Look(((key, 100, 1),)) for key in ("a.jsonl", "b.jsonl", "c.jsonl")})
    assert sources.share(sources.rows["a.jsonl"]) == (None, ""), "tasks have shares, files have none"


def test_c137_share_of_the_mix_is_marked_guessed_until_all_is_measured():
    sources = Sources(settings(train_data_path=["a", "b"]))
    a, b = sources.rows["a"], sources.rows["b"]
    assert sources.share(a) == (None, "")
    sources.took({"a": Look((("a", 300, 1),)), "b": Look((("b", 100, 1),))})
    assert sources.share(a) == (0.75, "guessed") and sources.share(sources.rows[BUILT_IN]) == (None, "")
    for source, tokens in ((a, 10), (b, 30)):
        source.check = {"tokens": tokens, "tokens_basis": "measured", "files": [], "problem_counts": {}}
    assert sources.share(a) == (0.25, "measured")


def test_c137_a_source_is_stale_when_a_file_changed_came_or_went(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(record("q", "a")))
    sources = Sources(settings(), [str(tmp_path)])
    source = sources.rows[str(tmp_path)]

    def look() -> bool:
        sources.took({source.key: look_at(source.key)})
        return source.stale

    found = path.stat()
    source.check = {"files": [{"path": str(path), "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}]}
    assert not look()
    os.utime(path, ns=(1, 1))
    assert look()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert not look()
    (tmp_path / "b.jsonl").write_text(lines(record("q", "b")))
    assert look()


def test_c137_a_path_with_odd_characters_stays_one_word():
    path = "-- odd: [x], \u00e9 'q' \"d\" #\U0001f600.jsonl"
    Path(path).write_text(lines(record("q", "a")))
    sources = Sources(settings(), [path])
    source = sources.rows[path]
    from lumina_engine.config.loading import merge

    for words in (sources.preview(source, 0), sources.prepare(source)):
        pairs = [word for word in words if "=" in word and not word.startswith("--")]
        assert merge("debug", None, pairs).config.train_data_path == path
    assert sources.validate(source)[-2:] == ["--", path] == sources.convert(source, "o")[2:4]


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "binary", "empty", "nul"])
def test_c137_what_cannot_be_used_says_why(tmp_path, kind):
    path = tmp_path / "x.jsonl"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "binary":
        path.write_bytes(b"\x00\x01")
    elif kind == "empty":
        path.touch()
    look = look_at(str(path) + ("\0" if kind == "nul" else ""))
    assert look.problem and look.format == ""


def test_c137_formats_are_told_by_content(shared):
    for folder, name in (
        ("alpaca", "alpaca"),
        ("sharegpt", "sharegpt"),
        ("messages", "messages"),
        ("text", "text"),
        ("oasst", "oasst"),
    ):
        assert look_at(str(shared / folder)).format == name


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the folder {folder}, which a checkout does not have")
    return folder


def test_output_names_and_what_is_wrong_with_them(tmp_path):
    sources = Sources(settings(), ["a/b.json", "dir/*", "dir/"])
    assert [output_name(sources.rows[k]) for k in sources.added] == [
        "b.messages.jsonl",
        "dir.messages.jsonl",
        "dir.messages.jsonl",
    ]
    (tmp_path / "there").touch()
    assert wrong_output(str(tmp_path / "there")) and wrong_output("  ") and wrong_output(str(tmp_path / "new")) is None


def test_a_path_is_checked_at_first_sight_only_and_folders_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "walk", lambda *_, **more: pytest.fail("a key press walked through a folder"))
    assert wrong_path(str(tmp_path)) is None and wrong_path("*.jsonl") is None and wrong_path(" ") and wrong_path("a\0")
    assert wrong_path(str(tmp_path / "nowhere")) and wrong_path("x" * 5000)
    monkeypatch.undo()
    (tmp_path / "many").mkdir()
    for number in range(30):
        (tmp_path / "many" / f"{number}.jsonl").write_text("{}\n")
    monkeypatch.setattr("lumina_tui.data_sources._ENTRIES", 20)
    assert "more than 20 entries" in look_at(str(tmp_path / "many")).problem
    assert "more than 20 entries" in look_at(str(tmp_path / "many/*")).problem


def test_completion_as_in_a_shell(tmp_path):
    tmp_path = tmp_path / "work"
    for name in ("alpha.json", "alpine.json", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "beta").mkdir()
    (tmp_path / "beta" / "x.jsonl").touch()
    assert complete("al") == ("alp", ["alpha.json", "alpine.json"])
    assert complete("alph") == ("alpha.json", ["alpha.json"])
    assert complete("b") == ("beta/", ["beta/"]) and complete("beta/") == ("beta/x.jsonl", ["x.jsonl"])
    assert complete("")[1] == ["alpha.json", "alpine.json", "beta/"] and complete(".h")[0] == ".hidden"
    assert complete(f"{tmp_path}/b")[0] == f"{tmp_path}/beta/"
    assert complete("nowhere/x") == ("nowhere/x", []) and complete("a\0/b") == ("a\0/b", [])


# texts


def test_c142_trained_tokens_are_marked_and_underlined_and_nothing_by_colour_alone():
    source = Sources(settings()).rows[BUILT_IN]
    pieces = [
        {"kind": "context", "document": 1, "tokens": 5, "text": "<|im_start|>user\nq<|im_end|>\n", "ends_turn": False},
        {"kind": "trained", "document": 1, "tokens": 3, "text": "one\n\ntwo<|im_end|>", "ends_turn": True},
        {"kind": "context", "document": 2, "tokens": 1, "text": "\n", "ends_turn": False},
        {"kind": "trained", "document": 2, "tokens": 3, "text": "cut", "ends_turn": False},
        {"kind": "padding", "document": 0, "tokens": 7, "text": "", "ends_turn": False},
    ]
    source.rows[0] = {"documents": 2, "tokens": 12, "trained": 6, "padding": 7, "pieces": pieces}
    source.total_rows = 3
    told = data_text.sample(source)[2:]
    texts = ["".join(text for text, _ in line) for line in told]
    assert texts == [
        "-- document 1 of 2 --",
        "  <|im_start|>user",
        "  q<|im_end|>",
        "T one",
        "T two<|im_end|>",
        "-- document 2 of 2 --",
        "T cut",
        "T (cut: no end of turn)",
        "P padding, 7 tokens",
    ]
    assert [line[1][1] for line in told if line[0][0] == "T "] == ["trained", "trained", "trained", "warn"]
    assert Terminal().palette.of("trained").underline and Terminal(palette=COLOURS).palette.of("trained").color
    assert data_text.sample_title(source) == ("Sample row 1 of 3", "19 tokens, 32 % trained")


def test_c137_histogram_tells_what_lies_beyond_seq_length():
    told = data_text.histogram(
        {"shortest": 3, "longest": 90, "median": 20, "edges": [0, 16, 64, 128], "counts": [1, 18, 2]}, 64
    )
    texts = ["".join(text for text, _ in line) for line in told]
    assert "3 to 90" in texts[0] and "< seq_length" in texts[2] and "over" in texts[3] and "over" not in texts[1]
    assert texts[2].count("█") == 18 and texts[1].count("█") == 1
    assert told[3][1][1] == "warn" and told[2][1][1] == "accent"


# the screen


async def test_c137_empty_names_the_key_and_the_layouts():
    app = App()
    async with app.run_test(size=(120, 30)) as pilot:
        await opened(pilot)
        assert "a adds a file or folder" in screen_text(app) and "built-in" in screen_text(app)
        assert "preset debug: lumina-1k" in screen_text(app) and "not checked" in screen_text(app)


async def test_c137_validate_shows_lines_bad_bytes_lengths_and_then_stale(tmp_path):
    long = record("why", "because " * 400)
    bad = Path("bad.jsonl")
    bad.write_bytes(lines(record("q", "a"), record("q", "a"), long).encode() + b'{"messages": "caf\xe9"}\n')
    other = Path("good.jsonl")
    other.write_text(lines(record("q", "other")))
    app = App()
    async with app.run_test(size=(160, 50)) as pilot:
        screen = await opened(pilot, "bad.jsonl", "good.jsonl")
        assert "~" in screen_text(app)  # tokens are guessed before they are counted
        await screen.action_do("data.validate")
        source = screen.chosen
        await until(pilot, lambda: source.check is not None)
        text = shown(screen.findings)
        for part in (
            "bad.jsonl:4 byte 18 is not UTF-8",
            'here  {"messages": "caf\\xe9"}\\x0a',
            "expected  save the file as UTF-8",
            "3 conversations",
            "(measured)",
            "% trained",
            "1 longer than seq_length 256",
            "1 repeat an earlier one",
            "bad.jsonl:2 = line 1",
            "< seq_length",
            "no evaluation data named",
        ):
            assert part in text, f"{part}\n{text}"
        assert "1 problem" in screen_text(app) and screen.sources.rows["good.jsonl"].check is None
        bad.write_text(lines(record("q", "mended")))
        screen._looked = 0.0
        await until(pilot, lambda: "changed since" in screen_text(app))
        assert "a file has changed since this check: v checks again" in shown(screen.findings)
        await screen.action_do("data.validate")
        await until(pilot, lambda: "clean" in screen_text(app))


async def test_c137_overlap_with_the_configured_evaluation_data_is_found():
    Path("t.jsonl").write_text(lines(record("q", "a"), record("r", "b")))
    Path("e.jsonl").write_text(lines(record("r", "b")))
    form = Form.from_preset("debug")
    form.set_value("train_data_path", "t.jsonl")
    form.set_value("eval_data_path", "e.jsonl")
    from lumina_tui.drafts import save_draft

    save_draft(form)
    app = App()
    async with app.run_test(size=(160, 45)) as pilot:
        screen = app.open_screen(8)
        await until(pilot, lambda: "e.jsonl" in screen.sources.rows)
        screen.table.move_to("t.jsonl")
        await until(pilot, lambda: screen.chosen.key == "t.jsonl" and screen.chosen.look is not None)
        assert screen.chosen.use == "train" and "100 %" in screen_text(app)
        await screen.action_do("data.validate")
        await until(pilot, lambda: screen.chosen.check is not None)
        text = shown(screen.findings)
        assert "1 are also in the evaluation data" in text and "t.jsonl:2" in text


async def test_c142_rows_of_every_layout_and_their_keys(tmp_path):
    Path("alpaca.json").write_text(json.dumps([{"instruction": f"ask {n}", "output": f"tell {n} " * 20} for n in range(30)]))
    app = App()
    async with app.run_test(size=(160, 45)) as pilot:
        screen = await opened(pilot, "alpaca.json")
        source = screen.chosen
        await until(pilot, lambda: source.total_rows is not None, what="rows fetched by themselves")
        total = source.total_rows
        assert total >= 3 and f"Sample row 1 of {total}" in screen_text(app) and "T tell" in screen_text(app)
        sample = screen.sample
        await pilot.resize_terminal(110, 30)
        sample.action_page_down()
        assert sample._top > 0
        await screen.action_do("data.next")
        assert source.at_row == 1 and sample._top == 0  # another row begins at its top
        await pilot.resize_terminal(160, 45)
        await screen.action_do("data.previous")
        await screen.action_do("data.previous")
        await until(pilot, lambda: source.at_row == total - 1 and source.at_row in source.rows)
        assert f"Sample row {total} of {total}" in screen_text(app)
        ends = [p["ends_turn"] for row in source.rows.values() for p in row["pieces"] if p["kind"] == "trained"]
        assert ends and all(ends)


async def test_c137_a_source_that_cannot_be_sampled_says_why_and_r_tries_again():
    Path("x.jsonl").write_text("{}\n")
    Path("y.jsonl").write_text('{"messages": 1}\n')
    app = App()
    async with app.run_test(size=(160, 45)) as pilot:
        screen = await opened(pilot, "y.jsonl", "x.jsonl")
        sample = screen.sample
        await until(pilot, lambda: sample.state is State.ERROR)
        assert "y.jsonl:1" in sample.message and "r tries again" in sample.message
        Path("y.jsonl").write_text(lines(record("q", "a")))
        await screen.action_do("data.reload")
        await until(pilot, lambda: sample.state is State.LIVE)
        screen.table.move_to("x.jsonl")
        await until(pilot, lambda: "no known layout" in shown(screen.findings))
        assert "not available yet: OASST" in shown(screen.findings) and "unusable" in screen_text(app)
        assert screen.why_not("data.validate") is not None


async def test_c137_counts_grow_and_are_marked_so_far_and_x_cancels(monkeypatch):
    Path("a.jsonl").write_text(lines(record("q", "a")))
    code = """
import json, sys, time
print(json.dumps({"progress": "x", "conversations": 1234, "tokens": 99, "problems": 2, "bytes": 42, "total_bytes": 100}),
      file=sys.stderr, flush=True)
time.sleep(600)"""
    monkeypatch.setattr(Job, "argv", property(lambda self: [sys.executable, "-c", code]))
    app = App()
    async with app.run_test(size=(120, 30)) as pilot:
        screen = await opened(pilot, "a.jsonl")
        assert screen.why_not("data.cancel") == "nothing runs for this source"
        await screen.action_do("data.validate")
        await until(pilot, lambda: "checking 42 %" in screen_text(app))
        assert "1,234 conversations, 99 tokens, 2 problems so far" in shown(screen.findings)
        assert "1.23 k" in screen_text(app) and "X cancels" in shown(screen.findings)
        assert "already" in (screen.why_not("data.validate") or "")
        source = screen.chosen
        await screen.action_do("data.cancel")
        await until(pilot, lambda: not source.running)
        assert source.jobs["validate"].state is JobState.CANCELLED and "not checked" in screen_text(app)
        assert any("cancelled" in notice.text for notice in app.notices)


async def test_c137_a_cancelled_sample_can_be_asked_for_again(monkeypatch):
    Path("a.jsonl").write_text(lines(record("q", "a")))
    app = App()
    async with app.run_test(size=(120, 30)) as pilot:
        with monkeypatch.context() as slow:
            slow.setattr(Job, "argv", property(lambda self: [sys.executable, "-c", "import time; time.sleep(600)"]))
            screen = await opened(pilot, "a.jsonl")
            source = screen.chosen
            await until(pilot, lambda: source.running)
            await screen.action_do("data.cancel")
            await until(pilot, lambda: source.jobs["preview"].state is JobState.CANCELLED)
        assert "> shows rows" in screen.sample.message
        await screen.action_do("data.next")
        await until(pilot, lambda: source.rows)


async def test_c137_convert_and_prepare_leave_files_and_sources():
    Path("s.json").write_text(
        json.dumps([{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}] * 3)
    )
    app = App()
    async with app.run_test(size=(120, 30)) as pilot:
        screen = await opened(pilot, "s.json")
        source = screen.chosen
        screen.work.begin(source, screen.sources.convert(source, "out.messages.jsonl"), keep=True)
        await until(pilot, lambda: "out.messages.jsonl" in screen.sources.rows)
        assert len(Path("out.messages.jsonl").read_text().splitlines()) == 3 and screen.chosen is source
        assert any("3 of 3 conversations written" in notice.text for notice in app.notices)
        await screen.action_do("data.prepare")
        await until(pilot, lambda: source.prepared is not None or source.jobs["prepare"].error)
        assert source.jobs["prepare"].error == "" and list(Path("data/cache").glob("*/tokens.u32"))
        assert "prepared" in shown(screen.findings)
        screen.action_report()
        (export,) = Path("exports").glob("data-s-*.json")
        assert json.loads(export.read_text())["prepared"]["stores"]["train"]["conversations"] >= 1


async def test_c137_adding_a_path_with_completion_is_remembered(tmp_path):
    Path("mydata").mkdir()
    Path("mydata/one.jsonl").write_text(lines(record("q", "a")))
    app = App()
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await opened(pilot)
        await screen.action_do("data.add")
        await until(pilot, lambda: isinstance(app.screen, PathPrompt))
        await pilot.press("m", "y", "tab")
        await until(pilot, lambda: app.screen.query_one("Input").value == "mydata/")
        await pilot.press("tab", "enter")
        await until(pilot, lambda: app.screen is screen)
        assert screen.chosen.key == "mydata/one.jsonl"
        await until(pilot, lambda: screen.chosen.look is not None)
        assert app.memory.get("data.paths", [""]) == ["mydata/one.jsonl"]
        await screen.action_do("data.forget")
        assert app.memory.get("data.paths", [""]) == [] and list(screen.sources.rows) == [BUILT_IN]
        assert Path("mydata/one.jsonl").exists()


async def test_c137_copy_find_and_a_screen_that_rests_repaints_nothing(monkeypatch):
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).write_text(lines(record("q", name)))
    app = App()
    async with app.run_test(size=(160, 45)) as pilot:
        screen = await opened(pilot, "a.jsonl", "b.jsonl")
        copied: list[str] = []
        monkeypatch.setattr(app, "copy_text", lambda text, name="": copied.append(text))
        await screen.action_do("data.copy")
        screen.table.find("b.jsonl")
        await until(pilot, lambda: screen.chosen.key == "b.jsonl")
        await until(pilot, lambda: screen.chosen.rows, what="the sample")
        screen.chosen.jobs.clear()
        await screen.action_do("data.command")
        assert copied == ["a.jsonl", "lumina-engine data validate --tokenizer lumina-1k --seq-length 256 -- b.jsonl"]
        drawn: list[str] = []
        for widget in screen.query("*"):
            monkeypatch.setattr(widget, "refresh", lambda *args, _name=str(widget), **kwargs: drawn.append(_name))
        for _ in range(3):
            screen._looked = 0.0
            screen.tick()
            await until(pilot, lambda: not screen._looking)
        assert drawn == []


async def test_c137_readonly_reads_but_writes_nothing():
    Path("a.jsonl").write_text(lines(record("q", "a")))
    app = App(readonly=True)
    async with app.run_test(size=(120, 30)) as pilot:
        screen = await opened(pilot, "a.jsonl")
        for action in ("data.convert", "data.prepare", "data.report"):
            assert "--readonly" in (screen.refusal(action) or "")
        assert screen.refusal("data.validate") is None


async def test_c138_80x24_is_a_list_and_enter_shows_the_detail():
    Path("a.jsonl").write_text(lines(record("q", "the answer")))
    app = App()
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await opened(pilot, "a.jsonl")
        assert "Findings" not in screen_text(app) and "preview" not in screen.chosen.jobs
        await pilot.press("enter")
        await until(pilot, lambda: "Findings" in screen_text(app) and "T the answer" in screen_text(app))
        assert "Sources" not in screen_text(app)
        await pilot.press("escape")
        await until(pilot, lambda: "Sources" in screen_text(app))
        assert "Findings" not in screen_text(app)


async def test_any_size_and_hostile_names_and_contents():
    name = HOSTILE.replace("/", "_") + ".jsonl"
    Path(name).write_text(lines(record(HOSTILE, HOSTILE), {"messages": HOSTILE}))
    app = App()
    async with app.run_test(size=(160, 45)) as pilot:
        screen = await opened(pilot, name)
        source = screen.chosen
        await screen.action_do("data.validate")
        await until(pilot, lambda: source.check is not None and "preview" in source.jobs and source.jobs["preview"].over)
        for width, height in ((20, 6), (10, 3), (1, 1), (59, 14), (100, 30), (200, 60), (80, 24)):
            await pilot.resize_terminal(width, height)
            await pilot.pause()
            text = screen_text(app)
            assert not set(text) & {"\x1b", "\x07", "\x9b", "\u202e"}
