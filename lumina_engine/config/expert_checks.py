"""Rules of experts that are spread over ranks (`expert_parallel_size`, `overlap_alltoall`)."""

from __future__ import annotations

from collections.abc import Iterator

from lumina_engine.config.declare import show
from lumina_engine.config.finding import Finding, error
from lumina_engine.config.resolve import MOST_STAGE_WITH_EXPERTS, expert_ranks_findings
from lumina_engine.config.schema import Config

# Values of other keys that have been shown to give the same losses as with all experts on every rank; the first is the fix.
PROVED: dict[str, tuple[object, ...]] = {
    "precision": ("auto", "fp32", "bf16", "mixed_bf16"),
    "compile": (False,),
    "auto_tune_precision": (False,),
    "dynamic_precision": (False,),
    "dynamic_batching": (False,),
    "partition_activations": (False,),
    "cpu_offload": (False,),
    "cpu_offload_optimizer": (False,),
    "nvme_offload_optimizer": (False,),
    "expert_growth": ("off", "advise"),
}


def expert_parallel(config: Config) -> Iterator[Finding]:
    """What expert parallelism needs: experts that the ranks divide, stage 0 to 2, and features that were proved with it."""
    size = config.expert_parallel_size
    if size == 1:
        if config.overlap_alltoall:
            message = "overlap_alltoall = true with expert_parallel_size = 1: every rank has all experts, nothing is sent"
            yield error("overlap", "expert_parallel_size overlap_alltoall", message, "set overlap_alltoall=false")
        return
    if not config.use_moe:
        message = f"expert_parallel_size = {size}: the model has no experts (use_moe = false)"
        yield error("expert_parallel", "expert_parallel_size use_moe", message, "set expert_parallel_size=1")
        return
    if config.num_experts % size:
        message = f"expert_parallel_size = {size}: does not divide num_experts = {config.num_experts}"
        near = max(n for n in range(1, min(size, config.num_experts) + 1) if config.num_experts % n == 0)
        yield error("expert_parallel", "expert_parallel_size num_experts", message, f"set expert_parallel_size={near}")
    if config.num_gpus != "auto":
        yield from expert_ranks_findings(size, config.num_gpus * config.num_nodes)
    if config.zero_stage != "auto" and config.zero_stage > MOST_STAGE_WITH_EXPERTS:
        message = f"zero_stage = {config.zero_stage} with expert_parallel_size = {size}: both split the experts' weights"
        yield error("expert_stage", "expert_parallel_size zero_stage", message, f"set zero_stage={MOST_STAGE_WITH_EXPERTS}")
    if config.use_deepspeed and config.zero_stage != 0 and config.contiguous_gradients is False:
        message = f"contiguous_gradients = false with expert_parallel_size = {size}: DeepSpeed needs them for experts"
        yield error("expert_gradients", "expert_parallel_size contiguous_gradients", message, "set contiguous_gradients=true")
    for key, proved in PROVED.items():
        value = getattr(config, key)
        if value not in proved:
            message = f"{key} = {show(value)} with expert_parallel_size = {size}: not proved to give the same losses"
            yield error(
                "expert_unproved",
                f"expert_parallel_size {key}",
                message,
                f"set {key}={show(proved[0])} or expert_parallel_size=1",
            )
