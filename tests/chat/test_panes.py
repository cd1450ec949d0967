"""Two panes, versions, conversations and the token view of the Chat tab, over real sockets (terminal.md 2.7, C136)."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.chat.client import ServerBackend, probe, socket_path
from lumina_engine.chat.events import Done, Event, Routed, Start, Token
from lumina_engine.chat.generate import LocalBackend, generate
from lumina_engine.chat.loading import open_backend
from lumina_engine.chat.modes import ChatError, Sampling
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_tui.chatting import Phase
from lumina_tui.widgets.chat_conversations import ConversationTable
from lumina_tui.widgets.chat_pane import Pane
from tests.chat.chat_screen import App, Servers, isolated, opened, runs, say, servers, shows
from tests.chat.fakes import FakeBackend, commit_checkpoint
from tests.chat.models import make_model, save_model
from tests.tui.helpers import until
from tests.tui.test_terminal import Terminal
from tests.waiting import until as wait

__all__ = ["isolated", "runs", "servers"]  # fixtures

ROOT = Path(__file__).resolve().parents[2]


def ended(*panes: Pane) -> Callable[[], bool]:
    """Whether no reply is being written and everything that was told is painted."""
    return lambda: all(
        pane.link.phase in (Phase.READY, Phase.GONE) and not pane.link._updates and not pane._grown for pane in panes
    )


@asynccontextmanager
async def two(runs: Path, servers: Servers, size: tuple[int, int] = (120, 40), **more: Any) -> Any:
    """The screen with step-000200 on the left and step-000100 on the right, each answering for itself."""
    servers.others = {"step-000200": FakeBackend("aa", 200), "step-000100": FakeBackend("bb", 100)}
    async with opened(runs, servers, size=size, **more) as (app, pilot):
        app.chat.action_split()
        await until(pilot, lambda: "choose a checkpoint for the right pane" in app.shown and "best latest" in app.shown)
        app.chat.query_one("#checkpoints").move_to(str(runs / "autumn/checkpoints/step-000100"))  # type: ignore[attr-defined]
        await pilot.press("enter")
        await until(pilot, lambda: app.chat.right.link.phase is Phase.READY)
        await until(pilot, lambda: app.chat.field.has_focus)
        yield app, pilot


async def tell(app: App, pilot: Any, text: str) -> None:
    """Send a message to the panes and wait for the end of all replies."""
    app.chat.field.focus()
    app.chat.field.put(text)
    await pilot.press("enter")
    await until(pilot, ended(*app.chat.panes), what="the replies")


def left_right(servers: Servers) -> tuple[FakeBackend, FakeBackend]:
    left, right = servers.others["step-000200"], servers.others["step-000100"]
    assert isinstance(left, FakeBackend) and isinstance(right, FakeBackend)
    return left, right


# two panes


@pytest.mark.parametrize("seed", [None, 7])
async def test_c136_two_checkpoints_answer_the_same_prompt_with_the_same_seed(
    runs: Path, servers: Servers, seed: int | None
) -> None:
    async with two(runs, servers) as (app, pilot):
        app.chat.settings.seed = seed
        app.chat.use_settings()
        for text in ("why?", "and then?"):
            await tell(app, pilot, text)
        left, right = left_right(servers)
        assert [asked[0][-1]["content"] for asked in left.asked] == ["why?", "and then?"]
        assert [(asked[1], asked[2]) for asked in left.asked] == [(asked[1], asked[2]) for asked in right.asked]
        assert seed is None or left.asked[0][2] == seed
        assert shows(app, "same prompt, same seed" + (" 7" if seed else ""))
        app.chat.action_again()
        await until(pilot, ended(*app.chat.panes))
        assert left.asked[-1][2] == right.asked[-1][2] != left.asked[-2][2]
        assert app.chat.left.session.version == app.chat.right.session.version == (2, 2)


async def test_c136_one_slow_pane_does_not_hold_the_other_back(runs: Path, servers: Servers) -> None:
    async with two(runs, servers) as (app, pilot):
        left, right = left_right(servers)
        right.gate.clear()
        app.chat.field.put("hello")
        await pilot.press("enter")
        await until(pilot, ended(app.chat.left))
        await until(pilot, lambda: shows(app, "4 tokens") or shows(app, "3 tokens"))
        assert app.chat.right.link.phase is Phase.REPLYING and "WRITING" in app.shown
        app.chat.field.put("more")
        await pilot.press("enter")
        assert app.chat.field.text == "more" and len(left.asked) == 1  # both answer, or none is asked
        right.gate.set()
        await until(pilot, ended(app.chat.right))
        assert [turn["content"] for turn in app.chat.right.session.history][1].startswith("answer 1")


async def test_c136_esc_stops_both(runs: Path, servers: Servers) -> None:
    async with two(runs, servers) as (app, pilot):
        app.chat.field.put("endless")
        await pilot.press("enter")
        await until(pilot, lambda: app.shown.count("answer 1") >= 2)
        await pilot.press("escape")
        await until(pilot, ended(*app.chat.panes))
        assert [pane.session.last.reason for pane in app.chat.panes] == ["cancelled", "cancelled"]


@pytest.mark.parametrize("side", ["left", "right"])
async def test_c136_either_pane_may_fail_alone(runs: Path, servers: Servers, side: str) -> None:
    async with two(runs, servers) as (app, pilot):
        failing = left_right(servers)[side == "right"]
        failing.fail = ChatError("out of memory while answering: lower it")
        await tell(app, pilot, "one")
        broken, sound = getattr(app.chat, side), app.chat.right if side == "left" else app.chat.left
        assert [turn["content"] for turn in sound.session.history] == ["one", "answer 1 to one"]
        assert broken.session.history == [] and broken.session.unsent == "one"
        assert any(item.kind == "error" and "out of memory" in item.text for item in broken.transcript.items)
        failing.fail = None
        app.chat._active = broken
        broken.again(3)
        await until(pilot, ended(*app.chat.panes))
        assert broken.session.history[0]["content"] == "one"


async def test_c136_a_dead_server_is_one_panes_affair_and_r_starts_it_again(runs: Path, servers: Servers) -> None:
    async with two(runs, servers) as (app, pilot):
        await tell(app, pilot, "one")
        server, thread = servers.running.pop()  # of the right pane
        server.stop("killed")
        await asyncio.to_thread(thread.join, 20)
        app.chat.right.link.watch()
        await until(pilot, lambda: app.chat.right.link.phase is Phase.GONE)
        await tell(app, pilot, "two")
        assert len(app.chat.left.session.history) == 4 and app.chat.right.session.unsent == "two"
        assert any("not sent here" in item.text for item in app.chat.right.transcript.items)
        app.chat.right.enter()
        await pilot.pause()
        app.chat.action_reload()
        await until(pilot, lambda: app.chat.right.link.phase is Phase.READY)
        app.chat.action_again()
        await until(pilot, ended(*app.chat.panes))
        assert [turn["content"] for turn in app.chat.right.session.history][2] == "two"
        left, right = left_right(servers)
        assert len(left.asked) == 2 and right.asked[-1][2] == left.asked[-1][2]  # only what was missing, with the same seed


async def test_c136_the_split_closes_and_opens_and_its_words_stay_in_the_file(runs: Path, servers: Servers) -> None:
    async with two(runs, servers) as (app, pilot):
        await tell(app, pilot, "one")
        app.chat.action_split()
        await pilot.pause()
        assert app.chat.panes == [app.chat.left]
        await tell(app, pilot, "two")
        [path] = (runs.parent / "chats").iterdir()
        content = json.loads(path.read_text())
        assert len(content["conversation"]) == 4 and len(content["second"]["conversation"]) == 2
        assert content["second"]["checkpoint"]["step"] == 100
        app.chat.action_split()
        await until(pilot, lambda: app.chat.right.link.phase is Phase.READY)
        assert len(app.chat.right.session.history) == 2


async def test_c136_giving_up_a_load_keeps_what_was_said(runs: Path, servers: Servers) -> None:
    async with two(runs, servers) as (app, pilot):
        await tell(app, pilot, "one")
        servers.load.clear()
        server, thread = servers.running.pop()
        server.stop("killed")
        await asyncio.to_thread(thread.join, 20)
        app.chat.right.open(app.chat.right.wanted)
        app.chat.right.enter()
        await until(pilot, lambda: "LOADING" in app.shown and app.chat.right.transcript.has_focus)
        await pilot.press("escape")
        await until(pilot, lambda: app.chat.right.link.phase is Phase.GONE)
        assert app.chat.split and len(app.chat.right.session.history) == 2
        servers.load.set()
        app.chat.action_reload()
        await until(pilot, lambda: app.chat.right.link.phase is Phase.READY)


# versions


async def test_c136_regenerate_keeps_the_old_answer_and_brackets_switch(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers) as (app, pilot):
        await say(app, pilot, "one")
        await pilot.press("escape", ".")
        await until(pilot, lambda: shows(app, "version 2 of 2"))
        assert "answer 2 to one" in app.shown and "answer 1 to one" not in app.shown
        await pilot.press("[")
        await until(pilot, lambda: shows(app, "version 1 of 2"))
        assert "answer 1 to one" in app.shown
        await pilot.press("[")
        assert "no other version" in app.notices[-1].text
        await pilot.press("i")
        await say(app, pilot, "two")
        assert servers.backend.asked[-1][0][1]["content"] == "answer 1 to one"  # the chosen one is what was said
        [path] = (runs.parent / "chats").iterdir()
        stored = json.loads(path.read_text())
        assert [len(entry["replies"]) for entry in stored["versions"]] == [2, 1] and stored["versions"][0]["chosen"] == 0


async def test_c136_a_failed_regeneration_leaves_the_answer(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers) as (app, pilot):
        await say(app, pilot, "one")
        servers.backend.fail, servers.backend.fail_after = ChatError("no luck"), 1
        app.chat.action_again()
        await until(pilot, lambda: shows(app, "no luck"))
        assert shows(app, "the answer before stays:") and shows(app, "answer 1 to one")
        assert app.chat.left.session.version == (1, 1)


# conversations


async def test_c136_conversations_are_saved_each_turn_switched_renamed_and_deleted(runs: Path, servers: Servers) -> None:
    chats = runs.parent / "chats"
    async with opened(runs, servers, size=(160, 45)) as (app, pilot):
        table = app.chat.query_one(ConversationTable)
        await say(app, pilot, "first talk")
        app.chat.action_again()
        await until(pilot, ended(app.chat.left))
        await pilot.press("escape", "a")
        await say(app, pilot, "second talk")
        await until(pilot, lambda: len(table.rows) == 2)
        assert len(list(chats.iterdir())) == 2 and shows(app, "* second talk")
        await pilot.press("escape", "c")
        await until(pilot, lambda: table.has_focus)
        first = next(summary.path for summary in table.found if summary.first == "first talk")
        table.move_to(str(first))
        await pilot.press("R")
        app.screen.query_one("Input").value = "about/autumn"
        await pilot.press("enter")
        await until(pilot, lambda: "without a folder" in app.shown)
        app.screen.query_one("Input").value = "autumn-1"
        await pilot.press("enter")
        await until(pilot, lambda: (chats / "autumn-1.json").exists())
        await until(pilot, lambda: str(chats / "autumn-1.json") in {row.key for row in table.rows})
        table.move_to(str(chats / "autumn-1.json"))
        await pilot.press("enter")
        await until(pilot, lambda: shows(app, "2 messages loaded"))
        assert "answer 2 to first talk" in app.shown and shows(app, "version 2 of 2")  # with its versions
        assert app.chat.left.choose_version(-1) and "answer 1 to first talk" in app.chat.left.session.history[-1]["content"]
        await say(app, pilot, "go on")
        assert len(json.loads((chats / "autumn-1.json").read_text())["conversation"]) == 4
        await pilot.press("escape", "D")
        await until(pilot, lambda: "Delete autumn-1 for good?" in app.shown)
        await pilot.press("escape")
        assert (chats / "autumn-1.json").exists()
        app.chat.action_delete()
        await until(pilot, lambda: "Delete autumn-1 for good?" in app.shown)
        await pilot.press("d")
        await until(pilot, lambda: not (chats / "autumn-1.json").exists())
        await until(pilot, lambda: app.chat.left.session.history == [])


async def test_c136_conversations_in_a_compact_terminal(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers) as (app, pilot):
        assert not shows(app, "conversations")
        await say(app, pilot, "first talk")
        await pilot.press("escape", "c")
        await until(pilot, lambda: shows(app, "* first talk"))
        assert not app.chat.field.is_on_screen
        await pilot.press("escape")
        await until(pilot, lambda: shows(app, "answer 1 to first"))


async def test_c136_a_conversation_comes_back_with_both_checkpoints(runs: Path, servers: Servers) -> None:
    async with two(runs, servers) as (app, pilot):
        await tell(app, pilot, "both")
        [path] = (runs.parent / "chats").iterdir()
    content = json.loads(path.read_text())
    content["checkpoint"]["path"] = str(runs / "autumn/checkpoints/step-000200")
    content["second"]["checkpoint"]["path"] = str(runs / "autumn/checkpoints/step-000100")
    path.write_text(json.dumps(content))
    async with opened(runs, servers, None, size=(120, 40)) as (app, pilot):
        await until(pilot, lambda: "best latest" in app.shown)
        app.chat.open_conversation(path)
        await until(pilot, lambda: app.chat.split and app.chat.right.link.phase is Phase.READY)
        await until(pilot, lambda: app.chat.left.link.phase is Phase.READY)
        assert app.shown.count("answer 1 to both") == 2
        await tell(app, pilot, "again both")
        assert len(app.chat.left.session.history) == len(app.chat.right.session.history) == 4


async def test_c136_a_conversation_whose_checkpoint_is_gone_can_be_read(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers) as (app, pilot):
        await say(app, pilot, "words")
    [path] = (runs.parent / "chats").iterdir()
    shutil.rmtree(runs)
    runs.mkdir()
    async with opened(runs, servers, None) as (app, pilot):
        app.chat.open_conversation(path)
        await until(pilot, lambda: shows(app, "answer 1 to words") and shows(app, "is not there"))
        assert "NO SERVER" in app.shown
        app.chat.field.put("hello?")
        app.chat.field.focus()
        await pilot.press("enter")
        assert app.chat.field.text == "hello?"  # not lost
        (path.parent / "broken.json").write_text("{")
        app.chat.open_conversation(path.parent / "broken.json")
        assert "no JSON" in app.notices[-1].text and app.chat.left.session.history[0]["content"] == "words"


async def test_c136_a_checkpoint_deleted_while_it_is_loaded_goes_on_answering(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers) as (app, pilot):
        shutil.rmtree(runs / "autumn")
        await app.chat.left.look_for_newer()
        await say(app, pilot, "still there?")
        assert "answer 1 to still there?" in app.shown
        servers.stop("killed")
        app.chat.left.link.watch()
        await until(pilot, lambda: app.chat.left.link.phase is Phase.GONE)
        app.chat.action_reload()
        await until(pilot, lambda: shows(app, "no run 'autumn'"))
        assert shows(app, "answer 1 to still there?") and len(app.chat.left.session.history) == 2


# settings


async def test_c136_settings_hold_for_both_panes_and_the_next_session(runs: Path, servers: Servers) -> None:
    async with two(runs, servers) as (app, pilot):
        app.chat.run_command("/mode precise")
        app.chat.run_command("/system Be brief.")
        app.chat.settings.apply_text("max_new_tokens=9 seed=3 trace=off")
        app.chat.use_settings()
        await tell(app, pilot, "one")
        for backend in left_right(servers):
            messages, sampling, seed = backend.asked[-1]
            assert messages[0] == {"role": "system", "content": "Be brief."} and seed == 3
            assert sampling == Sampling(0.1, 0.5, 10, max_new_tokens=9)
        app.memory.flush()
    async with opened(runs, servers) as (app, pilot):
        assert app.chat.settings.mode == "precise" and app.chat.settings.seed == 3 and not app.chat.settings.trace
        assert app.chat.left.session.mode == "precise"


async def test_c110_loading_shows_the_share_of_the_weights(runs: Path, servers: Servers) -> None:
    servers.load.clear()
    app = App(runs, checkpoint="autumn", starter=servers)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "checking and reading step-000200 62 %" in app.shown)
        assert "LOADING 62 %" in app.shown
        servers.load.set()
        await until(pilot, lambda: "READY" in app.shown)


# what is written


async def test_c136_markdown_is_laid_out_and_v_shows_it_raw(runs: Path, servers: Servers) -> None:
    servers.backend.reply = "# Title\n\n- **one**\n- two\n\n```\ncode\n```"
    async with opened(runs, servers) as (app, pilot):
        await say(app, pilot, "x")
        await until(pilot, lambda: "│ code" in app.shown)
        assert "**one**" not in app.shown and "- one" in app.shown
        await pilot.press("escape", "v")
        await until(pilot, lambda: "**one**" in app.shown and "```" in app.shown)


async def test_c136_a_growing_reply_is_painted_at_most_eight_times_a_second(
    runs: Path, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(runs, servers) as (app, pilot):
        pane = app.chat.left
        app.chat.field.put("endless")
        await pilot.press("enter")
        await until(pilot, lambda: "answer" in app.shown)
        await pilot.pause()
        pane._painted = float("inf")  # the moment of the last paint: from here on no time passes
        shown, painted = pane.transcript.items[-1].text, []
        monkeypatch.setattr(pane.transcript, "changed", lambda: painted.append(1))
        await until(pilot, lambda: len(pane.transcript.items[-1].text) > len(shown) + 20)
        assert painted == []
        pane._painted = 0.0
        pane.settle()
        pane.settle()
        assert len(painted) <= 1
        await pilot.press("escape")
        await until(pilot, lambda: pane.link.phase is Phase.READY)
        pane.tick()
        assert painted  # the whole, whenever the last part was painted


class Cutting(FakeBackend):
    """Says that older messages were left out."""

    def generate(self, *arguments: Any, **more: Any) -> Iterator[Event]:  # type: ignore[override]
        for event in super().generate(*arguments, **more):
            yield Start(prompt_tokens=200, context_limit=256, dropped=4) if isinstance(event, Start) else event


async def test_c136_a_full_context_says_what_was_cut(runs: Path, servers: Servers) -> None:
    servers.backend = Cutting()
    async with opened(runs, servers) as (app, pilot):
        await say(app, pilot, "x")
        assert shows(app, "the oldest 4 messages were left out: the context holds 256 tokens")
        assert shows(app, "context 204 of 256")


NASTY = [
    "\x1b]0;owned\x07 \x1b[2J [/x] [@click=app.quit]x[/] [bold &#27;[31m",
    "x" * 10_000,
    "e\u0301\u0302" * 300 + " 👨\u200d👩\u200d👧 ❤\ufe0f 漢字 " * 40,
    "\u202eשלום\u202c مرحبا " * 60,
    "```\n" + "code\n" * 300,
    "| a |\n|---|\n" + "| \x1b[2J |\n" * 50,
]


@pytest.mark.parametrize("reply", NASTY, ids=["escapes", "long line", "graphemes", "right to left", "open fence", "table"])
async def test_se01_se03_hostile_text_of_two_models(runs: Path, servers: Servers, reply: str) -> None:
    async with two(runs, servers, size=(80, 24)) as (app, pilot):
        for backend in left_right(servers):
            backend.reply = reply
        await tell(app, pilot, "x")
        for size in ((80, 24), (160, 45), (200, 60), (20, 6), (1, 1), (80, 24)):
            await pilot.resize_terminal(*size)
            await pilot.pause()
            assert not {"\x1b", "\x07", "\x9b", "\u202e", "\u202c", "\r"} & set(app.shown)
            assert all(len(line) <= size[0] for line in app.shown.splitlines()) or not reply.isascii()
        app.chat.left.toggle_tokens()
        await pilot.pause()
        assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(app.shown)
        assert app.is_running


# tokens


async def test_c136_the_token_view_walks_a_reply(runs: Path, servers: Servers) -> None:
    servers.backend.reply = "four words of text"
    async with opened(runs, servers) as (app, pilot):
        await say(app, pilot, "x")
        await pilot.press("escape", "x")
        tokens = app.chat.left.tokens
        await until(pilot, lambda: tokens.has_focus and "1 of 4" in app.shown)
        assert shows(app, '"four " id 0') and "100.0% by the model: softmax of its raw logits" in app.shown
        assert "50.0% as drawn" in app.shown and "experts of 8" in app.shown and "L1  █······· 0:0.75" in app.shown
        await pilot.press("l", "l")
        await until(pilot, lambda: "3 of 4" in app.shown)
        assert shows(app, '"of " id 2') and " 33.3% by the model" in app.shown and "2:0.75" in app.shown
        assert ' 25.0% "of?"' in app.shown  # an alternative
        await pilot.press("$", "h", "0", "L")
        await until(pilot, lambda: "4 of 4" in app.shown)
        await pilot.press("escape")
        await until(pilot, lambda: app.chat.left.transcript.has_focus and "four words of text" in app.shown)


async def test_c136_words_are_found_in_what_was_said(runs: Path, servers: Servers) -> None:
    servers.backend.reply = "\n".join(f"line {number} of the answer" for number in range(60))
    async with opened(runs, servers) as (app, pilot):
        await say(app, pilot, "x")
        assert "line 7 of" not in app.shown
        await pilot.press("escape", "g", "slash")
        await until(pilot, lambda: "Find in this pane" in app.shown)
        app.screen.query_one("Input").value = "LINE answer 7"
        await pilot.press("enter")
        await until(pilot, lambda: "line 7 of" in app.shown.splitlines()[2])
        await pilot.press("n")
        await until(pilot, lambda: "line 17 of" in app.shown.splitlines()[2])


async def test_c136_marks_say_without_colour_what_was_unlikely(runs: Path, servers: Servers) -> None:
    servers.backend.reply = " ".join(f"w{number}" for number in range(15))
    async with opened(runs, servers) as (app, pilot):
        await say(app, pilot, "x")
        app.chat.left.toggle_tokens()
        await pilot.pause()
        lines = app.shown.splitlines()
        at = next(number for number, line in enumerate(lines) if "w0 w1 w2" in line)
        text, marks = lines[at], lines[at + 1]
        assert marks[text.index("w1")] == "." and marks[text.index("w5")] == "-" and marks[text.index("w12")] == "?"
        await app.chat.left.tokens.action_do("tokens.unlikely")
        assert app.chat.left.tokens.index == 10  # 1/11 is the first below 10 %


async def test_c136_each_version_has_its_tokens_and_a_loaded_reply_has_none(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers) as (app, pilot):
        await say(app, pilot, "x")
        app.chat.action_again()
        await until(pilot, ended(app.chat.left))
        pane = app.chat.left
        pane.toggle_tokens()
        assert "".join(traced.token.text for traced in pane.tokens.trace.tokens) == "answer 2 to x"
        pane.choose_version(-1)
        assert "".join(traced.token.text for traced in pane.tokens.trace.tokens) == "answer 1 to x"
        path = pane.session.save()
        app.chat.open_conversation(path)
        await pilot.pause()
        pane.show_tokens()
        await until(pilot, lambda: "This reply has no trace" in app.shown)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real checkpoints of a tiny model with experts."""
    tokenizer = ConversationTokenizer("lumina-1k")
    root = tmp_path_factory.mktemp("tiny")
    for step in (10, 20):
        save_model(make_model(tokenizer, init_std=0.3 + step / 1000), tokenizer, root / "tiny", step)
    return root


