"""Device and host memory of training, from the shape alone. Bytes throughout.

A step is highest at one of three moments: in the loss (all activations, one chunk of logits), in the backward pass (activations
and the gradients that are there already, highest at its first or its last block), or in the update (all gradients, with the
copies that the optimizer makes). The parts of a step are not there all at once: `total` is the highest moment, not their sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lumina_engine.config.activations import (
    activation_bytes,
    block_activation_bytes,
    cast_bytes,
    loss_bytes,
    working_bytes,
    worst_places,
)
from lumina_engine.config.buckets import ON_GPU
from lumina_engine.config.counts import Counts, parameter_counts
from lumina_engine.config.schema import DeepSeekConfig

# bytes of one weight, one gradient, and one value in the arithmetic, by precision
_BYTES = {"fp32": (4, 4, 4), "bf16": (2, 2, 2), "fp16": (2, 2, 2), "mixed_bf16": (4, 4, 2), "mixed_fp16": (4, 4, 2)}
# elements of gathered weights that DeepSpeed keeps at stage 3 where they are used again soon, half of its reuse distance
_REUSED = 500_000_000
# elements that DeepSpeed reduces at once at stage 0
_STAGE0_BUCKET = 500_000_000
# of the plain loop's conversions to fp32: 2**20 values on a CPU, 2**24 on a GPU (training/masters.py)
_STRETCH = {True: 4 << 20, False: 64 << 20}


@dataclass(frozen=True, slots=True)
class Layout:
    """How a run is spread out: everything beside the model that decides memory. `precision` and `zero_stage` are resolved."""

    batch_size: int
    seq_length: int
    precision: str
    world: int = 1
    zero_stage: int = 0
    use_deepspeed: bool = True
    accumulates: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    nvme_optimizer: bool = False
    nvme_parameters: bool = False
    reduce_bucket_size: int = ON_GPU
    prefetch_bucket_size: int = 50_000_000
    overlap_comm: bool = True
    contiguous_gradients: bool = True
    on_cpu: bool = True


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device while training at the worst shape, part by part, and at the `moments` of a step.

    That is the micro batch of the dry run: full rows of documents that leave the most filler in attention.

    `working` are temporaries of the backward pass; `buckets` those of reducing and gathering; `host` and `nvme` is what offload
    keeps elsewhere, per rank.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    experts: int
    buckets: int
    working: int
    host: int
    nvme: int
    moments: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All that one device must hold at once. `experts` is a part of `weights`, not on top."""
        return max(self.moments.values())

    @property
    def moment(self) -> str:
        """When that is: loss, backward or update."""
        return max(self.moments, key=lambda name: self.moments[name])


@dataclass(frozen=True, slots=True)
class _State:
    """Bytes of one rank beside activations: what stays, what gradients take when, and what offload moves away."""

    weights: int
    gradients: int
    optimizer: int
    held: int  # gradients kept between the micro batches of a step
    left: int  # gradients kept at the end of the last backward pass
    update: int  # gradients and copies of them in the update
    buckets: int  # of reducing and gathering, in the backward pass
    gathered: int = 0  # the part of them that is there in the forward pass too
    host: int = 0
    nvme: int = 0

    @property
    def stays(self) -> int:
        return self.weights + self.optimizer


