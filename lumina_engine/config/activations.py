"""What a micro batch adds to memory: tensors kept for the backward pass, temporaries of that pass, the loss at its peak.

Counted tensor by tensor as `lumina_engine.model` makes them; tests compare with the tensors that autograd keeps and with the
resident memory of real steps. Bytes throughout. `value_bytes` is the size of a value in the arithmetic (2 under autocast).

`places` are those that attention lays the tokens into where rows hold several documents (model/segments.py), filler included;
None where each row is one document.
"""

from __future__ import annotations

from lumina_engine.config.counts import parameter_counts
from lumina_engine.config.schema import DeepSeekConfig

# Rectangles of attention are this wide, or a power of two above it; documents just longer leave the most filler in them.
NARROWEST = 16
WORST_DOCUMENT = NARROWEST + 1


def worst_places(model: DeepSeekConfig, batch_size: int, seq_length: int) -> int | None:
    """Places for full rows of the worst documents, which is the batch that a dry run takes."""
    if not model.use_flash_attention or seq_length <= WORST_DOCUMENT:
        return None
    documents, rest = divmod(seq_length, WORST_DOCUMENT)
    return batch_size * (documents * 2 * NARROWEST + (NARROWEST if rest else 0))


def block_activation_bytes(
    model: DeepSeekConfig,
    tokens: int,
    value_bytes: int,
    on_cpu: bool = True,
    length: int | None = None,
    places: int | None = None,
) -> int:
    """Bytes that one block keeps for its backward pass, averaged over blocks with and without experts.

    `length` is that of the rows (default: the longest); it matters where attention is written out.
    """
    attention = attention_activation_bytes(model, tokens, value_bytes, on_cpu, length, places)
    before = tokens * (value_bytes * model.hidden_size + 4)  # input of the second half and the statistic of its norm
    with_experts = model.expert_layers
    without = model.num_layers - with_experts
    dense = tokens * value_bytes * (model.hidden_size + 3 * model.dense_width)
    experts = expert_activation_bytes(model, tokens, value_bytes, on_cpu) if with_experts else 0
    dropped = dropout_bytes(model, tokens, value_bytes, on_cpu)
    return attention + before + dropped + (with_experts * experts + without * dense) // model.num_layers


def dropout_bytes(model: DeepSeekConfig, tokens: int, value_bytes: int, on_cpu: bool = True) -> int:
    """Bytes of what dropout keeps of both branches of one block: factors on a CPU, flags elsewhere."""
    return 2 * tokens * model.hidden_size * (value_bytes if on_cpu else 1) if model.dropout else 0


def attention_activation_bytes(
    model: DeepSeekConfig,
    tokens: int,
    value_bytes: int,
    on_cpu: bool = True,
    length: int | None = None,
    places: int | None = None,
) -> int:
    """Bytes that the attention half of one block keeps, with the input of the block; rows have `length` tokens."""
    if model.attention == "mla":
        projected = _latent_bytes(model, tokens, value_bytes)
        fused = _fused_latent_bytes
    else:  # input and normed input, statistic of the norm
        projected, fused = tokens * (value_bytes * 2 * model.hidden_size + 4), _fused_grouped_bytes
    if model.qk_norm:
        projected += (places or tokens) * 4 * (model.num_heads + model.num_kv_heads)
    if model.use_flash_attention:
        if places is None:
            return projected + fused(model, tokens, value_bytes)
        return projected + fused(model, places, value_bytes) + _moved_back_bytes(model, tokens, places, value_bytes, on_cpu)
    return projected + score_bytes(model, tokens, length) + _written_out_bytes(model, tokens, value_bytes)


def score_bytes(model: DeepSeekConfig, tokens: int, length: int | None = None) -> int:
    """Bytes of the scores of one block where attention is written out (`use_flash_attention: false`), in float32."""
    return tokens * (length or model.seq_length) * model.num_heads * 4


def _written_out_bytes(model: DeepSeekConfig, tokens: int, value_bytes: int) -> int:
    """Bytes that attention written out keeps beside scores: queries, and keys and values of every query head, all in float32,
    and its output."""
    value = model.v_head_dim if model.attention == "mla" else model.head_size
    return tokens * model.num_heads * (4 * (2 * model.head_size + value) + value_bytes * value)


def _moved_back_bytes(model: DeepSeekConfig, tokens: int, places: int, value_bytes: int, on_cpu: bool) -> int:
    """Bytes of the output of attention that is moved from places to tokens, without that in the places where nothing keeps it:
    blocks of queries do not, which is how short rectangles are attended to on a CPU in less than float32, or by a window."""
    value = model.v_head_dim if model.attention == "mla" else model.head_size
    in_blocks = (value_bytes < 4 and on_cpu) or (model.sliding_window or places) < 2 * NARROWEST
    apart = value != model.head_size  # what is cut out of a wider output is counted by itself already
    return (tokens - (places if in_blocks or apart else 0)) * model.num_heads * value * value_bytes


