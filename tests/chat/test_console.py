"""Chat on a plain terminal and on pipes, with a scripted model (capabilities 5.2, 5.5, reliability S6). No torch."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumina_engine.chat.client import ServerGone
from lumina_engine.chat.console import Console, Show
from lumina_engine.chat.modes import ChatError
from lumina_engine.chat.session import ChatSession
from tests.chat.fakes import FakeBackend

DEADLINE = 20.0
ROOT = Path(__file__).resolve().parents[2]


class Screen(io.StringIO):
    """A terminal that is written to."""

    def isatty(self) -> bool:
        return True


def talk(
    lines: str, tmp_path: Path, show: Show | None = None, out: io.StringIO | None = None, backend: FakeBackend | None = None
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a conversation whose lines come from a pipe."""
    session = ChatSession(backend or FakeBackend(), chats_dir=tmp_path / "chats", seed=3)
    out, err = out or io.StringIO(), io.StringIO()
    code = Console(session, show or Show(), out, err, io.StringIO(lines)).loop()
    return code, out.getvalue(), err.getvalue()


def test_c104_replies_go_to_stdout_everything_else_to_stderr(tmp_path: Path) -> None:
    code, out, err = talk("hi\n\n/mode precise\n/nonsense\nmore\n", tmp_path, Show(timing=True, tokens=True))
    assert code == 0 and out == "answer 1 to hi\nanswer 2 to more\n"
    assert "[4 tokens, 8.0 tokens/s, 0.5 s, first token 250 ms; 10 + 4 tokens, context 14 of 256]" in err
    assert "mode precise: temperature 0.1" in err and "unknown command /nonsense" in err


def test_c106_quit_ends_and_retry_answers_again(tmp_path: Path) -> None:
    code, out, _ = talk("hi\n/retry\n/quit\nnever\n", tmp_path)
    assert (code, out) == (0, "answer 1 to hi\nanswer 2 to hi\n")


def test_c104_json_is_one_object_a_line_and_nothing_else(tmp_path: Path) -> None:
    _, out, _ = talk("hi \x1b[2J\n/stats\n/mode wild\n", tmp_path, Show(json=True))
    reply, stats, wrong = (json.loads(line) for line in out.splitlines())
    assert reply["content"] == "answer 1 to hi \x1b[2J" and "\x1b" not in out
    assert {"prompt_tokens", "context_limit", "tokens", "seconds", "tokens_per_s", "first_token_s", "reason", "seed"} <= set(
        reply
    )
    assert reply["seed"] == 3 and stats["ok"] is True and wrong["ok"] is False


def test_se01_control_characters_are_shown_on_a_terminal_and_kept_in_a_pipe(tmp_path: Path) -> None:
    backend = FakeBackend()
    backend.reply = "a\x1b[2Jb \x9bc"
    _, out, _ = talk("x\n", tmp_path, out=Screen(), backend=backend)
    assert out == "a␛[2Jb �c\n"
    _, out, err = talk("x\n/system \x1b]0;x\x07\n/system\n", tmp_path, backend=backend)
    assert out == "a\x1b[2Jb \x9bc\n"
    assert "\x1b" not in err and "␛]0;x␇" in err


def test_c110_a_failing_reply_is_one_line_and_the_chat_goes_on(tmp_path: Path) -> None:
    backend = FakeBackend()
    backend.fail = ChatError("out of memory while answering: lower it")
    code, out, err = talk("hi\n", tmp_path, backend=backend)
    assert code == 0 and err == "lumina-engine: out of memory while answering: lower it\n" and "Traceback" not in out + err


def test_c110_when_the_server_is_gone_the_conversation_is_saved(tmp_path: Path) -> None:
    backend = FakeBackend()
    session = ChatSession(backend, chats_dir=tmp_path / "chats")
    console = Console(session, Show(), io.StringIO(), io.StringIO(), io.StringIO("two\n"))
    list(session.send("one"))
    backend.fail = ServerGone("the chat server is gone: start it again")
    with pytest.raises(ServerGone, match=r"is gone: start it again; saved as .*chat_"):
        console.loop()
    [path] = (tmp_path / "chats").iterdir()
    assert [turn["content"] for turn in json.loads(path.read_text())["conversation"]] == ["one", "answer 1 to one", "two"]


def test_c104_one_prompt_one_answer(tmp_path: Path) -> None:
    out = io.StringIO()
    session = ChatSession(FakeBackend())
    assert Console(session, Show(), out, io.StringIO()).once("hi") == 0
    assert out.getvalue() == "answer 1 to hi\n"


class Terminal:
    """`tests.chat.fakes` on a pseudo-terminal of its own."""

    def __init__(self) -> None:
        self.master, slave = pty.openpty()

        def take_terminal() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run started in the background ignores it, and so would this
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        argv = [sys.executable, "-m", "tests.chat.fakes"]
        self.process = subprocess.Popen(argv, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, preexec_fn=take_terminal)
        os.close(slave)
        self.seen = ""

    def expect(self, text: str, again: bytes = b"") -> None:
        """Wait for a text. `again` is sent every two seconds until it comes: Python's line input misses a signal that arrives
        just before it starts to read."""
        end = time.monotonic() + DEADLINE
        next_time = time.monotonic() + 2
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} never came: {self.seen!r}"
            if again and time.monotonic() > next_time:
                next_time += 2
                self.send(again)
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
                except OSError:
                    pass  # the other end is closed; what was expected is missing or not
        self.seen = self.seen.partition(text)[2]

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # the program has ended already
            os.write(self.master, data)

    def end(self, again: bytes = b"") -> int:
        """The exit code; `again` as for `expect`."""
        for _ in range(int(DEADLINE / 2)):
            try:
                return self.process.wait(2)
            except subprocess.TimeoutExpired:
                self.send(again)
        raise AssertionError(f"it does not end: {self.seen!r}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)
        os.close(self.master)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    found = Terminal()
    yield found
    found.close()


def test_c110_ctrl_c_ends_the_reply_and_twice_the_program(terminal: Terminal) -> None:
    terminal.expect("You  ")
    terminal.send(b"endless\n")
    terminal.expect("answer 1")
    terminal.send(b"\x03")
    terminal.expect("[stopped]")
    terminal.expect("You  ")
    terminal.send(b"hello\n")
    terminal.expect("answer 2 to hello")
    terminal.expect("You  ")
    terminal.send(b"\x03")
    terminal.expect("Ctrl-C again leaves", again=b"\x03")
    terminal.send(b"\x03")
    assert terminal.end(again=b"\x03") == 130


def test_c110_end_of_input_quits(terminal: Terminal) -> None:
    terminal.expect("You  ")
    terminal.send(b"\x04")
    assert terminal.end() == 0
