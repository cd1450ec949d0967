"""The program in a real pseudo-terminal: bytes that leave, how it ends; and what it imports."""

from __future__ import annotations

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

    def settle(self, before: int, quiet: float = 0.2, seconds: float = 10.0) -> None:
        """Read until something has come since `before` bytes and nothing more comes for a moment."""
        deadline = time.monotonic() + seconds
        size = -1
        while (len(self.raw) == before or len(self.raw) != size) and time.monotonic() < deadline:
            size = len(self.raw)
            self.read(quiet)

    def stalled(self) -> bool:
        """Whether so much waits to be read that the writer is blocked: the pty's buffer is full."""
        waiting = fcntl.ioctl(self.fd, termios.FIONREAD, b"\0\0\0\0")
        return struct.unpack("i", waiting)[0] >= 4000

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
        for key, expected in ((b"\r", b"loss  EMA"), (b"t", b"engine.log"), (b"A", b"what to do")):
            terminal.send(key)
            terminal.expect(expected)
        terminal.send(b"qq")  # the list, then the program
        assert terminal.end() == 0
        for payload in (b"\x1b]52;c;aGk=", b"\x1b]0;pwned", b"\x1bPq", b"\x9b31m", b"\x1b[6n", b"\xe2\x80\xae"):
            assert payload not in terminal.raw, payload
        assert b"\x1bc" not in re.sub(rb"\x1b\][^\x07\x1b]*(\x07|\x1b\\)", b"", terminal.raw)


JOURNEY = ((b"?", b"Help: Monitor"), (b"\x1b", b""),
           (b"!", b"Notices"), (b"\x1b", b""), (b"m", b""), (b"m", b""), (b":", b"palette"),
           (b"\x1b", b""), (b"\x0f", b" a "), (b"\x1b", b""))  # fmt: skip


def toured(root: Path, *arguments: str, size: tuple[int, int] = (100, 30), **environ: str) -> bytes:
    """All bytes of a tour: the Monitor of a run with hostile texts, help, notices, one panel alone, palette, jump letters."""
    hostile_run(root)
    with Terminal("--runs", str(root), *arguments, "demo", size=size, **environ) as terminal:
        terminal.expect(b"loss  EMA")
        for key, expected in JOURNEY:
            before = len(terminal.raw)
            terminal.send(key)
            if expected:
                terminal.expect(expected)
            terminal.settle(before)
        terminal.send(b"q")
        assert terminal.end() == 0
        return terminal.raw


def colours(raw: bytes) -> dict[str, set[int]]:
    """The colour parameters of all SGR sequences: plain codes, numbers of 256, and whether there is truecolor."""
    found: dict[str, set[int]] = {"named": set(), "256": set(), "rgb": set()}
    for text in re.findall(rb"\x1b\[([0-9;:]*)m", raw):
        codes = [int(code) for code in re.split(rb"[;:]", text) if code]
        while codes:
            code = codes.pop(0)
            if code in (38, 48, 58) and codes and codes[0] == 5:
                found["256"].add(codes[1])
                del codes[:2]
            elif code in (38, 48, 58) and codes and codes[0] == 2:
                found["rgb"].add(code)
                del codes[:4]
            elif 30 <= code <= 37 or 40 <= code <= 47 or 90 <= code <= 107:
                found["named"].add(code)
    return found


def test_c138_ascii_locale_sends_only_ascii(tmp_path):
    raw = toured(tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert raw.isascii() and b"+-" in raw


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param({"COLORTERM": "truecolor"}, id="truecolor"),
        pytest.param({"TERM": "linux"}, id="linux", marks=pytest.mark.slow),
    ],
)
def test_c138_no_color_sends_no_colour(tmp_path, environ):
    assert colours(toured(tmp_path, **{"NO_COLOR": "1", **environ})) == {"named": set(), "256": set(), "rgb": set()}


@pytest.mark.parametrize("term", ["linux", pytest.param("screen", marks=pytest.mark.slow)])
def test_c138_sixteen_colours_are_named_ones(tmp_path, term):
    raw = toured(tmp_path, TERM=term, COLORTERM="truecolor")
    found = colours(raw)
    assert found["named"] and not found["256"] and not found["rgb"]
    if term == "linux":
        text = raw.decode(errors="replace")
        assert not any("\u2800" < c <= "\u28ff" for c in text) and not any(c in text for c in "\u256d\u256e\u256f\u2570")


@pytest.mark.parametrize("term", [pytest.param("xterm-256color", marks=pytest.mark.slow), "tmux-256color"])
def test_c138_256_colours_avoid_the_users_16(tmp_path, term):
    extra = {} if term.startswith("xterm") else {"COLORTERM": "truecolor"}  # inside tmux it is that of the terminal outside
    found = colours(toured(tmp_path, TERM=term, **extra))
    assert found["256"] and min(found["256"]) >= 16 and not found["rgb"] and not found["named"]


