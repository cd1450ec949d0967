"""`lumina` in a pseudo-terminal of its own, timed from outside: bytes, CPU seconds, memory, the time until something shows."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from .picture import Picture

READ = 1 << 16
AUTOGROUP_NICE = b"-19"


class MeasureError(Exception):
    """A figure could not be measured; the message says why."""


class Viewer:
    """A running `lumina`. Use as a context; it is killed at the end.

    Args:
        arguments: of its command line.
        size: columns and lines of the terminal.
        home: folder for its own files (state, cache, settings).
        sockets: folder for the sockets of runs and chat servers, so that it sees none but ours.
    """

    def __init__(self, arguments: Sequence[str], size: tuple[int, int], home: Path, sockets: Path) -> None:
        self.picture = Picture(*size)
        self.sent = 0  # bytes that left it
        self._deflate = zlib.compressobj(6)
        self.packed = 0  # the same after zlib, as `ssh -C` does: flushed at each read
        keep = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
        folders = {f"XDG_{kind}_HOME": str(home / kind.lower()) for kind in ("STATE", "CACHE", "CONFIG")}
        environ = {
            **keep,
            **folders,
            "LUMINA_SOCKETS": str(sockets),
            "TERM": "xterm-256color",
            "LC_ALL": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
        }
        self.began = time.monotonic()
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
            with contextlib.suppress(OSError):  # root only: the scheduler takes us before what else this machine does
                Path("/proc/self/autogroup").write_bytes(AUTOGROUP_NICE)
            os.execve(sys.executable, [sys.executable, "-m", "lumina_tui.app", *arguments], environ)
        self._process = psutil.Process(self.pid)

    def __enter__(self) -> Viewer:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            os.close(self.fd)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    # bytes

    def read(self, seconds: float) -> bytes:
        """What comes within `seconds`, as soon as it comes; empty if nothing does.

        Raises:
            MeasureError: lumina has ended.
        """
        ready, _, _ = select.select([self.fd], [], [], max(0.0, seconds))
        if not ready:
            return b""
        try:
            data = os.read(self.fd, READ)
        except OSError:
            data = b""
        if not data:
            raise MeasureError("lumina ended: " + self.picture.text.strip()[-200:])
        self.sent += len(data)
        self.packed += len(self._deflate.compress(data)) + len(self._deflate.flush(zlib.Z_SYNC_FLUSH))
        self.picture.feed(data)
        return data

    def watch(self, seconds: float) -> None:
        """Let it run, reading all that it sends."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.read(left)

    def until(self, condition: Callable[[Picture], object], what: str, seconds: float = 30.0) -> float:
        """Read until the picture fulfils a condition; returns the monotonic time at which it did.

        Raises:
            MeasureError: it did not within `seconds`.
        """
        end = time.monotonic() + seconds
        while not condition(self.picture):
            left = end - time.monotonic()
            if left <= 0:
                raise MeasureError(f"waited {seconds:.0f} s for {what}")
            self.read(left)
        return time.monotonic()

    def settle(self, silence: float = 0.3, seconds: float = 20.0) -> None:
        """Read until nothing comes for `silence` seconds, or `seconds` are over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.read(silence):
            pass

    def send(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def key(self, key: str, region: Callable[[Picture], str] | None = None, seconds: float = 3.0) -> float | None:
        """Seconds from a key to the first bytes, or to the change of a part of the picture; None if nothing changes."""
        before = region(self.picture) if region is not None else None
        began = time.monotonic()
        self.send(key)
        while (left := began + seconds - time.monotonic()) > 0:
            data = self.read(left)
            if (region(self.picture) != before) if region is not None else data:
                return time.monotonic() - began
        return None

    # cost

    @property
    def cpu(self) -> float:
        """CPU seconds so far, user and system."""
        times = self._process.cpu_times()
        return float(times.user + times.system)

    @property
    def rss_mb(self) -> float:
        """Resident memory now, in MB (10^6 bytes)."""
        return float(self._process.memory_info().rss) / 1e6

    @property
    def peak_mb(self) -> float:
        """Largest resident memory so far, in MB."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise MeasureError("this system does not tell the largest memory of a process")
