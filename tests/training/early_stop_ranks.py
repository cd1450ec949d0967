"""One rank of the test that rank 0 decides about an early stop for all.

    python early_stop_ranks.py DATA.jsonl FOLDER

Evaluations fall on rank 0 and rise on the others. Rank 0 prints `EARLY {…}`: `step`, `state` and `actions` of each rank, and
the steps that are `saved`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lumina_engine.training.comm import Comm
from tests.training.zero_ranks import Run


def main() -> None:
    data, folder = sys.argv[1], Path(sys.argv[2]) / "run"
    comm = Comm.start("gloo")
    keys: dict[str, Any] = {"use_deepspeed": False, "batch_size": 4, "max_steps": 16, "eval_interval": 1}
    run = Run(data, {**keys, "adaptive": "act", "early_stopping_gain": 0.02}, comm, folder)
    trainer = run.trainer

    def figures(store: Any, batches: int) -> dict[str, float]:
        step = trainer.progress.step
        value = 2.0 + (1.5 / step if comm.rank == 0 else step)
        return {"loss": value, "perplexity": 1.0, "bits_per_byte": 1.0, "accuracy": 0.0, "tokens": 1}

    trainer.evaluate = figures
    summary = trainer.train(run.store, run.store)
    found = {
        "step": comm.all_gather(summary["step"]),
        "state": comm.all_gather(summary["state"]),
        "actions": comm.all_gather(len(trainer.adaptive.state_dict()["actions"])),
    }
    if comm.rank == 0:
        print("EARLY " + json.dumps({**found, "saved": [step for step, _ in trainer.manager.committed()]}), flush=True)


if __name__ == "__main__":
    main()
