"""Device and host memory of training, from the shape alone.

Activations are counted tensor by tensor as the model of `lumina_engine.model` keeps them for the backward pass; tests compare
them with the tensors that autograd really saves. Bytes throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

from lumina_engine.config.counts import parameter_counts
from lumina_engine.config.schema import DeepSeekConfig

# bytes of one weight, one gradient, and one value in the arithmetic, by precision
_BYTES = {"fp32": (4, 4, 4), "bf16": (2, 2, 2), "fp16": (2, 2, 2), "mixed_bf16": (4, 4, 2), "mixed_fp16": (4, 4, 2)}


@dataclass(frozen=True, slots=True)
class Layout:
    """How a run is spread out: everything beside the model that decides memory. `precision` and `zero_stage` are resolved."""

    batch_size: int
    seq_length: int
    precision: str
    world: int = 1
    zero_stage: int = 0
    use_deepspeed: bool = True
    offload_optimizer: bool = False
    reduce_bucket_size: int = 200_000_000
    overlap_comm: bool = True
    on_cpu: bool = True


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device while training at the worst shape; `host` is what offload moves to host memory, per rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    experts: int
    buckets: int
    host: int

    @property
    def total(self) -> int:
        """All that one device must hold. `experts` is a part of `weights`, not on top."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.buckets


