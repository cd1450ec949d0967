"""The keys of the training loop and of the data: sections `training` and `data`."""

from __future__ import annotations

from typing import ClassVar, Literal

from lumina_engine.config.declare import Section, key

_BATCH = "data/batch.py"
_CURRICULUM = "config/curriculum.py"
_ENGINE = "training/engine.py"
_SCHEDULE = "training/schedule.py"
_TRAINER = "training/trainer.py"
_BOUNDARY = "training/boundary.py"


class TrainingKeys(Section):
    """Batch, optimizer, schedule, precision, evaluation."""

    section_name: ClassVar[str] = "training"

    batch_size: int = key(
        2,
        "Micro batch: rows on one device at once. The global batch is batch_size x gradient_accumulation_steps x ranks.",
        unit="sequences per device",
        minimum=1,
        maximum=65_536,
        resume=True,
        read_by=_BATCH,
    )
    gradient_accumulation_steps: int = key(
        1, "Micro batches per optimizer step.", unit="micro batches", minimum=1, maximum=65_536, resume=True, read_by=_TRAINER
    )
    learning_rate: float = key(
        1e-4, "Peak of the learning rate schedule.", unit="per step", above=0, maximum=1, resume=True, read_by=_SCHEDULE
    )
    weight_decay: float = key(
        0.01, "AdamW's decay; norms, embeddings and routers are exempt.", minimum=0, below=1, resume=True, read_by=_ENGINE
    )
    adam_beta1: float = key(0.9, "AdamW's decay of the mean gradient.", minimum=0, below=1, resume=True, read_by=_ENGINE)
    adam_beta2: float = key(
        0.95, "AdamW's decay of the mean squared gradient.", minimum=0, below=1, resume=True, read_by=_ENGINE
    )
    adam_eps: float = key(1e-8, "Added to AdamW's denominator.", minimum=0, below=1, resume=True, read_by=_ENGINE)
    max_grad_norm: float = key(
        1.0,
        "Gradients are scaled down to this global norm; 0 is off.",
        minimum=0,
        resume=True,
        read_by="training/plain_engine.py, config/deepspeed.py",
    )
    num_epochs: int = key(
        3,
        "Passes over the data; the run ends here or at max_steps, whichever comes first.",
        unit="epochs",
        minimum=1,
        resume=True,
        read_by=_TRAINER,
    )
    max_steps: int | None = key(
        None,
        "Optimizer steps after which the run ends; null is no limit but num_epochs.",
        unit="steps",
        minimum=1,
        resume=True,
        read_by=_TRAINER,
    )
    lr_schedule: Literal["cosine", "wsd", "linear", "constant"] = key(
        "cosine",
        "Shape of the learning rate after warm-up. wsd stays at the peak and falls at the end.",
        resume=True,
        read_by=_SCHEDULE,
    )
    warmup_steps: int | Literal["auto"] = key(
        "auto",
        "Steps of linear rise to learning_rate. Too few with a large batch is a usual cause of an early loss spike. "
        "auto is 2 % of all steps, at most 2,000; 0 is off.",
        unit="steps",
        minimum=0,
        maximum=1_000_000,
        resume=True,
        read_by=_SCHEDULE,
    )
    min_lr_ratio: float = key(
        0.1, "Lowest learning rate at the end, as a share of the peak.", minimum=0, maximum=1, resume=True, read_by=_SCHEDULE
    )
    decay_ratio: float = key(
        0.2, "Share of all steps that the decay of wsd takes.", minimum=0, maximum=1, resume=True, read_by=_SCHEDULE
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "mixed_bf16", "mixed_fp16"] = key(
        "auto",
        "Numbers in weights and arithmetic. bf16 and fp16 keep fp32 masters in the optimizer; mixed_* keep fp32 weights and "
        "compute in the short type. auto is bf16 where the device has it, fp32 on CPU.",
        resume=True,
        read_by="training/precision.py",
    )
    auto_tune_precision: bool = key(
        False,
        "Try the precisions that the device has on real batches first, and take the fastest that stays accurate.",
        resume=True,
        read_by="training/settle.py",
    )
    dynamic_precision: bool = key(
        False,
        "Go on in a wider precision for a while when steps keep being not finite.",
        resume=True,
        read_by="training/trainer.py",
    )
    seed: int = key(0, "Source of all randomness.", minimum=0, maximum=2**32 - 1, read_by="data/order.py, training/setup.py")
    deterministic: bool = key(
        True,
        "Only deterministic kernels. false may be faster on a GPU; then runs are not repeatable bit for bit.",
        resume=True,
        read_by="training/setup.py",
    )
    curriculum_learning: bool = key(
        False,
        "Start with short rows and double their length in steps. Full rows are cut into shorter ones, so the tokens of a step "
        "stay the same and none is lost; a conversation that a cut splits is read as two.",
        read_by=_CURRICULUM,
    )
    min_seq_length: int | Literal["auto"] = key(
        "auto",
        "Length of the first rows of the curriculum. auto is seq_length / 8, at least 64.",
        unit="tokens",
        minimum=16,
        read_by=_CURRICULUM,
    )
    max_seq_length: int | Literal["auto"] = key(
        "auto", "Length of the last rows of the curriculum. auto is seq_length.", unit="tokens", minimum=16, read_by=_CURRICULUM
    )
    curriculum_steps: int = key(
        1_000, "Steps until the curriculum reaches full length.", unit="steps", minimum=1, read_by=_CURRICULUM
    )
    dynamic_batching: bool = key(
        False,
        "Find the largest micro batch that fits before the start; the global batch stays as configured. What experts learn "
        "depends a little on how it is cut (see load_balancing_weight), and so does what a capacity drops.",
        resume=True,
        read_by="training/settle.py",
    )
    target_memory_usage: float = key(
        0.9,
        "Share of device memory that may be planned for.",
        minimum=0.3,
        maximum=0.98,
        resume=True,
        read_by="config/resolve.py",
    )
    min_batch_size: int = key(
        1,
        "Smallest micro batch that dynamic_batching may choose.",
        unit="sequences",
        minimum=1,
        maximum=65_536,
        resume=True,
        read_by="config/micro_batch.py",
    )
    max_batch_size: int = key(
        32,
        "Largest micro batch that dynamic_batching may choose.",
        unit="sequences",
        minimum=1,
        maximum=65_536,
        resume=True,
        read_by="config/micro_batch.py",
    )
    eval_interval: int = key(
        200, "Steps between evaluations; 0 evaluates at the end only.", unit="steps", minimum=0, resume=True, read_by=_BOUNDARY
    )
    eval_batches: int = key(
        100, "Batches of one evaluation; 0 takes all.", unit="batches", minimum=0, resume=True, read_by=_BOUNDARY
    )
    early_stopping_patience: int = key(
        0,
        "Evaluations without a better loss after which the run ends; 0 is off.",
        unit="evaluations",
        minimum=0,
        resume=True,
        read_by=_BOUNDARY,
    )
    early_stopping_gain: float = key(
        0.0,
        "The run should end when eval_loss can fall by less than this to the last step: the upper end (95 %) of what the curve "
        "through its own evaluations gives, 12 at least. adaptive=advise: an alert; act: the run ends; 0 is off.",
        unit="nats",
        minimum=0,
        resume=True,
        read_by="monitoring/early_stop.py",
    )


