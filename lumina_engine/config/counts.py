"""Parameters and floating point operations of a model, from its shape alone.

One counting function serves the command line, the editor, reports and the model itself; tests hold it equal to the module.
Letters: h hidden size, H and K query and key/value heads, d head size, I expert width, E experts, k experts per token,
L blocks, S sequence length, V embedding rows. One multiply-add is two operations.
"""

from __future__ import annotations

from dataclasses import dataclass

from lumina_engine.config.finding import ConfigError, Finding
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
    """Parameters of a model. Raises `ConfigError` while `vocab_size` is auto, or for an attention that does not exist yet."""
    if model.attention != "gqa":
        message = f"attention = {model.attention}: not available yet"
        raise ConfigError([Finding("not_yet", "error", ("attention",), message, "set gqa")])
    hidden, d = model.hidden_size, model.head_size
    attention = 2 * hidden * model.num_heads * d + 2 * hidden * model.num_kv_heads * d
    norms = 2 * hidden + (2 * d if model.qk_norm else 0)
    expert = 3 * hidden * model.expert_width
    with_experts = model.expert_layers
    without = model.num_layers - with_experts
    dense = 3 * hidden * (model.dense_width if model.use_moe else model.expert_width)
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


def kv_cache_bytes_per_token(model: DeepSeekConfig, bytes_per_value: int) -> int:
    """Bytes that the chat cache keeps for one token: keys and values of the key/value heads only."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_size * bytes_per_value


def forward_flops(model: DeepSeekConfig, seq_length: int, batch_size: int = 1) -> dict[str, int]:
    """Operations of one forward pass over `batch_size` rows, by part. Attention is causal: half of S x S."""
    tokens = seq_length * batch_size
    hidden, d = model.hidden_size, model.head_size
    counts = parameter_counts(model)
    used = counts.active - counts.attention - counts.router - counts.norms
    parts = {
        "projections": 2 * tokens * counts.attention,
        "attention": 2 * model.num_layers * model.num_heads * d * seq_length * tokens,
        "experts": 2 * tokens * used,
        "router": 2 * tokens * counts.router,
        "head": 2 * tokens * model.vocab_rows * hidden,
    }
    total = sum(parts.values())
    return parts | {"total": total, "per_token": total // tokens}


def training_flops_per_token(model: DeepSeekConfig, seq_length: int | None = None) -> float:
    """Operations of forward and backward for one token of a row of `seq_length` (default: the longest).

    6 x (active + V h) + 6 L H d S; a third more with full gradient checkpointing.
    """
    length = seq_length or model.seq_length
    counts = parameter_counts(model)
    flops = 6.0 * (counts.active + model.vocab_rows * model.hidden_size)
    flops += 6.0 * model.num_layers * model.num_heads * model.head_size * length
    return flops * 4 / 3 if model.gradient_checkpointing is True else flops
