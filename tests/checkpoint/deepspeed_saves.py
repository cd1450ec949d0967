"""One rank that trains two steps at a ZeRO stage and saves as DeepSpeed does: python deepspeed_saves.py DATA FOLDER STAGES

FOLDER/STAGE-WORLD is what DeepSpeed's `save_checkpoint` writes, FOLDER/STAGE-WORLD.safetensors the whole fp32 weights (rank 0).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from lumina_engine.training.comm import Comm
from tests.training.zero_ranks import Run


def main() -> None:
    data, folder, stages = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    comm = Comm.start("gloo")
    for stage in stages:
        shape = {"hidden_size": 65, "head_dim": 34, "num_experts": 3}  # widths that two ranks cannot share evenly
        run = Run(data, {"batch_size": 4, "max_steps": 2, "zero_stage": stage, **shape}, comm).train()
        target = folder / f"{stage}-{comm.world_size}"
        run.trainer.engine.engine.save_checkpoint(str(target), tag="global_step2")  # type: ignore[attr-defined]
        tensors = run.trainer.engine.model_tensors()
        if comm.rank == 0:
            save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, f"{target}.safetensors")
            (folder / "config.json").write_text(json.dumps(run.trainer.model.config.to_dict()))
    print("SAVES " + json.dumps(stages), flush=True)


if __name__ == "__main__":
    main()
