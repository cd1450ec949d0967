"""The program in a real pseudo-terminal: bytes that leave, how it ends; and what it imports."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from lumina_engine.monitoring import record as rec

from .fake_engine import FakeEngine
from .test_frame import HOSTILE

TUI = Path(__file__).resolve().parents[2] / "lumina_tui"
OURS = sorted(TUI.rglob("*.py"))


class Terminal:
    """`lumina` in a pty. `expect` reads until a text has come; everything that left is in `raw`."""

    def __init__(self, *arguments: str, size: tuple[int, int] = (80, 24), script: str = "", **environ: str) -> None:
        self.raw = b""
        base = {
            key: os.environ[key]
            for key in ("PATH", "HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME")
            if key in os.environ
        }
        self.environ = {**base, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **environ}
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(
                sys.executable, [sys.executable, *([script] if script else ["-m", "lumina_tui.app"]), *arguments], self.environ
            )
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            os.close(self.fd)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def read(self, seconds: float = 0.05) -> bool:
        """Take what has come; False at the end."""
        ready, _, _ = select.select([self.fd], [], [], seconds)
        if ready:
            try:
                data = os.read(self.fd, 1 << 16)
            except OSError:
                return False
            self.raw += data
            return bool(data)
        return True

    def expect(self, text: bytes, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.raw:
            assert self.read() and time.monotonic() < deadline, self.raw[-3000:].decode(errors="replace")

    def send(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def end(self, seconds: float = 20.0) -> int:
        """The exit code."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                self.read(0.02)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                while self.read():  # what it wrote last may still be on its way
                    if not select.select([self.fd], [], [], 0)[0]:
                        break
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline, self.raw[-2000:].decode(errors="replace")


def hostile_run(root: Path) -> None:
    engine = FakeEngine(root)
    engine.emit(rec.Run(state="running", total_steps=100))
    engine.steps(30)
    for text in HOSTILE:
        engine.emit(rec.Alert(severity="warning", code="x" + text, message=text, recommendation=text, step=3))
        engine.log(text)
    engine.emit(rec.Run(state="failed", reason=" ".join(HOSTILE)))
    bad = root / "\x1b]0;pwned\x07"
    bad.mkdir()
    (bad / "run.json").write_text(json.dumps({"format": 1, "id": "x", "state": "failed", "reason": "\x1b]52;c;aGk=\x07"}))


def test_se01_no_payload_leaves_as_a_sequence(tmp_path):
    hostile_run(tmp_path)
    with Terminal("--runs", str(tmp_path), size=(120, 40)) as terminal:
        terminal.expect(b"]0;pwned")
        for key, expected in ((b"\r", b"loss  EMA"), (b"t", b"engine.log"), (b"A", b"Alerts")):
            terminal.send(key)
            terminal.expect(expected)
        terminal.send(b"qq")  # the list, then the program
        assert terminal.end() == 0
        for payload in (b"\x1b]52;c;aGk=", b"\x1b]0;pwned", b"\x1bPq", b"\x9b31m", b"\x1b[6n", b"\xe2\x80\xae"):
            assert payload not in terminal.raw, payload
        assert b"\x1bc" not in re.sub(rb"\x1b\][^\x07\x1b]*(\x07|\x1b\\)", b"", terminal.raw)


