"""One rank of the start-up test: the memory of a start at ZeRO stage 3, as the kernel sees it, and the weights it begins with.

    MALLOC_MMAP_THRESHOLD_=65536 python start.py FOLDER      under torch.distributed.run

Prints `START {...}` (rank 0): bytes of a `whole` copy of the weights in fp32; for each rank the largest resident set over what
was there before, until the weights are `split` and until training could begin (`ready`); `equal`: the weights of the engine
have the bits of a model that one process builds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

from lumina_engine.config.machine import Machine
from lumina_engine.config.memory import training_memory
from lumina_engine.config.resolve import layout_of, model_config
from lumina_engine.config.schema import Config
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.model.transformer import DeepSeekTransformer
from lumina_engine.training.comm import Comm
from lumina_engine.training.expert_parallel import build_model
from lumina_engine.training.trainer import EnhancedConversationTrainer
from tests.training.peak import SHAPE, reset_largest, resident, settle

KEYS = {"zero_stage": 3, "precision": "bf16", "batch_size": 1, "seq_length": 32, "packing": "concat"}
BUCKETS = {"reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 0}


def start(config: Config, comm: Comm) -> tuple[EnhancedConversationTrainer, dict[str, int]]:
    """A trainer from nothing, and the largest resident set on the way to it."""
    settle()
    before = resident("VmRSS")
    reset_largest()
    highest: dict[str, int] = {}
    inner = deepspeed.initialize

    def initialize(*args: Any, **kwargs: Any) -> Any:
        highest["split"] = resident("VmHWM") - before
        return inner(*args, **kwargs)

    deepspeed.initialize = initialize
    try:
        trainer = EnhancedConversationTrainer(
            build_model(config, comm), ConversationTokenizer(config.tokenizer), config, None, comm=comm
        )
    finally:
        deepspeed.initialize = inner
    highest["ready"] = resident("VmHWM") - before
    return trainer, highest


def main() -> None:
    folder = Path(sys.argv[1])
    comm = Comm.start("gloo")
    own = {"train_data_path": str(folder / "train.jsonl"), "data_cache_dir": str(folder / "cache")}
    config = Config(**(SHAPE | KEYS | BUCKETS | own | {"num_layers": 1}))
    start(config, comm)  # loads every library
    config = Config(**(config.to_dict(sectioned=False) | {"num_layers": 16, "seed": 5}))
    trainer, highest = start(config, comm)
    ranks = comm.all_gather(highest)
    tensors = trainer.engine.model_tensors()
    if comm.rank == 0:
        model = DeepSeekTransformer(config)
        whole = sum(parameter.nbytes for parameter in model.parameters())
        built = model.to(torch.bfloat16).state_dict()
        equal = built.keys() == tensors.keys() and all(torch.equal(built[name], tensors[name]) for name in built)
        layout = layout_of(trainer.config, Machine(), 3, comm.world_size)
        total = training_memory(model_config(trainer.config), layout).total
        print("START " + json.dumps({"whole": whole, "ranks": ranks, "equal": equal, "budget": total}), flush=True)


if __name__ == "__main__":
    main()
