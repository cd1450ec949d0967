"""One checkpoint's side of the conversation: its connection, what it said, and how it came to say it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from textual.containers import Vertical
from textual.message import Message

from lumina_engine.chat.catalogue import CheckpointError, Entry, explain_checkpoint, run_entries
from lumina_engine.chat.console import timing
from lumina_engine.chat.events import Done, Routed, Start, Token
from lumina_engine.chat.saved import SavedChat, Version
from lumina_engine.chat.session import ChatSession
from lumina_engine.checkpoint.keep import EMERGENCY
from lumina_engine.checkpoint.verify import step_of

from ..chatting import ChatLink, Connected, Lost, NoBackend, Phase, Progress, Refused, Saved, Starter, Update
from ..paint import duration
from ..traces import Trace, Traces
from .acts import Acts
from .chat_tokens import TokenPanel
from .chat_transcript import Item, Transcript
from .panel import State

if TYPE_CHECKING:
    from textual.app import ComposeResult

WATCH_TIME = 1.0  # s between two looks whether the server is still there
NEWER_TIME = 5.0  # s between two looks for a newer checkpoint
NARROW = 60  # cells below which titles and figures are short
WRITES = 8.0  # repaints of a growing reply a second, at most
_ENDS = {"stop": "", "length": ", cut off at the longest reply", "context": ", the context is full", "cancelled": ", stopped"}


class Pane(Acts, Vertical):
    """Transcript and token view over one `ChatLink`. The screen calls `tick()`; text from outside may come as it is."""

    DEFAULT_CSS = """
    Pane { width: 1fr; }
    Pane TokenPanel { display: none; }
    Pane.-tokens TokenPanel { display: block; }
    Pane.-tokens Transcript { display: none; }
    """

    class Ready(Message):
        """A server answers; the pane has a session."""

        def __init__(self, pane: Pane) -> None:
            super().__init__()
            self.pane = pane

    class Kept(Message):
        """The conversation was saved."""

    def __init__(self, session_of: Callable[[Pane], ChatSession], starter: Starter | None, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.link = ChatLink(starter)
        self.transcript = Transcript(id=f"{id}-transcript")
        self.tokens = TokenPanel(id=f"{id}-tokens")
        self.newer: Entry | None = None
        self._newest = 0  # step of the run's newest checkpoint when this one was chosen
        self.wanted: str | Path | None = None
        self.progress: Progress | None = None  # of loading
        self.traces = Traces()
        self._session_of = session_of
        self._reply: Item | None = None  # being written
        self._again = False  # it is another version of the last one
        self._trace: Trace | None = None
        self._grown = False
        self._painted = 0.0
        self._turned = 0  # how many replies back the token view shows

    def compose(self) -> ComposeResult:
        yield self.transcript
        yield self.tokens

    def on_mount(self) -> None:
        self.set_interval(WATCH_TIME, self.link.watch)
        self.set_interval(NEWER_TIME, self.look_for_newer)

    @property
    def session(self) -> ChatSession | None:
        return self.link.session

    @property
    def empty(self) -> bool:
        """Whether nothing was said yet."""
        return not self.transcript.items

    def enter(self) -> None:
        """Give the focus to what is read here."""
        (self.tokens if self.has_class("-tokens") else self.transcript).focus()

    # connecting

    def open(self, checkpoint: str | Path) -> None:
        """Talk to another checkpoint; the conversation goes on with it."""
        self.wanted = checkpoint
        self.link.disconnect()
        self.link.phase, self.progress = Phase.CONNECTING, None
        self.break_off()
        if self.empty:
            self.transcript.set_state(State.LOADING, f"looking for {checkpoint}\n\nEsc stops waiting")
        self.run_worker(self._resolve(checkpoint), group="open", exclusive=True, exit_on_error=False)

    async def _resolve(self, checkpoint: str | Path) -> None:
        try:
            path, why = await asyncio.to_thread(explain_checkpoint, checkpoint, self.lumina.runs_root)
            newest = await asyncio.to_thread(_newest, path)
        except (CheckpointError, OSError) as error:
            self._gone(str(error))
        else:
            self._newest = step_of((newest.path if newest is not None else path).name) or 0
            self.link.connect(path, why)

    def leave(self) -> None:
        """Leave the server, or stop waiting for it."""
        self.workers.cancel_group(self, "open")
        self.link.disconnect()
        self.break_off()

    def _connected(self, update: Connected) -> None:
        info = update.backend.info
        self.newer = None
        if self.link.session is None:
            self.link.session = self._session_of(self)
            self.link.session.backend = update.backend
        self.say("note", f"{update.notice + ': ' if update.notice else ''}{info.name}{info.line().removeprefix(info.path)}")
        if self.link.session.unsent:
            self.say("note", ". sends the last message again")
        self.post_message(self.Ready(self))

    def _gone(self, error: str) -> None:
        """No server. What was said stays, and so does the message that got no answer."""
        self.link.phase = Phase.GONE
        self.break_off()
        if self.empty:
            self.transcript.set_state(State.ERROR, f"{error}\n\nr tries again, o chooses another checkpoint")
        else:
            self.say("error", f"{error}. The conversation is kept: r starts the server again, o chooses another checkpoint")

    def stay_without(self, why: str) -> None:
        """No server is wanted for now; what was said can be read."""
        self.link.phase = Phase.GONE
        self.say("note", f"{why}: o chooses a checkpoint, r tries again")

    async def look_for_newer(self) -> None:
        """Notice a checkpoint that the run has written since this one was chosen."""
        path = self.link.path
        if path is None or self.link.phase is not Phase.READY:
            return
        newest = await asyncio.to_thread(_newest, path)
        if newest is not None and (step_of(newest.path.name) or 0) > self._newest and path == self.link.path:
            self.newer = newest

    # what happens

    def tick(self) -> bool:
        """Take what has happened and paint it; true if anything has."""
        before = self.link.phase
        updates = self.link.drain()
        for update in updates:
            self._take(update)
        self.settle()
        self._show_title()
        return bool(updates) or before is not self.link.phase

    def _take(self, update: Update) -> None:
        if isinstance(update, Start | Token | Routed | Done):
            self._hear(update)
        elif isinstance(update, Progress):
            if self.empty:
                self.transcript.set_state(State.LOADING, f"{progress_text(update)}\n\nEsc stops waiting")
            self.progress = update
        elif isinstance(update, Connected):
            self._connected(update)
        elif isinstance(update, Lost):
            self._gone(update.error)
        elif isinstance(update, Refused):
            self.break_off()
            self.say("error", update.error)
        elif isinstance(update, Saved) and update.error:
            self.lumina.notice(update.error, "error")
        elif isinstance(update, Saved) and update.path is not None:
            self.post_message(self.Kept())

    def _show_title(self) -> None:
        session, phase = self.link.session, self.link.phase
        if session is None:
            self.transcript.set_title("", "")
            return
        info = session.backend.info
        state = {Phase.CONNECTING: "LOADING", Phase.REPLYING: "WRITING", Phase.GONE: "NO SERVER"}.get(phase, info.device)
        if phase is Phase.READY and self.newer is not None:
            state = f"{self.newer.path.name} is newer, r"
        name = info.name if self.size.width >= NARROW or info.step is None else f"step-{info.step:06d}"
        self.transcript.set_title(f"{name}  {session.mode}", state)

    # talking

    def say(self, kind: str, text: str) -> None:
        """Add what a user, a note or an error says."""
        self.transcript.set_state(State.LIVE)
        self.transcript.add(kind, text)

    def send(self, text: str, seed: int) -> None:
        """Send a message to a server that is ready, or keep it for the one that comes."""
        session = self.link.session
        assert session is not None
        self.say("user", text)
        if self.link.phase is not Phase.READY:
            session.unsent = text
            self.say("note", "not sent here: r starts the server, then . sends it")
            return
        self._begin((len(session.history) + 1, 0))
        self.link.send(text, seed)

    def again(self, seed: int) -> None:
        """Answer the last message again; an answer that it has stays as a version."""
        session = self.link.session
        assert session is not None
        self._again = session.unsent is None
        if self._again:
            at = self._last_answer()
            if at is not None:
                del self.transcript.items[at:]
            self._begin((len(session.history) - 1, session.version[1]))
        else:
            self.show_history()
            self.transcript.add("user", session.unsent or "")
            self._begin((len(session.history) + 1, 0))
        self.link.retry(seed)

    def _begin(self, key: tuple[int, int]) -> None:
        self._reply = self.transcript.add("assistant", "", finished=False)
        self._trace = self.traces.begin(key)
        self._turned = 0
        if self.has_class("-tokens"):
            self.show_tokens()

    def _hear(self, event: Start | Token | Routed | Done) -> None:
        """One event of the reply; `settle` paints what came."""
        self._grown = True
        if self._trace is not None and isinstance(event, Token | Routed):
            self._trace.add(event)
        if self._reply is None:
            return
        if isinstance(event, Start):
            if notice := event.notice():
                self.transcript.items.insert(len(self.transcript.items) - 1, Item("note", notice))
        elif isinstance(event, Token):
            self._reply.text += event.text
        elif isinstance(event, Done):
            self._reply.text += event.tail
            self._end(self._foot(event))

    def _end(self, foot: str) -> None:
        assert self._reply is not None
        self._reply.foot, self._reply.finished = foot, True
        self._reply, self._trace, self._again = None, None, False
        self._painted = 0.0  # the whole is painted now, however short ago the last part was

    def break_off(self) -> None:
        """No more of this reply will come."""
        if self._reply is None:
            return
        kept = self._again
        self._end("not finished")
        self._grown = True
        if kept and self.session is not None and self.session.version[1]:
            self.say("note", "the answer before stays:")
            self._add_answer(len(self.session.history) - 1)
        self.settle()

    def settle(self) -> None:
        """Paint once for all events since the last call, at most `WRITES` times a second while a reply grows."""
        now = time.monotonic()
        if self._grown and now - self._painted >= 1 / WRITES:
            self._grown, self._painted = False, now
            self.transcript.changed()
            if self.has_class("-tokens"):
                self.show_tokens()

    # what was said

    def _last_answer(self) -> int | None:
        items = self.transcript.items
        return next((at for at in range(len(items) - 1, -1, -1) if items[at].kind == "assistant"), None)

    def show_history(self) -> None:
        """The session's conversation instead of what stands there."""
        self.transcript.items.clear()
        session = self.link.session
        for turn, said in enumerate(session.history if session is not None else ()):
            if said["role"] == "assistant":
                self._add_answer(turn)
            else:
                self.transcript.items.append(Item("user", said["content"]))
        self.transcript.set_state(State.LIVE)
        self.transcript.changed()

    def _add_answer(self, turn: int) -> None:
        assert self.session is not None
        entry = self.session.versions.get(turn)
        foot = "" if entry is None else self._version_foot(entry.replies[entry.chosen], entry.chosen + 1, len(entry.replies))
        self.transcript.items.append(Item("assistant", self.session.history[turn]["content"], foot))

    def choose_version(self, step: int) -> bool:
        """Another version of the last answer; false if there is none."""
        session, at = self.link.session, self._last_answer()
        if session is None or at is None or not session.choose_version(step):
            return False
        del self.transcript.items[at:]
        self._add_answer(len(session.history) - 1)
        self.transcript.changed()
        self._turned = 0
        if self.has_class("-tokens"):
            self.show_tokens()
        return True

    def _foot(self, done: Done) -> str:
        number = self.session.version[1] if self.session is not None else 0
        return self._version_foot(Version.of("", done, ""), number, number)

    def _version_foot(self, version: Version, number: int, total: int) -> str:
        done = version.done
        parts = [f"version {number} of {total}"] if total > 1 else []
        if done is not None and self.size.width < NARROW:
            rate = "" if done.tokens_per_s is None else f"{done.tokens_per_s:.1f} tok/s, "
            parts.append(f"{done.tokens:,} tokens, {rate}{done.seconds:.1f} s{_ENDS[done.reason]}")
        elif done is not None:
            parts += [timing(done) + _ENDS[done.reason], f"seed {done.seed}"]
        return ", ".join(parts)

    # tokens

    def toggle_tokens(self) -> None:
        """Show the last reply token by token, or the conversation again."""
        self._turned = 0
        self.set_class(not self.has_class("-tokens"), "-tokens")
        if self.has_class("-tokens"):
            self.show_tokens()
        self.enter()

    def show_tokens(self) -> None:
        """What the token view shows now."""
        session = self.link.session
        if session is None:
            return
        answers = [turn for turn, said in enumerate(session.history) if said["role"] == "assistant"]
        if self._trace is not None and not self._turned:
            self.tokens.show(self._trace, "being written")
        elif answers:
            turn = answers[max(0, len(answers) - 1 - self._turned)]
            entry = session.versions.get(turn)
            chosen = entry.chosen if entry is not None else 0
            of = f" version {chosen + 1}" if entry is not None and len(entry.replies) > 1 else ""
            self.tokens.show(self.traces.get((turn, chosen)), f"answer {turn // 2 + 1}{of}")
        else:
            self.tokens.show(None)

    def on_token_panel_turned(self, message: TokenPanel.Turned) -> None:
        session = self.link.session
        answers = sum(said["role"] == "assistant" for said in session.history) if session is not None else 0
        self._turned = max(0, min(self._turned - message.step, answers - 1))
        self.show_tokens()

    def on_token_panel_escaped(self) -> None:
        self.toggle_tokens()

    # conversations

    def restore(self, chat: SavedChat) -> None:
        """Show and continue what a file holds; without a server it can only be read."""
        if self.link.session is None:
            self.link.session = self._session_of(self)
            path, step, digest = (chat.checkpoint.get(name) for name in ("path", "step", "digest"))
            self.link.session.backend = NoBackend(
                str(path or "-"),
                step if isinstance(step, int) else None,
                digest if isinstance(digest, str) else None,
            )
        self.link.session.restore(chat)
        self.traces.clear()
        self.show_history()
        if self.link.session.unsent:
            self.transcript.add("user", self.link.session.unsent)
            self.say("note", ". sends it again")

    def forget(self) -> None:
        """An empty conversation."""
        if self.link.session is not None:
            self.link.session.clear()
        self.traces.clear()
        self.transcript.clear()
        self.transcript.set_state(State.LIVE)
        self.remove_class("-tokens")