def _fused_grouped_bytes(model: DeepSeekConfig, tokens: int, value_bytes: int) -> int:
    """Bytes that grouped-query attention keeps behind its norm."""
    heads, kv = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    # fused q k v, rotated q and k, output of attention; logsumexp of the scores
    return tokens * (value_bytes * (heads + 2 * kv + heads + kv + heads) + 4 * model.num_heads)


def _latent_bytes(model: DeepSeekConfig, tokens: int, value_bytes: int) -> int:
    """Bytes that latent attention of one block keeps before scores, with its norm."""
    heads, queries, latent = model.num_heads, model.q_lora_rank or 0, model.kv_lora_rank
    # input and normed input, compressed, normed latents
    values = 2 * model.hidden_size + (queries or heads * model.head_size) + latent + model.qk_rope_head_dim + queries + latent
    return tokens * (value_bytes * values + 4 * (2 + (1 if queries else 0)))  # statistics of the norms


def _fused_latent_bytes(model: DeepSeekConfig, tokens: int, value_bytes: int) -> int:
    """Bytes that latent attention keeps behind its projections."""
    heads, key, value = model.num_heads, model.head_size, model.v_head_dim
    expanded = heads * (model.qk_nope_head_dim + value)
    if key != value and value_bytes < 4:  # blocks of queries: queries, keys, values within the expanded, output
        return tokens * value_bytes * (2 * heads * key + expanded + heads * value)
    # SDPA on one width: queries, keys, values, output; what is widened is a copy of its own; logsumexp of the scores
    wide = heads * max(key, value)
    values = 2 * wide + (wide if value < key else expanded) + wide + (heads * value if value != key else 0)
    return tokens * (value_bytes * values + 4 * heads)


def expert_activation_bytes(model: DeepSeekConfig, tokens: int, value_bytes: int, on_cpu: bool = True) -> int:
    """Bytes that the experts and the router of one block keep for the backward pass.

    The grouped kernels of a GPU keep the activation before the down projection and the gathered tokens too; the loop of the CPU
    makes them again.
    """
    chosen = tokens * model.moe_top_k
    if on_cpu and model.expert_parallel_size == 1:  # the tokens are the router's input, unless that is a copy in float32
        routed = chosen * value_bytes * (model.hidden_size + 2 * model.expert_width)
        routed += tokens * value_bytes * model.hidden_size if value_bytes < 4 else 0
    else:
        routed = chosen * value_bytes * (2 * model.hidden_size + (2 if on_cpu else 3) * model.expert_width)
    if model.expert_parallel_size > 1:  # where rows lie on either side, and gates of one
        routed += chosen * 20
    shared = tokens * value_bytes * model.num_shared_experts * 3 * model.expert_width
    if model.num_shared_experts and value_bytes < 4 and not (on_cpu and model.expert_parallel_size == 1):
        shared += tokens * value_bytes * model.hidden_size
    # the router works on the normed input in float32, and keeps scores and their logsumexp, choices and gates
    router = tokens * 4 * (model.hidden_size + 2 * model.num_experts) + chosen * 36
    if model.router_jitter_noise:  # the noise; where experts keep the input too, what it makes of it is a tensor of its own
        kept = value_bytes == 4 and (model.num_shared_experts > 0 or (on_cpu and model.expert_parallel_size == 1))
        router += tokens * 4 * model.hidden_size * (2 if kept else 1)
    return routed + shared + router


def selective_activation_bytes(model: DeepSeekConfig, tokens: int, value_bytes: int, on_cpu: bool = True) -> int:
    """Bytes that one block keeps with selective checkpointing: its inputs and the results of matrix products, on average."""
    hidden, heads, value = model.hidden_size, model.num_heads, model.v_head_dim
    if model.attention == "mla":
        queries = heads * model.head_size
        projected = (model.q_lora_rank or queries) + model.kv_lora_rank + model.qk_rope_head_dim
        projected += (queries if model.q_lora_rank else 0) + heads * (model.qk_nope_head_dim + value)
    else:
        projected = (heads + 2 * model.num_kv_heads) * model.head_size
    with_experts = model.expert_layers
    width = model.dense_width
    # experts: normed input and its statistic; gate-up of routed and shared; logits, scores, choices and gates of the router
    # with jitter the router is not run again, and keeps what it does without checkpointing, the noise and its product
    jitter = model.router_jitter_noise > 0
    scores = 4 if model.router_score == "softmax" and not jitter else 8
    chosen = tokens * model.moe_top_k
    experts = tokens * (value_bytes * hidden + 4) + chosen * value_bytes * 2 * model.expert_width
    experts += (
        tokens * (value_bytes * model.num_shared_experts * 2 * model.expert_width + scores * model.num_experts) + chosen * 36
    )
    experts += tokens * 8 * hidden if jitter else 0
    if model.expert_parallel_size > 1:  # rows as they came in, and results as they came back
        experts += chosen * (value_bytes * 2 * hidden + 20)
    feed_forward = with_experts * experts + (model.num_layers - with_experts) * tokens * value_bytes * 2 * width
    inputs = tokens * value_bytes * (2 * hidden + projected) + dropout_bytes(model, tokens, value_bytes, on_cpu)
    return inputs + feed_forward // model.num_layers


