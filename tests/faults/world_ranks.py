"""One rank of the tests that go on with other ranks and stages: runs parts of chains in one process group, prints their steps.

    python world_ranks.py DATA.jsonl FOLDER '{"chain": [[stop, {config overrides}], …], …}'

Each part goes on from the newest checkpoint of FOLDER/CHAIN, if there is one, trains to step `stop` and saves. Rank 0 prints
`PARTS {"chain": [[step, loss, grad_norm, tokens], …], …}`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lumina_engine.monitoring.record import Step
from lumina_engine.training.comm import Comm
from lumina_engine.training.state import restore
from tests.training.zero_ranks import Run

ROWS = 8  # of a global batch


def main() -> None:
    data, folder, wanted = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    comm = Comm.start("gloo")
    out: dict[str, list[list[float]]] = {}
    for chain, parts in wanted.items():
        out[chain] = []
        for stop, overrides in parts:
            keys = {"batch_size": ROWS // comm.world_size, "router_bias_rate": 0.01, **overrides}
            run = Run(data, keys, comm, folder / chain)
            run.trainer.prepare(run.store, run.store)
            path = run.trainer.manager.recover()
            if path is not None:
                restore(run.trainer, run.trainer.manager.load(path))
            run.trainer.total_steps = stop  # the schedule keeps the full length
            run.train()
            out[chain] += [[r.step, r.loss, r.grad_norm, r.tokens] for r in run.records if isinstance(r, Step)]
    if comm.rank == 0:
        print("PARTS " + json.dumps(out), flush=True)


if __name__ == "__main__":
    main()
