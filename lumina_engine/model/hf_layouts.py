"""Which Hugging Face layout computes the same function as a configuration, and its `config.json` both ways (rule R18).

| ours | theirs |
|---|---|
| dense, grouped-query attention | Llama |
| softmax scores, gates divided by their sum | Mixtral |
| softmax scores, raw gates (Mixtral would divide a top-1 gate to 1), or dense first layers | Qwen2-MoE |
| sigmoid scores, with bias, shared experts, dense first layers, QK-norm | GLM-4-MoE |
| latent attention, dense or with sigmoid scores | DeepSeek-V3 |

Anything else is refused by the key's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lumina_engine.config.schema import DeepSeekConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
# Values that a layout can hold of keys that change the function, where it cannot hold all.
_PLAIN: dict[str, Any] = {"sliding_window": None, "qk_norm": False}
_SOFTMAX = {"qk_norm": False, "num_shared_experts": 0, "router_scale": 1.0}
_REQUIRED: dict[str, dict[str, Any]] = {
    "llama": _PLAIN,
    "mixtral": _SOFTMAX,
    "qwen2_moe": _SOFTMAX | _PLAIN,
    "glm4_moe": {"sliding_window": None},
    "deepseek_v3": _PLAIN,
}
# Entries of a foreign config.json that change the function, with the values that this model computes; a missing entry is None.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "use_sliding_window": (None, False),
    "shared_expert_intermediate_size": (None, 0),
    "hidden_act": (None, "silu"),
    "scoring_func": (None, "sigmoid"),
    "topk_method": (None, "noaux_tc"),
    "moe_layer_freq": (None, 1),
    "decoder_sparse_step": (None, 1),
}
_ROPE_DEFAULTS = {
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
    "partial_rotary_factor": 1.0,
    "mscale": 0,
    "mscale_all_dim": 0,
}


class LayoutError(ValueError):
    """No Hugging Face layout computes the same function; the message names the key and its value."""


def layout_of(config: DeepSeekConfig) -> str:
    """The `model_type` that computes the same function. Raises LayoutError naming the key that no layout can hold."""
    layout = _nearest(config)
    for key, required in _REQUIRED[layout].items():
        value = getattr(config, key)
        if value != required:
            raise LayoutError(f"{key}={value!r} has no Hugging Face layout here; {layout} can only hold {key}={required!r}")
    if layout == "qwen2_moe" and config.head_size * config.num_heads != config.hidden_size:
        raise LayoutError(f"head_dim={config.head_size}: Qwen2-MoE fixes it to hidden_size / num_heads")
    if layout in ("glm4_moe", "deepseek_v3") and config.use_moe and config.num_experts < 2:
        raise LayoutError(f"num_experts={config.num_experts}: {layout} compares at least two experts")
    return layout


def _nearest(config: DeepSeekConfig) -> str:
    if config.attention == "mla":
        if config.use_moe and config.router_score != "sigmoid":
            raise LayoutError(f"router_score={config.router_score!r} has no Hugging Face layout here with attention='mla'")
        return "deepseek_v3"
    if not config.use_moe:
        return "llama"
    if config.router_score == "sigmoid":
        return "glm4_moe"
    return "mixtral" if config.normalizes_gates and not config.num_dense_layers else "qwen2_moe"


def hf_config(config: DeepSeekConfig) -> dict[str, Any]:
    """The `config.json` of a model. Raises LayoutError as `layout_of`."""
    layout = layout_of(config)
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[layout]],
        "model_type": layout,
        "vocab_size": config.vocab_rows,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.expert_width if layout == "mixtral" else config.dense_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads if layout == "deepseek_v3" else config.num_kv_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": config.seq_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if layout != "deepseek_v3":
        values["head_dim"] = config.head_size
    if config.rope_scaling != "none":
        values["rope_scaling"] = _rope_to_hf(config)
    return values | _OWN_ENTRIES[layout](config)


def _rope_to_hf(config: DeepSeekConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": config.rope_scaling, "factor": config.rope_scaling_factor}
    if config.rope_scaling == "yarn":
        original = config.rope_original_length or round(config.seq_length / config.rope_scaling_factor)
        rope["original_max_position_embeddings"] = original
        if config.attention == "mla":  # the factor is on the scores, none is left for cosines and sines
            rope |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    return rope


def _llama(config: DeepSeekConfig) -> dict[str, Any]:
    return {"mlp_bias": False}


def _mixtral(config: DeepSeekConfig) -> dict[str, Any]:
    return {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.moe_top_k,
        "sliding_window": config.sliding_window,
    }


def _qwen2_moe(config: DeepSeekConfig) -> dict[str, Any]:
    return {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.moe_top_k,
        "moe_intermediate_size": config.expert_width,
        "shared_expert_intermediate_size": 0,
        "norm_topk_prob": config.normalizes_gates,
        "mlp_only_layers": list(range(config.num_dense_layers)),
        "decoder_sparse_step": 1,
        "qkv_bias": False,
        "use_sliding_window": False,
    }


def _sigmoid_router(config: DeepSeekConfig) -> dict[str, Any]:
    return {
        "n_routed_experts": config.num_experts,
        "n_shared_experts": config.num_shared_experts,
        "num_experts_per_tok": config.moe_top_k,
        "moe_intermediate_size": config.expert_width,
        "routed_scaling_factor": config.router_scale,
        "norm_topk_prob": config.normalizes_gates,
        "first_k_dense_replace": config.num_dense_layers if config.use_moe else config.num_layers,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
    }


def _glm4_moe(config: DeepSeekConfig) -> dict[str, Any]:
    return _sigmoid_router(config) | {"use_qk_norm": config.qk_norm, "partial_rotary_factor": 1.0}


def _deepseek_v3(config: DeepSeekConfig) -> dict[str, Any]:
    sizes = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return _sigmoid_router(config) | {key: getattr(config, key) for key in sizes} | {"rope_interleave": True}


_OWN_ENTRIES = {
    "llama": _llama,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "glm4_moe": _glm4_moe,
    "deepseek_v3": _deepseek_v3,
}


def config_from_hf(values: Mapping[str, Any]) -> DeepSeekConfig:
    """Our configuration for a `config.json`.

    Raises:
        LayoutError: naming the entry that is missing, or that this model cannot compute.
        ConfigError: a size is out of bounds.
    """
    layout = values.get("model_type")
    if layout not in ARCHITECTURES:
        raise LayoutError(f"model_type={layout!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    for key, known in _KNOWN.items():
        if values.get(key) not in known:
            raise LayoutError(f"{key}={values[key]!r} is not supported; only {key}={known[-1]!r} is")
    try:
        return DeepSeekConfig(**_shape_from_hf(values, layout), **_rope_from_hf(values, layout), **_FROM_HF[layout](values))
    except KeyError as missing:
        raise LayoutError(f"config.json has no entry {missing.args[0]}") from None


def _shape_from_hf(values: Mapping[str, Any], layout: str) -> dict[str, Any]:
    heads = values["num_attention_heads"]
    ours = {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads") or heads,
        "seq_length": values["max_position_embeddings"],
        "norm_eps": values["rms_norm_eps"],
        "tie_word_embeddings": bool(values.get("tie_word_embeddings")),
    }
    if layout != "deepseek_v3":
        ours["head_dim"] = values.get("head_dim") or values["hidden_size"] // heads
    return ours


def _from_llama(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_moe": False, "intermediate_size": values["intermediate_size"]}


def _from_mixtral(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "intermediate_size": values["intermediate_size"],
        "num_experts": values["num_local_experts"],
        "moe_top_k": values["num_experts_per_tok"],
        "router_normalize": True,
        "sliding_window": values.get("sliding_window"),
    }


def _from_qwen2_moe(values: Mapping[str, Any]) -> dict[str, Any]:
    if values.get("qkv_bias", True):
        raise LayoutError("qkv_bias=True is not supported")
    dense = sorted(values.get("mlp_only_layers") or [])
    if dense != list(range(len(dense))):
        raise LayoutError(f"mlp_only_layers={dense}: only the first layers may be dense")
    return {
        "intermediate_size": values["moe_intermediate_size"],
        "num_experts": values["num_experts"],
        "moe_top_k": values["num_experts_per_tok"],
        "router_normalize": bool(values["norm_topk_prob"]),
        "num_dense_layers": len(dense),
        "dense_intermediate_size": values["intermediate_size"],
    }


def _from_sigmoid_router(values: Mapping[str, Any]) -> dict[str, Any]:
    if values.get("n_group", 1) != values.get("topk_group", 1):
        raise LayoutError(f"n_group={values.get('n_group')}: choosing among groups of experts is not supported")
    if values["first_k_dense_replace"] >= values["num_hidden_layers"]:
        return {"use_moe": False, "intermediate_size": values["intermediate_size"]}
    return {
        "intermediate_size": values["moe_intermediate_size"],
        "num_experts": values["n_routed_experts"],
        "num_shared_experts": values["n_shared_experts"] or 0,
        "moe_top_k": values["num_experts_per_tok"],
        "router_score": "sigmoid",
        "router_normalize": bool(values["norm_topk_prob"]),
        "router_scale": float(values["routed_scaling_factor"]),
        "num_dense_layers": values["first_k_dense_replace"],
        "dense_intermediate_size": values["intermediate_size"],
    }


def _from_glm4_moe(values: Mapping[str, Any]) -> dict[str, Any]:
    rope = values.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 0.5))
    if share != 1:
        raise LayoutError(f"partial_rotary_factor={share!r} is not supported; only 1.0 is")
    return _from_sigmoid_router(values) | {"qk_norm": bool(values.get("use_qk_norm"))}


def _from_deepseek_v3(values: Mapping[str, Any]) -> dict[str, Any]:
    sizes = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return _from_sigmoid_router(values) | {"attention": "mla"} | {key: values[key] for key in sizes}


_FROM_HF = {
    "llama": _from_llama,
    "mixtral": _from_mixtral,
    "qwen2_moe": _from_qwen2_moe,
    "glm4_moe": _from_glm4_moe,
    "deepseek_v3": _from_deepseek_v3,
}


def _rope_from_hf(values: Mapping[str, Any], layout: str) -> dict[str, Any]:
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    ours: dict[str, Any] = {"rope_theta": float(rope.get("rope_theta", values.get("rope_theta", 10_000.0)))}
    if kind == "default":
        return ours
    if kind not in ("linear", "yarn"):
        raise LayoutError(f"rope_type={kind!r} is not supported; supported are default, linear and yarn")
    scales = {"mscale": 1, "mscale_all_dim": 1} if layout == "deepseek_v3" and kind == "yarn" else {}
    defaults = _ROPE_DEFAULTS | scales
    for key in sorted(
        (rope.keys() | scales.keys()) - {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    ):
        if rope.get(key) != defaults.get(key) and (rope.get(key) is not None or key in scales):
            raise LayoutError(f"rope_scaling {key}={rope.get(key)!r} is not supported")
    ours |= {"rope_scaling": kind, "rope_scaling_factor": float(rope["factor"])}
    if kind == "yarn":
        ours["rope_original_length"] = rope.get("original_max_position_embeddings") or values["max_position_embeddings"]
    return ours
