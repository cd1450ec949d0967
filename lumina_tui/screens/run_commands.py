"""Commands to a run from the Monitor: each is asked for where it is final, sent with an id, and answered by a record."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from lumina_engine.run.directory import RunDirectory

from ..ending import Footprint, footprint, kill_run, outcome
from ..feed import Feed
from ..paint import number, whole
from ..requests import Phase, Request
from ..widgets.acts import Acts
from .dialogs import Choice

NEED_RUN = frozenset({"monitor.checkpoint", "monitor.pause", "monitor.set_lr"})


class RunCommands(Acts):
    """Mixin of a screen with a `feed`."""

    feed: Feed | None

    def why_not(self, action_id: str) -> str | None:
        feed = self.feed
        if feed is None:
            return None
        if action_id in NEED_RUN or action_id == "monitor.stop":
            if self.lumina.readonly:
                return "--readonly: runs are left as they are"
            reason = feed.why_no_commands()
            if action_id == "monitor.stop" and feed.alive:
                return None  # a process can be ended without a connection too
            return reason
        if action_id == "monitor.chat":
            if not self.lumina.has_screen(7):
                return "this version has no Chat"
            if feed.run.newest_step() is None:
                return "there is no checkpoint yet; C saves one"
        return None

    def _send(self, cmd: str, text: str, **args: Any) -> Request:
        assert self.feed is not None
        request = self.feed.command(cmd, text, **args)
        self.lumina.spawn(self._follow(request))
        return request

    async def _follow(self, request: Request) -> None:
        """Say in a notice how a command ended, also if another screen is shown by then."""
        while request.open:
            await asyncio.sleep(0.1)
        failed = request.phase.value == "refused"
        shown_here = self.lumina.screen is self and not failed  # by the status line
        self.lumina.notice(request.line(time.time()), "error" if failed else "information", toast=not shown_here)

    def action_checkpoint(self) -> None:
        self._send("checkpoint", "checkpoint now")

    def action_pause(self) -> None:
        assert self.feed is not None
        paused = self.feed.store.state == "paused"
        self._send("resume" if paused else "pause", "resume" if paused else "pause")

    def action_set_lr(self) -> None:
        assert self.feed is not None
        store = self.feed.store
        present = store.steps.last("lr")
        now = f"The schedule stands at {number(present)} (step {whole(store.step)})." if present else "No step was made yet."
        self.lumina.prompt(
            f"Learning rate of {self.feed.run.name}",
            lambda text: self._set_lr(float(text)),
            value=number(present) if present else "",
            lines=[now, "It changes at the next step boundary; the schedule keeps its shape from there."],
            check=check_lr,
        )

    def _set_lr(self, lr: float) -> None:
        self._send("set_lr", f"learning rate {number(lr)}", lr=lr)

    def action_stop(self) -> None:
        assert self.feed is not None
        name = self.feed.run.name
        choices = [Choice("k", "kill the process tree (asks again)", "kill")]
        if self.feed.why_no_commands() is None:
            choices = [
                Choice("s", "save a checkpoint, then stop", "save"),
                Choice("x", "stop without saving", "stop"),
                *choices,
            ]
        self.lumina.ask(f"Stop {name}?", choices, self._stop, ["It can be resumed from its newest checkpoint with R on Home."])

    def _stop(self, answer: str) -> None:
        assert self.feed is not None
        if answer == "kill":
            question = f"Kill every process of {self.feed.run.name}?"
            lines = ["Steps since the newest checkpoint are lost. Checkpoints stay whole."]
            self.lumina.ask(question, [Choice("K", "kill", "kill")], lambda _: self._kill(), lines)
            return
        save = answer == "save"
        request = self._send("stop", "save and stop" if save else "stop without saving", save=save)
        self.lumina.spawn(self._watch_end(self.feed, request))

    def _kill(self) -> None:
        assert self.feed is not None
        self.lumina.spawn(self._kill_tree(self.feed.run))

    async def _kill_tree(self, run: RunDirectory) -> None:
        before = await asyncio.to_thread(footprint, run)
        await asyncio.to_thread(kill_run, run)
        await self._report_end(run, before)

    async def _watch_end(self, feed: Feed, request: Request) -> None:
        """After a stop: wait until the supervisor has gone, then say what that freed and who is still there."""
        before = await asyncio.to_thread(footprint, feed.run)
        while request.open or (feed.alive and not feed.closed and request.phase is Phase.APPLIED):
            await asyncio.sleep(0.2)
        if request.phase is Phase.APPLIED and not feed.alive:
            await self._report_end(feed.run, before)

    async def _report_end(self, run: RunDirectory, before: Footprint) -> None:
        after = await asyncio.to_thread(footprint, run)
        words = f"{run.name}: {outcome(before, after)}"
        self.lumina.notice(words, "error" if after.pids else "information", timeout=20)

    def action_chat(self) -> None:
        assert self.feed is not None
        run = self.feed.run
        name = run.name if run.path.parent == self.lumina.runs_root.absolute() else str(run.path)
        best = any(item.best for item in self.feed.store.checkpoints)
        self.lumina.open_chat(f"{name}@best" if best else name)


def check_lr(text: str) -> str | None:
    """What is wrong with a learning rate, None if nothing is."""
    try:
        value = float(text)
    except ValueError:
        return "a number, such as 3e-4"
    if not math.isfinite(value) or value <= 0:
        return "must be above 0; P pauses the run instead"
    return "must be at most 1" if value > 1 else None
