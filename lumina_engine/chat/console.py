"""Chat on a plain terminal or a pipe: reads lines, prints replies as they come. No torch here."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

import msgspec

from ..text import safe_text
from .client import ServerGone
from .events import Done, Event, Routed, Start, Token
from .modes import ChatError
from .session import ChatSession

INTERRUPTED = 130


@dataclass(frozen=True)
class Show:
    """What is printed beside the replies."""

    timing: bool = False
    tokens: bool = False
    json: bool = False


class Console:
    """The conversation loop of `lumina-engine chat`.

    Replies go to `out`, everything else to `err`. On a terminal control characters are shown, not obeyed; a pipe gets the text
    as it is, `json` one object per reply.
    """

    def __init__(
        self,
        session: ChatSession,
        show: Show,
        out: TextIO | None = None,
        err: TextIO | None = None,
        source: TextIO | None = None,
    ) -> None:
        self.session = session
        self.show = show
        self.out = out or sys.stdout
        self.err = err or sys.stderr
        self.source = source or sys.stdin
        self._interrupts = 0  # Ctrl-C since the user's last line

    # whole conversations

    def once(self, text: str) -> int:
        """One answer, then the exit code.

        Raises:
            ChatError: no answer could be given.
        """
        return INTERRUPTED if self._stream(self.session.send(text)) == "cancelled" else 0

    def loop(self) -> int:
        """Talk until the user leaves; returns the exit code.

        Raises:
            ServerGone: after the conversation was saved.
        """
        try:
            self._converse()
        except KeyboardInterrupt:
            self._say("")
            return INTERRUPTED
        return 0

    def _converse(self) -> None:
        """Lines and replies to the end of input; a KeyboardInterrupt that leaves here is the second Ctrl-C."""
        while True:
            try:
                line = self._ask()
            except KeyboardInterrupt:
                self._interrupts += 1
                if self._interrupts > 1:
                    raise
                self._say("\nCtrl-C again leaves; so do /quit and Ctrl-D")
                continue
            if line is None:
                if self._interactive:
                    self._say("")
                return
            self._interrupts = 0
            if not self._turn(line):
                return

    # one turn

    def _turn(self, line: str) -> bool:
        """One line of the user; false to leave."""
        if not line.strip():
            return True
        outcome = self.session.command(line)
        if outcome is None:
            self._answer(lambda: self.session.send(line))
            return True
        if outcome.text:
            if self.show.json:
                self._print_json({"command": line.split()[0], "ok": outcome.ok, "text": outcome.text})
            else:
                self._say(outcome.text)
        if outcome.action == "retry":
            self._answer(self.session.retry)
        return outcome.action != "quit"

    def _answer(self, start: Callable[[], Iterator[Event]]) -> None:
        """Stream a reply; an error is one line and the conversation goes on, unless the server is gone."""
        try:
            self._stream(start())
        except ServerGone as error:
            if not self.session.history:
                raise
            raise ServerGone(f"{error}; saved as {self.session.save()}", exit_code=error.exit_code) from error
        except ChatError as error:
            self._say(f"lumina-engine: {error}")

    def _stream(self, events: Iterator[Event]) -> str:
        """Print a reply as it comes; returns why it ended."""
        start: Start | None = None
        done: Done | None = None
        parts: list[str] = []
        with self._ctrl_c_ends_the_reply():
            if self._interactive and not self.show.json:
                self._write("AI   ")
            for event in events:
                if isinstance(event, Start):
                    start = event
                    continue
                if isinstance(event, Routed):
                    continue  # this console shows no routing
                text = event.text if isinstance(event, Token) else event.tail
                parts.append(text)
                if not self.show.json:
                    self._write(text)
                if isinstance(event, Done):
                    done = event
        assert done is not None and start is not None  # a backend ends with Done or raises
        if self.show.json:
            self._print_json(_as_json("".join(parts), start, done, self.session))
        else:
            self._write("\n")
            self._say_how_it_went(start, done, empty=not "".join(parts).strip())
        return done.reason

    def _say_how_it_went(self, start: Start, done: Done, empty: bool) -> None:
        notes = [start.notice()]
        if done.reason == "cancelled":
            notes.append("stopped")
        elif done.reason != "stop":
            limit = (
                f"--max-new-tokens ({self.session.sampling.max_new_tokens})"
                if done.reason == "length"
                else "the context is full"
            )
            notes.append(f"cut off: {limit}")
        elif empty:
            notes.append("the model had nothing to say")
        if self.show.timing:
            notes.append(timing(done))
        if self.show.tokens:
            used = start.prompt_tokens + done.tokens
            notes.append(f"{start.prompt_tokens:,} + {done.tokens:,} tokens, context {used:,} of {start.context_limit:,}")
        if said := [note for note in notes if note]:
            self._say(f"     [{'; '.join(said)}]")

    @contextmanager
    def _ctrl_c_ends_the_reply(self) -> Iterator[None]:
        """The first Ctrl-C cancels, the second one is a KeyboardInterrupt."""

        def interrupted(number: int, frame: object) -> None:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
            self.session.cancel()

        try:
            before = signal.signal(signal.SIGINT, interrupted)
        except ValueError:  # not the main thread: signals are somebody else's
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    # terminal

    @property
    def _interactive(self) -> bool:
        return self.source.isatty()

    def _ask(self) -> str | None:
        """The user's next line, None at the end of input."""
        if self._interactive and self.source is sys.stdin:
            try:
                return input("You  ")
            except EOFError:
                return None
        line = self.source.readline()
        return line.rstrip("\n") if line else None

    def _write(self, text: str) -> None:
        self.out.write(safe_text(text) if self.out.isatty() else text)
        self.out.flush()

    def _say(self, text: str) -> None:
        print(safe_text(text), file=self.err, flush=True)

    def _print_json(self, content: dict[str, Any]) -> None:
        import json

        self.out.write(json.dumps(content, ensure_ascii=True) + "\n")
        self.out.flush()


def timing(done: Done) -> str:
    """Tokens, rate and times of a reply in one line."""
    parts = [f"{done.tokens:,} tokens"]
    if done.tokens_per_s is not None:
        parts.append(f"{done.tokens_per_s:.1f} tokens/s")
    parts.append(f"{done.seconds:.1f} s")
    if done.first_token_s is not None:
        parts.append(f"first token {1000 * done.first_token_s:.0f} ms")
    return ", ".join(parts)


def _as_json(text: str, start: Start, done: Done, session: ChatSession) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": text,
        "mode": session.mode,
        "checkpoint": session.backend.info.path,
        "dropped_messages": start.dropped,
        **{key: value for key, value in msgspec.to_builtins(start).items() if key in ("prompt_tokens", "context_limit")},
        **{key: value for key, value in msgspec.to_builtins(done).items() if key not in ("op", "id", "tail")},
        "tokens_per_s": done.tokens_per_s,
    }
