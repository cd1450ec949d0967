"""Parameters and floating point operations of a model, from its shape alone.

One counting function serves the command line, the editor, reports and the model itself; tests hold it equal to the module.
Letters: h hidden size, H and K query and key/value heads, d and e key and value size of a head, I expert width, E experts,
k experts per token, L blocks, S sequence length, V embedding rows. One multiply-add is two operations.
"""

from __future__ import annotations

from dataclasses import dataclass

from lumina_engine.config.schema import DeepSeekConfig


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters. `total` and `active` leave the embeddings out; `embeddings` has the output head too when it is untied.

    The parts are sums over all blocks; `experts` are the routed ones, `shared` those that every token uses, `dense` the
    feed-forward networks of blocks without experts.
    """

    attention: int
    experts: int
    shared: int
    router: int
    dense: int
    norms: int
    embeddings: int
    active: int

    @property
    def total(self) -> int:
        """All parameters but the embeddings."""
        return self.attention + self.experts + self.shared + self.router + self.dense + self.norms

    @property
    def stored(self) -> int:
        """All parameters with the embeddings: the sum of `numel` over the module, tied weights once."""
        return self.total + self.embeddings

    def to_dict(self) -> dict[str, int]:
        """For JSON."""
        return {name: getattr(self, name) for name in (*self.__slots__, "total", "stored")}


def parameter_counts(model: DeepSeekConfig) -> Counts:
    """Parameters of a model. Raises `ConfigError` while `vocab_size` is auto."""
    hidden = model.hidden_size
    attention = sum(rows * columns for rows, columns in attention_matrices(model))
    norms = 2 * hidden + _norms_of_attention(model)
    expert = 3 * hidden * model.expert_width
    with_experts = model.expert_layers
    without = model.num_layers - with_experts
    dense = 3 * hidden * model.dense_width
    experts = with_experts * model.num_experts * expert
    counts = {
        "attention": model.num_layers * attention,
        "experts": experts,
        "shared": with_experts * model.num_shared_experts * expert,
        "router": with_experts * model.num_experts * hidden,
        "dense": without * dense,
        "norms": model.num_layers * norms + hidden,
    }
    idle = with_experts * (model.num_experts - model.moe_top_k) * expert
    rows = model.vocab_rows * hidden
    embeddings = rows if model.tie_word_embeddings else 2 * rows
    return Counts(**counts, embeddings=embeddings, active=sum(counts.values()) - idle)


def attention_matrices(model: DeepSeekConfig) -> list[tuple[int, int]]:
    """(outputs, inputs) of each projection of one block."""
    hidden, heads = model.hidden_size, model.num_heads
    if model.attention == "gqa":
        return [((heads + 2 * model.num_kv_heads) * model.head_size, hidden), (hidden, heads * model.head_size)]
    queries = heads * model.head_size
    compressed = (model.q_lora_rank or queries) + model.kv_lora_rank + model.qk_rope_head_dim
    expand_queries = [(queries, model.q_lora_rank)] if model.q_lora_rank else []
    expand = (heads * (model.qk_nope_head_dim + model.v_head_dim), model.kv_lora_rank)
    return [(compressed, hidden), *expand_queries, expand, (hidden, heads * model.v_head_dim)]


def _norms_of_attention(model: DeepSeekConfig) -> int:
    """Weights of the norms inside attention: of the latents, or of the heads of queries and keys."""
    if model.attention == "mla":
        return model.kv_lora_rank + (model.q_lora_rank or 0)
    return 2 * model.head_size if model.qk_norm else 0


def largest_parameter(model: DeepSeekConfig) -> int:
    """At least as many values as the largest single parameter has."""
    width = max(model.dense_width, model.expert_width * max(1, model.num_shared_experts))
    rows = [model.vocab_rows, 2 * width, model.num_experts * 2 * model.expert_width if model.use_moe else 0]
    return max(max(rows) * model.hidden_size, *(outputs * inputs for outputs, inputs in attention_matrices(model)))


def kv_cache_bytes_per_token(model: DeepSeekConfig, bytes_per_value: int) -> int:
    """Bytes that the chat cache keeps for one token: keys and values of key/value heads, or latent and rotary key."""
    if model.attention == "mla":
        return model.num_layers * (model.kv_lora_rank + model.qk_rope_head_dim) * bytes_per_value
    return 2 * model.num_layers * model.num_kv_heads * model.head_size * bytes_per_value


def attention_pair_flops(model: DeepSeekConfig, seq_length: int) -> int:
    """Operations of scores and weighted sums over one row of S tokens, all blocks; causal, within the window if there is one.

    2 L H (d + e) for each pair of a token and one that it sees, counted as S²/2 pairs, or W·S - W²/2 with a window W.
    """
    value = model.v_head_dim if model.attention == "mla" else model.head_size
    window = min(model.sliding_window or seq_length, seq_length)
    return model.num_layers * model.num_heads * (model.head_size + value) * window * (2 * seq_length - window)


def forward_flops(model: DeepSeekConfig, seq_length: int, batch_size: int = 1) -> dict[str, int]:
    """Operations of one forward pass over `batch_size` rows, by part. Of attention only pairs that see each other."""
    tokens = seq_length * batch_size
    hidden = model.hidden_size
    counts = parameter_counts(model)
    used = counts.active - counts.attention - counts.router - counts.norms
    parts = {
        "projections": 2 * tokens * counts.attention,
        "attention": attention_pair_flops(model, seq_length) * batch_size,
        "experts": 2 * tokens * used,
        "router": 2 * tokens * counts.router,
        "head": 2 * tokens * model.vocab_rows * hidden,
    }
    total = sum(parts.values())
    return parts | {"total": total, "per_token": total // tokens}


def training_flops_per_token(model: DeepSeekConfig, seq_length: int | None = None) -> float:
    """Operations of forward and backward for one token of a row of `seq_length` (default: the longest).

    6 x (active + V h) + 3 L H (d + e) S, with a window W instead of S in it 2 W - W²/S; a third more with full gradient
    checkpointing, of the attention alone with selective.
    """
    length = seq_length or model.seq_length
    counts = parameter_counts(model)
    flops = 6.0 * (counts.active + model.vocab_rows * model.hidden_size)
    repeats = 4.0 if model.gradient_checkpointing == "selective" else 3.0
    flops += repeats * attention_pair_flops(model, length) / length
    return flops * 4 / 3 if model.gradient_checkpointing is True else flops