async def test_c136_two_real_checkpoints_side_by_side_with_their_tokens(tiny: Path, servers: Servers, tmp_path: Path) -> None:
    opened_by_step = {f"step-0000{step}": open_backend(tiny / f"tiny/checkpoints/step-0000{step}", "cpu") for step in (10, 20)}
    servers.others = dict(opened_by_step)
    async with opened(tiny, servers, "tiny@step-000020", size=(160, 45)) as (app, pilot):
        app.chat.settings.apply_text("max_new_tokens=12 seed=7")
        app.chat.use_settings()
        app.chat.right.wanted = "tiny@step-000010"
        app.chat.action_split()
        await until(pilot, lambda: app.chat.right.link.phase is Phase.READY)
        await tell(app, pilot, "What is 7 + 8?")
        for pane, name in ((app.chat.left, "step-000020"), (app.chat.right, "step-000010")):
            assert pane.session.backend.info.step == int(name[-6:])
            assert_same(pane, opened_by_step[name])
            pane.toggle_tokens()
        await until(pilot, lambda: app.shown.count("by the model: softmax") == 2)
        expert = app.chat.left.tokens.current.routed.routes[0]
        assert f"{expert.experts[0]}:{expert.gates[0]:.2f}" in app.shown


def assert_same(pane: Pane, backend: LocalBackend) -> None:
    """The pane's trace is that of the model: text, probabilities, experts of every token."""
    messages = [{"role": "user", "content": "What is 7 + 8?"}]
    events = list(generate(backend.model, backend.tokenizer, messages, pane.session.sampling, 7, trace=True))
    trace = pane.traces.get((1, 0))
    assert trace is not None
    tokens = [event for event in events if isinstance(event, Token)]
    assert [(t.token.token, t.token.probability, t.token.alternatives) for t in trace.tokens] == [
        (token.token, token.probability, token.alternatives) for token in tokens
    ]
    routed = [event for event in events if isinstance(event, Routed)]
    assert [(t.routed.index, t.routed.routes) for t in trace.tokens if t.routed] == [(r.index, r.routes) for r in routed]
    assert len(routed) == len(tokens) > 0


