"""What watching costs a run: step times with no viewer, one that reads, and eight that never read, in rounds of one run.

    python tests/bench/telemetry.py [--rounds 9] [--steps 40] [key=value …]

One run of the debug preset goes on all the time; the viewers come and go. Each round gives the median step time of its three
phases, so the ratios are of neighbours in time. The last line is JSON: throughput with viewers ÷ without, median over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import LogReader
from lumina_engine.run.directory import RunDirectory

HELLO = json.dumps({"op": "hello", "proto": 1, "client": "bench"}).encode() + b"\n"


@contextlib.contextmanager
def viewers(path: str, stalled: int, reading: int) -> Iterator[None]:
    """Connected viewers: some read all the time, the others never."""
    links = []
    for _ in range(stalled + reading):
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.connect(path)
        link.sendall(HELLO)
        links.append(link)

    def drain(link: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while link.recv(65_536):
                pass

    threads = [threading.Thread(target=drain, args=(link,), daemon=True) for link in links[:reading]]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for link in links:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()


def step_times(reader: LogReader, count: int) -> list[float]:
    """The next `count` step times from now on, without the first (it began before the viewers came)."""
    reader.read_new()
    times: list[float] = []
    while len(times) < count + 1:
        times += [r.step_time for r in reader.read_new() if isinstance(r, rec.Step) and r.step_time]
        select.select([], [], [], 0.02)
    return times[1 : count + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keys = ["max_steps=100000", "num_epochs=1000", "eval_interval=0", "save_interval=0", *args.overrides]
        words = [sys.executable, "-m", "lumina_engine.cli", "train", "--runs", folder, "--run", "bench", "--detach", *keys]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        run = RunDirectory(Path(folder) / "bench")
        try:
            reader = LogReader(run.metrics_path)
            path = run.identity()["socket"]
            step_times(reader, args.steps)  # warm-up
            rows = []
            phases = [("none", 0, 0), ("one", 0, 1), ("eight", 8, 0)]
            for number in range(args.rounds):
                row = {}
                turn = number % len(phases)  # each phase is first, second and last equally often
                for name, stalled, reading in phases[turn:] + phases[:turn]:
                    with viewers(path, stalled, reading):
                        row[name] = statistics.median(step_times(reader, args.steps))
                rows.append(row)
                print("  ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in row.items()), flush=True)
        finally:
            subprocess.run([*words[:3], "runs", "stop", "bench", "--runs", folder, "--no-save"], stdout=subprocess.DEVNULL)
    result = {}
    for name in ("one", "eight"):
        ratios = [row["none"] / row[name] for row in rows]
        result[name] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    print(json.dumps({"throughput_against_none": result, "rounds": args.rounds, "steps": args.steps}))


if __name__ == "__main__":
    main()