def activation_bytes(
    model: DeepSeekConfig,
    batch_size: int,
    seq_length: int,
    value_bytes: int,
    on_cpu: bool = True,
    places: int | None = None,
) -> int:
    """Bytes kept for the backward pass of one micro batch. Only attention written out keeps scores and a mask."""
    tokens = batch_size * seq_length
    block = block_activation_bytes(model, tokens, value_bytes, on_cpu, seq_length, places)
    ends = tokens * value_bytes * 2 * model.hidden_size
    if not model.use_flash_attention:  # the mask of documents, one for all blocks
        ends += tokens * seq_length * value_bytes
    if model.gradient_checkpointing == "selective":  # and what one block computes again
        kept = selective_activation_bytes(model, tokens, value_bytes, on_cpu)
        return (model.num_layers - 1) * kept + max(kept, block) + ends
    if model.gradient_checkpointing:
        return model.num_layers * tokens * value_bytes * model.hidden_size + block + ends
    return model.num_layers * block + ends


def cast_bytes(model: DeepSeekConfig, value_bytes: int) -> int:
    """Bytes of the copies of weights that autocast makes for products; checkpointed blocks make theirs again, one at a time."""
    counts = parameter_counts(model)
    experts = counts.experts // model.expert_parallel_size
    products = counts.attention + experts + counts.shared + counts.dense
    cached = counts.attention + counts.shared + counts.dense  # autocast keeps those of linear layers to the end of the forward
    if model.gradient_checkpointing is True:
        return value_bytes * (cached + experts // max(1, model.expert_layers))
    return value_bytes * products


def working_bytes(model: DeepSeekConfig, tokens: int, value_bytes: int, on_cpu: bool = True, length: int | None = None) -> int:
    """Bytes of temporaries while the backward pass is in the widest part of a block; its weight gradients are not in it."""
    hidden = model.hidden_size
    passing = 2 * tokens * value_bytes * hidden  # gradients of the residual stream and of the branch
    widths = []
    if model.expert_layers:
        width = model.expert_width
        # gathered gradient; silu, its product, gradients of both and of the fused pair; gradient of the gathered input
        rows = max(6 * width + hidden, 5 * width + 2 * hidden) * model.moe_top_k
        # the loop of the CPU holds those of one expert, and the gradient of all tokens
        widths.append((rows // model.num_experts + hidden if on_cpu else rows) * value_bytes)
    if model.expert_layers < model.num_layers:
        widths.append((5 * model.dense_width + hidden) * value_bytes)
    if model.attention == "mla":
        both = model.num_heads * (2 * model.head_size + model.v_head_dim)
    else:
        both = (model.num_heads + 2 * model.num_kv_heads) * model.head_size
    # gradients of q, k, v with those of the rotation in float32; the norm works in float32 too. Where they have filler, what
    # the other half of the block kept is gone by then, and makes up for it.
    widths.append(both * (2 * value_bytes + 4))
    if not model.use_flash_attention:  # gradients of the probabilities and of the scores
        widths.append(2 * score_bytes(model, 1, length))
    widths.append(hidden * (12 if value_bytes == 4 else 20))
    return passing + tokens * max(widths)


def loss_bytes(
    model: DeepSeekConfig, tokens: int, value_bytes: int, weight_bytes: int | None = None, on_cpu: bool = True
) -> int:
    """Bytes of the loss at its peak: logits of one chunk and the head's gradient, summed over several chunks in float32.

    `weight_bytes` above `value_bytes` (autocast) means a copy of the head in the smaller type.
    """
    rows = min(tokens, model.loss_chunk_size) if model.loss_chunk_size else tokens
    logits = rows * model.vocab_rows * (value_bytes if on_cpu else value_bytes + 4)
    if on_cpu and value_bytes < 4:  # oneDNN packs the transposed gradient of the logits for its product with the hidden states
        logits += rows * model.vocab_rows * value_bytes
    head = model.vocab_rows * model.hidden_size * (value_bytes if rows == tokens or value_bytes == 4 else 4 + value_bytes)
    if (weight_bytes or value_bytes) > value_bytes:
        head += model.vocab_rows * model.hidden_size * value_bytes
    return logits + head + tokens * model.hidden_size * value_bytes