def test_c136_killing_lumina_harms_neither_server(runs: Path, tmp_path: Path) -> None:
    checkpoints = [runs / f"autumn/checkpoints/step-000{step}" for step in (100, 200)]
    places = [socket_path(path) for path in checkpoints]
    places[0].parent.mkdir(mode=0o700)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.chat import fakes; fakes.serve(sys.argv[1])"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(place)], start_new_session=True) for place in places]
    try:
        wait(lambda: all(probe(place) for place in places), "both servers", deadline=30)
        sockets = {"LUMINA_SOCKETS": str(places[0].parent)}
        with Terminal("--runs", str(runs), str(checkpoints[1]), **sockets) as terminal:
            terminal.expect(b"READY")
            terminal.send(b"endless\r")
            terminal.expect(b"answer 1 to")
        # killed in the middle of a reply: both still answer
        for place in places:
            backend = ServerBackend(place)
            events = list(backend.generate([{"role": "user", "content": "there?"}], Sampling(), 0))
            assert isinstance(events[-1], Done) and events[-1].reason == "stop"
            backend.close()
    finally:
        for process in processes:
            process.kill()
            process.wait(20)


async def test_c136_newer_is_said_of_what_came_since(runs: Path, servers: Servers) -> None:
    async with opened(runs, servers, "autumn@step-000100") as (app, pilot):
        await app.chat.left.look_for_newer()
        assert app.chat.left.newer is None  # step-000200 was there when the older one was chosen
        commit_checkpoint(runs, "autumn", 300)
        await app.chat.left.look_for_newer()
        await until(pilot, lambda: "step-000300 is newer, r loads it" in app.shown)