def test_c138_ascii_locale_sends_only_ascii(tmp_path):
    hostile_run(tmp_path)
    with Terminal("--runs", str(tmp_path), "demo", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0") as terminal:
        terminal.expect(b"loss  EMA")
        terminal.expect(b"+-")
        terminal.send(b"q")
        assert terminal.end() == 0
        assert terminal.raw.isascii()


def test_c138_no_color_sends_no_colour(tmp_path):
    hostile_run(tmp_path)
    with Terminal("--runs", str(tmp_path), "demo", NO_COLOR="1") as terminal:
        terminal.expect(b"loss  EMA")
        terminal.send(b"q")
        assert terminal.end() == 0
        for found in re.findall(rb"\x1b\[([0-9;]*)m", terminal.raw):
            codes = [int(code) for code in found.split(b";") if code]
            assert not any(30 <= c <= 38 or 40 <= c <= 48 or 90 <= c <= 107 for c in codes), found


def test_c138_linux_console_gets_16_colours_and_no_braille(tmp_path):
    hostile_run(tmp_path)
    with Terminal("--runs", str(tmp_path), "demo", TERM="linux") as terminal:
        terminal.expect(b"loss  EMA")
        terminal.send(b"q")
        assert terminal.end() == 0
        text = terminal.raw.decode(errors="replace")
        assert not any("⠀" < c <= "⣿" for c in text) and "38;5;" not in text and "38;2;" not in text


def test_256_colours_avoid_the_users_16(tmp_path):
    hostile_run(tmp_path)
    with Terminal("--runs", str(tmp_path), "demo") as terminal:
        terminal.expect(b"loss  EMA")
        terminal.send(b"q")
        assert terminal.end() == 0
        numbers = {int(n) for n in re.findall(rb"[34]8;5;(\d+)", terminal.raw)}
        assert numbers and min(numbers) >= 16 and b"38;2;" not in terminal.raw


def test_ps01_hang_up_and_a_closed_terminal_end_the_viewer(tmp_path):
    with Terminal("--runs", str(tmp_path)) as terminal:
        terminal.expect(b"No runs in")
        os.kill(terminal.pid, signal.SIGHUP)
        assert terminal.end() == 0
    with Terminal("--runs", str(tmp_path)) as terminal:
        terminal.expect(b"No runs in")
        os.close(terminal.fd)
        deadline = time.monotonic() + 20
        while os.waitpid(terminal.pid, os.WNOHANG)[0] == 0:
            assert time.monotonic() < deadline


def test_ps01_a_terminal_that_goes_while_records_stream_in_ends_the_viewer(tmp_path):
    """The writer's queue fills up then and blocks the loop; the viewer must still leave."""
    engine = FakeEngine(tmp_path, total_steps=None)
    engine.emit(rec.Run(state="running"))
    engine.steps(50)
    with Terminal("--runs", str(tmp_path), "--fps", "10", "demo") as terminal:
        terminal.expect(b"loss  EMA")
        engine.steps(5)
        os.close(terminal.fd)
        deadline = time.monotonic() + 30
        while os.waitpid(terminal.pid, os.WNOHANG)[0] == 0:
            engine.steps(1)
            engine.log("line")
            assert time.monotonic() < deadline


@pytest.mark.parametrize(("environ", "stdout"), [({"TERM": "xterm"}, "pipe"), ({"TERM": "dumb"}, "pty")])
def test_no_full_screen_names_the_engine_in_one_line(tmp_path, environ, stdout):
    if stdout == "pty":
        with Terminal("--runs", str(tmp_path), **environ) as terminal:
            assert terminal.end() == 2
            text = terminal.raw.decode()
    else:
        done = subprocess.run(
            [sys.executable, "-m", "lumina_tui.app"], capture_output=True, text=True, env={**os.environ, **environ}
        )
        assert done.returncode == 2 and not done.stdout
        text = done.stderr
    assert text.count("\n") == 1 and "lumina-engine" in text and "\x1b" not in text


def test_wrong_subject_is_one_line(tmp_path):
    with Terminal("--runs", str(tmp_path), "no-such-run") as terminal:
        assert terminal.end() == 2
        assert terminal.raw.count(b"\n") == 1 and b"no-such-run" in terminal.raw


HOME_PROBE = """
import asyncio, sys
from lumina_tui.application import LuminaApp, Start
from lumina_tui.terminal import Look
from pathlib import Path
async def main():
    app = LuminaApp(sys.argv[1], look=Look(), start=Start(run=Path(sys.argv[2])) if len(sys.argv) > 2 else None)
    async with app.run_test(size=(80, 24)) as pilot:
        for _ in range(40):
            await pilot.pause(0.005)
asyncio.run(main())
print(",".join(sorted(name for name in sys.modules if "." not in name)))
"""


@pytest.mark.parametrize("subject", ["home", "monitor"])
def test_c010_heavy_libraries_stay_out_of_the_viewer(tmp_path, subject):
    engine = FakeEngine(tmp_path)
    engine.emit(rec.Run(state="finished"))
    engine.steps(3)
    arguments = [str(tmp_path)] + ([str(tmp_path / "demo")] if subject == "monitor" else [])
    done = subprocess.run([sys.executable, "-c", HOME_PROBE, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.strip().splitlines()[-1].split(","))
    assert not loaded & {"torch", "deepspeed", "transformers", "plotext", "pydantic", "yaml", "tiktoken"}
    assert "numpy" not in loaded or subject == "monitor"


def test_se06_forbidden_calls_are_absent():
    markup = {"Static", "Label", "Button", "Checkbox", "RadioButton"}
    for path in OURS:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("call_from_thread", "from_markup"), f"{path}:{node.lineno}"
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                assert "shell" not in keywords, f"{path}:{node.lineno}"
                if name in markup and any(isinstance(arg, ast.JoinedStr) for arg in node.args):
                    value = keywords.get("markup")
                    assert isinstance(value, ast.Constant) and value.value is False, f"{path}:{node.lineno}"
                if name == "notify":
                    assert "markup" in keywords, f"{path}:{node.lineno}"
