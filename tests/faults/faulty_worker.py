"""The real worker of a run, over a channel that strikes: `faulty_worker.py RUN_DIR`, in place of the worker's own module."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from lumina_engine.run.rank import NullChannel, RankChannel
from lumina_engine.training import worker as product

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.faults.injector import FaultyChannel, read_plan


class FaultyChannelOfEnvironment(RankChannel):
    """What `worker.main` makes its channel from."""

    @classmethod
    def from_environment(cls, environment: Any = None) -> NullChannel:
        folder = Path(sys.argv[-1])
        real = RankChannel.from_environment(environment)
        rank, inc = int(os.environ.get("RANK", "0")), int(os.environ.get("LUMINA_INC", "1"))
        return FaultyChannel(real, folder, read_plan(folder), rank, inc)


class KnownWorker(product.Worker):
    """Tells its channel who it is: poison needs its model."""

    def __init__(self, directory: Any, channel: Any) -> None:
        super().__init__(directory, channel)
        channel.worker = self


if __name__ == "__main__":
    product.RankChannel = FaultyChannelOfEnvironment  # type: ignore[misc]
    product.Worker = KnownWorker  # type: ignore[misc]
    sys.exit(product.main())
