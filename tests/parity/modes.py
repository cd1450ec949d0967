"""The parity table: every mode of the engine against training written out by hand (`plain_loop.py`).

python -m tests.parity.modes [TABLE.md]      runs all modes and prints the table, or writes it
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from lumina_engine.config.offload_checks import async_io_problem
from tests.launch import last_line, launch
from tests.parity.plain_loop import plain_losses
from tests.parity.rows import ROWS, config_of, store_of

PROGRAM = Path(__file__).with_name("rows.py")
BOUNDS = {"fp32": 1e-5, "bf16": 2e-2, "mixed_bf16": 2e-2}  # largest relative difference of a loss, in 20 steps
# Offload to disk wants tensors of at least 1 MiB, or DeepSpeed never swaps them; and the gradient of this head does not begin
# on a multiple of 512 bytes within its parameter group, which is where DeepSpeed 0.19 corrupts it.
NVME_SHAPE = {"vocab_size": 16_384, "hidden_size": 65, "head_dim": 34, "tie_word_embeddings": False}
BIAS_RATE = 0.01
REFUSED = "refused: DeepSpeed runs a phantom optimizer step with bf16 at stage 0"


@dataclass(frozen=True)
class Mode:
    """One row of the table. `stage` None is the engine of plain PyTorch; `more` are further overrides, `label` names them."""

    stage: int | None
    ranks: int
    precision: str
    accumulation: int
    checkpointing: bool
    label: str = ""
    more: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        engine = "plain" if self.stage is None else f"zero{self.stage}"
        parts = [engine, self.label, f"{self.ranks}r", self.precision, f"acc{self.accumulation}"]
        return "-".join([p for p in parts if p] + (["ckpt"] if self.checkpointing else []))

    @property
    def refused(self) -> bool:
        return self.stage == 0 and self.precision == "bf16"

    def overrides(self) -> dict[str, Any]:
        engine = {"use_deepspeed": False} if self.stage is None else {"zero_stage": self.stage}
        return {
            **engine,
            "precision": self.precision,
            "batch_size": ROWS // self.accumulation // self.ranks,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_checkpointing": self.checkpointing,
            **dict(self.more),
        }


def modes() -> list[Mode]:
    """All rows: stages and the plain engine, 1 and 2 ranks, precisions, accumulation, checkpointing; then offload."""
    grid = product((None, 0, 1, 2, 3), (1, 2), ("fp32", "bf16"), (1, 4), (False, True))
    return [*(Mode(*row) for row in grid), *mixed(), *cpu_offload()]


def mixed() -> list[Mode]:
    """Rows of fp32 weights under autocast, each engine on 1 and 2 ranks; accumulation and checkpointing take turns."""
    return [
        Mode(stage, ranks, "mixed_bf16", 4 if ranks == 1 else 1, ranks == 2) for stage in (None, 0, 1, 2, 3) for ranks in (1, 2)
    ]


def biased() -> list[Mode]:
    """Rows with the router balanced by its bias (reference of their own), each engine on 1 and 2 ranks."""
    more = (("router_bias_rate", BIAS_RATE),)
    return [Mode(stage, ranks, "fp32", 4, False, "bias", more) for stage in (None, 0, 1, 2, 3) for ranks in (1, 2)]


def cpu_offload() -> list[Mode]:
    """Rows of offload to host memory, each on 1 and 2 ranks."""
    keys = {name: ((f"cpu_offload{name}", True),) for name in ("", "_optimizer", "_parameters")}
    wanted = [(1, "", "fp32"), (2, "_optimizer", "fp32"), (3, "", "fp32"), (3, "_parameters", "fp32"), (3, "", "bf16")]
    return [
        Mode(stage, ranks, precision, 4, False, f"cpu_offload{name}", keys[name])
        for stage, name, precision in wanted
        for ranks in (1, 2)
    ]


def nvme_offload(folder: Path) -> list[Mode]:
    """Rows of offload to disk, in a shape of their own."""
    optimizer = (("nvme_path", str(folder)), *NVME_SHAPE.items(), ("nvme_offload_optimizer", True))
    both = (*optimizer, ("nvme_offload_parameters", True))
    return [
        Mode(3, ranks, precision, 4, False, label, more)
        for precision, label, more in (("fp32", "nvme optimizer", optimizer), ("bf16", "nvme optimizer and weights", both))
        for ranks in (1, 2)
    ]


def write_data(folder: Path) -> Path:
    """120 short conversations of uneven length, so that padding differs between rows and ranks."""
    draw = random.Random(7)
    words = ["red", "green", "blue", "one", "two", "three", "sun", "moon", "river", "stone", "bird", "tree"]
    path = folder / "train.jsonl"
    with path.open("w") as stream:
        for _ in range(120):
            asked = " ".join(draw.choices(words, k=draw.randint(1, 9)))
            told = " ".join(reversed(asked.split()))
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
            stream.write(json.dumps({"messages": turns}) + "\n")
    return path


def results(data: Path, ranks: int, wanted: list[Mode]) -> dict[str, dict[str, Any]]:
    """What each mode gave, all of them in one process group."""
    arguments = {mode.name: mode.overrides() for mode in wanted if mode.ranks == ranks and not mode.refused}
    return last_line(launch(PROGRAM, ranks, str(data), json.dumps(arguments)), "ROWS ")


def references(data: Path, **overrides: Any) -> dict[int, list[float]]:
    """The losses of the loop by hand, for each accumulation."""
    config = config_of(str(data), overrides)
    store = store_of(config)
    return {accumulation: plain_losses(config, store, ROWS, accumulation) for accumulation in (1, 4)}


def worst(losses: list[float], reference: list[float]) -> float:
    """The largest relative difference of 20 losses."""
    assert len(losses) == len(reference) == 20
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def table(rows: list[tuple[Mode, float | None]]) -> str:
    """The table as Markdown."""
    lines = [
        "20 losses of each mode against training written out by hand in fp32 on one rank: largest relative difference.",
        "",
        "| engine | ranks | precision | accumulation | checkpointing | difference | bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode, value in rows:
        engine = "plain PyTorch" if mode.stage is None else f"ZeRO {mode.stage}"
        engine += f", {mode.label}" if mode.label else ""
        cells = [engine, mode.ranks, mode.precision, mode.accumulation, "on" if mode.checkpointing else "off"]
        cells += [REFUSED, ""] if value is None else [f"{value:.1e}", f"{BOUNDS[mode.precision]:.0e}"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))
        disk = [] if async_io_problem() else nvme_offload(Path(folder) / "nvme")
        wanted = modes() + biased() + disk
        small, large = references(data), references(data, **NVME_SHAPE)
        moved = references(data, router_bias_rate=BIAS_RATE)
        found = results(data, 1, wanted) | results(data, 2, wanted)
    of = {mode: large if mode in disk else moved if mode.label == "bias" else small for mode in wanted}
    rows = [(m, None if m.refused else worst(found[m.name]["losses"], of[m][m.accumulation])) for m in wanted]
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(table(rows))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
