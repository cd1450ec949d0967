"""Transcript and message field together: what was said, the reply that is being written, what is being typed."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical

from lumina_engine.chat.console import timing
from lumina_engine.chat.events import Done, Event, Start, Token
from lumina_engine.chat.session import ChatSession

from .chat_field import MessageField
from .chat_transcript import Item, Transcript
from .panel import Panel, State

_ENDS = {"stop": "", "length": ", cut off at the longest reply", "context": ", the context is full", "cancelled": ", stopped"}


class Talk(Vertical):
    """One conversation on the screen. Text from outside may come as it is."""

    DEFAULT_CSS = """
    Talk { width: 1fr; }
    Talk #message { height: auto; }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._reply: Item | None = None  # being written
        self._grown = False

    def compose(self) -> ComposeResult:
        yield Transcript(id="transcript")
        yield Panel(MessageField(id="field"), id="message")

    def on_mount(self) -> None:
        panel = self.query_one("#message", Panel)
        panel.set_title("message", "/help for commands")
        panel.set_foot("Enter send  ctrl+j new line  Esc stop, then leave")

    @property
    def transcript(self) -> Transcript:
        return self.query_one("#transcript", Transcript)

    @property
    def field(self) -> MessageField:
        return self.query_one("#field", MessageField)

    @property
    def empty(self) -> bool:
        """Whether nothing was said yet."""
        return not self.transcript.items

    def say(self, kind: str, text: str) -> None:
        """Add what a user, the assistant, a note or an error says."""
        self.transcript.set_state(State.LIVE)
        self.transcript.add(kind, text)

    def show_history(self, session: ChatSession) -> None:
        """The session's conversation instead of what stands there."""
        self.transcript.clear()
        for turn in session.history:
            self.transcript.add("user" if turn["role"] == "user" else "assistant", turn["content"])

    # the reply

    def begin(self) -> None:
        """A reply is on its way."""
        self._reply = self.transcript.add("assistant", "")

    def begin_again(self, session: ChatSession) -> None:
        """The last message is answered again: its answer, if it had one, makes room."""
        unsent = session.unsent
        self.show_history(session)
        if unsent is not None:
            self.transcript.add("user", unsent)
        elif not self.empty:
            self.transcript.items.pop()
        self.begin()

    def take(self, event: Event) -> None:
        """One event of the reply; `settle` paints what came."""
        if isinstance(event, Start):
            if notice := event.notice():
                self.transcript.items.insert(-1, Item("note", notice))
        elif self._reply is not None:
            if isinstance(event, Token):
                self._reply.text += event.text
            elif isinstance(event, Done):
                self._reply.text += event.tail
                self._reply.foot = timing(event) + _ENDS[event.reason]
                self._reply = None
        self._grown = True

    def break_off(self) -> None:
        """No more of this reply will come."""
        if self._reply is not None:
            self._reply.foot = "not finished"
            self._reply = None
            self._grown = True
            self.settle()

    def settle(self) -> None:
        """Paint once for all events since the last call."""
        if self._grown:
            self._grown = False
            self.transcript.changed()