class DataKeys(Section):
    """Sources, tokenizer, packing, loading."""

    section_name: ClassVar[str] = "data"

    train_data_path: str | list[str] | None = key(
        None, "File, folder, glob, URL (s3://…) or list of them. null is the built-in corpus.", read_by="data/store.py"
    )
    eval_data_path: str | list[str] | None = key(
        None,
        "Data to evaluate on: file, folder, glob, URL or list. null holds back eval_split of the training data.",
        read_by="data/store.py",
    )
    eval_split: float = key(
        0.02,
        "Share of conversations held back for evaluation, chosen by a digest of each.",
        minimum=0,
        maximum=0.5,
        read_by="data/store.py",
    )
    data_format: Literal["auto", "messages", "oasst", "alpaca", "sharegpt", "text"] = key(
        "auto", "Layout of the data files; auto looks into them.", read_by="data/store.py"
    )
    tokenizer: str = key(
        "gpt-4",
        "gpt-4, gpt-4o, lumina-1k, or the path of a .tiktoken vocabulary (GPT-2: r50k_base.tiktoken) or of a Hugging Face "
        "tokenizer.json.",
        read_by="data/tokenizer.py",
    )
    train_on: Literal["assistant", "all"] = key("assistant", "Which tokens carry loss.", read_by=_BATCH)
    assistant_loss_weight: float = key(
        1.0, "Weight of assistant tokens when train_on is all.", minimum=0, maximum=10, read_by="data/rows.py"
    )
    packing: Literal["fit", "concat", "none"] = key(
        "fit",
        "fit puts whole conversations into rows and cuts only texts longer than a row, concat fills rows to the end, none is "
        "one conversation a row. Conversations in one row never attend to each other.",
        read_by=_BATCH,
    )
    streaming_threshold_gb: float = key(
        5.0,
        "Files larger than this in sum are streamed: no more than this of their tokens lies on the disk. 0 always streams.",
        unit="GB",
        minimum=0,
        read_by="data/stream_open.py",
    )
    num_workers: int = key(
        2,
        "Loader threads; 0 loads in the training thread.",
        unit="threads",
        minimum=0,
        maximum=64,
        resume=True,
        read_by=_BATCH,
    )
    prefetch_batches: int = key(
        2, "Batches that each loader thread keeps ready.", unit="batches", minimum=1, maximum=64, resume=True, read_by=_BATCH
    )
    data_cache_dir: str = key(
        "data/cache", "Folder of tokenised data.", pattern=r".+", form="a path", resume=True, read_by="data/store.py"
    )
    multi_task: bool = key(False, "Mix several tasks, each in its share of the rows.", read_by="data/store.py")
    task_weights: dict[str, float] = key(
        {},
        "Share of the rows that each task gets; shares are divided by their sum. Without weights the tasks of task_data_paths "
        "share as their sizes do.",
        read_by="data/tasks.py",
    )
    task_data_paths: dict[str, str | list[str]] = key(
        {},
        "Data of each task: file, folder, glob or list. Names the same tasks as task_weights. Without paths, the records of "
        "train_data_path carry their task.",
        read_by="data/tasks.py",
    )
    task_temperature: float = key(1.0, "Shares become weight^(1/t): above 1 evens them out.", above=0, read_by="data/mixed.py")
    task_max_epochs: float | None = key(
        None,
        "How often the data of one task is used at most; its share goes to the others then. null is no limit.",
        unit="epochs",
        above=0,
        read_by="data/mixed.py",
    )
