"""The field a message is typed in: Enter sends, ctrl+j starts a new line, Up in an empty field recalls."""

from __future__ import annotations

from textual.events import Key
from textual.message import Message
from textual.widgets import TextArea

MAX_LINES = 6


class MessageField(TextArea):
    """Grows with its text up to `MAX_LINES`. Posts `Sent` and `Escaped`."""

    DEFAULT_CSS = """
    MessageField { height: auto; max-height: 6; min-height: 1; border: none; padding: 0; background: $background; }
    MessageField:focus { border: none; }
    """

    class Sent(Message):
        """Enter was pressed; the field is empty again."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    class Escaped(Message):
        """Esc was pressed."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id, compact=True, highlight_cursor_line=False, soft_wrap=True)
        self._sent: list[str] = []
        self._recalled = 0  # how many messages back the field shows; 0 = what the user types

    async def _on_key(self, event: Key) -> None:
        if event.key == "enter":
            self._stop(event)
            self._send()
        elif event.key == "ctrl+j":
            self._stop(event)
            self.insert("\n")
        elif event.key == "escape":
            self._stop(event)
            self.post_message(self.Escaped())
        elif event.key in ("up", "down") and self._may_recall():
            self._stop(event)
            self._recall(1 if event.key == "up" else -1)
        else:
            await super()._on_key(event)

    @staticmethod
    def _stop(event: Key) -> None:
        event.stop()
        event.prevent_default()

    def _send(self) -> None:
        """Hand the text over and empty the field at once: keys may be typed before anybody has read the message."""
        text = self.text
        if not text.strip():
            return
        if not self._sent or self._sent[-1] != text:
            self._sent.append(text)
        self._recalled = 0
        self.load_text("")
        self.post_message(self.Sent(text))

    def put(self, text: str) -> None:
        """Show a text with the cursor behind it."""
        self.load_text(text)
        self.move_cursor(self.document.end)

    def give_back(self, text: str) -> None:
        """A text that could not be sent, unless the user is typing the next one already (Up recalls it then)."""
        if not self.text:
            self.put(text)

    def _may_recall(self) -> bool:
        """Up and down move in the text, unless it is empty or a recalled message that nobody has changed."""
        if not self.text:
            return True
        return 0 < self._recalled <= len(self._sent) and self.text == self._sent[-self._recalled]

    def _recall(self, back: int) -> None:
        self._recalled = max(0, min(len(self._sent), self._recalled + back))
        self.put(self._sent[-self._recalled] if self._recalled else "")
