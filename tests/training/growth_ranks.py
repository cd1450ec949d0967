"""One rank of the test that a machine started by hand does what the supervised one decides.

    python growth_ranks.py RUN_DIR      under torch.distributed.run

Rank 0 has a supervisor, the others have none, and only rank 0 says at which save the experts should change. Rank 0 prints
`GROWTH {…}`: for each rank the exit `codes`, the last `steps`, and the precision `ladders` that it has.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from lumina_engine.run.directory import RunDirectory
from lumina_engine.run.rank import NullChannel
from lumina_engine.training.comm import Comm
from lumina_engine.training.worker import Worker
from tests.training.test_experts import AT, change


class Supervised(NullChannel):
    supervised = True


def main() -> None:
    channel = Supervised() if os.environ["RANK"] == "0" else NullChannel()
    worker = Worker(RunDirectory(Path(sys.argv[1])), channel)
    worker.growth.wanted = lambda step, spent: change(step) if step == AT else None  # type: ignore[method-assign]
    code = worker.run()
    comm = Comm.start("gloo")
    found = {
        "codes": comm.all_gather(code),
        "steps": comm.all_gather(worker.trainer.progress.step),
        "ladders": comm.all_gather(worker.trainer.ladder is not None),
    }
    if comm.rank == 0:
        print("GROWTH " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