def test_c138_truecolor_and_ascii_by_wish(tmp_path):
    raw = toured(tmp_path, "--ascii", COLORTERM="truecolor")
    found = colours(raw)
    assert found["rgb"] and not found["256"] and not found["named"]
    assert raw.isascii()


@pytest.mark.parametrize(
    ("environ", "colours_", "light"),
    [
        ({"TERM": "xterm-256color"}, 256, False),
        ({"TERM": "xterm", "COLORTERM": "24bit"}, 1 << 24, False),
        ({"TERM": "xterm-kitty"}, 256, False),
        ({"TERM": "tmux-256color", "COLORTERM": "truecolor"}, 256, False),
        ({"TERM": "screen", "COLORTERM": "truecolor"}, 16, False),
        ({"TERM": "linux", "COLORTERM": "truecolor"}, 16, False),
        ({"TERM": "vt220"}, 16, False),
        ({}, 16, False),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, 0, False),
        ({"TERM": "xterm-256color", "NO_COLOR": ""}, 256, False),  # no-color.org: only when not empty
        ({"TERM": "xterm", "COLORFGBG": "0;15"}, 16, True),
        ({"TERM": "xterm", "COLORFGBG": "0;default;7"}, 16, True),
        ({"TERM": "xterm", "COLORFGBG": "15;0"}, 16, False),
        ({"TERM": "xterm", "COLORFGBG": "x"}, 16, False),
    ],
)
def test_c138_colours_of_the_environment(environ, colours_, light):
    from lumina_tui.colours import colours_of, light_background

    assert (colours_of(environ), light_background(environ)) == (colours_, light)


def test_copy_sends_osc_52_up_to_8_kib_and_always_a_file(tmp_path):
    import base64

    from lumina_tui.places import cache_dir

    run = "r" * 60
    FakeEngine(tmp_path, name=run).emit(rec.Run(state="finished"))
    with Terminal("--runs", str(tmp_path), TERM="screen-256color") as terminal:
        terminal.expect(run[:10].encode())
        terminal.send(b"y")
        terminal.expect(b"copied; also in")
        terminal.send(b"q")
        assert terminal.end() == 0
        (sent,) = re.findall(rb"\x1b\]52;c;([A-Za-z0-9+/=]*)\x07", terminal.raw)
    assert base64.b64decode(sent).decode().endswith(run)
    assert (cache_dir() / "copied.txt").read_text().endswith(run)


def test_stalled_reader_is_waited_for_and_then_sees_the_newest_step(tmp_path):
    """The terminal is not read while records stream in; read again, it shows the newest step at once."""
    engine = FakeEngine(tmp_path, total_steps=None)
    engine.emit(rec.Run(state="running"))
    engine.steps(50)
    with Terminal("--runs", str(tmp_path), "--fps", "10", "demo", size=(200, 60)) as terminal:
        terminal.expect(b"loss  EMA")
        deadline = time.monotonic() + 60
        while not terminal.stalled() and time.monotonic() < deadline:
            engine.steps(20, loss=2.0 + (engine.step_number % 7))
            time.sleep(0.05)
        engine.steps(1)
        newest = f"step {engine.step_number:,}".encode()
        for key, expected in ((b"1", b"runs 1"), (b"5", newest)):  # a whole repaint, not only the digits that changed
            terminal.send(key)
            terminal.expect(expected)
        terminal.send(b"q")
        assert terminal.end() == 0


def test_what_is_remembered_survives_a_hang_up(tmp_path):
    from lumina_tui.places import state_dir

    engine = FakeEngine(tmp_path)
    engine.emit(rec.Run(state="finished"))
    engine.steps(30)
    with Terminal("--runs", str(tmp_path), "demo") as terminal:
        terminal.expect(b"loss  EMA")
        terminal.send(b"v")
        terminal.expect(b"log Y")
        os.kill(terminal.pid, signal.SIGHUP)
        assert terminal.end() == 0
    kept = json.loads((state_dir() / "session.json").read_text())
    assert kept["app.screen"]["subject"]["run"] == str(tmp_path / "demo")
    with Terminal("--runs", str(tmp_path)) as terminal:  # plain lumina: the same screen again
        terminal.expect(b"loss  EMA")
        terminal.send(b"q")
        assert terminal.end() == 0


def test_no_mouse_and_the_setting_leave_the_mouse_to_the_terminal(tmp_path):
    from lumina_tui.places import config_dir

    with Terminal("--runs", str(tmp_path)) as terminal:
        terminal.expect(b"No runs in")
        assert b"\x1b[?1003h" in terminal.raw
    with Terminal("--runs", str(tmp_path), "--no-mouse") as terminal:
        terminal.expect(b"No runs in")
        assert b"\x1b[?1003h" not in terminal.raw
    config_dir().mkdir(parents=True)
    (config_dir() / "settings.yaml").write_text("mouse: false\n")
    with Terminal("--runs", str(tmp_path)) as terminal:
        terminal.expect(b"No runs in")
        assert b"\x1b[?1003h" not in terminal.raw


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
