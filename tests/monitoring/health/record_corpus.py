"""Records the calibration corpus anew, into the files beside it.

`python -m tests.monitoring.health.record_corpus PART`: `healthy 0`, `healthy 1`, `faults`, `signs`, `whole SEED=LOG…`.
Real runs of the real trainer on CPU in this process, some milliseconds a step; `whole` takes logs of the debug preset. Times
are wall clock: let nothing else run meanwhile. It takes a few minutes.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lumina_engine.bench.corpus import Recorded, write
from lumina_engine.monitoring.log import read_records
from tests.faults.tiny import Tiny

STEPS = 160
AFTER = 45  # steps of a run with a fault after it
EACH = 8  # runs of a fault
FOLDER = Path(__file__).parent
SHAPES: dict[str, dict[str, Any]] = {
    "top2": {},
    "top1": {"moe_top_k": 1, "num_experts": 4, "learning_rate": 2e-3},
    "eight": {"num_experts": 8, "moe_top_k": 2, "learning_rate": 1e-3, "lr_schedule": "wsd"},
    "dense": {"use_moe": False, "learning_rate": 1e-3, "lr_schedule": "linear", "warmup_steps": 20},
    "wide": {"hidden_size": 96, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 96, "batch_size": 4, "seq_length": 64},
    "deep": {"num_layers": 4, "lr_schedule": "constant", "learning_rate": 5e-4},
    "single": {"batch_size": 1, "learning_rate": 1e-3, "warmup_steps": 40},
    "bias": {"num_experts": 8, "router_bias_rate": 1e-3, "load_balancing_weight": 0.001, "weight_decay": 0.1},
}
COMMON: dict[str, Any] = {
    "max_steps": STEPS,
    "gradient_accumulation_steps": 1,
    "router_bias_rate": 0.0,
    "expert_log_interval": 10,
    "eval_interval": 50,
    "eval_split": 0.1,
    "eval_batches": 2,
    "num_epochs": 1000,
    "warmup_steps": 10,
    "spike_policy": "alert",
}


def make(folder: Path, shape: str, seed: int, documents: int, **keys: Any) -> Tiny:
    """A run that is ready to train."""
    torch.set_num_threads(1)
    return Tiny(folder, f"{shape}-{seed}", documents=documents, **COMMON | SHAPES[shape] | {"seed": seed} | keys)


def recorded(tiny: Tiny, run: Recorded) -> Recorded:
    """Train, keep the records. Their times are wall clock, so another program that runs meanwhile is in them."""
    emit = tiny.records.emit

    def stamped(record: Any) -> None:
        record.t = time.time()
        emit(record)

    tiny.trainer.emit = stamped
    tiny.train()
    return run.take(tiny.records)


def healthy(part: int) -> list[Recorded]:
    """Half of the healthy runs (0 or 1)."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(32 * part, 32 * part + 32):
            shape, documents = list(SHAPES)[number % len(SHAPES)], (300, 1500)[number // len(SHAPES) % 2]
            where = Path(folder) / str(documents)
            run = Recorded("healthy", number, shape, held=number // len(SHAPES) % 2 == 1)
            runs.append(recorded(make(where, shape, number, documents), run))
            print(number, shape, flush=True)
    return runs


Inject = Callable[[Tiny, int], None]


def at_step(tiny: Tiny, first: int, change: Callable[[], None]) -> None:
    """Do something once, before the data of step `first`."""
    tiny.channel.at = lambda step, section: change() if (step, section) == (first, "data") else None


def forward(tiny: Tiny, first: int, count: int, how: Callable[[Any, Any], Any]) -> None:
    """What the model gives in `count` steps from `first` on comes from `how(forward, arguments)`."""
    inner = tiny.trainer.engine.forward

    def disturbed(*args: Any, **kwargs: Any) -> Any:
        return how(inner, (args, kwargs)) if first <= tiny.trainer.progress.step + 1 < first + count else inner(*args, **kwargs)

    tiny.trainer.engine.forward = disturbed  # type: ignore[method-assign]


def rate(tiny: Tiny, first: int) -> None:
    def change() -> None:
        assert tiny.trainer.schedule is not None
        tiny.trainer.schedule.multiplier *= 10

    at_step(tiny, first, change)


def garbage(count: int) -> Inject:
    """Random tokens where the answers were."""

    def inject(tiny: Tiny, first: int) -> None:
        draw = torch.Generator().manual_seed(first)

        def how(inner: Any, call: Any) -> Any:
            labels = call[1]["labels"]
            other = torch.randint(0, 256, labels.shape, generator=draw)
            return inner(*call[0], **call[1] | {"labels": torch.where(labels >= 0, other, labels)})

        forward(tiny, first, count, how)

    return inject


def not_a_number(tiny: Tiny, first: int) -> None:
    def how(inner: Any, call: Any) -> Any:
        out = inner(*call[0], **call[1])
        return out._replace(loss_sum=out.loss_sum * float("nan"))

    forward(tiny, first, 10_000, how)


def collapse(tiny: Tiny, first: int) -> None:
    """The router of the last layer chooses the same experts for every token."""

    def change() -> None:
        *_, bias = (buffer for name, buffer in tiny.trainer.model.named_buffers() if name.endswith("router.bias"))
        bias[: tiny.config.moe_top_k] += 1000.0

    at_step(tiny, first, change)


def uneven(tiny: Tiny, first: int) -> None:
    """One expert of the last layer is among the chosen of every token."""

    def change() -> None:
        *_, bias = (buffer for name, buffer in tiny.trainer.model.named_buffers() if name.endswith("router.bias"))
        bias[0] += 1000.0

    at_step(tiny, first, change)


def broken(tiny: Tiny, first: int) -> None:
    """The weights of the last block, its router's too, are not those that were learned, as after a bad load."""

    def change() -> None:
        with torch.no_grad():
            for parameter in tiny.trainer.model.blocks[-1].parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(first)) * 0.5)

    at_step(tiny, first, change)


