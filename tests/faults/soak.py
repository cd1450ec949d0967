"""Everything at once for minutes (MX08): `python -m tests.faults.soak [--minutes 30] [--seed N] [--json]`.

A real run of the tiny model; eight clients that attach, read, stall and go at random; a viewer in a terminal killed every ten
seconds; a save every five; the rank killed once a minute and restarted by its supervisor. At the end the run is stopped, its
last checkpoint compared with that of a run over the same steps that nobody disturbed, and the figures are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import load_file

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import LogReader, read_records
from lumina_engine.run.client import RunClient, send_command
from lumina_engine.run.directory import RunDirectory, RunError
from lumina_engine.run.launch import wait
from lumina_engine.run.process import descendants
from tests.tui.test_terminal import Terminal
from tests.waiting import until

from .injector import Fault
from .tiny_run import final_manifest, prepare, start, steps

KEYS: dict[str, Any] = {
    "lr_schedule": "constant",  # so that an undisturbed run over fewer steps has the same rates
    "warmup_steps": 0,
    "num_epochs": 1_000_000,
    "max_steps": 10_000_000,
    "save_interval": 0,  # by command
    "eval_interval": 0,
    "async_save": True,
}
PACE_S = 0.01  # added to each step: at most 100 a second
CLIENTS = 8
SAVE_S, VIEWER_S, KILL_S, LOOK_S = 5.0, 10.0, 60.0, 2.0  # between two saves, viewers, kills, looks


class Soak:
    """One soak of `seconds` in `folder`."""

    def __init__(self, folder: Path, seconds: float, seed: int) -> None:
        self.folder, self.seconds, self.seed = folder, seconds, seed
        pace = Fault("slow", section="data", value=PACE_S, inc=None, times=None)
        self.run = prepare(folder, "soak", [pace], **KEYS)
        self.over = threading.Event()
        self.counts = dict.fromkeys(("attached", "stalled", "saves", "viewers", "kills"), 0)
        self.samples: list[tuple[float, int, int, int]] = []  # of the supervisor: time, rss, descriptors, threads
        self.rank_rss: dict[int, int] = {}  # incarnation -> the largest resident size of its rank
        self.wrong: list[str] = []
        self.begin = time.monotonic()

    def go(self) -> dict[str, Any]:
        """Run it; the figures."""
        start(self.run, restart_pause_s=0.01, max_restarts=3)
        until(lambda: (self.run.info().step or 0) > 10, "the first steps", deadline=120)
        send_command(self.run, "checkpoint")
        self.begin = time.monotonic()
        actors: list[Callable[[], None]] = [self.permanent, *(self._client(number) for number in range(CLIENTS))]
        actors += [self._every(SAVE_S, self.save), self._every(VIEWER_S, self.viewer), self._every(KILL_S, self.kill)]
        actors.append(self._every(LOOK_S, self.look))
        threads = [threading.Thread(target=self._guarded(actor), daemon=True) for actor in actors]
        for thread in threads:
            thread.start()
        self.over.wait(self.seconds)
        self.over.set()
        for thread in threads[1:]:
            thread.join(60)
        until(self._stopped, "the run to take the stop", deadline=60)
        code = wait(self.run, 120)
        threads[0].join(60)
        if any(thread.is_alive() for thread in threads):
            self.wrong.append("a client did not end")
        if code != 0:
            self.wrong.append(f"the run ended with {code}: {self.run.info().reason}")
        return self.figures()

    def _guarded(self, actor: Callable[[], None]) -> Callable[[], None]:
        def act() -> None:
            try:
                actor()
            except Exception as error:
                self.wrong.append(f"{getattr(actor, '__name__', 'actor')}: {type(error).__name__}: {error}")

        return act

    def _every(self, seconds: float, action: Callable[[], None]) -> Callable[[], None]:
        def act() -> None:
            while not self.over.wait(seconds):
                action()

        return act

    def _stopped(self) -> bool:
        with contextlib.suppress(RunError, OSError):
            send_command(self.run, "stop", {"save": True})
        return not self.run.alive or self.run.info().state in ("stopping", "finished")

    # ---- what is done to it ----------------------------------------------------------------------------------------------

    def permanent(self) -> None:
        """A client that reads everything, over all restarts: each record once, in order."""
        expected = 0
        with RunClient(self.run, timeout=120) as client:
            for record in client.records():
                expected += 1
                if record.seq != expected:
                    self.wrong.append(f"the permanent client got seq {record.seq} for {expected}")
                    return
        self.counts["records seen by the permanent client"] = expected

    def _client(self, number: int) -> Callable[[], None]:
        chance = random.Random(f"{self.seed}:{number}")

        def come_and_go() -> None:
            while not self.over.is_set():
                with contextlib.suppress(RunError, OSError), RunClient(self.run, timeout=2.0) as client:
                    self.counts["attached"] += 1
                    until_then = time.monotonic() + chance.random() * 4
                    if chance.random() < 0.4:  # stands still without reading
                        self.counts["stalled"] += 1
                        self.over.wait(until_then - time.monotonic())
                        continue
                    while time.monotonic() < until_then and client.read_line() is not None:
                        pass
                self.over.wait(chance.random())

        return come_and_go

    def save(self) -> None:
        with contextlib.suppress(RunError, OSError):  # between two incarnations nobody saves
            send_command(self.run, "checkpoint")
            self.counts["saves"] += 1

    def viewer(self) -> None:
        """`lumina` in a terminal, killed some seconds later, whatever it is doing."""
        environ = {"LUMINA_RUNS": str(self.folder), "LUMINA_SOCKETS": os.environ["LUMINA_SOCKETS"]}
        with Terminal(self.run.name, **environ) as seen:
            end = time.monotonic() + 6
            while time.monotonic() < end and seen.read(0.1):
                pass
            os.kill(seen.pid, signal.SIGKILL)
            self.counts["viewers"] += 1
            if b"Traceback" in seen.raw:
                self.wrong.append("a viewer showed a traceback")

    def kill(self) -> None:
        """SIGKILL the rank at a random moment; its supervisor starts it again."""
        threading.Event().wait(random.Random(f"{self.seed}:{self.counts['kills']}").random())
        for child in descendants(psutil.Process(self._owner()).pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
        self.counts["kills"] += 1

    def _owner(self) -> int:
        owner = self.run.owner()
        assert owner is not None, "the supervisor is gone"
        return owner.pid

    def look(self) -> None:
        supervisor = psutil.Process(self._owner())
        with supervisor.oneshot():
            values = (supervisor.memory_info().rss, supervisor.num_fds(), supervisor.num_threads())
        self.samples.append((time.monotonic() - self.begin, *values))
        inc = self.run.info().inc or 0
        for child in supervisor.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                self.rank_rss[inc] = max(self.rank_rss.get(inc, 0), child.memory_info().rss)

    # ---- what came of it -------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        seqs, damaged = read_all(self.run)
        log = self.run.log_path.read_text(errors="replace")
        rewinds = sum(isinstance(record, rec.Rewind) for record in read_records(self.run.metrics_path))
        last = max(steps(self.run))
        begin = time.monotonic()
        equal = self.equal_to_replay(last)
        warm = [sample for sample in self.samples if sample[0] > min(60.0, self.seconds / 4)] or self.samples
        ranks = [self.rank_rss[inc] for inc in sorted(self.rank_rss)]
        return {
            **self.counts,
            "seconds": round(self.seconds),
            "steps": last,
            "steps a second": round(last / self.seconds, 1),
            "records": len(seqs),
            "seq gaps": sum(b != a + 1 for a, b in itertools.pairwise(seqs)) + (seqs[0] != 1),
            "damaged lines": damaged,
            "restarts": rewinds,
            "supervisor rss slope, MB/h": round(slope(warm) / 1e6 * 3600, 2),
            "supervisor rss growth, MB": round((warm[-1][1] - warm[0][1]) / 1e6, 2),
            "supervisor descriptors, least and most": [min(s[2] for s in warm), max(s[2] for s in warm)],
            "supervisor descriptors after the last client": self.samples[-1][2],
            "supervisor threads": sorted({s[3] for s in warm}),
            "rank rss by incarnation, MB": [round(rss / 1e6) for rss in ranks],
            "tracebacks": log.count("Traceback"),
            "equal to a replay": equal,
            "replay, s": round(time.monotonic() - begin, 1),
            "wrong": self.wrong,
        }

    def equal_to_replay(self, last: int) -> bool:
        """Whether an undisturbed run over the same steps ends in the same bits: weights, optimizer, generators."""
        other = prepare(self.folder, "replay", **{**KEYS, "max_steps": last, "async_save": False})
        start(other)
        if wait(other, self.seconds * 2 + 120) != 0:
            self.wrong.append(f"the replay ended with {other.info().reason}")
            return False
        mine, others = tensors(self.run), tensors(other)
        return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def tensors(run: RunDirectory) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint: weights, optimizer, generators.

    Without the routing counts since the last `experts` record: a run that reaches its end has just written that record, one
    that is stopped has not.
    """
    manifest = final_manifest(run)
    folder = run.checkpoints / f"step-{manifest['step']:06d}"
    files = [entry["path"] for entry in manifest["files"] if entry["path"].endswith(".safetensors")]
    found = {f"{file}:{name}": value for file in files for name, value in load_file(folder / file).items()}
    return {name: value for name, value in found.items() if ":routing." not in name}


