"""One rank of the test that ends in an evaluation: the save of that step is on its way when it begins (CK16).

    python eval_ranks.py DATA.jsonl FOLDER

The evaluation goes on until the step is committed, and then fails; another start goes on from there to the end. Rank 0 prints
`EVAL {"committed": whether it was, "resumed": [steps of the second start]}`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lumina_engine.data.batch import Batch, EvalLoader
from lumina_engine.monitoring.record import Step
from lumina_engine.training import trainer as trainer_module
from lumina_engine.training.comm import Comm
from tests.training.zero_ranks import Run
from tests.waiting import DEADLINE

STEP = 2  # both saved and evaluated


class EvaluationDied(Exception):
    """`committed`: whether the step's checkpoint was there by then."""

    def __init__(self, committed: bool) -> None:
        super().__init__(committed)
        self.committed = committed


def main() -> None:
    data, folder = sys.argv[1], Path(sys.argv[2]) / "run"
    comm = Comm.start("gloo")
    keys: dict[str, Any] = {"use_deepspeed": False, "batch_size": 4, "async_save": True, "max_steps": 4}
    keys |= {"save_interval": STEP, "eval_interval": STEP, "eval_batches": 2}

    class Long(EvalLoader):
        def __iter__(self) -> Iterator[Batch]:
            batch, end = next(super().__iter__()), time.monotonic() + DEADLINE
            while True:
                yield batch
                there = (folder / "checkpoints" / f"step-{STEP:06d}").is_dir()
                seen = comm.all_gather([there, time.monotonic() > end])
                if all(one for one, _ in seen) or any(late for _, late in seen):
                    raise EvaluationDied(there)

    first = Run(data, keys, comm, folder)
    trainer_module.EvalLoader = Long  # type: ignore[misc]
    try:
        first.train()
    except EvaluationDied as death:
        committed = death.committed
    first.trainer.manager.abandon()
    trainer_module.EvalLoader = EvalLoader  # type: ignore[misc]
    again = Run(data, keys, comm, folder)
    again.trainer.prepare(again.store, again.store)
    if committed:
        again.resume(STEP)
        again.train()
    if comm.rank == 0:
        steps = [r.step for r in again.records if isinstance(r, Step)]
        print("EVAL " + json.dumps({"committed": committed, "resumed": steps}), flush=True)


if __name__ == "__main__":
    main()
