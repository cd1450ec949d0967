"""Chat: one or two committed checkpoints answer the same messages, through chat servers that outlive this program."""

from __future__ import annotations

import asyncio
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textual.containers import Horizontal, Vertical
from textual.events import Key
from textual.widget import Widget

from lumina_engine.chat.session import ChatSession

from ..chat_settings import ChatSettings
from ..chatting import Phase, Starter
from ..checkpoints import list_choices
from ..conversations import Conversations
from ..paint import whole
from ..widgets.chat_checkpoints import CheckpointTable
from ..widgets.chat_conversations import ConversationTable
from ..widgets.chat_field import MessageField
from ..widgets.chat_pane import Pane, badge_of
from ..widgets.chat_transcript import Transcript
from ..widgets.panel import Panel
from ..widgets.table import Table
from .chat_files import ConversationFiles

if TYPE_CHECKING:
    from textual.app import ComposeResult


class ChatScreen(ConversationFiles):
    """One conversation at a time, with one checkpoint or with two side by side."""

    scope = "chat"
    number = 7
    heading = "Chat"
    DEFAULT_CSS = """
    ChatScreen #talk { width: 1fr; }
    ChatScreen #panes { height: 1fr; }
    ChatScreen #message { height: auto; }
    ChatScreen #conversations { width: 40; display: none; }
    ChatScreen #checkpoints { width: 1fr; }
    ChatScreen #checkpoints, ChatScreen #right { display: none; }
    ChatScreen.-split #right { display: block; }
    ChatScreen.-wide #conversations { display: block; }
    ChatScreen.-choosing #checkpoints { display: block; }
    ChatScreen.-choosing #talk, ChatScreen.-listing #talk { display: none; }
    ChatScreen.-listing #conversations { width: 1fr; display: block; }
    """

    def __init__(
        self, *, checkpoint: str | Path | None = None, starter: Starter | None = None, chats_dir: Path | str = "chats"
    ) -> None:
        super().__init__()
        self._wanted = checkpoint
        self._chats_dir = Path(chats_dir)
        self.left = Pane(self._session_of, starter, id="left")
        self.right = Pane(self._session_of, starter, id="right")
        self._active = self.left
        self._target = self.left  # the pane that a checkpoint is chosen for
        self.conversations = Conversations(self._chats_dir)
        self.settings = ChatSettings()

    def content(self) -> ComposeResult:
        with Horizontal(classes="content"):
            yield ConversationTable(id="conversations")
            yield CheckpointTable(id="checkpoints")
            with Vertical(id="talk"):
                with Horizontal(id="panes"):
                    yield self.left
                    yield self.right
                yield Panel(MessageField(id="field"), id="message")

    @property
    def field(self) -> MessageField:
        return self.query_one("#field", MessageField)

    @property
    def split(self) -> bool:
        return self.has_class("-split")

    @property
    def panes(self) -> list[Pane]:
        """The panes that are talked to."""
        return [self.left, self.right] if self.split else [self.left]

    @property
    def pane(self) -> Pane:
        """The pane that keys act on: the one that was last read."""
        return self._active if self._active in self.panes else self.left

    @property
    def sessions(self) -> list[ChatSession]:
        """Those of the panes that are talked to."""
        return [pane.session for pane in self.panes if pane.session is not None]

    # life

    def on_mount(self) -> None:
        message = self.query_one("#message", Panel)
        message.set_title("message", "/help for commands")
        message.set_foot("Enter send  ctrl+j new line  Esc stop, then leave")
        self.settings = ChatSettings.remembered(self.lumina.memory)
        for pane in (self.left, self.right):
            pane.link.save = self._save
            pane.transcript.raw = self.lumina.memory.get("chat.raw", False)
        self.lumina.spawn(asyncio.to_thread(import_module, "markdown_it"))  # before the first reply needs it
        if self._wanted is None:
            self._choose(self.left)
        else:
            self._open(self.left, self._wanted)
        self.refresh_conversations()

    def on_unmount(self) -> None:
        for pane in (self.left, self.right):
            pane.link.disconnect()

    def retarget(self, **arguments: Any) -> bool:
        """Another checkpoint in the same screen: the conversation goes on with it."""
        if "checkpoint" not in arguments:
            return False
        self._open(self.left, arguments["checkpoint"])
        return True

    def _session_of(self, pane: Pane) -> ChatSession:
        """The session of a pane that has none yet."""
        session = ChatSession(None, chats_dir=self._chats_dir)  # type: ignore[arg-type]  # the pane gives it its backend
        self.settings.put_into(session)
        if pane is self.right and self.left.session is not None:
            self.left.session.second = session
            session.system_prompt = self.left.session.system_prompt
        return session

    def _save(self) -> Path | None:
        """Both panes are one conversation in one file. Called in the threads that read replies."""
        return None if self.lumina.readonly or self.left.session is None else self.left.session.save()

    # choosing

    def _choose(self, pane: Pane) -> None:
        self._target = pane
        self.add_class("-choosing")
        self.remove_class("-listing")
        where = " for the right pane" if pane is self.right else ""
        self.set_frame(subject=f"choose a checkpoint{where}", badge="")
        self.query_one(CheckpointTable).focus()
        self.lumina.spawn(self._list())

    async def _list(self) -> None:
        table = self.query_one(CheckpointTable)
        root = self.lumina.runs_root
        table.searching(root)
        table.show(await asyncio.to_thread(list_choices, root), root)

    def on_table_chosen(self, message: Table.Chosen) -> None:
        if isinstance(message.table, ConversationTable):
            self.open_conversation(Path(message.key))
            return
        choice = self.query_one(CheckpointTable).chosen(message.key)
        if choice is not None and choice.entry.problem is not None:
            self.lumina.notice(f"{choice.entry.path.name} cannot be used: {choice.entry.problem}", "warning")
        elif choice is not None:
            if self._target is self.right:
                self.add_class("-split")
            self._open(self._target, choice.entry.path)

    def on_key(self, event: Key) -> None:
        if event.key == "escape" and (self.has_class("-listing") or self.has_class("-choosing")):
            if self.left.link.phase is Phase.IDLE and self.left.session is None:
                return  # there is nothing to go back to
            event.stop()
            self.back_to_talk()

    def back_to_talk(self) -> None:
        """The panes instead of a list."""
        self.remove_class("-listing")
        self.remove_class("-choosing")
        self.pane.enter()
        self.show_frame()

    def _open(self, pane: Pane, checkpoint: str | Path) -> None:
        self._active = pane
        pane.open(checkpoint)
        self.back_to_talk()

    def on_pane_ready(self, message: Pane.Ready) -> None:
        if not self.has_class("-choosing") and not self.has_class("-listing"):
            self.field.focus()  # a list on screen keeps the keys: a hidden field must not take them

    # what happens

    def tick(self) -> None:
        happened = [pane.tick() for pane in self.panes]
        if any(happened):
            self.refresh_keys()
        self.show_frame()

    def on_descendant_focus(self) -> None:
        node: Any = self.focused
        while isinstance(node, Widget) and not isinstance(node, Pane):
            node = node.parent
        if isinstance(node, Pane):
            self._active = node
        super().on_descendant_focus()

    def show_frame(self) -> None:
        """The first line: conversation, settings, context, and how the connections are."""
        if self.has_class("-choosing"):
            ready = self.left.link.phase is Phase.READY
            self.set_frame(badge="READY, Esc goes to it" if ready else "", badge_role="good")
            return
        session, seed = self.pane.session, self.settings.seed
        if session is not None:
            info = session.backend.info
            same = ["same prompt, same seed" + (f" {seed}" if seed is not None else "")] if self.split else [info.name]
            parts = [*same, session.mode, *([f"seed {seed}"] if seed is not None and not self.split else [])]
            limit = whole(info.context_limit) if info.context_limit else "-"
            self.set_frame(subject=" | ".join([*parts, f"context {whole(session.context_used)} of {limit}"]))
        else:
            self.set_frame(subject=str(self.pane.wanted or ""))
        badge, role = badge_of(self.panes)
        self.set_frame(badge=badge, badge_role=role)

    # the message field

    def on_message_field_sent(self, message: MessageField.Sent) -> None:
        if message.text.startswith("/") and self.sessions:
            self.run_command(message.text)
        elif reason := self.send(message.text):
            self.field.give_back(message.text)
            self.lumina.notice(reason, "warning")
        self.tick()

    def on_message_field_escaped(self) -> None:
        if not self._stop_replies():
            self.pane.enter()

    def _stop_replies(self) -> bool:
        writing = [pane for pane in self.panes if pane.link.phase is Phase.REPLYING]
        for pane in writing:
            pane.link.cancel()
        return bool(writing)

    async def on_transcript_escaped(self, _message: Transcript.Escaped) -> None:
        if self._stop_replies():
            return
        if self.pane.link.phase is Phase.CONNECTING:
            self.pane.leave()
            if self.pane.session is not None:
                self.pane.stay_without("loading was given up")
            elif self.pane is self.right:
                self.action_split()
            else:
                self._choose(self.left)
        else:
            await self.app.run_action("do('app.back')")

    # actions

    def action_write(self) -> None:
        self.back_to_talk()
        self.field.focus()

    def action_checkpoints(self) -> None:
        self._choose(self.pane)

    def action_split(self) -> None:
        """A second checkpoint beside the first, or the first alone again; what the second said stays in the file."""
        if self.split:
            self.right.leave()
            self.remove_class("-split")
            self._active = self.left
            self.back_to_talk()
        elif self.right.wanted is not None:
            self.add_class("-split")
            self._open(self.right, self.right.wanted)
        else:
            self._choose(self.right)

    def action_reload(self) -> None:
        if self.has_class("-choosing"):
            self._choose(self._target)
            return
        for pane in (self.pane, *self.panes):
            if pane.newer is not None or pane.link.phase is Phase.GONE:
                self._open(pane, pane.newer.path if pane.newer is not None else pane.wanted or "")
                return
        self.refresh_conversations()
        self.lumina.notice("nothing to reload: the server answers and no checkpoint is newer")
