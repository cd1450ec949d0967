"""What the checks look at, in one object, so that a test can put faults into any part of it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..monitoring.hardware import Nvml

_READ_LIMIT = 1 << 20  # bytes of a file below /proc, /sys or /etc
DISTRIBUTION = "lumina"


@dataclass(frozen=True)
class Output:
    """How a program ended; `code` is None if it did not in its time."""

    code: int | None
    out: str
    err: str

    @property
    def last_error(self) -> str:
        """The last line of its error output, else of its output."""
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return lines[-1].strip() if lines else ""


def call(argv: Sequence[str], limit_s: float) -> Output:
    """Run a program without a terminal and without a shell.

    Raises:
        OSError: it cannot be started.
    """
    try:
        done = subprocess.run(list(argv), stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return Output(None, "", f"no end after {limit_s:.0f} s")
    return Output(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> list[str] | None:
    try:
        return importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvml() -> Nvml | None:
    from ..monitoring.hardware import Nvml

    return Nvml.open()


def _cache(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lumina"


class _Timex(ctypes.Structure):
    """The head of struct timex of adjtimex(2); the kernel fills it whole, so there is room behind it."""

    _fields_ = [
        ("modes", ctypes.c_int),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 512),
    ]


def kernel_clock_status() -> int | None:
    """The status bits of the kernel's clock (adjtimex, read only), None if it cannot be asked."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        state = _Timex()
        return None if library.adjtimex(ctypes.byref(state)) < 0 else int(state.status)
    except (OSError, AttributeError):
        return None


@dataclass(frozen=True)
class System:
    """This machine by default. `root` is the file system that /proc, /sys, /etc, /run and /var are read from."""

    environ: Mapping[str, str]
    runs: Path
    cache: Path
    tmp: Path
    sockets: Path
    root: Path = Path("/")
    python: tuple[int, int, int] = sys.version_info[:3]
    version: Callable[[str], str | None] = _version
    requirements: Callable[[], list[str] | None] = _requirements
    nvml: Callable[[], Nvml | None] = _nvml
    call: Callable[[Sequence[str], float], Output] = call
    rlimit: Callable[[int], tuple[int, int]] = resource.getrlimit
    statvfs: Callable[[Path], os.statvfs_result] = os.statvfs
    now: Any = time  # time(), monotonic(), sleep()
    clock_status: Callable[[], int | None] = kernel_clock_status

    @classmethod
    def here(cls, runs: Path | None = None) -> System:
        """The machine that this process runs on."""
        from ..run.directory import runs_root
        from ..run.socket import socket_folder

        return cls(
            environ=os.environ,
            runs=runs or runs_root(),
            cache=_cache(os.environ),
            tmp=Path(tempfile.gettempdir()),
            sockets=socket_folder(),
        )

    def read(self, path: str) -> str | None:
        """The text of a file below `root`, None if it is not there or cannot be read."""
        try:
            with (self.root / path.lstrip("/")).open("rb") as file:
                return file.read(_READ_LIMIT).decode(errors="replace")
        except OSError:
            return None

    def has(self, path: str) -> bool:
        """Whether a path exists below `root`."""
        return os.path.lexists(self.root / path.lstrip("/"))

    def names(self, path: str) -> list[str]:
        """The names in a folder below `root`; none if it cannot be read."""
        try:
            return sorted(entry.name for entry in (self.root / path.lstrip("/")).iterdir())
        except OSError:
            return []

    def which(self, program: str) -> str | None:
        """Where a program is found on the PATH."""
        return shutil.which(program, path=self.environ.get("PATH", ""))