_BADGES = {
    Phase.CONNECTING: ("LOADING", "accent"),
    Phase.REPLYING: ("WRITING", "accent"),
    Phase.GONE: ("NO SERVER", "bad"),
    Phase.READY: ("READY", "good"),
    Phase.IDLE: ("", "dim"),
}


def _newest(path: Path) -> Entry | None:
    """The newest usable checkpoint of the run that `path` belongs to. Blocking."""
    entries = run_entries(path.parent.parent) if path.parent.name in ("checkpoints", EMERGENCY) else []
    return next((entry for entry in entries if entry.latest and entry.problem is None), None)


def badge_of(panes: Sequence[Pane]) -> tuple[str, str]:
    """Badge and role for the first line: of the pane that needs attention most."""
    phases = [pane.link.phase for pane in panes]
    most = next(phase for phase in _BADGES if phase in phases)
    newer = next((pane.newer for pane in panes if pane.newer is not None), None)
    if most is Phase.READY and newer is not None:
        return f"{newer.path.name} is newer, r loads it", "warn"
    progress = next((pane.progress for pane in panes if pane.link.phase is Phase.CONNECTING and pane.progress), None)
    if most is Phase.CONNECTING and progress is not None:
        share = "" if progress.share is None else f" {100 * progress.share:.0f} %"
        return f"LOADING{share} {duration(progress.seconds)}", "accent"
    return _BADGES[most]


def progress_text(progress: Progress) -> str:
    """What is being done, how far it is and how long it takes already."""
    share = "" if progress.share is None else f" {100 * progress.share:.0f} %"
    return f"{progress.detail}{share}, {duration(progress.seconds)}"
