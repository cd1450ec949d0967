"""What the health monitor costs a run: one supervised run in which the monitor takes turns of ten seconds.

    python tests/bench/health_cost.py [--steps 4000] [--monitors 1] [key=value …]

The run is the debug preset under the real supervisor, without evaluation and saves. In every second turn of ten seconds the
monitor reads nothing; in the turns between it reads what came meanwhile, too, so they bear the work of both. All else is the
same. Throughput of a turn with the monitor is divided by that of its two neighbours, by whole steps behind the warm-up; runs of
their own would differ by much more than the monitor costs. Throughput still moves by more than one per cent from turn to turn,
so the processor time of the monitor is taken as well, as a share of all seconds: what it costs where training waits for all of
it. With `--monitors N` there are N in each turn, each of which reads the whole log: what they cost together stands out of the
noise of the machine, and the Nth part of it is the cost of one. Then the monitor alone reads a log of its records, again and
again. The last line is JSON: throughput with ÷ without (median of the turns, quartiles, extremes, standard error of the mean),
what one monitor costs by it, that share, and records/s of the monitor.
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
from collections.abc import Mapping, Sequence
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

TURN = 10.0  # s
LOOKS = "looks.json"
WARM = 10  # steps that are not counted
LONG = 100_000  # records that the monitor reads alone


def taking_turns(health: RunHealth, others: Sequence[RunHealth] = ()) -> list[tuple[float, float]]:
    """Let a monitor look in every second turn only, and others after it; grows with each look: when it ended, and processor
    time of all looks so far."""
    looks: list[tuple[float, float]] = []
    inner = health.look

    def look() -> bool:
        if not its_turn(time.time()):
            health.behind = False
            return False
        begin = time.thread_time()
        found = inner()
        for other in others:
            other.look()
        looks.append((time.time(), time.thread_time() - begin + (looks[-1][1] if looks else 0.0)))
        return found

    health.look = look  # type: ignore[method-assign]
    return looks


def its_turn(t: float) -> bool:
    """Whether the monitor reads at that unix second."""
    return int(t / TURN) % 2 == 0


def supervise(folder: str, monitors: int) -> int:
    """This process becomes the supervisor of a run whose command is in order.json, with so many monitors."""
    run = RunDirectory(folder)
    supervisor = Supervisor(run, json.loads((run.path / "order.json").read_text()))
    supervisor.open()
    more = [RunHealth(run.metrics_path, run.path / "unused.json", lambda alert: True) for _ in range(monitors - 1)]
    looks = taking_turns(supervisor.health, more)
    code = supervisor.loop()
    write_json(run.path / LOOKS, looks)
    return code


def measured(
    run: RunDirectory, argv: Sequence[str], world: int = 1, settings: dict[str, Any] | None = None, monitors: int = 1
) -> None:
    """Start a run and wait for its end.

    Raises:
        RuntimeError: it did not end with 0; the end of engine.log.
    """
    order = {"argv": list(argv), "world": world, "resume": False, "settings": settings or {}, "versions": {}, "host": "bench"}
    write_json(run.path / "order.json", order)
    words = [sys.executable, os.fspath(Path(__file__).resolve()), "--supervise", os.fspath(run.path), str(monitors)]
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


def counted(records: Sequence[rec.Record]) -> list[rec.Step]:
    """The steps from the last one of the warm-up on."""
    return [record for record in records if isinstance(record, rec.Step)][WARM - 1 :]


def turns(records: Sequence[rec.Record]) -> dict[int, float]:
    """Tokens/s of each turn that has more than two steps, by its number, from the first step that ended in it to the last."""
    found: dict[int, list[rec.Step]] = {}
    for step in counted(records):
        found.setdefault(int(step.t / TURN), []).append(step)
    whole = {number: steps for number, steps in list(found.items())[1:-1] if len(steps) > 2}
    return {n: ((steps[-1].tokens or 0) - (steps[0].tokens or 0)) / (steps[-1].t - steps[0].t) for n, steps in whole.items()}


def ratios(speeds: Mapping[int, float]) -> list[float]:
    """Throughput of each turn of the monitor over the mean of the turns before and after it."""
    both = [number for number in speeds if its_turn(number * TURN) and {number - 1, number + 1} <= speeds.keys()]
    return [2 * speeds[number] / (speeds[number - 1] + speeds[number + 1]) for number in both]


def processor_share(records: Sequence[rec.Record], looks: Sequence[Sequence[float]]) -> float:
    """Processor time of the monitor between the end of step `WARM` and that of the last one, as a share of those seconds."""
    first, *_, last = counted(records)
    begin, end = (max((spent for t, spent in looks if t <= step.t), default=0.0) for step in (first, last))
    return (end - begin) / (last.t - first.t)


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


def run_of(root: Path, overrides: Sequence[str], monitors: int = 1) -> RunDirectory:
    """A run in which so many monitors took turns."""
    run, config = prepared(root, "turns", overrides)
    world = world_size(config, detect())
    measured(run, launch.rank_argv(config, run.path, world), world, Settings.of_config(config), monitors)
    return run


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, extremes, and the mean with its standard error."""
    low, high = statistics.quantiles(values, n=4)[::2]
    error = statistics.stdev(values) / len(values) ** 0.5
    middle = {"median": statistics.median(values), "q1": low, "q3": high, "min": min(values), "max": max(values)}
    return {**middle, "mean": statistics.fmean(values), "standard_error": error, "turns": len(values)}


def main() -> int:
    if sys.argv[1:2] == ["--supervise"]:
        return supervise(sys.argv[2], int(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--monitors", type=int, default=1)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(Path(folder) / "runs", [f"max_steps={args.steps}", *args.overrides], args.monitors)
        records = list(read_records(run.metrics_path))
        share = processor_share(records, json.loads((run.path / LOOKS).read_text()))
        rate = records_per_s(records, Path(folder))
    speeds = turns(records)
    if len(ratios(speeds)) < 2:
        parser.error(f"--steps {args.steps}: more, there are too few turns of {TURN:g} s to compare")
    with_over_without = spread(ratios(speeds))
    result = {
        "throughput_with_over_without": with_over_without,
        "monitors": args.monitors,
        "cost_of_one": (1 - with_over_without["mean"]) / args.monitors,
        "cost_of_one_standard_error": with_over_without["standard_error"] / args.monitors,
        "tokens_per_s": statistics.median(speeds.values()),
        "monitor_share_of_a_core": share / args.monitors,
        "monitor_records_per_s": rate,
        "steps": len(counted(records)),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
