"""Programs for tests: a trial that ends as it is told, and a search for the largest micro batch under a memory cap.

python -m tests.training.trials ORDER RESULT                        a trial (see `lumina_engine.training.trial`)
python -m torch.distributed.run … -m tests.training.trials          a trial of several ranks, the last of which is killed
python -m tests.training.trials CAP CACHE '{config}' SIZE…          tries of these sizes; without sizes the whole search
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lumina_engine.config.micro_batch import split
from lumina_engine.config.schema import Config
from lumina_engine.training import batch_size
from lumina_engine.training.comm import Comm
from lumina_engine.training.trial import leave, run_trial, trial_main


def ends(config: Config, order: dict[str, Any]) -> dict[str, Any]:
    how = order["how"]
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "memory":
        bytearray(1 << 62)
    if how == "last killed" and int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"]):
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "last killed":  # as in a collective with the one that is gone
        threading.Event().wait()
    if how == "wrong":
        raise ValueError("the trial was told to be wrong")
    return {"rows": config.batch_size, "alone": os.environ["WORLD_SIZE"], "channel": os.environ.get("LUMINA_RANK_SOCKET")}


def ranks() -> None:
    comm = Comm.start("gloo")
    outcomes = run_trial("tests.training.trials", Config(), comm, {"how": "last killed"})
    seen = comm.all_gather([[outcome.code, outcome.out_of_memory] for outcome in outcomes])
    if comm.rank == 0:
        print("FOUND " + json.dumps(seen), flush=True)


def search(cap: int, cache: Path, keys: dict[str, Any], sizes: list[int]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
    config, comm = Config(**keys, data_cache_dir=str(cache)), Comm()
    if sizes:
        found: Any = []
        for size in sizes:
            one = config.model_copy(update=split(config, size) | {"gradient_accumulation_steps": 2})
            outcomes = run_trial(batch_size.__name__, one, comm, {"local_ranks": 1})
            found.append(outcomes[0].result)
    else:
        tries = batch_size.Tries(config, comm, {})
        changed, line = batch_size.fit(config, comm, tries, lambda rows: None)
        found = {
            "batch": [changed.batch_size, changed.gradient_accumulation_steps],
            "line": line,
            "tried": {name: asdict(item) for name, item in tries.tried.items()},
        }
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        leave(trial_main(ends, sys.argv))
    if len(sys.argv) == 1:
        sys.exit(ranks())
    search(int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), [int(size) for size in sys.argv[4:]])