def frozen(tiny: Tiny, first: int) -> None:
    """The first block keeps the weights that it has, as with an optimizer that lost its parameters."""
    weights = list(tiny.trainer.model.blocks[0].parameters())
    inner = tiny.trainer.engine.step

    def step(*args: Any) -> Any:
        before = [weight.detach().clone() for weight in weights]
        result = inner(*args)
        if tiny.trainer.progress.step + 1 >= first:
            with torch.no_grad():
                for weight, old in zip(weights, before, strict=True):
                    weight.copy_(old)
        return result

    tiny.trainer.engine.step = step  # type: ignore[method-assign]


class Stuck:
    """A loader that gives two batches again and again from a step on."""

    def __init__(self, loader: Any, first: int) -> None:
        self.loader, self.first = loader, first

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        last: list[Any] = []
        for number, batches in enumerate(self.loader, 1):
            if number < self.first:
                last = [*last[-1:], batches]
            yield batches if number < self.first else last[number % 2]


def stuck(tiny: Tiny, first: int) -> None:
    loader = tiny.trainer._loader
    tiny.trainer._loader = lambda: Stuck(loader(), first)  # type: ignore[assignment, return-value]


def slow(tiny: Tiny, first: int) -> None:
    pause(tiny, first, "forward", 4)


def waiting(tiny: Tiny, first: int) -> None:
    pause(tiny, first, "data", 1.5)


def pause(tiny: Tiny, first: int, where: str, times: float) -> None:
    """From `first` on a section takes longer by this many steps' time."""
    began: list[float] = []

    def at(step: int, section: str) -> None:
        if section == "data":
            began.append(time.perf_counter())
        if step >= first and section == where:
            usual = sorted(b - a for a, b in pairwise(began[:first]))[first // 2]
            time.sleep(times * usual)

    tiny.channel.at = at


MOST = [shape for shape in SHAPES if shape not in ("dense", "single")]
ROUTING = ["dead_experts", "hot_expert", "dropped_tokens"]
# fault -> how, codes of critical alerts, codes of warnings that tell it
FAULTS: dict[str, tuple[Inject, list[str], list[str]]] = {
    "rate x 10": (rate, ["rate_jump", "divergence", "routing_collapse"], ["loss_spike", "gradient_tail", *ROUTING]),
    "bad data": (garbage(10_000), ["divergence"], ["loss_spike"]),
    "one bad batch": (garbage(1), [], ["loss_spike"]),
    "not finite": (not_a_number, ["nonfinite_run"], ["nonfinite_step"]),
    "router collapse": (collapse, ["routing_collapse"], ["loss_spike", *ROUTING]),
    "uneven router": (uneven, [], ["loss_spike", *ROUTING]),
    "broken weights": (broken, ["divergence", "routing_collapse"], ["loss_spike", "gradient_tail", *ROUTING]),
    "slow rank": (slow, [], ["throughput_drop"]),
    "slow loader": (waiting, [], ["loader_wait", "throughput_drop"]),
    "frozen layer": (frozen, [], ["frozen_layer"]),
    "data come again": (stuck, [], ["repeated_data"]),
}


SIGNS = {"frozen layer", "data come again"}  # whose tell-tales are no times


def faults(names: Collection[str]) -> list[Recorded]:
    """Runs of these faults."""
    runs: list[Recorded] = []
    with tempfile.TemporaryDirectory() as folder:
        for place, (fault, (inject, critical, warning)) in enumerate(FAULTS.items()):
            if fault not in names:
                continue
            late, shapes = (120, ["eight", "bias"]) if fault == "uneven router" else (0, MOST)
            longer = late // 4 + (60 if fault == "frozen layer" else 0)  # the weights are looked at each 32 steps
            for number in range(EACH):
                seed, shape = 1000 + 10 * place + number, shapes[number % len(shapes)]
                first = 80 + late + random.Random(seed).randrange(30)
                tiny = make(Path(folder) / "data", shape, seed, 1500, max_steps=first + AFTER + longer)
                inject(tiny, first)
                run = Recorded(fault, seed, shape, held=number // 2 % 2 == 1, at=first, critical=critical, warning=warning)
                runs.append(recorded(tiny, run))
                print(fault, number, len(run.steps["loss"]), flush=True)
    return runs


def whole(logs: list[str]) -> list[Recorded]:
    """Whole runs of the debug preset, from their logs: `SEED=metrics.jsonl`."""
    runs = []
    for place, word in enumerate(logs):
        seed, _, path = word.partition("=")
        runs.append(Recorded("healthy", 2000 + int(seed), "debug", held=place % 2 == 1).take(read_records(path)))
    return runs


def main() -> None:
    part, *words = sys.argv[1:]
    match part:
        case "whole":
            runs = whole(words)
        case "healthy":
            runs = healthy(int(words[0]))
        case _:
            runs = faults(SIGNS if part == "signs" else FAULTS.keys() - SIGNS)
    file = FOLDER / (f"healthy-{words[0]}.json.xz" if part == "healthy" else f"{part}.json.xz")
    write(file, runs)
    print(part, len(runs), file.stat().st_size)


if __name__ == "__main__":
    main()