def training_memory(model: DeepSeekConfig, layout: Layout) -> Memory:
    """Memory of one device. Raises `ConfigError` while `vocab_size` is auto.

    With `expert_parallel_size` a device holds its share of the experts, and the tokens of a balanced routing.
    """
    if not model.use_moe or layout.world % model.expert_parallel_size:
        model = model.model_copy(update={"expert_parallel_size": 1})
    counts = parameter_counts(model)
    here = counts.stored - counts.experts + counts.experts // model.expert_parallel_size
    weight_bytes, grad_bytes, value_bytes = _BYTES[layout.precision]
    stage = layout.zero_stage if layout.use_deepspeed else 0
    split = [1 if stage < at else layout.world for at in (1, 2, 3)]  # optimizer, gradients, weights
    # two moments in fp32; a master copy too unless the weights themselves are fp32 and belong to no ZeRO partition
    moments = 8 if weight_bytes == 4 and stage == 0 else 12
    # what is split is split over all ranks: experts over the ranks of a group, and over the replicas of their weights
    optimizer = moments * (here if split[0] == 1 else counts.stored // split[0])
    offloaded = optimizer if layout.offload_optimizer else 0
    return Memory(
        weights=weight_bytes * (here if split[2] == 1 else counts.stored // split[2]),
        gradients=grad_bytes * (here if split[1] == 1 else counts.stored // split[1]),
        optimizer=optimizer - offloaded,
        activations=activation_bytes(model, layout.batch_size, layout.seq_length, value_bytes),
        logits=loss_bytes(model, layout.batch_size * layout.seq_length, value_bytes),
        experts=counts.experts * weight_bytes // max(split[2], model.expert_parallel_size),
        buckets=_bucket_bytes(layout, stage, here, grad_bytes) + _exchange_bytes(model, layout, value_bytes),
        host=offloaded,
    )


def _bucket_bytes(layout: Layout, stage: int, parameters: int, grad_bytes: int) -> int:
    """Buffers for reducing gradients. On CPU pages that are never touched cost nothing, so a small model pays its own size."""
    if not layout.use_deepspeed:
        return parameters * 4 if layout.world > 1 else 0
    if stage == 0:
        return min(parameters, 500_000_000) * grad_bytes if layout.world > 1 else 0
    size = min(parameters, layout.reduce_bucket_size) if layout.on_cpu else layout.reduce_bucket_size
    return size * grad_bytes * (2 if layout.overlap_comm else 1)


def _exchange_bytes(model: DeepSeekConfig, layout: Layout, value_bytes: int) -> int:
    """Rows that one block has under way between ranks, sent and received."""
    if model.expert_parallel_size == 1:
        return 0
    return 2 * layout.batch_size * layout.seq_length * model.moe_top_k * model.hidden_size * value_bytes


def block_activation_bytes(model: DeepSeekConfig, tokens: int, value_bytes: int) -> int:
    """Bytes that one block keeps for its backward pass, averaged over blocks with and without experts."""
    hidden = model.hidden_size
    attention = (
        _latent_bytes(model, tokens, value_bytes) if model.attention == "mla" else _grouped_bytes(model, tokens, value_bytes)
    )
    before = tokens * (value_bytes * hidden + 4)  # input of the second half and the statistic of its norm
    with_experts = model.expert_layers
    without = model.num_layers - with_experts
    width = model.dense_width if model.use_moe else model.expert_width
    dense = tokens * value_bytes * (hidden + 3 * width)
    experts = expert_activation_bytes(model, tokens, value_bytes) if with_experts else 0
    return attention + before + (with_experts * experts + without * dense) // model.num_layers


def _grouped_bytes(model: DeepSeekConfig, tokens: int, value_bytes: int) -> int:
    """Bytes that grouped-query attention of one block keeps, with its norm."""
    heads, kv = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    # input and normed input, fused q k v, rotated q and k, output of attention
    values = 2 * model.hidden_size + heads + 2 * kv + heads + kv + heads
    statistics = 1 + model.num_heads  # of the norm, logsumexp of the scores
    if model.qk_norm:
        statistics += model.num_heads + model.num_kv_heads
    return tokens * (value_bytes * values + 4 * statistics)


def _latent_bytes(model: DeepSeekConfig, tokens: int, value_bytes: int) -> int:
    """Bytes that latent attention of one block keeps, with its norm."""
    heads, key, value = model.num_heads, model.head_size, model.v_head_dim
    queries, latent = model.q_lora_rank or 0, model.kv_lora_rank
    # input and normed input, compressed, normed latents
    values = 2 * model.hidden_size + (queries or heads * key) + latent + model.qk_rope_head_dim + queries + latent
    statistics = 2 + (1 if queries else 0)  # of the norms
    expanded = heads * (model.qk_nope_head_dim + value)
    if key != value and value_bytes < 4:  # blocks of queries: queries, keys, values within the expanded, output
        values += 2 * heads * key + expanded + heads * value
    else:  # SDPA on one width: queries, keys, values, output; what is widened is a copy of its own
        wide = heads * max(key, value)
        values += 2 * wide + (wide if value < key else expanded) + wide + (heads * value if value != key else 0)
        statistics += heads  # logsumexp of the scores
    return tokens * (value_bytes * values + 4 * statistics)


def expert_activation_bytes(model: DeepSeekConfig, tokens: int, value_bytes: int) -> int:
    """Bytes that the experts and the router of one block keep for the backward pass."""
    chosen = tokens * model.moe_top_k
    routed = chosen * value_bytes * (2 * model.hidden_size + 2 * model.expert_width)
    if model.expert_parallel_size > 1:  # results as they came back, and the places of both sides
        routed += chosen * (value_bytes * model.hidden_size + 36)
    shared = tokens * value_bytes * model.num_shared_experts * 3 * model.expert_width
    shared += tokens * value_bytes * model.hidden_size if model.num_shared_experts and value_bytes < 4 else 0
    # the router works on the normed input in float32, and keeps scores and their logsumexp, choices and gates
    router = tokens * 4 * (model.hidden_size + 2 * model.num_experts) + chosen * 36
    return routed + shared + router


def selective_activation_bytes(model: DeepSeekConfig, tokens: int, value_bytes: int) -> int:
    """Bytes that one block keeps with selective checkpointing: its inputs and the results of matrix products, on average."""
    hidden, heads, value = model.hidden_size, model.num_heads, model.v_head_dim
    if model.attention == "mla":
        queries = heads * model.head_size
        projected = (model.q_lora_rank or queries) + model.kv_lora_rank + model.qk_rope_head_dim
        projected += (queries if model.q_lora_rank else 0) + heads * (model.qk_nope_head_dim + value)
    else:
        projected = (heads + 2 * model.num_kv_heads) * model.head_size
    with_experts = model.expert_layers
    width = model.dense_width if model.use_moe else model.expert_width
    # experts: normed input and its statistic; gate-up of routed and shared; logits, scores, choices and gates of the router
    scores = 4 if model.router_score == "softmax" else 8
    chosen = tokens * model.moe_top_k
    experts = tokens * (value_bytes * hidden + 4) + chosen * value_bytes * 2 * model.expert_width
    experts += (
        tokens * (value_bytes * model.num_shared_experts * 2 * model.expert_width + scores * model.num_experts) + chosen * 36
    )
    feed_forward = with_experts * experts + (model.num_layers - with_experts) * tokens * value_bytes * 2 * width
    return tokens * value_bytes * (2 * hidden + projected) + feed_forward // model.num_layers


def activation_bytes(model: DeepSeekConfig, batch_size: int, seq_length: int, value_bytes: int) -> int:
    """Bytes kept for the backward pass of one micro batch. Attention keeps no scores and no mask."""
    tokens = batch_size * seq_length
    block = block_activation_bytes(model, tokens, value_bytes)
    ends = tokens * value_bytes * 2 * model.hidden_size
    if model.gradient_checkpointing == "selective":  # and what one block computes again
        kept = selective_activation_bytes(model, tokens, value_bytes)
        return (model.num_layers - 1) * kept + max(kept, block) + ends
    if model.gradient_checkpointing:
        return model.num_layers * tokens * value_bytes * model.hidden_size + block + ends
    return model.num_layers * block + ends


def loss_bytes(model: DeepSeekConfig, tokens: int, value_bytes: int) -> int:
    """Bytes of the loss at its peak: logits of one chunk, their log-probabilities, and the head's gradient in float32."""
    rows = min(tokens, model.loss_chunk_size) if model.loss_chunk_size else tokens
    logits = rows * model.vocab_rows * (value_bytes + 4)
    head = model.vocab_rows * model.hidden_size * (4 if value_bytes == 4 else 4 + value_bytes)
    return logits + head + tokens * model.hidden_size * value_bytes
