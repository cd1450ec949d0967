"""Chat: choose a committed checkpoint, talk to it through a chat server that outlives this program."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textual.containers import Horizontal
from textual.events import Key

from lumina_engine.chat.catalogue import CheckpointError, Entry, explain_checkpoint, list_entries, run_entries
from lumina_engine.chat.events import Done, Start, Token
from lumina_engine.chat.modes import MODES, ChatError, parse_settings
from lumina_engine.chat.session import ChatSession

from ..chatting import ChatLink, Connected, Lost, Phase, Progress, Refused, Saved, Starter, Update
from ..paint import duration, whole
from ..widgets.chat_checkpoints import CheckpointTable
from ..widgets.chat_field import MessageField
from ..widgets.chat_talk import Talk
from ..widgets.chat_transcript import Transcript
from ..widgets.table import Table
from .base import LuminaScreen, State

if TYPE_CHECKING:
    from textual.app import ComposeResult

WATCH_TIME = 1.0  # s between two looks whether the server is still there
NEWER_TIME = 5.0  # s between two looks for a newer checkpoint of this run
WRITING = "a reply is being written: Esc stops it"


class ChatScreen(LuminaScreen):
    """One conversation with one checkpoint."""

    scope = "chat"
    number = 7
    heading = "Chat"
    DEFAULT_CSS = """
    ChatScreen #checkpoints { width: 46; display: none; }
    ChatScreen.-wide #checkpoints { display: block; }
    ChatScreen.-choosing #checkpoints { width: 1fr; display: block; }
    ChatScreen.-choosing #talk { display: none; }
    ChatScreen.-choosing.-wide #checkpoints { width: 46; }
    ChatScreen.-choosing.-wide #talk { display: block; }
    """

    def __init__(
        self, *, checkpoint: str | Path | None = None, starter: Starter | None = None, chats_dir: Path | str = "chats"
    ) -> None:
        super().__init__()
        self._wanted = checkpoint
        self._chats_dir = Path(chats_dir)
        self.link = ChatLink(starter)
        self._newer: Entry | None = None

    def content(self) -> ComposeResult:
        with Horizontal(classes="content"):
            yield CheckpointTable(id="checkpoints")
            yield Talk(id="talk")

    @property
    def talk(self) -> Talk:
        return self.query_one(Talk)

    # life

    def on_mount(self) -> None:
        self.link.save = not self.lumina.readonly
        self.set_interval(NEWER_TIME, self._look_for_newer)
        self.set_interval(WATCH_TIME, lambda: self.link.watch())
        if self._wanted is None:
            self._choose()
        else:
            self._open(self._wanted)
            self._refresh_list()

    def on_unmount(self) -> None:
        self.link.disconnect()

    def retarget(self, **arguments: Any) -> bool:
        """Another checkpoint in the same screen: the conversation goes on with it."""
        if "checkpoint" not in arguments:
            return False
        self._open(arguments["checkpoint"])
        return True

    # choosing

    def _choose(self) -> None:
        self.add_class("-choosing")
        self.set_frame(subject="choose a checkpoint", badge="")
        if self.talk.empty:
            self.talk.transcript.set_state(State.EMPTY, "Enter on a checkpoint loads it.")
        self.query_one(CheckpointTable).focus()
        self._refresh_list()

    def _refresh_list(self) -> None:
        self.run_worker(self._list(), group="list", exclusive=True, exit_on_error=False)

    async def _list(self) -> None:
        table = self.query_one(CheckpointTable)
        root = self.lumina.runs_root
        table.searching(root)
        table.show(await asyncio.to_thread(list_entries, root), root)

    def on_table_chosen(self, message: Table.Chosen) -> None:
        entry = self.query_one(CheckpointTable).chosen(message.key)
        if entry is not None and entry.problem is not None:
            self.lumina.notice(f"{entry.path.name} cannot be used: {entry.problem}", "warning")
        elif entry is not None:
            self._open(entry.path)

    def on_key(self, event: Key) -> None:
        if event.key == "escape" and self.has_class("-choosing") and self.link.phase in (Phase.READY, Phase.GONE):
            event.stop()  # back to the conversation
            self.remove_class("-choosing")
            self.talk.transcript.focus()
            if self.link.phase is Phase.GONE:
                self.set_frame(subject=str(self.link.path), badge="NO SERVER", badge_role="bad")

    # connecting

    def _open(self, checkpoint: str | Path) -> None:
        self._wanted = checkpoint
        self.remove_class("-choosing")
        self.set_frame(subject=str(checkpoint), badge="LOADING", badge_role="accent")
        self.talk.transcript.focus()
        self.run_worker(self._resolve(checkpoint), group="open", exclusive=True, exit_on_error=False)

    async def _resolve(self, checkpoint: str | Path) -> None:
        try:
            path, why = await asyncio.to_thread(explain_checkpoint, checkpoint, self.lumina.runs_root)
        except (CheckpointError, OSError) as error:
            self.link.disconnect()
            self.link.phase = Phase.GONE
            self._gone(str(error))
        else:
            self.talk.break_off()
            self.link.connect(path, why)

    def _connected(self, update: Connected) -> None:
        info = update.backend.info
        if self.link.session is None:
            self.link.session = ChatSession(update.backend, chats_dir=self._chats_dir)
        self._newer = None
        self.talk.say("note", f"{update.notice + ': ' if update.notice else ''}{info.line()}")
        if self.link.session.unsent:
            self.talk.say("note", ". sends the last message again")
        self.talk.transcript.set_title(info.name, f"{info.precision} {info.device}")
        if self.has_class("-choosing"):
            # the list is on screen and keeps the keys: a hidden field must not take them
            self.set_frame(badge="READY, Esc goes to it", badge_role="good")
        else:
            self.talk.field.focus()

    def _gone(self, error: str) -> None:
        """No server. What was said stays, and so does the message that got no answer."""
        self.talk.break_off()
        if self.talk.empty:
            self.talk.transcript.set_state(State.ERROR, f"{error}\n\nr tries again, o chooses another checkpoint")
        else:
            self.talk.say(
                "error", f"{error}. The conversation is kept: r starts the server again, o chooses another checkpoint"
            )
        self.talk.transcript.focus()
        self.set_frame(badge="NO SERVER", badge_role="bad")
        self.refresh_keys()

    async def _look_for_newer(self) -> None:
        path = self.link.path
        if path is None or self.link.phase is not Phase.READY or path.parent.name != "checkpoints":
            return
        entries = await asyncio.to_thread(run_entries, path.parent.parent)
        if entries and entries[0].path.name > path.name and entries[0].problem is None and path == self.link.path:
            self._newer = entries[0]

    # what happens

    def tick(self) -> None:
        before = self.link.phase
        updates = self.link.drain()
        for update in updates:
            self._take(update)
        self.talk.settle()
        if updates or before is not self.link.phase:
            self.refresh_keys()
        self._show_frame()

    def _take(self, update: Update) -> None:
        if isinstance(update, Start | Token | Done):
            self.talk.take(update)
        elif isinstance(update, Progress):
            if self.talk.empty:
                text = f"{update.detail}, {duration(update.seconds)}\n\nEsc stops waiting"
                self.talk.transcript.set_state(State.LOADING, text)
            self.set_frame(badge=f"LOADING {duration(update.seconds)}", badge_role="accent")
        elif isinstance(update, Connected):
            self._connected(update)
        elif isinstance(update, Lost):
            self._gone(update.error)
        elif isinstance(update, Refused):
            self.talk.break_off()
            self.talk.say("error", update.error)
        elif isinstance(update, Saved) and update.error:
            self.lumina.notice(update.error, "error")

    def _show_frame(self) -> None:
        session, phase = self.link.session, self.link.phase
        if session is None or phase not in (Phase.READY, Phase.REPLYING) or self.has_class("-choosing"):
            return
        info = session.backend.info
        seed = f" | seed {session.seed}" if session.seed is not None else ""
        context = f"context {whole(session.context_used)} of {whole(info.context_limit)}"
        self.set_frame(subject=f"{info.name} | {session.mode}{seed} | {context}")
        if phase is Phase.REPLYING:
            self.set_frame(badge="WRITING", badge_role="accent")
        elif self._newer is not None:
            self.set_frame(badge=f"{self._newer.path.name} is newer, r loads it", badge_role="warn")
        else:
            self.set_frame(badge="READY", badge_role="good")

    # the message field

    def on_message_field_sent(self, message: MessageField.Sent) -> None:
        session = self.link.session
        outcome = session.command(message.text) if session is not None else None
        if session is not None and outcome is None and self.link.phase is Phase.READY:
            self.talk.say("user", message.text)
            self.talk.begin()
            self.link.send(message.text)
        elif session is None or outcome is None:
            self.talk.field.give_back(message.text)
            reasons = {Phase.REPLYING: WRITING, Phase.GONE: "no server: r starts it again"}
            self.lumina.notice(reasons.get(self.link.phase, "no checkpoint is loaded yet"), "warning")
        elif outcome.action == "quit":
            self.app.exit()
        elif outcome.action == "retry":
            self.action_again()
        else:
            if outcome.action in ("clear", "load"):
                self.talk.show_history(session)
            self.talk.say("note" if outcome.ok else "error", outcome.text)
        self.tick()

    def on_message_field_escaped(self) -> None:
        if self.link.phase is Phase.REPLYING:
            self.link.cancel()
        else:
            self.talk.transcript.focus()

    async def on_transcript_escaped(self, _message: Transcript.Escaped) -> None:
        if self.link.phase is Phase.REPLYING:
            self.link.cancel()
        elif self.link.phase is Phase.CONNECTING:
            self.link.disconnect()
            self._choose()
        else:
            await self.app.run_action("do('app.back')")

    # actions

    def why_not(self, action_id: str) -> str | None:
        name, session = action_id.rpartition(".")[2], self.link.session
        if name != "write" and name != "copy" and self.link.phase is Phase.REPLYING:
            return WRITING
        if name in ("checkpoints", "reload"):
            return None
        if session is None:
            return "no checkpoint is loaded"
        if name == "again" and self.link.phase is not Phase.READY:
            return "no server: r starts it again"
        if name == "export" and self.lumina.readonly:
            return "--readonly: no file is written"
        if (name == "again" and not session.can_retry) or (name in ("copy", "export") and not session.history):
            return "nothing was said yet"
        return None

    @property
    def session(self) -> ChatSession:
        """The conversation; actions run only while there is one (`why_not`)."""
        assert self.link.session is not None
        return self.link.session

    def action_write(self) -> None:
        self.talk.field.focus()

    def action_again(self) -> None:
        if reason := self.why_not("chat.again"):
            self.lumina.notice(reason, "warning")
            return
        self.talk.begin_again(self.session)
        self.link.retry()

    def action_mode(self) -> None:
        names = list(MODES)
        outcome = self.session.command(f"/mode {names[(names.index(self.session.mode) + 1) % len(names)]}")
        self.talk.say("note", outcome.text if outcome is not None else "")

    def action_new(self) -> None:
        self.session.clear()
        self.talk.transcript.clear()
        self.talk.say("note", "new conversation" + ("; the system prompt stays" if self.session.system_prompt else ""))
        self.talk.field.focus()

    def action_checkpoints(self) -> None:
        self._choose()

    def action_settings(self) -> None:
        session = self.session

        def apply(answer: str) -> None:
            session.overrides, session.seed = parse_settings(session.mode, answer)
            self.talk.say("note", f"settings: {session.settings_text()}")

        def wrong(answer: str) -> str | None:
            try:
                parse_settings(session.mode, answer)
            except ChatError as error:
                return str(error)
            return None

        hint = "name=value with spaces between; seed=none draws a new one for each reply"
        self.lumina.prompt("Settings", apply, value=session.settings_text(), lines=[hint], check=wrong)

    def action_reload(self) -> None:
        if self.has_class("-choosing"):
            self._choose()
        elif self._newer is not None:
            self._open(self._newer.path)
        elif self.link.phase is Phase.GONE:
            self._open(self._wanted or "")
        else:
            self.lumina.notice("nothing to reload: the server answers and no checkpoint is newer")

    def action_copy(self) -> None:
        replies = [turn["content"] for turn in self.session.history if turn["role"] == "assistant"]
        self.lumina.copy_text(replies[-1] if replies else "", "reply.txt")

    def action_export(self) -> None:
        from .dialogs import Choice

        choices = [Choice("j", "JSON, to load again", "json"), Choice("m", "Markdown, to read", "markdown")]
        self.lumina.ask("Export the conversation", choices, self._export)

    def _export(self, kind: str) -> None:
        try:
            path = self.session.save() if kind == "json" else self.session.export_markdown()
        except ChatError as error:
            self.lumina.notice(str(error), "error")
        else:
            self.lumina.notice(f"written to {path}")