def training_memory(model: DeepSeekConfig, layout: Layout) -> Memory:
    """Memory of one device. Raises `ConfigError` while `vocab_size` is auto.

    With `expert_parallel_size` a device holds its share of the experts, and the tokens of a balanced routing.
    """
    model = _spread(model, layout)
    counts = parameter_counts(model)
    weight_bytes, grad_bytes, value_bytes = _BYTES[layout.precision]
    state = _state(model, layout, counts)
    tokens = layout.batch_size * layout.seq_length
    places = worst_places(model, layout.batch_size, layout.seq_length)
    kept = activation_bytes(model, layout.batch_size, layout.seq_length, value_bytes, layout.on_cpu, places)
    if weight_bytes > value_bytes:
        kept += cast_bytes(model, value_bytes)
    logits = loss_bytes(model, tokens, value_bytes, weight_bytes, layout.on_cpu)
    working = working_bytes(model, tokens, value_bytes, layout.on_cpu, layout.seq_length)
    working += _exchange_bytes(model, layout, value_bytes)
    block = grad_bytes * _block_parameters(model, counts)
    head = grad_bytes * model.vocab_rows * model.hidden_size
    one_block = block_activation_bytes(model, tokens, value_bytes, layout.on_cpu, layout.seq_length, places)
    tied = head if model.tie_word_embeddings else 0
    # the buckets are there from the start, but on a CPU only what is written to is
    first = state.held + kept + working + block + head + (state.gathered if layout.on_cpu else state.buckets)
    last = state.left + one_block + working + block + tied + state.buckets
    moments = {
        "loss": state.stays + state.held + state.gathered + kept + logits,
        "backward": state.stays + max(first, last),
        "update": state.stays + state.update,
    }
    return Memory(
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        activations=kept,
        logits=logits,
        experts=state.weights * counts.experts // model.expert_parallel_size // _local(model, counts),
        buckets=state.buckets,
        working=working,
        host=state.host,
        nvme=state.nvme,
        moments=moments,
    )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Bytes that a checkpoint holds: `weights` of the whole model, which rank 0 saves, and the `state` that each rank saves.

    `gathered` of these weights rank 0 puts together in host memory first; `fetched` of its state each rank reads from disk.
    """

    weights: int
    state: int
    gathered: int
    fetched: int


def checkpoint_bytes(model: DeepSeekConfig, layout: Layout) -> Checkpoint:
    """What is saved: two fp32 moments of each value, and fp32 masters beside shorter weights.

    ZeRO splits them over the ranks; without it, and at stage 0, each rank saves those of all that it holds.
    """
    model = _spread(model, layout)
    counts = parameter_counts(model)
    weight = _BYTES[layout.precision][0]
    splits = layout.use_deepspeed and layout.zero_stage > 0
    held = counts.stored // layout.world if splits else _local(model, counts)
    state = held * (12 if weight < 4 else 8)
    apart = counts.experts if model.expert_parallel_size > 1 else 0
    return Checkpoint(
        weights=counts.stored * weight,
        state=state,
        gathered=weight * (counts.stored if splits and layout.zero_stage == 3 else apart),
        fetched=state if layout.nvme_optimizer else 0,
    )


def _spread(model: DeepSeekConfig, layout: Layout) -> DeepSeekConfig:
    """The model with the ranks over which its experts can be spread."""
    if model.use_moe and layout.world % model.expert_parallel_size == 0:
        return model
    return model.model_copy(update={"expert_parallel_size": 1})


def _block_parameters(model: DeepSeekConfig, counts: Counts) -> int:
    """Parameters of the largest kind of block on one device: their gradients are made before any is given away."""
    layers, with_experts = model.num_layers, model.expert_layers
    shared = (counts.attention + counts.norms) // layers
    experts = (counts.experts // model.expert_parallel_size + counts.shared + counts.router) // max(1, with_experts)
    dense = counts.dense // max(1, layers - with_experts)
    return shared + max(experts, dense)


def _state(model: DeepSeekConfig, layout: Layout, counts: Counts) -> _State:
    stage = layout.zero_stage if layout.use_deepspeed else 0
    if stage == 0:
        return _whole(model, layout, counts)
    return _gathered(model, layout, counts) if stage == 3 else _split(model, layout, counts, stage)


def _local(model: DeepSeekConfig, counts: Counts) -> int:
    """Parameters that one device computes with: all, or its share of the experts and the rest."""
    return counts.stored - counts.experts + counts.experts // model.expert_parallel_size


def _whole(model: DeepSeekConfig, layout: Layout, counts: Counts) -> _State:
    """Plain PyTorch, and DeepSpeed's stage 0: every rank has everything."""
    count = _local(model, counts)
    weight, grad, _ = _BYTES[layout.precision]
    several, masters = layout.world > 1, weight < 4
    gradients = count * grad
    # the plain loop: one flat copy of all gradients in fp32, beside which those that it is made of go one by one
    buckets = (min(count, _STAGE0_BUCKET) * grad if layout.use_deepspeed else count * 4) if several else 0
    return _State(
        weights=count * weight,
        gradients=gradients,
        optimizer=count * (12 if masters else 8),  # two moments in fp32; a master copy unless the weights are fp32
        held=gradients if layout.accumulates else 0,
        left=gradients,
        # DeepSpeed has all gradients in fp32 at once, the plain loop a stretch of them
        update=gradients
        + max(buckets, (count * 4 if layout.use_deepspeed else min(count * 4, _STRETCH[layout.on_cpu])) if masters else 0),
        buckets=0,
    )


