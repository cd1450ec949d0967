"""The faulty worker of a run that grows: its first expert gets every token, and a few steps count as long.

`growing_worker.py RUN_DIR`, in place of the worker's own module. With a file `dead` in the run's folder the last expert gets
none instead, and the run shrinks. A file `kills.json` has incarnations, and for each a number: rank 0 dies in it before so many
durability calls, counted from where its experts are settled.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lumina_engine.model.transformer import DeepSeekTransformer
from lumina_engine.monitoring import growth, growth_watch
from lumina_engine.training import experts
from lumina_engine.training import worker as product
from tests.checkpoint.helpers import kill_at
from tests.faults.faulty_worker import FaultyChannelOfEnvironment, KnownWorker

# of `monitoring/growth.py`: steps that last, steps after which an expert is given up, and the share below which it is dead
GROWS = {"SUSTAINED": 8, "GIVEN_UP": 16, "COLD": 0.0}
SHRINKS = {**GROWS, "COLD": 0.1}
KNOWN_IN = (growth, growth_watch)
DEAD, KILLS = "dead", "kills.json"


def skewed(model: Any, seed: int, inner: Any = DeepSeekTransformer.init_weights) -> None:
    inner(model, seed)
    for layer in model.expert_layers:
        layer.router.bias[slice(-1, None) if dead() else slice(1, None)] = -1e9


def dead() -> bool:
    return (Path(sys.argv[-1]) / DEAD).exists()


def settled(*args: Any, inner: Any = experts.experts_in_force) -> Any:
    place = Path(sys.argv[-1]) / KILLS
    kills = json.loads(place.read_text()) if place.exists() else {}
    if os.environ["LUMINA_INC"] in kills and os.environ.get("RANK", "0") == "0":
        kill_at(kills[os.environ["LUMINA_INC"]])
    return inner(*args)


if __name__ == "__main__":
    for name, value in (SHRINKS if dead() else GROWS).items():
        for module in KNOWN_IN:
            setattr(module, name, value)
    DeepSeekTransformer.init_weights = skewed  # type: ignore[method-assign]
    experts.experts_in_force = settled
    product.RankChannel = FaultyChannelOfEnvironment  # type: ignore[misc]
    product.Worker = KnownWorker  # type: ignore[misc]
    sys.exit(product.main())
