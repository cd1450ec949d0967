"""Rules between the keys of the model and its experts."""

from __future__ import annotations

from collections.abc import Iterator

from lumina_engine.config.declare import show
from lumina_engine.config.finding import Finding, error, finding
from lumina_engine.config.schema import Config, infos_of

_LATENT_KEYS = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def attention(config: Config) -> Iterator[Finding]:
    """Heads, latents and the window."""
    yield from _latent(config) if config.attention == "mla" else _grouped(config)
    window = config.sliding_window
    if window is not None and window >= config.seq_length:
        message = f"sliding_window = {window:,} hides nothing in rows of seq_length = {config.seq_length:,}"
        yield finding("info", "window", "sliding_window seq_length", message, "set sliding_window=null, or a smaller one")


def _grouped(config: Config) -> Iterator[Finding]:
    hidden, heads, kv = config.hidden_size, config.num_heads, config.num_kv_heads
    if config.head_dim == "auto":
        if hidden % heads:
            near = max(64, round(hidden / heads) * heads)
            message = f"hidden_size = {hidden:,}: not a multiple of num_heads = {heads}"
            yield error("heads", "hidden_size num_heads", message, f"set hidden_size={near} or head_dim")
        elif (hidden // heads) % 2 or hidden // heads < 8:
            message = f"num_heads = {heads}: heads of {hidden // heads} values; rotary positions need an even number from 8 on"
            yield error("head_dim", "num_heads hidden_size", message, f"set num_heads={max(1, hidden // 64)}")
    if heads % kv:
        divisor = max(d for d in range(1, min(kv, heads) + 1) if heads % d == 0)
        message = f"num_kv_heads = {kv}: does not divide num_heads = {heads}"
        yield error("kv_heads", "num_kv_heads num_heads", message, f"set num_kv_heads={divisor}")
    for name in _LATENT_KEYS:
        default = infos_of(Config)[name].default
        if getattr(config, name) != default:
            message = f"{name} = {show(getattr(config, name))} has no effect with attention = gqa"
            yield error("latent_keys", f"{name} attention", message, f"set attention=mla, or {name}={show(default)}")


def _latent(config: Config) -> Iterator[Finding]:
    head = config.qk_nope_head_dim + config.qk_rope_head_dim
    if head % 2 or not 8 <= head <= 512:
        message = f"qk_nope_head_dim + qk_rope_head_dim = {head}: a head needs an even number of values from 8 to 512"
        yield error("latent_head", "qk_nope_head_dim qk_rope_head_dim", message, "set qk_nope_head_dim=128 qk_rope_head_dim=64")
    if config.head_dim not in ("auto", head):
        message = f"head_dim = {config.head_dim}: with attention = mla a head has qk_nope_head_dim + qk_rope_head_dim = {head}"
        yield error("latent_head_dim", "head_dim attention", message, "set head_dim=auto")
    if config.qk_norm:
        message = "qk_norm = true with attention = mla: keys are never built for a cached token, so they cannot be normed"
        yield error("latent_qk_norm", "qk_norm attention", message, "set qk_norm=false (the latents have norms of their own)")
    if config.num_kv_heads not in (infos_of(Config)["num_kv_heads"].default, config.num_heads):
        message = f"num_kv_heads = {config.num_kv_heads} has no effect with attention = mla: all heads share one latent"
        yield finding("info", "latent_kv_heads", "num_kv_heads attention", message, f"set num_kv_heads={config.num_heads}")


def shape(config: Config) -> Iterator[Finding]:
    """Experts and blocks that there are."""
    if config.use_moe and config.moe_top_k > config.num_experts:
        message = f"moe_top_k = {config.moe_top_k}: more than num_experts = {config.num_experts}"
        yield error("top_k", "moe_top_k num_experts", message, f"set moe_top_k={config.num_experts}")
    if config.num_dense_layers > config.num_layers:
        message = f"num_dense_layers = {config.num_dense_layers}: more than num_layers = {config.num_layers}"
        yield error("dense_layers", "num_dense_layers num_layers", message, f"set num_dense_layers={config.num_layers}")


def router(config: Config) -> Iterator[Finding]:
    """A router that learns."""
    if config.use_moe and config.router_normalize is True and config.moe_top_k == 1:
        message = "router_normalize = true with moe_top_k = 1: the gate would always be 1 and the router would never learn"
        yield error("normalize_top1", "router_normalize moe_top_k", message, "set router_normalize=auto")
    default = infos_of(Config)["capacity_factor"].default
    if config.moe_dropless and config.capacity_factor != default:
        message = f"capacity_factor = {show(config.capacity_factor)} has no effect with moe_dropless = true"
        fix = f"set capacity_factor={show(default)}, or moe_dropless=false"
        yield finding("info", "dropless", "capacity_factor moe_dropless", message, fix)


def rope(config: Config) -> Iterator[Finding]:
    """Rotary positions that reach as far as the rows."""
    if config.rope_scaling == "none":
        if config.rope_scaling_factor != 1:
            message = f"rope_scaling_factor = {show(config.rope_scaling_factor)} has no effect with rope_scaling = none"
            yield error("rope_factor", "rope_scaling_factor rope_scaling", message, "set rope_scaling=yarn, or the factor to 1")
        if config.rope_original_length is not None:
            message = f"rope_original_length = {config.rope_original_length:,} has no effect with rope_scaling = none"
            yield error("rope_length", "rope_original_length rope_scaling", message, "set rope_original_length=null")
    elif config.rope_scaling_factor == 1:
        message = f"rope_scaling = {config.rope_scaling} with rope_scaling_factor = 1 stretches nothing"
        fix = "set rope_scaling_factor to seq_length / the length the weights were trained at"
        yield finding("warning", "rope_factor", "rope_scaling rope_scaling_factor", message, fix)
    length = config.seq_length / config.rope_scaling_factor
    bound = 0.0424 * length**1.628
    if config.rope_theta < bound:
        message = f"rope_theta = {show(config.rope_theta)}: too low for {length:,.0f} tokens, far positions look alike"
        fix = f"set rope_theta={_round_up(bound)}"
        yield finding("warning", "rope_theta", "rope_theta seq_length", message, fix)


def _round_up(value: float) -> str:
    """The next number with one digit, as a person writes it: 8.75e6 → 9e6."""
    mantissa, _, exponent = f"{value:e}".partition("e")
    digit = int(float(mantissa)) + 1
    return f"{digit}e{int(exponent)}" if digit < 10 else f"1e{int(exponent) + 1}"
