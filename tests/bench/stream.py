"""A stream under a memory cap, killed and resumed: `python tests/bench/stream.py FOLDER [--gb 5] [--cap-mb 300] [--seconds N]`.

Writes a JSON Lines file of `--gb` GB into FOLDER (random words, so every conversation is another one), then reads it as
training would with `streaming_threshold_gb=1`, in processes that a memory cgroup holds to `--cap-mb`: all of the reader and
of its two tokenising workers counts, page cache included (the reader does without torch). Counting is killed at the end of
each call and goes on; reading is killed in the middle of the file, 40 batches before the end of a window, and 80 batches
are compared with a run that was not interrupted. Needs root for the cgroup; without one it says so and reports the largest
resident set of all processes only.

Each call works for at most `--seconds` and goes on where the last one was, so that it can share a machine; the last one prints
one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import psutil

CGROUP = Path("/sys/fs/cgroup/memory/lumina-bench-stream")
ROWS = 64  # of a batch


def generate(path: Path, size: int) -> None:
    """A file of at least `size` bytes, the same each time."""
    if path.exists() and path.stat().st_size >= size:
        return
    rng = random.Random(0)
    words = ["".join(rng.choices("aeiounrstlmdk", k=rng.randint(2, 9))) for _ in range(5000)]
    texts = [" ".join(rng.choices(words, k=rng.randint(20, 160))) for _ in range(4000)]
    with path.with_suffix(".part").open("w", encoding="utf-8") as file:
        written, number = 0, 0
        while written < size:
            ask, answer = rng.choice(texts), rng.choice(texts)
            turns = [{"role": "user", "content": f"{number}: {ask[:200]}"}, {"role": "assistant", "content": answer}]
            written += file.write(json.dumps({"messages": turns}) + "\n")
            number += 1
    path.with_suffix(".part").rename(path)


def read(path: Path, cache: Path, start: int, stop: int) -> None:
    """In the process that is measured: count, then print (place, digest) of the batches from row `start` to `stop`.

    Without torch, whose import alone takes 190 MB: the arrays are what `TrainLoader` makes tensors of.
    """
    from lumina_engine.data.rows import RowOptions
    from lumina_engine.data.stream_open import open_stream
    from lumina_engine.data.tokenizer import ConversationTokenizer

    config = SimpleNamespace(seq_length=1024, data_cache_dir=str(cache), streaming_threshold_gb=1.0)
    stream = open_stream(str(path), config, ConversationTokenizer("gpt-4"), workers=2)
    rows = stream.count(RowOptions.from_config(config))
    ends = rows._epoch(0)[1].tolist()
    head = {"rows": rows.num_rows, "windows": len(stream.windows), "tokens": stream.num_tokens}
    print(json.dumps({**head, "border": ends[len(ends) // 2]}), flush=True)
    for begin in range(start, min(stop, rows.num_rows), ROWS):
        planned = [rows.row(0, place) for place in range(begin, min(begin + ROWS, rows.num_rows))]
        built = rows.build(planned)
        digest = hashlib.sha256(built.input_ids.tobytes() + built.labels.tobytes()).hexdigest()
        print(json.dumps({"place": begin + len(planned), "batch": digest[:16], "rows": planned[:4]}), flush=True)


class Capped:
    """A process of `read` and its children inside the cgroup."""

    def __init__(self, argv: list[str], cap: int, output: IO[str]) -> None:
        self.printed = Path(output.name)  # read by a descriptor of its own: that of the process has its place to write at
        self.has_group = _make_group(cap)
        enter = f"echo $$ > {CGROUP}/cgroup.procs && " if self.has_group else ""
        command = ["sh", "-c", f'{enter}exec "$@"', "sh", sys.executable, __file__, *argv]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=output, text=True, env=environ)
        self.peak = 0

    def look(self) -> None:
        """Note how much the tree holds now."""
        with contextlib.suppress(psutil.Error):
            top = psutil.Process(self.process.pid)
            self.peak = max(self.peak, sum(p.memory_info().rss for p in [top, *top.children(recursive=True)]))

    def figures(self) -> dict[str, int]:
        """The largest use: of the group (what the cap is held against), of resident sets, and how often it met the cap."""
        found = {"peak_rss_sum": self.peak}
        if self.has_group:
            found["peak_group"] = int((CGROUP / "memory.max_usage_in_bytes").read_text())
            found["cap_met"] = int((CGROUP / "memory.failcnt").read_text())
        return found


def _make_group(cap: int) -> bool:
    try:
        CGROUP.mkdir(exist_ok=True)
        (CGROUP / "memory.limit_in_bytes").write_text(str(cap))
        (CGROUP / "memory.max_usage_in_bytes").write_text("0")
        return True
    except OSError as error:
        print(f"no memory cgroup here ({error.strerror}): resident sets only", file=sys.stderr)
        return False


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=5.0)
    parser.add_argument("--cap-mb", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--read", nargs=3, metavar=("CACHE", "START", "STOP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    source = args.folder / "source.jsonl"
    if args.read:
        read(source, Path(args.read[0]), int(args.read[1]), int(args.read[2]))
        return 0
    return measure(args, source)


def measure(args: argparse.Namespace, source: Path) -> int:
    """Generate, count (with kills), read unbroken, read with a kill; `state.json` keeps what is done between calls."""
    args.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.seconds
    generate(source, int(args.gb * 1e9))
    state_path = args.folder / "state.json"
    state = json.loads(state_path.read_text()) if state_path.exists() else {"kills": 0, "peaks": []}
    while not state.get("result"):
        stage = "count" if "head" not in state else "resumed" if "unbroken" in state else "unbroken"
        start, stop = (0, 0) if stage == "count" else state["span"]
        broken = state.get("broken", [])
        if stage == "resumed" and broken:
            start = broken[-1]["place"]
        with tempfile.NamedTemporaryFile("a", encoding="utf-8") as output:  # "a": what is written goes to the end
            argv = [str(args.folder), "--read", str(args.folder / "cache"), str(start), str(stop)]
            capped = Capped(argv, args.cap_mb << 20, output)
            lines, killed = _follow(capped, deadline, len_limit(stage, state))
        state["peaks"].append({"stage": stage, **capped.figures()})
        if not killed and capped.process.returncode != 0:  # the kernel, where the cap is met: no kill of ours
            print(f"{stage}: the process ended with {capped.process.returncode}", file=sys.stderr)
            return 1
        _note(state, stage, lines, killed)
        state_path.write_text(json.dumps(state))
        if time.monotonic() > deadline:
            print(json.dumps({"stage": stage, "killed": state["kills"], "peaks": state["peaks"][-1]}))
            return 0
    print(json.dumps(state["result"]))
    return 0


def len_limit(stage: str, state: dict) -> int | None:
    """Batches after which the process is killed: half of them, the first time that they are read again."""
    return len(state["unbroken"]) // 2 if stage == "resumed" and "broken" not in state else None


def _follow(capped: Capped, deadline: float, most: int | None) -> tuple[list[dict], bool]:
    """What the process prints until it ends, or is killed at the deadline or behind `most` batches."""
    while True:
        capped.look()
        ended = capped.process.poll() is not None
        lines = [json.loads(line) for line in capped.printed.read_text(encoding="utf-8").split("\n")[:-1]]
        if ended:
            return lines, False
        if time.monotonic() > deadline or (most is not None and len(lines) > most):
            capped.process.kill()
            capped.process.wait()
            return lines, True
        time.sleep(0.05)


def _note(state: dict, stage: str, lines: list[dict], killed: bool) -> None:
    """Take what a process printed into the state; the result when all is there."""
    state["kills"] += killed
    if stage == "count" and lines:
        state["head"] = lines[0]
        border = state["head"]["border"] // ROWS * ROWS  # between two windows in the middle of the epoch
        state["span"] = [max(0, border - 40 * ROWS), border + 40 * ROWS]
    elif stage == "unbroken" and not killed:
        state["unbroken"] = lines[1:]
    elif stage == "resumed":
        state["broken"] = state.get("broken", []) + lines[1:]
        if not killed:
            peaks = state["peaks"]
            state["result"] = {
                **state["head"],
                "batches": len(state["unbroken"]),
                "same": state["broken"] == state["unbroken"],
                "kills": state["kills"],
                "peak_group": max(peak.get("peak_group", 0) for peak in peaks),
                "peak_rss_sum": max(peak["peak_rss_sum"] for peak in peaks),
            }


if __name__ == "__main__":
    sys.exit(main())
