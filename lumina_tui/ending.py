"""The end of a run's processes: what they held, killing them, and what is left. Blocking: call it in a thread."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from lumina_engine.monitoring.hardware import Nvml
from lumina_engine.run.directory import RunDirectory, RunError
from lumina_engine.run.process import Process, marked, send_all

from .paint import size

KILL_WAIT_S = 15.0


@dataclass(frozen=True)
class Footprint:
    """What a run holds: its processes, their resident memory, their memory on devices (None where NVML does not tell)."""

    pids: Sequence[int] = ()
    host_bytes: int = 0
    device_bytes: int | None = None


def processes_of(run: RunDirectory) -> list[Process]:
    """Every process of the run: the supervisor, and whatever carries the run's nonce."""
    try:
        nonce = run.identity().get("nonce")
    except RunError:
        nonce = None
    owner = run.owner()
    found = marked(nonce) if isinstance(nonce, str) and nonce else []
    return [*([owner] if owner is not None else []), *(item for item in found if owner is None or item.pid != owner.pid)]


def footprint(run: RunDirectory, nvml: Nvml | None = None) -> Footprint:
    """What the run holds now."""
    import psutil

    pids, held = [], 0
    for item in processes_of(run):
        try:
            held += int(psutil.Process(item.pid).memory_info().rss)
        except psutil.Error:
            continue  # ended in between
        pids.append(item.pid)
    nvml = nvml or Nvml.open()
    used = [nvml.process_memory(pid) for pid in pids] if nvml is not None else []
    known = [value for value in used if value is not None]
    return Footprint(pids, held, sum(known) if known or (nvml is not None and not pids) else None)


def kill_run(run: RunDirectory, wait_s: float = KILL_WAIT_S) -> None:
    """End the supervisor and every process of the run. Takes up to `wait_s`."""
    run.signal(signal.SIGKILL)
    deadline = time.monotonic() + wait_s
    while left := processes_of(run):
        send_all(left, signal.SIGKILL)
        if time.monotonic() >= deadline:
            return
        time.sleep(0.1)


def outcome(before: Footprint, after: Footprint) -> str:
    """What an end has freed, and who is still there, for the user."""
    if after.pids:
        text = f"still alive: process {', '.join(map(str, after.pids))} (pid)"
    elif before.pids:
        many = len(before.pids) != 1
        text = f"{'all ' if many else ''}{len(before.pids)} process{'es are' if many else ' is'} gone"
    else:
        text = "no process is left"
    if before.device_bytes is not None and after.device_bytes is not None:
        freed = max(0, before.device_bytes - after.device_bytes)
        text += f", {size(freed)} of device memory freed"
    freed = max(0, before.host_bytes - after.host_bytes)
    return text + (f", {size(freed)} of host memory freed" if freed else "")