def _split(model: DeepSeekConfig, layout: Layout, counts: Counts, stage: int) -> _State:
    """Stages 1 and 2: optimizer and masters in fp32 split over the ranks, and reduced gradients, as DeepSpeed 0.19 does it."""
    count, part = _local(model, counts), counts.stored // layout.world
    weight, grad, _ = _BYTES[layout.precision]
    size = min(count, layout.reduce_bucket_size) if layout.on_cpu else layout.reduce_bucket_size
    buckets = size * grad * (2 if layout.overlap_comm else 1)
    if layout.on_cpu:  # what is written to in them are a block's gradients, which are counted by themselves
        buckets = max(0, buckets - grad * _block_parameters(model, counts))
    all_gradients, own = count * grad, part * grad
    # two moments, and masters where the weights are no masters themselves (training/deepspeed_engine.py)
    optimizer = (8 if layout.precision in ("fp32", "mixed_bf16") and not layout.offload_optimizer else 12) * part
    # at stage 1 DeepSpeed lets go of the gradients of other ranks only where it copies them into a bucket on the way
    early = stage == 2 or (layout.overlap_comm and layout.contiguous_gradients)
    held = (all_gradients if stage == 1 else own) if layout.accumulates else 0
    return _State(
        weights=count * weight,
        gradients=all_gradients if stage == 1 else own,
        optimizer=0 if layout.offload_optimizer else optimizer,
        held=held,
        left=held or (own if early else all_gradients),
        update=own + (0 if layout.offload_optimizer else own + (4 * part if grad < 4 else 0)),
        buckets=buckets,
        host=optimizer + 4 * part if layout.offload_optimizer else 0,  # with fp32 gradients of this part
    )


def _gathered(model: DeepSeekConfig, layout: Layout, counts: Counts) -> _State:
    """Stage 3: weights are split too, and gathered where a block needs them."""
    part = counts.stored // layout.world
    weight, grad, _ = _BYTES[layout.precision]
    moved = layout.offload_parameters or layout.nvme_parameters
    off = layout.offload_optimizer or layout.nvme_optimizer
    live = min(counts.stored, _block_parameters(model, counts) + layout.prefetch_bucket_size + _REUSED)
    size = min(counts.stored, layout.reduce_bucket_size) if layout.on_cpu else layout.reduce_bucket_size
    buckets = size * grad + live * weight
    optimizer, own = 12 * part, part * grad
    on_host = weight * part if layout.offload_parameters and not layout.nvme_parameters else 0
    on_host += 4 * part if off else 0  # fp32 gradients of this part
    on_host += optimizer if layout.offload_optimizer and not layout.nvme_optimizer else 0
    return _State(
        weights=0 if moved else weight * part,
        gradients=own,
        optimizer=0 if off else optimizer,
        held=own,
        left=own,
        update=own + (0 if off else 4 * part if grad < 4 else 0),
        buckets=buckets,
        gathered=buckets,  # the one of the gradients stays from step to step
        host=on_host,
        nvme=(optimizer if layout.nvme_optimizer else 0) + (weight * part if layout.nvme_parameters else 0),
    )


def _exchange_bytes(model: DeepSeekConfig, layout: Layout, value_bytes: int) -> int:
    """Rows that one block has under way between ranks, sent and received."""
    if model.expert_parallel_size == 1:
        return 0
    return 2 * layout.batch_size * layout.seq_length * model.moe_top_k * model.hidden_size * value_bytes
