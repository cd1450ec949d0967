"""The Chat screen on a real socket with a scripted model (terminal.md 2.7). No torch."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from rich.cells import cell_len

from lumina_engine.chat import catalogue
from lumina_engine.chat.catalogue import explain_checkpoint, list_entries, run_entries
from lumina_engine.chat.client import probe, socket_path
from lumina_engine.chat.modes import ChatError
from lumina_engine.checkpoint.verify import Report
from lumina_tui.chatting import Lost, Phase, start_server
from lumina_tui.widgets.chat_transcript import Item, Transcript
from lumina_tui.wrapping import wrap
from tests.chat.chat_screen import App, Servers, isolated, opened, runs, say, servers, shows
from tests.chat.fakes import commit_checkpoint
from tests.tui.helpers import until

__all__ = ["isolated", "runs", "servers"]  # fixtures

ROOT = Path(__file__).resolve().parents[2]


# the way through


async def test_c136_choose_talk_and_find_the_saved_file_by_keyboard_at_80x24(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers, None) as (app, pilot):
        await until(pilot, lambda: "eval_loss" in app.shown)
        lines = app.shown.splitlines()
        assert "200  best latest" in lines[3] and "100" in lines[4]  # best first
        await pilot.press("enter")
        await until(pilot, lambda: app.chat.left.link.phase is Phase.READY)
        assert servers.started == [(runs / "autumn/checkpoints/step-000200").resolve()]
        await until(pilot, lambda: "READY" in app.shown)
        assert "x step-000100" in app.shown and "eval_loss 1.5000" in app.shown  # what the server says it has
        await pilot.press(*"hi", "ctrl+j", *"ho", "enter")
        await until(pilot, lambda: "answer 1 to hi" in app.shown and app.chat.left.link.phase is Phase.READY)
        assert servers.backend.asked[0][0] == [{"role": "user", "content": "hi\nho"}]
        assert "4 tokens, 8.0 tokens/s, 0.5 s, first token 250 ms" in app.shown
        assert "standard | context 14 of 256" in app.shown
        saved = list((runs.parent / "chats").iterdir())
        assert len(saved) == 1
        assert json.loads(saved[0].read_text())["conversation"][1]["content"] == "answer 1 to hi\nho"


async def test_c136_a_running_server_is_used_as_it_is(runs: Path, servers: Servers) -> None:
    servers((runs / "autumn/checkpoints/step-000200").resolve(), lambda: False)
    async with opened(runs, servers) as (app, pilot):
        await until(pilot, lambda: "READY" in app.shown)
    assert len(servers.started) == 1
    assert servers.running[0][1].is_alive()  # and it goes on without us


async def test_c136_the_reply_streams(runs: Path, servers: Servers) -> None:
    servers.backend.reply = "one two three four"
    async with opened(runs, servers) as (app, pilot):
        servers.backend.gate.clear()
        app.chat.field.put("x")
        await pilot.press("enter")
        await until(pilot, lambda: "WRITING" in app.shown)
        assert app.chat.why_not("chat.again") == "a reply is being written: Esc stops it"
        servers.backend.gate.set()
        await until(pilot, lambda: "one two three four" in app.shown)


async def test_c136_what_is_typed_right_after_enter_is_not_lost(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers) as (app, pilot):
        app.chat.field.put("/mode precise")
        await pilot.press("enter", *"next")
        assert app.chat.field.text == "next"
        assert app.chat.left.link.session is not None and app.chat.left.link.session.mode == "precise"


# stopping, failing


async def test_c110_esc_stops_the_reply_then_leaves_the_field(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers) as (app, pilot):
        app.chat.field.put("endless")
        await pilot.press("enter")
        await until(pilot, lambda: "answer" in app.shown)
        await pilot.press("escape")
        await until(pilot, lambda: app.chat.left.link.phase is Phase.READY)
        await until(pilot, lambda: ", stopped" in app.shown)
        assert app.chat.field.has_focus
        await pilot.press("escape")
        assert app.chat.left.transcript.has_focus
        await pilot.press("i")
        assert app.chat.field.has_focus


async def test_c110_a_server_that_goes_mid_reply_costs_nothing_but_that_reply(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers) as (app, pilot):
        await say(app, pilot, "first")
        app.chat.field.put("endless question")
        await pilot.press("enter")
        await until(pilot, lambda: "answer 2" in app.shown)
        servers.stop("stopped by SIGTERM")
        await until(pilot, lambda: app.chat.left.link.phase is Phase.GONE)
        await until(pilot, lambda: "NO SERVER" in app.shown)
        text = " ".join(app.shown.replace("│", " ").split())
        assert "the chat server has left (stopped by SIGTERM). The conversation is kept: r starts the server again" in text
        kinds = [(item.kind, item.text[:17], item.foot.partition(", seed")[0]) for item in app.chat.left.transcript.items]
        assert ("assistant", "answer 1 to first", "4 tokens, 8.0 tokens/s, 0.5 s, first token 250 ms") in kinds
        assert ("assistant", "answer 2 to endle", "not finished") in kinds
        app.chat.field.put("lost?")
        app.chat.field.focus()
        await pilot.press("enter")
        assert app.chat.field.text == "lost?"  # it could not be sent, so it stays
        await pilot.press("escape", "r")
        await until(pilot, lambda: app.chat.left.link.phase is Phase.READY)
        assert len(servers.started) == 2
        session = app.chat.left.link.session
        assert session is not None and session.unsent == "endless question" and len(session.history) == 2
        servers.backend.reply = "done now"
        session.unsent = "question"
        app.chat.left.transcript.focus()
        await pilot.press(".")
        await until(pilot, lambda: "done now" in app.shown and app.chat.left.link.phase is Phase.READY)
        assert [turn["content"] for turn in session.history] == ["first", "answer 1 to first", "question", "done now"]


async def test_c110_a_server_that_leaves_between_replies_is_noticed(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers) as (app, pilot):
        app.chat.left.link.watch()
        assert app.chat.left.link.phase is Phase.READY
        servers.stop("idle for 1800 s")
        app.chat.left.link.watch()
        await until(pilot, lambda: "NO SERVER" in app.shown)
        assert shows(app, "the chat server has left (idle for 1800 s)")


async def test_c110_a_server_that_cannot_start_says_why_and_r_tries_again(runs: Path, servers: Servers) -> None:
    servers.refuse = (
        "step-000200 is damaged: model/model.safetensors, chunk 0; verify it with `lumina-engine checkpoint verify`"
    )
    async with opened(runs, servers) as (app, pilot):
        await until(pilot, lambda: "NO SERVER" in app.shown)
        assert "step-000200 is damaged" in app.shown and "r tries again" in app.shown
        servers.refuse = None
        await pilot.press("r")
        await until(pilot, lambda: "READY" in app.shown)


async def test_c110_an_unknown_checkpoint_is_one_line(runs: Path, servers: Servers) -> None:
    app = App(runs, checkpoint="autum", starter=servers)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "did you mean autumn?" in " ".join(app.shown.split()))


async def test_c110_loading_says_what_and_esc_stops_waiting(runs: Path, servers: Servers) -> None:
    servers.load.clear()
    app = App(runs, checkpoint="autumn", starter=servers)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "checking and reading step-000200" in app.shown)
        assert "LOADING" in app.shown and "Esc stops waiting" in app.shown
        await pilot.press("escape")
        await until(pilot, lambda: "choose a checkpoint" in app.shown)
        assert app.chat.left.link.phase is Phase.IDLE
        servers.load.set()
        await until(pilot, lambda: "eval_loss" in app.shown)
        await pilot.press("enter")
        await until(pilot, lambda: "READY" in app.shown)


async def test_c110_a_refused_reply_is_shown_and_the_next_one_works(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers) as (app, pilot):
        servers.backend.fail = ChatError("out of memory while answering: lower it")
        await say(app, pilot, "a")
        assert "! out of memory while answering" in " ".join(app.shown.split())
        servers.backend.fail = None
        await say(app, pilot, "b")
        assert "answer 2 to b" in app.shown


async def test_c136_empty_and_unreadable(tmp_path: Path, runs: Path, servers: Servers) -> None:
    async with opened(tmp_path / "none", servers, None) as (app, pilot):
        await until(pilot, lambda: "No committed checkpoint in" in app.shown)
    (runs / "autumn/checkpoints/step-000200/MANIFEST.json").write_text("{}")
    async with opened(runs, servers, None) as (app, pilot):
        await until(pilot, lambda: "unreadable" in app.shown)
        app.chat.query_one("#checkpoints").move_to(str(runs / "autumn/checkpoints/step-000200"))
        await pilot.press("enter")
        await until(pilot, lambda: any("cannot be used" in notice.text for notice in app.notices))
        assert servers.started == []


async def test_c136_a_newer_checkpoint_is_announced_and_r_loads_it(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers) as (app, pilot):
        await say(app, pilot, "first")
        commit_checkpoint(runs, "autumn", 300)
        await app.chat.left.look_for_newer()
        await until(pilot, lambda: "step-000300 is newer, r loads it" in app.shown)
        await pilot.press("escape", "r")
        await until(pilot, lambda: len(servers.started) == 2 and app.chat.left.link.phase is Phase.READY)
        assert servers.started[1].name == "step-000300"
        assert app.chat.left.link.session is not None and len(app.chat.left.link.session.history) == 2


async def test_c136_the_millionth_step_is_newer_than_the_one_before_it(runs: Path, servers: Servers) -> None:
    commit_checkpoint(runs, "autumn", 999_999)
    async with opened(runs, servers) as (app, pilot):
        await say(app, pilot, "first")
        commit_checkpoint(runs, "autumn", 1_000_000)
        await app.chat.left.look_for_newer()
        await until(pilot, lambda: "step-1000000 is newer, r loads it" in app.shown)


async def test_c084_an_emergency_save_is_announced_and_listed_as_one(runs: Path, servers: Servers) -> None:
    only = commit_checkpoint(runs, "only", 3, folder="emergency")
    async with opened(runs, servers, "only") as (app, pilot):
        await say(app, pilot, "first")
        assert servers.started == [only]
        commit_checkpoint(runs, "only", 4, folder="emergency")
        await app.chat.left.look_for_newer()
        await until(pilot, lambda: "step-000004 is newer, r loads it" in app.shown)
        await pilot.press("escape", "o")
        await until(pilot, lambda: "latest emergency" in app.shown)


async def test_c136_another_checkpoint_in_the_middle_of_a_reply(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers) as (app, pilot):
        app.chat.field.put("endless")
        await pilot.press("enter")
        await until(pilot, lambda: "answer 1" in app.shown)
        old = app.chat.left.link._updates
        app.open_chat("autumn@step-000100")
        await until(pilot, lambda: len(servers.started) == 2 and app.chat.left.link.phase is Phase.READY)
        await until(pilot, lambda: any(isinstance(update, Lost) for update in old), what="the end of the old reply")
        await pilot.pause()
        assert app.chat.left.link.phase is Phase.READY  # what the old connection still says concerns nobody
        assert app.chat.left.link.session is not None and app.chat.left.link.session.unsent == "endless"
        assert app.chat.left.transcript.items[2].foot == "not finished"


# commands and keys


async def test_c106_commands_work_in_the_field(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers, size=(100, 50)) as (app, pilot):
        await say(app, pilot, "one")
        session = app.chat.left.link.session
        assert session is not None
        for line, expected in {
            "/help": "/load PATH",
            "/stats": "messages_sent: 1",
            "/mode analytical": "mode analytical: temperature 0.3, top-p 0.7, top-k 20",
            "/mode wild": "unknown mode 'wild'; modes: standard, creative, analytical, precise",
            "/system Be kind.": "system prompt set",
            "/system": "system prompt: Be kind.",
            "/nonsense": "unknown command /nonsense",
        }.items():
            app.chat.field.put(line)
            await pilot.press("enter")
            await until(pilot, partial(shows, app, expected), what=line)
        app.chat.field.put("/save talk")
        await pilot.press("enter")
        await until(pilot, lambda: (runs.parent / "chats/talk.json").exists())
        app.chat.field.put("/retry")
        await pilot.press("enter")
        await until(pilot, lambda: "answer 2 to one" in app.shown and app.chat.left.link.phase is Phase.READY)
        assert "answer 1 to one" not in app.shown
        app.chat.field.put("/clear")
        await pilot.press("enter")
        await until(pilot, lambda: "conversation forgotten; the system prompt stays" in app.shown)
        assert "answer 2" not in app.shown and session.history == []
        app.chat.field.put(f"/load {runs.parent / 'chats/talk.json'}")
        await pilot.press("enter")
        await until(pilot, lambda: "2 messages loaded" in app.shown)
        assert "answer 2 to one" in app.shown  # the retried conversation went on in its file
        app.chat.field.put("/quit")
        await pilot.press("enter")
        await until(pilot, lambda: app._exit)


async def test_c136_mode_settings_new_copy_export_and_recall(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers) as (app, pilot):
        session = app.chat.left.link.session
        assert session is not None and app.chat.why_not("chat.copy") == "nothing was said yet"
        await say(app, pilot, "one")
        await pilot.press("escape", "M")
        assert session.mode == "creative"
        await pilot.press("comma")
        await until(pilot, lambda: "Settings" in app.shown)
        field = app.screen.query_one("Input")
        field.value = "temperature=0 seed=x"
        await pilot.press("enter")
        await until(pilot, lambda: "seed: 'x' is no number" in app.shown)
        field.value = "temperature=0 top_k=100 seed=7"
        await pilot.press("enter")
        await until(pilot, lambda: session.seed == 7)
        assert session.overrides == {"temperature": 0} and session.sampling.top_p == 0.95
        await pilot.press("y")
        await until(pilot, lambda: (runs.parent / "cache/lumina/reply.txt").exists())
        await pilot.press("e", "m")
        exports = app.exports_folder
        await until(pilot, lambda: list(exports.glob("*.md")))
        assert "## You\n\none\n" in next(exports.glob("*.md")).read_text()
        await pilot.press("a")
        assert session.history == [] and app.chat.field.has_focus
        await pilot.press("up")
        assert app.chat.field.text == "one"
        await pilot.press("down")
        assert app.chat.field.text == ""


async def test_c136_readonly_saves_nothing(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers, readonly=True) as (app, pilot):
        await say(app, pilot, "one")
        assert not (runs.parent / "chats").exists()
        assert "--readonly" in (app.chat.refusal("chat.export") or "")
        assert "--readonly" in (app.chat.refusal("chat.delete") or "")


HOSTILE = "\x1b]0;owned\x07 \x1b[2J [/x] [@click=app.quit]x[/] [bold \u202egnp \x9b31m \rover"


async def test_se01_se03_text_of_the_model_is_shown_not_obeyed(runs: Path, servers: Servers) -> None:
    servers.backend.reply = HOSTILE
    async with opened(runs, servers) as (app, pilot):
        await say(app, pilot, HOSTILE)
        text = " ".join(app.shown.replace("│", " ").split())
        assert "[/x] [@click=app.quit]x[/] [bold" in text and "␛]0;owned␇" in text
        assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(app.shown)
    lines = Item("assistant", HOSTILE, foot=HOSTILE).lines(40)
    assert all(
        text.isprintable() for line in lines for text, _ in line
    )  # also without the filter that the app has over every line


async def test_c136_no_size_raises(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers) as (app, pilot):
        await say(app, pilot, "a long message " * 20)
        for choosing in (False, True):
            for size in [(200, 60), (120, 40), (60, 15), (59, 14), (20, 6), (10, 3), (1, 1), (80, 24)]:
                await pilot.resize_terminal(*size)
                await pilot.pause()
                assert ("needs 60x15, has 59x14" in app.shown) == (size == (59, 14))
                if size == (200, 60):  # the conversations beside what is read
                    wanted = "best latest" if choosing else "answer 1"
                    await until(pilot, lambda: "first words" in app.shown and wanted in app.shown)  # noqa: B023
            if not choosing:
                app.chat.action_checkpoints()
                await until(pilot, lambda: "best latest" in app.shown)


# pieces


@pytest.mark.parametrize("width", [1, 2, 5, 20, 79])
def test_wrapped_lines_fit_and_lose_only_spaces(width: int) -> None:
    texts = ["", "word", "two words here", "   indented", "a" * 200, "漢字かな交じり文 and 漢字", "x  y   z ", "e\u0301" * 30]
    for text in texts:
        lines = wrap(text, width)
        assert all(cell_len(line) <= width for line in lines) or width == 1
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrap("one two three", 7) == ["one two", "three"]
    assert wrap("one two three", 8) == ["one two", "three"]
    assert wrap("   indented", 20) == ["   indented"]


def test_text_that_arrives_in_pieces_wraps_as_the_whole() -> None:
    whole = "first line\n\nsecond paragraph that is long\n\tindented\nend of it, really"
    item = Item("assistant")
    for letter in whole:
        item.text += letter
        grown = item.lines(12)
    assert grown == Item("assistant", whole).lines(12)
    assert item.lines(30) == Item("assistant", whole).lines(30)


async def test_the_transcript_follows_only_from_the_bottom(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers) as (app, pilot):
        transcript: Transcript = app.chat.left.transcript
        for number in range(40):
            transcript.add("note", f"line {number}")
        await pilot.pause()
        assert "line 39" in app.shown
        transcript.focus()
        await pilot.press("k", "k")
        transcript.add("note", "line 40")
        await pilot.pause()
        assert "line 40" not in app.shown and "G 1 new line" in app.shown
        await pilot.press("g")
        await pilot.pause()
        assert "best of run autumn" in app.shown
        await pilot.press("G")
        transcript.add("note", "line 41")
        await pilot.pause()
        assert "line 41" in app.shown


def test_the_list_is_best_first_over_all_runs(runs: Path) -> None:
    commit_checkpoint(runs, "winter", 10)
    (runs / "winter/metrics.jsonl").write_text("")
    (runs / "broken").mkdir()
    os.utime(runs / "autumn/checkpoints", (1, 1))
    names = [entry.reference for entry in list_entries(runs)]
    assert names == ["winter@step-000010", "autumn@step-000200", "autumn@step-000100"]
    assert list_entries(runs / "nothing") == []


def test_c084_the_list_has_emergency_saves_and_the_same_latest_as_the_resolver(runs: Path) -> None:
    commit_checkpoint(runs, "autumn", 300, folder="emergency")
    only = commit_checkpoint(runs, "only", 3, folder="emergency")
    for run, path in (("autumn", runs / "autumn/emergency/step-000300"), ("only", only)):
        entries = run_entries(runs / run)
        assert [entry.path for entry in entries if entry.latest] == [path] == [explain_checkpoint(f"{run}@latest", runs)[0]]
        assert entries[0].emergency and explain_checkpoint(entries[0].reference, runs)[0] == path
    (runs / "autumn/emergency/step-000300/MANIFEST.json").write_text("{}")
    entries = run_entries(runs / "autumn")
    assert [entry.step for entry in entries] == [300, 200, 100] and entries[0].problem
    assert [entry.step for entry in entries if entry.latest] == [200], "the newest that is sound"
    assert explain_checkpoint("autumn@latest", runs)[0] == entries[1].path


def test_what_its_run_removes_while_it_is_listed_is_left_out(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = catalogue.read_manifest

    def read(path: Path) -> Report:
        if path.name == "step-000100":
            path.rename(path.with_name(".trash-step-000100-1"))
        return real(path)

    monkeypatch.setattr(catalogue, "read_manifest", read)
    assert [entry.reference for entry in list_entries(runs)] == ["autumn@step-000200"]


async def test_the_starter_gives_the_engines_own_words(tmp_path: Path) -> None:
    def argv(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    def start(code: str, given_up: Callable[[], bool] = lambda: False) -> int:
        return start_server(tmp_path, given_up, argv(code))

    place = socket_path(tmp_path)
    place.parent.mkdir(mode=0o700)
    serving = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.chat import fakes; fakes.serve({str(place)!r})"
    pid = await asyncio.to_thread(start, serving)
    hello = probe(place)
    assert hello is not None and hello.pid == pid  # here the child itself is the server
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ChatError, match=r"^no such checkpoint$"):
        await asyncio.to_thread(start, "import sys; print('lumina-engine: no such checkpoint', file=sys.stderr); sys.exit(65)")
    with pytest.raises(ChatError, match="ended with exit code 3"):
        await asyncio.to_thread(start, "raise SystemExit(3)")
    with pytest.raises(ChatError, match="given up"):
        await asyncio.to_thread(start, "import signal; signal.pause()", lambda: True)
