"""What the health monitor costs a run: the same supervised run with the monitor and without it, in pairs.

    python tests/bench/health_cost.py [--rounds 9] [--steps 60] [key=value …]

Each run is the debug preset under the real supervisor, without evaluation and saves, one after the other; which of a pair comes
first changes from pair to pair. In the runs without it nothing reads the log for health; all else is the same. Throughput is
tokens over seconds from the end of the tenth step to the last. Throughput moves by much more than one per cent from run to run;
so the processor time of the monitor in those seconds is taken as well, as a share of them: what it costs where no core is free
for it and training waits for all of it. Then the monitor alone reads a long log of the records of such a run, again and
again. The last line is JSON: throughput with ÷ without (median of the pairs, quartiles, extremes), that share, and records/s of
the monitor.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lumina_engine.config.deepspeed import to_deepspeed
from lumina_engine.config.loading import merge
from lumina_engine.config.resolve import resolve, world_size
from lumina_engine.config.schema import Config
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.hardware import detect
from lumina_engine.monitoring.log import read_records
from lumina_engine.run import launch
from lumina_engine.run.directory import RunDirectory, write_json
from lumina_engine.run.health import RunHealth
from lumina_engine.run.policy import Settings
from lumina_engine.run.supervisor import Supervisor

ARMS = ("with", "without")
LOOKS = "looks.json"
WARM = 10  # steps that are not counted
LONG = 100_000  # records that the monitor reads alone


class NoHealth:
    """In the place of `RunHealth`: reads nothing, says nothing, writes no report."""

    inc, behind = 0, False

    def look(self) -> bool:
        return False

    def catch_up(self) -> None:
        return None

    def finish(self) -> list[rec.Alert]:
        return []


def timed(health: RunHealth) -> list[tuple[float, float]]:
    """Grows with each look of that monitor: when it ended, and the processor time of all looks so far."""
    looks: list[tuple[float, float]] = []
    inner = health.look

    def look() -> bool:
        begin = time.thread_time()
        found = inner()
        looks.append((time.time(), time.thread_time() - begin + (looks[-1][1] if looks else 0.0)))
        return found

    health.look = look  # type: ignore[method-assign]
    return looks


def supervise(folder: str, arm: str) -> int:
    """This process becomes the supervisor of a run whose command is in order.json."""
    run = RunDirectory(folder)
    supervisor = Supervisor(run, json.loads((run.path / "order.json").read_text()))
    supervisor.open()
    looks = timed(supervisor.health)
    if arm == "without":
        supervisor.health = NoHealth()  # type: ignore[assignment]
    code = supervisor.loop()
    write_json(run.path / LOOKS, looks)
    return code


def processor_share(records: Sequence[rec.Record], looks: Sequence[Sequence[float]]) -> float:
    """Processor time of the monitor between the end of step `WARM` and that of the last one, as a share of those seconds."""
    steps = [record for record in records if isinstance(record, rec.Step)][WARM - 1 :]
    begin, end = (max((spent for t, spent in looks if t <= step.t), default=0.0) for step in (steps[0], steps[-1]))
    return (end - begin) / (steps[-1].t - steps[0].t)


def measured(run: RunDirectory, argv: Sequence[str], arm: str, world: int = 1, settings: dict[str, Any] | None = None) -> None:
    """Start a run in one of the two ways and wait for its end.

    Raises:
        RuntimeError: it did not end with 0; the end of engine.log.
    """
    order = {"argv": list(argv), "world": world, "resume": False, "settings": settings or {}, "versions": {}, "host": "bench"}
    write_json(run.path / "order.json", order)
    words = [sys.executable, os.fspath(Path(__file__).resolve()), "--supervise", os.fspath(run.path), arm]
    with run.log_path.open("ab") as log:
        code = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=run.path,
            env=launch.environment(run),
            start_new_session=True,
        ).returncode
    if code:
        raise RuntimeError(f"the run {run.name} ended with {code}: {run.log_path.read_text(errors='replace')[-2000:]}")


def prepared(root: Path, name: str, overrides: Sequence[str]) -> tuple[RunDirectory, Config]:
    """The folder of a run of the debug preset, as `lumina-engine train` makes it."""
    words = ["num_epochs=1000", "eval_interval=0", "save_interval=0", f"data_cache_dir={root / 'cache'}", *overrides]
    config, machine = merge("debug", None, words).config, detect()
    config.experiment_name = name
    world = world_size(config, machine)
    vocabulary = ConversationTokenizer(config.tokenizer).get_vocab_size()
    config = resolve(config, machine, tokenizer_vocab=vocabulary, world=world)
    run = RunDirectory.create(root, name, preset="debug")
    config.save(run.config_path).chmod(0o600)
    if config.use_deepspeed:
        write_json(run.deepspeed_path, to_deepspeed(config, world))
    return run, config


def throughput(records: Sequence[rec.Record]) -> float:
    """Tokens/s from the end of step `WARM` to the end of the last one."""
    steps = [record for record in records if isinstance(record, rec.Step)][WARM - 1 :]
    return ((steps[-1].tokens or 0) - (steps[0].tokens or 0)) / (steps[-1].t - steps[0].t)


def records_per_s(records: Sequence[rec.Record], folder: Path, count: int = LONG) -> float:
    """How many records the monitor reads in a second, of a log that goes on as these records do."""
    last, span = max(getattr(record, "step", 0) or 0 for record in records), records[-1].t - records[0].t + 1
    path = folder / "long.jsonl"
    with path.open("wb") as file:
        for number in range(count):
            turn, place = divmod(number, len(records))
            record = copy.copy(records[place])
            record.seq, record.t, record.inc = number + 1, record.t + turn * span, 1
            if isinstance(getattr(record, "step", None), int):
                record.step += turn * last  # type: ignore[attr-defined]
            file.write(rec.encode(record))
    health = RunHealth(path, folder / "health.json", lambda alert: True)
    begin = time.perf_counter()
    while health.look():
        pass
    return count / (time.perf_counter() - begin)


def pairs(root: Path, rounds: int, overrides: Sequence[str]) -> tuple[list[dict[str, float]], list[rec.Record]]:
    """Throughput of each pair by arm with the monitor's share of a core, and the records of the last run with the monitor."""
    rows: list[dict[str, float]] = []
    records: list[rec.Record] = []
    for number in range(rounds):
        row = {}
        for arm in ARMS if number % 2 == 0 else ARMS[::-1]:
            run, config = prepared(root, f"{arm}-{number}", overrides)
            world = world_size(config, detect())
            measured(run, launch.rank_argv(config, run.path, world), arm, world, Settings.of_config(config))
            found = list(read_records(run.metrics_path))
            row[arm] = throughput(found)
            if arm == "with":
                records, row["share"] = found, processor_share(found, json.loads((run.path / LOOKS).read_text()))
        rows.append(row)
        print(
            "  ".join(f"{arm} {row[arm]:,.0f} tokens/s" for arm in ARMS),
            f" ratio {row['with'] / row['without']:.4f}  monitor {100 * row['share']:.3f} % of a core",
            flush=True,
        )
    return rows, records


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, high = statistics.quantiles(values, n=4)[::2] if len(values) > 1 else (values[0], values[0])
    return {"median": statistics.median(values), "q1": low, "q3": high, "min": min(values), "max": max(values)}


def main() -> int:
    if sys.argv[1:2] == ["--supervise"]:
        return supervise(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    if args.rounds < 1 or args.steps <= WARM:
        parser.error(f"at least one round, and more than {WARM} steps")
    with tempfile.TemporaryDirectory() as folder:
        rows, records = pairs(Path(folder) / "runs", args.rounds, [f"max_steps={args.steps}", *args.overrides])
        rate = records_per_s(records, Path(folder))
    result = {
        "throughput_with_over_without": spread([row["with"] / row["without"] for row in rows]),
        "tokens_per_s": {arm: spread([row[arm] for row in rows]) for arm in ARMS},
        "monitor_share_of_a_core": spread([row["share"] for row in rows]),
        "monitor_records_per_s": rate,
        "rounds": args.rounds,
        "steps": args.steps,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
