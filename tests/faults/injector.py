"""Rig I: a fault at (rank, step, section) of a real run, put in through the channel that every rank reports its sections to.

The product is not touched: the worker takes any channel, and calls `report(step, section)` at each change of section. A plan is
a list of `Fault`; `write_plan` stores it in the run's folder, `faulty_worker.py` reads it there in every rank.
"""

from __future__ import annotations

import collections
import ctypes
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lumina_engine.checkpoint import backup
from lumina_engine.data import batch
from lumina_engine.run.rank import Command, NullChannel

PLAN = "faults.json"
FIRED = "fired.jsonl"  # what was done, a line each, in the run's folder


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. It strikes at the `count`-th report of (step, section) that fits, in incarnation `inc`, on rank `rank`.

    Attributes:
        how: raise, say_environment, exit, abort, segfault, kill, oom, sleep, deadlock, hold_gil, stop, slow, nan_loss,
            nan_gradient, signal, loader (the threads that make rows fail from now on), restore (putting an optimizer's state
            back fails from now on, behind the weights), backup (copies to the backups never end from now on, and the first one
            has the run preempted).
        step: the reported step; None fits every step.
        section: data, forward, backward, step, save, eval, …; None fits every section.
        rank: global rank; None fits every rank.
        inc: incarnation of the run; None fits every one, so the fault comes back after each restart.
        value: exit code (exit), seconds (slow), signal number (signal), number to poison with (nan_*; default NaN), part of a
            parameter's name (nan_gradient: only parameters with it, in `only`).
        only: part of the names of the parameters whose gradients are poisoned; "" means all.
        times: how often it strikes at most; None: without end.
        to: whom a `signal` goes to: "rank" (itself) or "supervisor".
    """

    how: str
    step: int | None = None
    section: str | None = None
    rank: int | None = 0
    inc: int | None = 1
    count: int = 1
    value: float | None = None
    only: str = ""
    times: int | None = 1
    to: str = "rank"


def write_plan(folder: Path, faults: Sequence[Fault]) -> None:
    """Store the plan where the run's ranks find it."""
    (folder / PLAN).write_text(json.dumps([asdict(fault) for fault in faults]), encoding="utf-8")


