"""What the keys and commands of the Chat screen do to replies and settings. Layout and routing are in `chat`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lumina_engine.chat.modes import MODES
from lumina_engine.chat.session import ChatSession

from ..chat_settings import ChatSettings
from ..chatting import Phase
from ..conversations import Conversations
from .base import LuminaScreen

if TYPE_CHECKING:
    from ..widgets.chat_pane import Pane

WRITING = "a reply is being written: Esc stops it"
NO_SERVER = "no server: r starts it again"
FREE = ("write", "copy", "tokens", "raw", "find", "conversations")  # what can be done while a reply is being written
ALWAYS = (*FREE, "checkpoints", "reload", "rename", "delete")  # and without a session


class ConversationKeys(LuminaScreen):
    """The part of the Chat screen that works on sessions."""

    conversations: Conversations
    settings: ChatSettings
    left: Pane
    right: Pane

    if TYPE_CHECKING:  # what the screen itself has

        @property
        def pane(self) -> Pane: ...

        @property
        def panes(self) -> list[Pane]: ...

        @property
        def sessions(self) -> list[ChatSession]: ...

        def back_to_talk(self) -> None: ...

        def chosen_conversation(self) -> Path | None: ...

        def refresh_conversations(self) -> None: ...

        def open_conversation(self, path: Path) -> None: ...

        def action_new(self, note: str = "") -> None: ...

    # what can be done

    def no_reply_now(self) -> str | None:
        """Why no message can be sent now, or None."""
        phases = [pane.link.phase for pane in self.panes]
        if Phase.REPLYING in phases:
            return WRITING
        if Phase.CONNECTING in phases:
            return "a checkpoint is being loaded: Esc in its pane gives it up"
        if Phase.READY in phases and self.left.session is not None:
            return None
        return NO_SERVER if Phase.GONE in phases else "no checkpoint is loaded yet"

    def why_not(self, action_id: str) -> str | None:
        name, session = action_id.rpartition(".")[2], self.pane.session
        busy = any(pane.link.phase is Phase.REPLYING for pane in self.panes)
        if busy and name not in FREE:
            return WRITING
        if name in ("rename", "delete"):
            return None if self.chosen_conversation() is not None else "no conversation was saved yet"
        if name in ALWAYS and name not in ("copy", "tokens"):
            return None
        if session is None:
            return "no checkpoint is loaded"
        if name == "again" and (self.no_reply_now() or not any(session.can_retry for session in self.sessions)):
            return self.no_reply_now() or "nothing was said yet"
        if name in ("copy", "export", "find", "tokens", "version_next", "version_before") and not (session.history or busy):
            return "nothing was said yet"
        return None

    # commands

    def run_command(self, line: str) -> None:
        """A slash command; both sessions follow it."""
        outcomes = [session.command(line) for session in (self.sessions[:1] if line.startswith("/save") else self.sessions)]
        outcome = outcomes[self.panes.index(self.pane) if len(outcomes) == len(self.panes) else 0]
        if outcome is None:
            return
        if outcome.action == "quit":
            self.app.exit()
        elif outcome.action == "retry":
            self.action_again()
        elif outcome.action == "clear":
            self.action_new(outcome.text)
        elif outcome.action == "load":
            self.open_conversation(Path(line.partition(" ")[2].strip()).expanduser())
        else:
            self.pane.say("note" if outcome.ok else "error", outcome.text)
        if outcome.ok and self.sessions:
            self.settings.take_from(self.sessions[0])
            self.use_settings()
            if line.startswith("/save"):
                self.refresh_conversations()

    def use_settings(self) -> None:
        """Both sessions and the next `lumina` use the settings."""
        for session in self.sessions:
            self.settings.put_into(session)
        self.settings.remember(self.lumina.memory)

    # replies

    def send(self, text: str) -> str | None:
        """Ask both checkpoints the same with the same seed; why that cannot be, or None."""
        reason = self.no_reply_now()
        if reason is None and self.left.session is not None:
            seed = self.left.session.reply_seed()
            for pane in self.panes:
                if pane.session is not None:
                    pane.send(text, seed)
        return reason

    def action_again(self) -> None:
        if reason := self.why_not("chat.again"):
            self.lumina.notice(reason, "warning")
            return
        ready = [pane for pane in self.panes if pane.link.phase is Phase.READY]
        able = [(pane, pane.session) for pane in ready if pane.session is not None and pane.session.can_retry]
        if not able:
            self.lumina.notice("nothing to answer again where a server is ready", "warning")
            return
        if waiting := [(pane, session) for pane, session in able if session.unsent is not None]:
            # a message that only one pane could not answer: with the seed that the other one had
            answered = next((s.last for s in self.sessions if s.unsent is None and s.last is not None), None)
            seed = answered.seed if answered is not None else waiting[0][1].reply_seed()
        else:
            seed = able[0][1].reply_seed(again=True)
        for pane, _ in waiting or able:
            pane.again(seed)

    def action_copy(self) -> None:
        session = self.pane.session
        replies = [turn["content"] for turn in session.history if turn["role"] == "assistant"] if session is not None else []
        self.lumina.copy_text(replies[-1] if replies else "", "reply.txt")

    # settings

    def action_mode(self) -> None:
        names = list(MODES)
        self.run_command(f"/mode {names[(names.index(self.settings.mode) + 1) % len(names)]}")

    def action_settings(self) -> None:
        def apply(answer: str) -> None:
            self.settings.apply_text(answer)
            self.use_settings()
            self.pane.say("note", f"settings: {self.settings.text()}")

        self.lumina.prompt(
            "Settings", apply, value=self.settings.changes(), lines=self.settings.table(), check=self.settings.wrong
        )

    # views

    def action_find(self) -> None:
        self.lumina.prompt("Find in this pane", self.pane.transcript.find, value=self.pane.transcript.needle)

    def action_tokens(self) -> None:
        self.back_to_talk()
        self.pane.toggle_tokens()

    def action_raw(self) -> None:
        for pane in (self.left, self.right):
            pane.transcript.toggle_raw()
        self.lumina.memory.set("chat.raw", self.left.transcript.raw)

    def action_version_next(self) -> None:
        self.action_version(1)

    def action_version_before(self) -> None:
        self.action_version(-1)

    def action_version(self, step: int) -> None:
        """Another version of the last answer; both panes are independent of each other in this."""
        if not self.pane.choose_version(step):
            self.lumina.notice("there is no other version that way: . answers again and keeps this one")
