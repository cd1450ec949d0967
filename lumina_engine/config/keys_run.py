"""The keys of everything around the training loop: `deepspeed`, `run`, `checkpoint`, `monitoring`, `adaptive`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from lumina_engine.config.declare import Section, key

_DEEPSPEED = "config/deepspeed.py"
_OFFLOAD = "config/offload.py"
_WORKER = "training/worker.py"
_LAUNCH = "run/launch.py"
_SUPERVISOR = "run/supervisor.py"
_MANAGER = "checkpoint/manager.py"
_RATE = "monitoring/adaptive.py"
_ADAPTIVE = f"{_RATE}, monitoring/balance.py"
_GUARD = "training/guard.py"
_HOST = r"auto|[A-Za-z0-9][A-Za-z0-9.-]{0,252}"
_HOST_FORM = "auto, or a host name or address"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_NAME_FORM = "at most 64 letters, digits, '.', '_' or '-', the first one a letter or digit"
_REDUCTION = (
    "auto: not on a CPU at ZeRO stage 1, where a step is faster without, unless experts are spread or the optimizer offloaded."
)


class DeepSpeedKeys(Section):
    """ZeRO, offload, communication. All of it may change on resume: optimizer state is saved by parameter."""

    section_name: ClassVar[str] = "deepspeed"

    use_deepspeed: bool = key(
        True, "Train through DeepSpeed; false is plain torch with the same numbers.", resume=True, read_by="training/engine.py"
    )
    zero_stage: Literal["auto", 0, 1, 2, 3] = key(
        "auto",
        "What is split over ranks: 1 optimizer state, 2 gradients too, 3 weights too. auto takes the smallest stage that fits.",
        resume=True,
        read_by=_DEEPSPEED,
    )
    cpu_offload: bool = key(
        False, "Optimizer state in host memory, with ZeRO-3 the weights too.", resume=True, read_by=_OFFLOAD
    )
    cpu_offload_optimizer: bool = key(
        False, "Optimizer state in host memory; needs ZeRO 1 to 3.", resume=True, read_by=_OFFLOAD
    )
    cpu_offload_parameters: bool = key(False, "Weights in host memory; needs ZeRO-3.", resume=True, read_by=_OFFLOAD)
    nvme_offload_optimizer: bool = key(False, "Optimizer state on a local disk; needs ZeRO-3.", resume=True, read_by=_OFFLOAD)
    nvme_offload_parameters: bool = key(False, "Weights on a local disk; needs ZeRO-3.", resume=True, read_by=_OFFLOAD)
    nvme_path: str = key(
        "/tmp/deepspeed_nvme", "Folder for offload to disk.", pattern=r".+", form="a path", resume=True, read_by=_DEEPSPEED
    )
    overlap_comm: bool | Literal["auto"] = key(
        "auto",
        "Reduce gradients while the backward pass goes on. " + _REDUCTION,
        resume=True,
        read_by=_DEEPSPEED,
    )
    contiguous_gradients: bool | Literal["auto"] = key(
        "auto",
        "Copy gradients into one buffer as they come. " + _REDUCTION,
        resume=True,
        read_by=_DEEPSPEED,
    )
    allgather_bucket_size: int | Literal["auto"] = key(
        "auto",
        "Elements gathered at once. auto: 200,000,000 on GPUs, 2,000,000 on CPU.",
        unit="elements",
        minimum=100_000,
        maximum=5_000_000_000,
        multiple_of=2,
        resume=True,
        read_by=_DEEPSPEED,
    )
    reduce_bucket_size: int | Literal["auto"] = key(
        "auto",
        "Elements reduced at once. auto: 200,000,000 on GPUs, 2,000,000 on CPU.",
        unit="elements",
        minimum=100_000,
        maximum=5_000_000_000,
        resume=True,
        read_by=_DEEPSPEED,
    )
    stage3_prefetch_bucket_size: int = key(
        50_000_000,
        "ZeRO-3: elements fetched ahead.",
        unit="elements",
        minimum=0,
        maximum=10_000_000_000,
        resume=True,
        read_by=_DEEPSPEED,
    )
    stage3_param_persistence_threshold: int = key(
        100_000,
        "ZeRO-3: smaller weights are not split.",
        unit="elements",
        minimum=0,
        maximum=10_000_000_000,
        resume=True,
        read_by=_DEEPSPEED,
    )
    communication_backend: Literal["auto", "nccl", "gloo"] = key(
        "auto", "How ranks talk: auto is nccl on GPUs, gloo on CPU.", resume=True, read_by=_WORKER
    )
    deepspeed_log_level: Literal["debug", "info", "warning", "error"] = key(
        "warning", "How much DeepSpeed writes to engine.log.", resume=True, read_by="training/deepspeed_engine.py"
    )
    deepspeed_overrides: dict[str, Any] = key(
        {},
        "DeepSpeed settings that no key covers, merged into deepspeed.json after a check of every name.",
        resume=True,
        read_by=_DEEPSPEED,
    )


class RunKeys(Section):
    """Name, ranks, nodes, supervision. All of it may change on resume."""

    section_name: ClassVar[str] = "run"

    experiment_name: str = key(
        "auto",
        "Name of the run's folder. auto is the preset and the time, fixed at launch.",
        pattern=_NAME,
        form=_NAME_FORM,
        resume=True,
        read_by="commands/train.py",
    )
    launcher: Literal["auto", "deepspeed", "torchrun", "srun", "none"] = key(
        "auto",
        "How ranks start: none by Lumina on this machine, deepspeed by an agent on each machine of the hostfile (ssh), srun by "
        "one on each machine of the Slurm job, torchrun by hand on each machine. auto is none on one machine, deepspeed with "
        "a hostfile, torchrun with node_rank.",
        resume=True,
        read_by=_LAUNCH,
    )
    num_gpus: int | Literal["auto"] = key(
        "auto",
        "Ranks per node: GPUs, or processes where there is no GPU. auto is all GPUs, or one process.",
        unit="ranks",
        minimum=1,
        maximum=1_024,
        resume=True,
        read_by="config/resolve.py",
    )
    num_nodes: int = key(1, "Machines.", unit="nodes", minimum=1, maximum=100_000, resume=True, read_by=_LAUNCH)
    node_rank: int | None = key(
        None,
        "Number of this machine when each is started by hand; 0 has the run.",
        minimum=0,
        maximum=100_000,
        resume=True,
        read_by=_LAUNCH,
    )
    hostfile: str | None = key(
        None,
        "File of lines `host slots=N`: the machines, this one among them.",
        pattern=r".+",
        form="a path",
        resume=True,
        read_by=_LAUNCH,
    )
    master_addr: str = key(
        "auto",
        "Address of the first machine, where ranks meet. auto: loopback for one machine, else found on the way to the second.",
        pattern=_HOST,
        form=_HOST_FORM,
        resume=True,
        read_by=_LAUNCH,
    )
    master_port: int | Literal["auto"] = key(
        "auto",
        "Port of the first machine. auto: 29,500, for one machine any free one.",
        minimum=1,
        maximum=65_535,
        resume=True,
        read_by=_LAUNCH,
    )
    max_restarts: int = key(
        3,
        "Restarts in a row without a newer checkpoint before the run is given up.",
        minimum=0,
        maximum=1_000,
        resume=True,
        read_by=_SUPERVISOR,
    )
    hang_timeout_s: float = key(
        60.0, "Least time without any progress that counts as hung.", unit="s", minimum=0, resume=True, read_by=_SUPERVISOR
    )
    hang_factor: float = key(
        5.0, "Times the usual duration of a section after which it counts as hung.", minimum=0, resume=True, read_by=_SUPERVISOR
    )
    startup_timeout_s: float = key(
        1_800.0, "Time that the first steps may take.", unit="s", minimum=0, resume=True, read_by=_SUPERVISOR
    )
    preempt_grace_s: float = key(
        30.0,
        "Time between the signal to leave and the kill, in which a checkpoint is saved.",
        unit="s",
        minimum=0,
        resume=True,
        read_by=_SUPERVISOR,
    )
    engine_log_mb: int = key(
        64,
        "Largest size of engine.log before it is rotated.",
        unit="MiB",
        minimum=1,
        maximum=10_000,
        resume=True,
        read_by=_SUPERVISOR,
    )


class CheckpointKeys(Section):
    """What is saved, how often, how many are kept. All of it may change on resume."""

    section_name: ClassVar[str] = "checkpoint"

    save_interval: int = key(
        500,
        "Steps between checkpoints; 0 saves at the end only.",
        unit="steps",
        minimum=0,
        resume=True,
        read_by="training/boundary.py",
    )
    keep_checkpoints: int = key(
        3, "Newest checkpoints kept; the best one is always kept.", unit="checkpoints", minimum=2, resume=True, read_by=_MANAGER
    )
    async_save: bool = key(True, "Write checkpoints beside training.", resume=True, read_by=_MANAGER)
    best_metric: Literal["eval_loss", "loss"] = key(
        "eval_loss",
        "What the pointer best follows; eval_loss counts at steps that are saved and evaluated.",
        resume=True,
        read_by=_MANAGER,
    )
    checkpoint_compression: Literal["none", "zstd"] = key(
        "none", "Compression of the optimizer state.", resume=True, read_by="checkpoint/saving.py"
    )
    backup_every_n_hours: float = key(
        6.0, "Time between copies of the newest checkpoint; 0 is off.", unit="hours", minimum=0, resume=True, read_by=_MANAGER
    )
    max_backup_count: int = key(5, "Backups kept.", unit="backups", minimum=1, maximum=1_000, resume=True, read_by=_MANAGER)
    backup_path: str | None = key(
        None, "Folder of backups; null is backups/ in the run.", pattern=r".+", form="a path", resume=True, read_by=_MANAGER
    )
    enable_emergency_save: bool = key(
        True, "Save the last finished step when a run of one rank fails in the next.", resume=True, read_by=_WORKER
    )


class MonitoringKeys(Section):
    """Records and the guard against bad steps. All of it may change on resume."""

    section_name: ClassVar[str] = "monitoring"

    log_interval: int = key(
        1, "Steps between step records.", unit="steps", minimum=1, resume=True, read_by="training/trainer.py"
    )
    expert_log_interval: int = key(
        10, "Steps between records of the experts' load.", unit="steps", minimum=1, resume=True, read_by="training/boundary.py"
    )
    hardware_interval_s: float = key(
        2.0, "Time between records of devices and host.", unit="s", minimum=0.5, resume=True, read_by="training/worker.py"
    )
    spike_sigma: float = key(
        6.0,
        "Deviations above the recent median from which a loss counts as a spike, and a gradient norm that the loss bears out "
        "(half as many) or that is a hundred times its median.",
        minimum=3,
        maximum=20,
        resume=True,
        read_by=_GUARD,
    )
    spike_window: int = key(
        128, "Steps over which the median is taken.", unit="steps", minimum=32, maximum=4_096, resume=True, read_by=_GUARD
    )
    spike_recover_steps: int = key(
        32, "Steps after a spike in which the loss must come back.", unit="steps", minimum=1, resume=True, read_by=_GUARD
    )
    spike_policy: Literal["alert", "skip", "rollback"] = key(
        "skip", "How far the guard may go at a spike.", resume=True, read_by=_GUARD
    )
    max_nonfinite_in_row: int = key(
        3,
        "Non-finite steps in a row after which the run goes back or ends.",
        unit="steps",
        minimum=1,
        resume=True,
        read_by="training/trainer.py",
    )
    max_rollbacks: int = key(
        2,
        "Returns to an earlier checkpoint in 1,000 steps before the run ends.",
        minimum=1,
        resume=True,
        read_by="training/rollback.py",
    )
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = key(
        [],
        "Experiment trackers that get the records, each from a process of its own.",
        resume=True,
        read_by="config/checks.py, commands/train.py",
    )
    alert_command: list[str] = key(
        [],
        "Program and arguments to run at a warning or critical alert, at most once a minute and at the run's end; no shell. "
        "The worst alert since the last time comes as JSON on its standard input.",
        resume=True,
        read_by="run/policy.py",
    )


class AdaptiveKeys(Section):
    """What may be changed without being asked. All of it may change on resume."""

    section_name: ClassVar[str] = "adaptive"

    adaptive: Literal["off", "advise", "act"] = key(
        "advise",
        "What is done when a loss that rises and stays up says that the learning rate is too high, or experts are out of "
        "balance where balancing is weak. advise: an alert with the command; act: the rate is lowered, then the run goes back "
        "(spike_policy=rollback), at last it ends; load_balancing_weight or capacity_factor is doubled once; off: nothing is "
        "computed.",
        resume=True,
        read_by="monitoring/adaptive.py, monitoring/balance.py, monitoring/growth_watch.py",
    )
    lr_multiplier_min: float = key(
        0.1, "Lowest factor that act may put on the schedule's rate.", minimum=0.01, maximum=1, resume=True, read_by=_RATE
    )
    adaptive_cooldown_steps: int = key(
        200,
        "Steps between two actions of act, after which each is judged.",
        unit="steps",
        minimum=10,
        resume=True,
        read_by=_ADAPTIVE,
    )
    max_adaptive_actions: int = key(
        20,
        "What act may do, or pieces of advice, in one run; what is given back does not count.",
        minimum=0,
        resume=True,
        read_by=_ADAPTIVE,
    )
    expert_growth: Literal["off", "advise", "act"] = key(
        "advise",
        "What is done when an expert should be added or removed in each layer; never further than adaptive. advise: an alert "
        "with the command; act: a save that save_interval makes is rewritten with one expert more or less, and the run is "
        "started again from it (a run of lumina-engine train; adding needs moe_top_k=1); off: nothing is computed.",
        resume=True,
        read_by="monitoring/growth_watch.py, training/worker.py, training/experts.py",
    )
    max_num_experts: int = key(
        64,
        "Most experts that growth may reach.",
        unit="experts",
        minimum=1,
        maximum=1_024,
        resume=True,
        read_by="checkpoint/growth.py, monitoring/growth.py, training/experts.py",
    )