def read_plan(folder: Path) -> list[Fault]:
    path = folder / PLAN
    return [Fault(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def fired(folder: Path) -> list[dict[str, Any]]:
    """What struck so far: fault, step, section, rank, inc, and when (`t`, unix seconds, as the records of the log)."""
    path = folder / FIRED
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


class FaultyChannel(NullChannel):
    """Passes everything on to a real channel, and strikes where the plan says.

    `worker` is set once the worker exists: poison needs its model.
    """

    def __init__(self, inner: NullChannel, folder: Path, faults: Sequence[Fault], rank: int, inc: int) -> None:
        self.inner, self.folder, self.rank, self.inc = inner, folder, rank, inc
        mine = [f for f in faults if f.rank in (None, rank) and f.inc in (None, inc)]
        self._seen = dict.fromkeys(range(len(mine)), 0)
        self._struck = dict(self._seen)
        self._faults = mine
        self.supervised = inner.supervised
        self.worker: Any = None
        self.until_step: list[Callable[[], None]] = []  # what ends with the backward pass

    def report(self, step: int, section: str) -> None:
        self.inner.report(step, section)
        while section == "step" and self.until_step:
            self.until_step.pop()()
        for number, fault in enumerate(self._faults):
            if fault.step not in (None, step) or fault.section not in (None, section):
                continue
            self._seen[number] += 1
            done = self._struck[number]
            if self._seen[number] >= fault.count and (fault.times is None or done < fault.times):
                self._struck[number] += 1
                self._note(fault, step, section)
                _STRIKES[fault.how](fault, self)

    def poll(self) -> list[Command]:
        return self.inner.poll()

    def leave(self, code: int, reason: str | None = None) -> None:
        self.inner.leave(code, reason)

    def __getattr__(self, name: str) -> Any:  # what a later channel can do beyond this, its own way
        return getattr(self.inner, name)

    def _note(self, fault: Fault, step: int, section: str) -> None:
        line = {"how": fault.how, "step": step, "section": section, "rank": self.rank, "inc": self.inc, "t": time.time()}
        descriptor = os.open(self.folder / FIRED, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, json.dumps(line).encode() + b"\n")
        os.close(descriptor)


class InjectedError(RuntimeError):
    """Raised by the fault `raise`."""


def _raise(fault: Fault, channel: FaultyChannel) -> None:
    raise InjectedError(f"injected at rank {channel.rank}")


def _say_environment(fault: Fault, channel: FaultyChannel) -> None:
    """Print the environment, and put it into an error, as a careless library may."""
    everything = " ".join(os.environ.values())
    print(everything, flush=True)
    raise InjectedError(everything)


def _exit(fault: Fault, channel: FaultyChannel) -> None:
    os._exit(int(fault.value if fault.value is not None else 3))


def _abort(fault: Fault, channel: FaultyChannel) -> None:
    os.abort()


def _segfault(fault: Fault, channel: FaultyChannel) -> None:
    ctypes.string_at(0)


def _kill(fault: Fault, channel: FaultyChannel) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _oom(fault: Fault, channel: FaultyChannel) -> None:
    raise torch.OutOfMemoryError("injected: out of memory")


def _sleep(fault: Fault, channel: FaultyChannel) -> None:
    while True:
        time.sleep(3600)


def _deadlock(fault: Fault, channel: FaultyChannel) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def _hold_gil(fault: Fault, channel: FaultyChannel) -> None:
    """A loop in C without end: no other thread of Python runs, no handler of a signal either."""
    collections.deque(itertools.repeat(0), maxlen=0)


def _stop(fault: Fault, channel: FaultyChannel) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _slow(fault: Fault, channel: FaultyChannel) -> None:
    time.sleep(fault.value or 0.05)


def _signal(fault: Fault, channel: FaultyChannel) -> None:
    target = int(os.environ["LUMINA_SUPERVISOR"]) if fault.to == "supervisor" else os.getpid()
    os.kill(target, int(fault.value if fault.value is not None else signal.SIGTERM))


def _loader(fault: Fault, channel: FaultyChannel) -> None:
    def broken(*_: Any) -> Any:
        raise OSError(f"injected in {threading.current_thread().name}")

    batch.make_batch = broken  # type: ignore[assignment]


def _restore(fault: Fault, channel: FaultyChannel) -> None:
    def broken(*_: Any) -> Any:
        raise InjectedError(f"injected at rank {channel.rank}, in the middle of a restore")

    channel.worker.trainer.engine.load_state = broken


def _backup(fault: Fault, channel: FaultyChannel) -> None:
    def endless(*_: Any) -> Any:
        os.kill(int(os.environ["LUMINA_SUPERVISOR"]), signal.SIGTERM)
        threading.Event().wait()

    backup._copy_file = endless


def _poison(fault: Fault) -> float:
    return float("nan") if fault.value is None else fault.value


def _nan_loss(fault: Fault, channel: FaultyChannel) -> None:
    """The next forward pass of the model gives a poisoned loss. Strike in section forward."""
    model = channel.worker.trainer.model

    def poisoned(module: Any, args: Any, output: Any) -> Any:
        handle.remove()
        return output._replace(loss_sum=output.loss_sum * _poison(fault))

    handle = model.register_forward_hook(poisoned)


def _nan_gradient(fault: Fault, channel: FaultyChannel) -> None:
    """The next backward pass gives poisoned gradients. Strike in section forward or backward."""
    named = channel.worker.trainer.model.named_parameters()
    parameters = [parameter for name, parameter in named if fault.only in name and parameter.requires_grad]
    if not parameters:
        raise LookupError(f"no parameter with {fault.only!r} in its name")
    channel.until_step += [p.register_hook(lambda gradient: gradient * _poison(fault)).remove for p in parameters]


_STRIKES: dict[str, Callable[[Fault, FaultyChannel], None]] = {
    "raise": _raise,
    "say_environment": _say_environment,
    "exit": _exit,
    "abort": _abort,
    "segfault": _segfault,
    "kill": _kill,
    "oom": _oom,
    "sleep": _sleep,
    "deadlock": _deadlock,
    "hold_gil": _hold_gil,
    "stop": _stop,
    "slow": _slow,
    "signal": _signal,
    "loader": _loader,
    "restore": _restore,
    "backup": _backup,
    "nan_loss": _nan_loss,
    "nan_gradient": _nan_gradient,
}
