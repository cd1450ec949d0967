"""Checks of memory, shared memory, limits of the process, and clocks."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path

from .row import Result, fail, ok, skipped, warn
from .system import System

ADVISED_MEMORY, LEAST_MEMORY = 16e9, 2e9  # bytes: the documented floor; what the debug preset needs
ADVISED_SHM = 1 << 30
LEAST_FILES, ADVISED_FILES = 256, 1024
ADVISED_PROCESSES = 2048
_UNLIMITED = resource.RLIM_INFINITY
_CLOCK_WAIT = 0.05  # s over which two clocks are compared
_NOT_SYNCHRONISED = 0x40  # STA_UNSYNC of adjtimex(2)


def memory(system: System) -> Iterator[Result]:
    """Memory that this process may use: the machine's, or its control group's limit if that is lower."""
    from ..monitoring.hardware import memory_limit

    limit = memory_limit(system.root / "sys/fs/cgroup")
    lines = (line.split() for line in (system.read("/proc/meminfo") or "").splitlines())
    figures = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) >= 2 and words[1].isdigit()}
    total = figures.get("MemTotal", limit)
    usable = min(total, limit)
    free = min(usable, figures.get("MemAvailable", usable))
    text = f"{usable / 1e9:.1f} GB, {free / 1e9:.1f} GB free" + (
        f" (limit of the container or slice; the machine has {total / 1e9:.0f} GB)" if limit < 0.99 * total else ""
    )
    if free < LEAST_MEMORY:
        yield fail(text, f"the smallest preset needs {LEAST_MEMORY / 1e9:.0f} GB: stop other programs, or raise the limit")
    elif usable < 0.9 * ADVISED_MEMORY:  # a machine sold with 16 GB shows a little less
        yield warn(text, "16 GB are advised: small presets work; lumina-engine budget says what fits")
    else:
        yield ok(text)


def shared_memory(system: System) -> Iterator[Result]:
    """/dev/shm: NCCL and data loaders of several ranks exchange data through it."""
    try:
        found = system.statvfs(system.root / "dev/shm")
    except OSError as error:
        yield warn(f"/dev/shm: {error.strerror}", "mount a tmpfs there; several ranks on one machine need it")
        return
    size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    text = f"{size / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
    if min(size, free) < ADVISED_SHM:
        yield warn(text, "in a container: --shm-size=8g or --ipc=host; else free or enlarge /dev/shm")
    else:
        yield ok(text)


def limits(system: System) -> Iterator[Result]:
    """Open files, locked memory and processes that this login may have (ulimit)."""
    soft, hard = system.rlimit(resource.RLIMIT_NOFILE)
    text = f"{_amount(soft)} open files (at most {_amount(hard)})"
    if _below(soft, LEAST_FILES):
        yield fail(text, f"ulimit -n {ADVISED_FILES} before starting", "files")
    elif _below(soft, ADVISED_FILES):
        yield warn(text, f"ulimit -n {ADVISED_FILES} before starting", "files")
    else:
        yield ok(text, part="files")
    soft, _ = system.rlimit(resource.RLIMIT_MEMLOCK)
    text = f"{'unlimited' if soft == _UNLIMITED else f'{soft / (1 << 20):,.0f} MiB of'} locked memory"
    if soft != _UNLIMITED and system.names("/sys/class/infiniband"):
        yield warn(
            f"{text}; InfiniBand needs it unlimited",
            "ulimit -l unlimited (limits.conf, or LimitMEMLOCK= of the service)",
            "locked",
        )
    else:
        yield ok(text, part="locked")
    soft, _ = system.rlimit(resource.RLIMIT_NPROC)
    pids = (system.read("/sys/fs/cgroup/pids.max") or "").strip()
    least = min(
        [limit for limit in (soft, int(pids) if pids.isdigit() else _UNLIMITED) if limit != _UNLIMITED], default=_UNLIMITED
    )
    text = f"{_amount(least)} processes and threads"
    if _below(least, ADVISED_PROCESSES):
        yield warn(text, f"ulimit -u {ADVISED_PROCESSES}; in a container --pids-limit {ADVISED_PROCESSES}", "processes")
    else:
        yield ok(text, part="processes")


def _below(limit: int, wanted: int) -> bool:
    return limit != _UNLIMITED and limit < wanted


def _amount(limit: int) -> str:
    return "unlimited" if limit == _UNLIMITED else f"{limit:,}"


def clock(system: System) -> Iterator[Result]:
    """Whether wall clock and steady clock run alike, and whether the kernel calls its clock synchronised (NTP)."""
    now = system.now
    wall, steady = now.time(), now.monotonic()
    now.sleep(_CLOCK_WAIT)
    drift = abs((now.time() - wall) - (now.monotonic() - steady))
    made = Path(__file__).stat().st_mtime
    if drift > 0.5:
        yield fail(
            f"the wall clock jumped by {drift:.1f} s within {_CLOCK_WAIT:.2f} s",
            "something sets the clock again and again: stop it",
        )
    elif wall < made - 86_400:
        yield fail(
            f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime(wall))} UTC: older than Lumina itself",
            "set the clock: ages of records and checkpoints would be wrong",
        )
    else:
        yield ok(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(wall))} UTC, steady")
    yield _synchronised(system)


def _synchronised(system: System) -> Result:
    status = system.clock_status()
    daemon = next(
        (
            name
            for name, path in (("timesyncd", "/run/systemd/timesync/synchronized"), ("chrony", "/run/chrony"))
            if system.has(path)
        ),
        "",
    )
    if status is None:
        return skipped("the kernel does not say whether its clock is synchronised", part="ntp")
    if status & _NOT_SYNCHRONISED and not daemon:
        return warn(
            "not synchronised (virtual machines may take their host's clock)",
            "only runs over several machines compare clocks: timedatectl set-ntp true, or install chrony",
            "ntp",
        )
    return ok(f"synchronised{f' by {daemon}' if daemon else ''}", part="ntp")
