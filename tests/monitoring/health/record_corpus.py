"""Records the calibration corpus anew, into the files beside it.

`python -m tests.monitoring.health.record_corpus PART`: `healthy 0`, `healthy 1`, `faults`, `signs`, `routing`, `course`,
`whole SEED=LOG…`. Real runs of the real trainer on CPU in this process, some milliseconds a step; `whole` takes logs of the
debug preset. Times are wall clock: let nothing else run meanwhile. `routing` and `course` leave them out, since nothing in them
shows in times. It takes a few minutes.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lumina_engine.bench.corpus import Recorded, write
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import read_records
from tests.faults.tiny import Tiny
from tests.training.observed import WORDS

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
MANY: dict[str, dict[str, Any]] = {  # in which one expert can get more than four times its share
    "sixteen": {"num_experts": 16, "moe_top_k": 2, "learning_rate": 1e-3},
    "twelve": {"num_experts": 12, "moe_top_k": 2, "router_bias_rate": 1e-3, "lr_schedule": "wsd"},
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
    return Tiny(folder, f"{shape}-{seed}", documents=documents, **COMMON | (SHAPES | MANY)[shape] | {"seed": seed} | keys)


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


def forward(tiny: Tiny, first: int, count: int, how: Callable[[Any, Any], Any], every: int = 1) -> None:
    """What the model gives in each `every`-th of `count` steps from `first` on comes from `how(forward, arguments)`."""
    inner = tiny.trainer.engine.forward
    steps = range(first, first + count, every)

    def disturbed(*args: Any, **kwargs: Any) -> Any:
        return how(inner, (args, kwargs)) if tiny.trainer.progress.step + 1 in steps else inner(*args, **kwargs)

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


def push(tiny: Tiny, first: int, experts: int, by: float) -> None:
    """Move the bias by which the router of the last layer chooses its first experts."""

    def change() -> None:
        *_, bias = (buffer for name, buffer in tiny.trainer.model.named_buffers() if name.endswith("router.bias"))
        bias[:experts] += by

    at_step(tiny, first, change)


def heavy(tiny: Tiny, first: int) -> None:
    """Each sixth batch counts thirty times, as with rows that have a wrong weight."""

    def how(inner: Any, call: Any) -> Any:
        out = inner(*call[0], **call[1])
        return out._replace(loss_sum=30 * out.loss_sum)

    forward(tiny, first, 10_000, how, every=6)


def collapse(tiny: Tiny, first: int) -> None:
    """The router of the last layer chooses the same experts for every token."""
    push(tiny, first, tiny.config.moe_top_k, 1000.0)


def uneven(tiny: Tiny, first: int) -> None:
    """One expert of the last layer is among the chosen of every token."""
    push(tiny, first, 1, 1000.0)


def dead(tiny: Tiny, first: int) -> None:
    """One expert of the last layer is never chosen."""
    push(tiny, first, 1, -1000.0)


def cramped(tiny: Tiny, first: int) -> None:
    """Experts have room for half of an equal share, as after a resume with `capacity_factor=0.5`."""

    def change() -> None:
        for layer in tiny.trainer.model.expert_layers:
            layer.capacity_factor = 0.5

    at_step(tiny, first, change)


def still(tiny: Tiny, first: int) -> None:
    """Nothing is learned any more."""

    def change() -> None:
        assert tiny.trainer.schedule is not None
        tiny.trainer.schedule.multiplier = 0.0

    at_step(tiny, first, change)


def nothing(tiny: Tiny, first: int) -> None:
    """The run is as it is."""


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
EIGHT, ROOMY = ["eight", "bias"], ["sixteen", "twelve"]
ROUTING = ["dead_experts", "hot_expert", "dropped_tokens"]
UNTIMED = ("routing", "course")  # parts whose runs have no times
LATE: dict[str, Any] = {"late": 120, "longer": 30}  # experts are judged from step 200 on, by five records


@dataclass(frozen=True)
class Fault:
    """How it is made, the codes of critical alerts and of warnings that tell it, and the runs that have it."""

    inject: Inject
    critical: list[str]
    warning: list[str]
    part: str = "faults"
    shapes: list[str] = field(default_factory=lambda: MOST)  # in turn; runs 2, 3, 6, 7 of the eight are held
    late: int = 0  # steps by which it begins later than others
    longer: int = 0  # steps of the run beyond `AFTER`
    few: bool = False  # few conversations, to learn by heart
    keys: dict[str, Any] = field(default_factory=dict)
    begins: Callable[[Recorded], int] | None = None  # step that it counts from, where that is not the one of `inject`


def best_evaluation(run: Recorded) -> int:
    """The step from which on the evaluation loss is never lower."""
    return min((record for record in run.records() if isinstance(record, rec.Eval)), key=lambda e: e.loss or 0.0).step


def few_conversations(path: Path) -> None:
    """24 conversations of random words, in which no answer follows from anything."""
    draw = random.Random(24)

    def turn(role: str) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 6)))}

    lines = [json.dumps({"messages": [turn("user"), turn("assistant")]}) for _ in range(24)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


BY_HEART: dict[str, Any] = {
    "eval_interval": 25,
    "eval_split": 0.25,
    "batch_size": 4,
    "dropout": 0.0,
    "learning_rate": 1e-3,
    "lr_schedule": "constant",
}
TURNS = ["top2", "dense", "top2", "dense", "wide", "deep", "wide", "deep"]
FAULTS: dict[str, Fault] = {
    "rate x 10": Fault(rate, ["rate_jump", "divergence", "routing_collapse"], ["loss_spike", "gradient_tail", *ROUTING]),
    "bad data": Fault(garbage(10_000), ["divergence"], ["loss_spike"]),
    "one bad batch": Fault(garbage(1), [], ["loss_spike"]),
    "not finite": Fault(not_a_number, ["nonfinite_run"], ["nonfinite_step"]),
    "router collapse": Fault(collapse, ["routing_collapse"], ["loss_spike", *ROUTING]),
    "uneven router": Fault(uneven, [], ["dropped_tokens"], "routing", EIGHT, **LATE),
    "broken weights": Fault(broken, ["divergence", "routing_collapse"], ["loss_spike", "gradient_tail", *ROUTING]),
    "slow rank": Fault(slow, [], ["throughput_drop"]),
    "slow loader": Fault(waiting, [], ["loader_wait", "throughput_drop"]),
    # the weights are looked at each 32 steps
    "frozen layer": Fault(frozen, [], ["frozen_layer"], "signs", longer=60),
    "data come again": Fault(stuck, [], ["repeated_data"], "signs"),
    "dead expert": Fault(dead, [], ["dead_experts"], "routing", EIGHT, **LATE),
    "hot expert": Fault(uneven, [], ["hot_expert", "dropped_tokens"], "routing", ROOMY, **LATE),
    "too little room": Fault(cramped, [], ["dropped_tokens"], "routing", EIGHT, **LATE),
    "healthy": Fault(nothing, [], [], "routing", 2 * EIGHT + 2 * ROOMY, begins=lambda run: 0, **LATE),
    "rare heavy batches": Fault(heavy, [], ["gradient_tail", "loss_spike"], "course", longer=60),
    "overfitting": Fault(nothing, [], ["overfitting"], "course", TURNS, 0, 160, True, BY_HEART, best_evaluation),
    "rate 0": Fault(still, [], ["eval_plateau"], "course", longer=60, keys={"eval_interval": 20, "eval_batches": 8}),
}


def faults(part: str) -> list[Recorded]:
    """The runs of a part."""
    runs: list[Recorded] = []
    with tempfile.TemporaryDirectory() as folder:
        for place, (name, fault) in enumerate(FAULTS.items()):
            if fault.part != part:
                continue
            for number in range(EACH):
                seed, shape = 1000 + 10 * place + number, fault.shapes[number % len(fault.shapes)]
                first = 80 + fault.late + random.Random(seed).randrange(30)
                length = first + AFTER + fault.longer
                where = Path(folder) / ("few" if fault.few else "data")
                if fault.few:
                    few_conversations(where / "train.jsonl")
                tiny = make(where, shape, seed, 1500, max_steps=length, **fault.keys)
                fault.inject(tiny, first)
                held = number // 2 % 2 == 1
                run = Recorded(name, seed, shape, held, first, fault.critical, fault.warning)
                recorded(tiny, run)
                if part in UNTIMED:
                    run.steps |= {name: [None] * len(run.steps[name]) for name in ("step_time", "data_time")}
                run.at = first if fault.begins is None else fault.begins(run)
                runs.append(run)
                print(name, number, run.at, len(run.steps["loss"]), flush=True)
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
            runs = faults(part)
    file = FOLDER / (f"healthy-{words[0]}.json.xz" if part == "healthy" else f"{part}.json.xz")
    write(file, runs)
    print(part, len(runs), file.stat().st_size)


if __name__ == "__main__":
    main()
