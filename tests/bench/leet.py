"""The same run in `lumina` and in `wandb leet`, side by side in tmux: seconds to the complete curve, CPU seconds, memory.

    python tests/bench/leet.py [--wandb FOLDER/bin/wandb] [--steps 100000] [--rounds 3] [--capture FILE]

One run of 12 metrics is written twice from the same numbers: as a Lumina run, and with the wandb SDK in offline mode. Both
viewers have a pane of the same size. In each round they open the run one after the other, so that neither disturbs the other,
and the order changes from round to round; lumina once without its column cache and once with it. A viewer is done when its
screen says that the run is finished and shows the last step. CPU and memory are of all its processes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MetricLog
from lumina_engine.run.directory import RunDirectory

METRICS = (
    *("loss", "tokens_per_s", "grad_norm", "lr", "aux_loss", "z_loss", "step_time", "mfu"),
    *("data_time", "forward_time", "backward_time", "optimizer_time"),
)
PANE = (120, 48)
TMUX = ("tmux", "-L", f"lumina-leet-{os.getpid()}", "-f", "/dev/null")
SDK = """
import json, os, sys
os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
import wandb
run = wandb.init(project="bench", dir=sys.argv[2], settings=wandb.Settings(console="off", x_disable_stats=True))
for number, line in enumerate(open(sys.argv[1]), 1):
    run.log(json.loads(line), step=number)
run.finish()
"""


def write_runs(folder: Path, steps: int, wandb: Path) -> tuple[Path, Path]:
    """The folder of Lumina's runs and wandb's file."""
    rng = random.Random(0)
    numbers = folder / "numbers.jsonl"
    run = RunDirectory.create(folder / "runs", "bench", preset="debug")
    with numbers.open("w") as file, MetricLog(run.metrics_path, 1, sync_interval=0) as log:
        log.emit(rec.Run(state="running", total_steps=steps))
        for n in range(1, steps + 1):
            curve = 1.7 + 4.2 * math.exp(-n / 3e4)
            values = {name: round(curve + rng.gauss(0, 0.05), 5) for name in METRICS}
            file.write(json.dumps(values) + "\n")
            log.emit(rec.Step(step=n, tokens=2048 * n, **values))
        log.emit(rec.Run(state="finished", exit_code=0))
    run.update_identity(state="finished", inc=1, total_steps=steps, exit_code=0)
    command = [str(wandb.with_name("python")), "-c", SDK, str(numbers), str(folder)]
    environ = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "HOME": str(folder)}
    subprocess.run(command, check=True, env=environ, stdout=subprocess.DEVNULL)
    return folder / "runs", next((folder / "wandb").glob("offline-run-*/*.wandb"))


def tmux(*words: str) -> str:
    return subprocess.run([*TMUX, *words], check=True, capture_output=True, text=True).stdout


def tree(pid: int) -> list[psutil.Process]:
    top = psutil.Process(pid)
    return [top, *top.children(recursive=True)]


def opened(pane: int, command: list[str], environ: dict[str, str], done: Callable[[str], bool]) -> dict[str, float]:
    """Start a viewer in a pane; seconds, CPU seconds and largest memory (MB) until it is done."""
    words = ["env", "-i", *[f"{name}={value}" for name, value in environ.items()], *command]
    began = time.monotonic()
    tmux("respawn-pane", "-k", "-t", f":0.{pane}", *words)
    pid = int(tmux("display-message", "-p", "-t", f":0.{pane}", "#{pane_pid}"))
    with contextlib.suppress(OSError):  # root only: both viewers before what else this machine does
        Path(f"/proc/{pid}/autogroup").write_bytes(b"-19")
    peak = cpu = 0.0
    while True:
        shown = tmux("capture-pane", "-p", "-t", f":0.{pane}")
        spent = time.monotonic() - began
        memory = total = 0.0
        for process in tree(pid):
            try:
                times = process.cpu_times()
                total += times.user + times.system
                memory += process.memory_info().rss
            except psutil.Error:
                continue
        cpu, peak = max(cpu, total), max(peak, memory)
        if done(shown):
            return {"seconds": spent, "cpu_s": cpu, "rss_mb": peak / 1e6}
        if spent > 180:
            raise SystemExit(f"{command[0]} was not done in 180 s:\n{shown}")
        time.sleep(0.03)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wandb", default=shutil.which("wandb"), help="the wandb command (default: the one on the PATH)")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--capture", type=Path, help="file for the text of both panes at the end")
    args = parser.parse_args()
    for name, found in (("wandb (pip install wandb, or --wandb)", args.wandb), ("tmux", shutil.which("tmux"))):
        if not found or not (name == "tmux" or Path(found).exists()):
            print(f"skipped: there is no {name}")
            return 0
    wandb = Path(args.wandb).absolute()
    with tempfile.TemporaryDirectory(prefix="lumina-leet-") as name:
        folder = Path(name)
        runs, file = write_runs(folder, args.steps, wandb)
        base = {"PATH": os.environ["PATH"], "HOME": name, "TERM": "screen-256color", "LC_ALL": "C.UTF-8"}
        base |= {key: os.environ[key] for key in ("PYTHONPATH",) if key in os.environ}
        last = f"{args.steps:,}"
        viewers: dict[str, Callable[[], dict[str, float]]] = {
            "lumina, no cache": lambda: (shutil.rmtree(folder / ".cache", True), lumina())[1],
            "lumina, cache": lambda: lumina(),
            "wandb leet": lambda: opened(
                1,
                [str(wandb), "leet", str(file)],
                {key: value for key, value in base.items() if key != "PYTHONPATH"},
                lambda text: "State: Finished" in text and re.search(rf"_step\s+{args.steps}\b", text) is not None,
            ),
        }

        def lumina() -> dict[str, float]:
            return opened(
                0,
                [sys.executable, "-m", "lumina_tui.app", "--runs", str(runs), "bench"],
                base,
                lambda text: f"step {last} of" in text and "LOADING" not in text and "preview" not in text and "EMA" in text,
            )

        tmux("new-session", "-d", "-x", str(2 * PANE[0] + 1), "-y", str(PANE[1]), "sleep 600")
        try:
            tmux("set-option", "-g", "remain-on-exit", "on")
            tmux("split-window", "-h", "sleep 600")
            rows: dict[str, list[dict[str, float]]] = {title: [] for title in viewers}
            for number in range(args.rounds):
                for title in sorted(viewers, key=lambda t: t == "wandb leet", reverse=bool(number % 2)):
                    rows[title].append(viewers[title]())
                    for pane in (0, 1):
                        tmux("respawn-pane", "-k", "-t", f":0.{pane}", "sleep 600")
            viewers["lumina, cache"]()
            viewers["wandb leet"]()
            if args.capture:
                panes = [tmux("capture-pane", "-p", "-t", f":0.{pane}").split("\n") for pane in (0, 1)]
                args.capture.write_text("\n".join(f"{left:<{PANE[0]}}│{right}" for left, right in zip(*panes, strict=False)))
        finally:
            tmux("kill-server")
    result = {}
    for title, found in rows.items():
        for what in found[0]:
            values = [row[what] for row in found]
            result[f"{title}: {what}"] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            print(f"{title:<18} {what:<8} {statistics.median(values):8.2f}  ({min(values):.2f}-{max(values):.2f})")
    print(json.dumps({"steps": args.steps, "rounds": args.rounds, **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