def read_all(run: RunDirectory) -> tuple[list[int], int]:
    reader, seqs = LogReader(run.metrics_path), []
    while records := reader.read_new():
        seqs += [record.seq for record in records]
    return seqs, len(reader.errors)


def slope(samples: list[tuple[float, int, int, int]]) -> float:
    """Bytes a second, by least squares."""
    times, sizes = np.array([s[0] for s in samples]), np.array([s[1] for s in samples], dtype=np.float64)
    return float(np.polyfit(times, sizes, 1)[0]) if len(samples) > 2 else 0.0


def problems(figures: dict[str, Any]) -> list[str]:
    """What breaks the row's criterion. The slope is asserted where it can be told from noise: from ten minutes on."""
    found = list(figures["wrong"])
    for name in ("seq gaps", "damaged lines", "tracebacks"):
        if figures[name]:
            found.append(f"{figures[name]} {name}")
    if not figures["equal to a replay"]:
        found.append("the final state is not that of a replay")
    if figures["seconds"] >= 600 and figures["supervisor rss slope, MB/h"] > 5:
        found.append(f"the supervisor grows by {figures['supervisor rss slope, MB/h']} MB/h")
    if figures["supervisor rss growth, MB"] > 5 or len(figures["supervisor threads"]) > 1:
        found.append("the supervisor's memory or threads grow")
    ranks = figures["rank rss by incarnation, MB"]
    if len(ranks) > 2 and ranks[-1] > ranks[0] * 1.1:
        found.append("each incarnation's rank is larger than the one before")
    return found


def soak(seconds: float, seed: int) -> dict[str, Any]:
    """Run one soak in folders of its own."""
    with tempfile.TemporaryDirectory(prefix="lumina-soak-") as folder:
        sockets = Path(tempfile.mkdtemp(prefix="ls-", dir="/tmp"))
        os.environ |= {"LUMINA_SOCKETS": str(sockets / "s"), "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": f"{folder}/state"}
        try:
            return Soak(Path(folder), seconds, seed).go()
        finally:
            for left in sorted(sockets.rglob("*"), reverse=True):
                left.rmdir() if left.is_dir() else left.unlink()
            sockets.rmdir()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description="everything at once, for minutes (MX08)")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    figures = soak(60 * args.minutes, args.seed)
    if args.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name:<42} {value}" for name, value in figures.items()))
    found = problems(figures)
    for line in found:
        print(f"WRONG: {line}", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
