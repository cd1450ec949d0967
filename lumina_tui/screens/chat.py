"""Chat: choose a committed checkpoint, talk to it through a chat server that outlives this program."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textual.containers import Horizontal, Vertical

from lumina_engine.chat.catalogue import CheckpointError, Entry, explain_checkpoint, list_entries, run_entries
from lumina_engine.chat.console import timing
from lumina_engine.chat.events import Done, Start, Token
from lumina_engine.chat.modes import MODES, ChatError, parse_settings
from lumina_engine.chat.session import ChatSession

from ..chatting import ChatLink, Connected, Lost, Phase, Progress, Refused, Saved, Starter, Update
from ..paint import duration, whole
from ..widgets.chat_checkpoints import CheckpointTable
from ..widgets.chat_field import MessageField
from ..widgets.chat_transcript import Item, Transcript
from ..widgets.table import Table
from .base import LuminaScreen, Panel, State

if TYPE_CHECKING:
    from textual.app import ComposeResult

NEWER_TIME = 5.0  # s between two looks for a newer checkpoint of this run


class ChatScreen(LuminaScreen):
    """One conversation with one checkpoint."""

    scope = "chat"
    number = 7
    heading = "Chat"
    DEFAULT_CSS = """
    ChatScreen #talk { width: 1fr; }
    ChatScreen #checkpoints { width: 46; display: none; }
    ChatScreen.-wide #checkpoints { display: block; }
    ChatScreen.-choosing #checkpoints { width: 1fr; display: block; }
    ChatScreen.-choosing #talk { display: none; }
    ChatScreen #message { height: auto; }
    """

    def __init__(
        self,
        *,
        checkpoint: str | Path | None = None,
        starter: Starter | None = None,
        chats_dir: Path | str = "chats",
    ) -> None:
        super().__init__()
        self._wanted = checkpoint
        self._chats_dir = Path(chats_dir)
        self._starter = starter
        self.link = ChatLink(starter)
        self._reply: Item | None = None
        self._error = ""
        self._newer: Entry | None = None

    def content(self) -> ComposeResult:
        with Horizontal(classes="content"):
            yield CheckpointTable(id="checkpoints")
            with Vertical(id="talk"):
                yield Transcript(id="transcript")
                yield Panel(MessageField(id="field"), id="message")

    # life

    def on_mount(self) -> None:
        self.link = ChatLink(self._starter, save=not self.lumina.readonly)
        panel = self.query_one("#message", Panel)
        panel.set_title("message", "/help for commands")
        panel.set_foot("Enter send  ctrl+j new line  Esc stop, then leave")
        self.set_interval(NEWER_TIME, self._look_for_newer)
        if self._wanted is not None:
            self._open(self._wanted)
        else:
            self._choose()

    def on_unmount(self) -> None:
        self.link.disconnect()

    def retarget(self, **arguments: Any) -> bool:
        """Another checkpoint in the same screen: the conversation goes on with it."""
        if "checkpoint" not in arguments:
            return False
        self._open(arguments["checkpoint"])
        return True

    @property
    def transcript(self) -> Transcript:
        return self.query_one("#transcript", Transcript)

    @property
    def field(self) -> MessageField:
        return self.query_one("#field", MessageField)

    # choosing

    def _choose(self) -> None:
        self.add_class("-choosing")
        self.set_frame(subject="choose a checkpoint")
        table = self.query_one(CheckpointTable)
        table.focus()
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

    # connecting

    def _open(self, checkpoint: str | Path) -> None:
        self.remove_class("-choosing")
        self._error = ""
        self.set_frame(subject=str(checkpoint), badge="LOADING", badge_role="accent")
        self.transcript.focus()
        self.run_worker(self._resolve(checkpoint), group="open", exclusive=True, exit_on_error=False)

    async def _resolve(self, checkpoint: str | Path) -> None:
        try:
            path, why = await asyncio.to_thread(explain_checkpoint, checkpoint, self.lumina.runs_root)
        except (CheckpointError, OSError) as error:
            self._gone(str(error))
        else:
            self.link.connect(path, why)
            self.tick()

    def _connected(self, update: Connected) -> None:
        info = update.backend.info
        if self.link.session is None:
            self.link.session = ChatSession(update.backend, chats_dir=self._chats_dir)
        self._newer, self._error = None, ""
        self.transcript.set_state(State.LIVE)
        self.transcript.add("note", f"{update.notice + ': ' if update.notice else ''}{info.line()}")
        if self.link.session.unsent:
            self.transcript.add("note", ". sends the last message again")
        self.transcript.set_title(info.name, f"{info.precision} {info.device}")
        self.field.focus()

    def _gone(self, error: str) -> None:
        """No server. What was said stays, and so does the message that got no answer."""
        self._error = error
        if self._reply is not None:
            self._reply.foot = "not finished"
            self._reply = None
        talked = bool(self.transcript.items)
        if talked:
            self.transcript.set_state(State.LIVE)
            self.transcript.add("error", f"{error} - r starts the server again, o another checkpoint")
        else:
            self.transcript.set_state(State.ERROR, f"{error}\n\nr tries again, o chooses another checkpoint")
        self.transcript.focus()
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
        if self._reply is not None and any(isinstance(update, Token) for update in updates):
            self.transcript.changed()
        if updates or before is not self.link.phase:
            self.refresh_keys()
        self._show_frame()

    def _take(self, update: Update) -> None:
        if isinstance(update, Token):
            if self._reply is not None:
                self._reply.text += update.text
        elif isinstance(update, Progress):
            if not self.transcript.items:
                text = f"{update.detail}, {duration(update.seconds)}\n\nEsc stops waiting"
                self.transcript.set_state(State.LOADING, text)
            self.set_frame(badge=f"LOADING {duration(update.seconds)}", badge_role="accent")
        elif isinstance(update, Connected):
            self._connected(update)
        elif isinstance(update, Lost):
            self._gone(update.error)
        elif isinstance(update, Start):
            if notice := update.notice():
                self.transcript.items.insert(-1, Item("note", notice))
        elif isinstance(update, Done):
            self._finished(update)
        elif isinstance(update, Refused):
            self._reply = None
            self.transcript.add("error", update.error)
        elif isinstance(update, Saved) and update.error:
            self.lumina.notice(update.error, "error")

    def _finished(self, done: Done) -> None:
        if self._reply is not None:
            reasons = {"stop": "", "length": ", cut off at the longest reply", "context": ", the context is full"}
            self._reply.text += done.tail
            self._reply.foot = timing(done) + reasons.get(done.reason, ", stopped")
            self._reply = None
            self.transcript.changed()

    def _show_frame(self) -> None:
        session, phase = self.link.session, self.link.phase
        if self.has_class("-choosing") or phase in (Phase.IDLE, Phase.GONE, Phase.CONNECTING) or session is None:
            return
        info = session.backend.info
        context = f"context {whole(session.context_used)} of {whole(info.context_limit)}"
        seed = f" | seed {session.seed}" if session.seed is not None else ""
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
        if session is None or self.link.phase is Phase.CONNECTING:
            self.lumina.notice("no checkpoint is loaded yet", "warning")
            return
        outcome = session.command(message.text)
        if outcome is None:
            if self.link.phase is not Phase.READY:
                self.lumina.notice(self.why_not("chat.again") or "no server: r starts it again", "warning")
                return
            self.field.taken()
            self._say("user", message.text)
            self._begin()
            self.link.send(message.text)
            return
        self.field.taken()
        if outcome.action == "quit":
            self.app.exit()
        elif outcome.action == "retry":
            self._again()
        else:
            if outcome.action in ("clear", "load"):
                self._show_history(session)
            self._say("note" if outcome.ok else "error", outcome.text)
        self.tick()

    def on_message_field_escaped(self) -> None:
        if self.link.phase is Phase.REPLYING:
            self.link.cancel()
        else:
            self.transcript.focus()

    async def on_transcript_escaped(self) -> None:
        if self.link.phase is Phase.REPLYING:
            self.link.cancel()
        elif self.link.phase is Phase.CONNECTING:
            self.link.disconnect()
            self._choose()
        else:
            await self.app.run_action("do('app.back')")

    def _say(self, kind: str, text: str) -> Item:
        return self.transcript.add(kind, text)

    def _begin(self) -> None:
        self._reply = self._say("assistant", "")

    def _show_history(self, session: ChatSession) -> None:
        self.transcript.clear()
        for turn in session.history:
            self._say("user" if turn["role"] == "user" else "assistant", turn["content"])

    # actions

    def why_not(self, action_id: str) -> str | None:
        name, session = action_id.rpartition(".")[2], self.link.session
        if name in ("checkpoints", "reload"):
            return "a reply is being written: Esc stops it" if self.link.phase is Phase.REPLYING else None
        if session is None:
            return "no checkpoint is loaded"
        if name in ("again", "new", "mode", "settings", "export") and self.link.phase is Phase.REPLYING:
            return "a reply is being written: Esc stops it"
        if name == "again":
            if self.link.phase is not Phase.READY:
                return "no server: r starts it again"
            return None if session.can_retry else "nothing was said yet"
        if name == "export" and self.lumina.readonly:
            return "--readonly: no file is written"
        if name in ("copy", "export") and not session.history:
            return "nothing was said yet"
        return None

    def action_write(self) -> None:
        self.field.focus()

    def action_again(self) -> None:
        self._again()

    def _again(self) -> None:
        session = self.link.session
        if session is None or self.why_not("chat.again") is not None:
            return
        unsent = session.unsent
        self._show_history(session)
        if unsent is not None:
            self._say("user", unsent)
        elif self.transcript.items:
            self.transcript.items.pop()
        self._begin()
        self.link.retry()

    def action_mode(self) -> None:
        session = self.link.session
        assert session is not None
        names = list(MODES)
        outcome = session.command(f"/mode {names[(names.index(session.mode) + 1) % len(names)]}")
        assert outcome is not None
        self._say("note", outcome.text)
        self._show_frame()

    def action_new(self) -> None:
        session = self.link.session
        assert session is not None
        session.clear()
        self.transcript.clear()
        self._say("note", "new conversation" + ("; the system prompt stays" if session.system_prompt else ""))
        self.field.focus()

    def action_checkpoints(self) -> None:
        self._choose()

    def action_settings(self) -> None:
        session = self.link.session
        assert session is not None
        values = {**session.sampling.to_dict(), "seed": session.seed if session.seed is not None else "none"}
        text = " ".join(f"{name}={value}" for name, value in values.items())

        def apply(answer: str) -> None:
            session.overrides, session.seed = parse_settings(session.mode, answer)
            self._say("note", "settings: " + " ".join(f"{k}={v}" for k, v in session.sampling.to_dict().items()))

        def wrong(answer: str) -> str | None:
            try:
                parse_settings(session.mode, answer)
            except ChatError as error:
                return str(error)
            return None

        self.lumina.prompt(
            "Settings",
            apply,
            value=text,
            lines=["name=value, separated by spaces; seed=none draws a new one each time"],
            check=wrong,
        )

    def action_reload(self) -> None:
        if self.has_class("-choosing"):
            self._choose()
        elif self._newer is not None:
            self._open(self._newer.path)
        elif self.link.phase is Phase.GONE or self._error:
            self._open(self.link.path or self._wanted or "")
        else:
            self.lumina.notice("nothing to reload: the server answers and no checkpoint is newer")

    def action_copy(self) -> None:
        session = self.link.session
        assert session is not None
        reply = next((turn["content"] for turn in reversed(session.history) if turn["role"] == "assistant"), "")
        self.lumina.copy_text(reply, "reply.txt")

    def action_export(self) -> None:
        from .dialogs import Choice

        choices = [Choice("j", "JSON, to load again", "json"), Choice("m", "Markdown, to read", "markdown")]
        self.lumina.ask("Export the conversation", choices, self._export)

    def _export(self, kind: str) -> None:
        session = self.link.session
        assert session is not None
        try:
            path = session.save() if kind == "json" else session.export_markdown()
        except ChatError as error:
            self.lumina.notice(str(error), "error")
        else:
            self.lumina.notice(f"written to {path}")
