"""One rank of the test that ranks of a machine started by hand start as the supervised one was told to.

    python by_hand_ranks.py RUN_DIR      under torch.distributed.run

Only rank 0 is told by its environment to go on, with other data, after running out of memory. The ranks leave where the model
fits. Rank 0 prints `BY HAND [[…], …]`: for each rank resume, accept_data_change, batch_size, gradient_accumulation_steps.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from lumina_engine.run.directory import RunDirectory
from lumina_engine.run.rank import NullChannel
from lumina_engine.training.comm import Comm
from lumina_engine.training.worker import Refused, Worker


class Fitting(Worker):
    """Goes no further than to a model that fits."""

    def _fits(self) -> None:
        raise Refused("far enough")


def main() -> None:
    if os.environ["RANK"] == "0":
        os.environ |= {"LUMINA_RESUME": "1", "LUMINA_ACCEPT_DATA_CHANGE": "1", "LUMINA_AFTER": "out_of_memory"}
    worker = Fitting(RunDirectory(Path(sys.argv[1])), NullChannel())
    worker.run()
    comm, config = Comm.start("gloo"), worker.config
    told = [worker.resume, worker.accept_data_change, config.batch_size, config.gradient_accumulation_steps]
    found = comm.all_gather(told)
    if comm.rank == 0:
        print("BY HAND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
