"""Weights and configuration to and from Hugging Face layouts that compute the same function, name by name.

Dense models are Llama; experts with softmax scores and gates divided by their sum are Mixtral; experts with raw softmax gates
are Qwen2-MoE (Mixtral would renormalise a top-1 gate to 1 and answer differently, rule R18). Anything else is refused by the
key's name. State dicts are in the layout of the files on disk: one tensor per projection and expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lumina_engine.config.schema import DeepSeekConfig

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}
_MLP = {"llama": "mlp", "mixtral": "block_sparse_moe", "qwen2_moe": "mlp"}
# Names of gate, up and down in one feed-forward network, dense or expert.
_DENSE_PARTS = ("gate_proj", "up_proj", "down_proj")
_PARTS = {"llama": _DENSE_PARTS, "mixtral": ("w1", "w3", "w2"), "qwen2_moe": _DENSE_PARTS}
# Keys whose other values none of the three layouts can hold.
_REQUIRED: dict[str, Any] = {
    "attention": "gqa",
    "sliding_window": None,
    "qk_norm": False,
    "num_shared_experts": 0,
    "router_score": "softmax",
    "router_scale": 1.0,
}
_EXPERT_ONLY = ("num_shared_experts", "router_score", "router_scale")


class LayoutError(ValueError):
    """No Hugging Face layout computes the same function; the message names the key and its value."""


def layout_of(config: DeepSeekConfig) -> str:
    """llama, mixtral or qwen2_moe. Raises LayoutError naming the key that no layout can hold."""
    for key, required in _REQUIRED.items():
        if key in _EXPERT_ONLY and not config.use_moe:
            continue
        value = getattr(config, key)
        if value != required:
            raise LayoutError(f"{key}={value!r} has no Hugging Face layout here; only {key}={required!r} can be exported")
    if not config.use_moe:
        return "llama"
    raw = not config.normalizes_gates
    if (raw or config.num_dense_layers) and config.head_size * config.num_heads != config.hidden_size:
        raise LayoutError(f"head_dim={config.head_size}: Qwen2-MoE fixes it to hidden_size / num_heads")
    return "qwen2_moe" if raw or config.num_dense_layers else "mixtral"


def hf_config(config: DeepSeekConfig) -> dict[str, Any]:
    """The `config.json` of a model. Raises LayoutError as `layout_of`."""
    layout = layout_of(config)
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[layout]],
        "model_type": layout,
        "vocab_size": config.vocab_rows,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.dense_width if layout == "qwen2_moe" else config.expert_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.seq_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if config.rope_scaling != "none":
        original = config.rope_original_length or round(config.seq_length / config.rope_scaling_factor)
        values["rope_scaling"] = {"rope_type": config.rope_scaling, "factor": config.rope_scaling_factor}
        if config.rope_scaling == "yarn":
            values["rope_scaling"]["original_max_position_embeddings"] = original
    if layout == "llama":
        values |= {"attention_bias": False, "mlp_bias": False}
    elif layout == "mixtral":
        values |= {"num_local_experts": config.num_experts, "num_experts_per_tok": config.moe_top_k, "sliding_window": None}
    else:
        values |= {
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
    return values


def config_from_hf(values: Mapping[str, Any]) -> DeepSeekConfig:
    """Our configuration for a `config.json`. Raises LayoutError naming the entry that this model cannot compute."""
    layout = values.get("model_type")
    if layout not in _ARCHITECTURES:
        raise LayoutError(f"model_type={layout!r} is not supported; supported are {', '.join(_ARCHITECTURES)}")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window", "shared_expert_intermediate_size"):
        if values.get(key):
            raise LayoutError(f"{key}={values[key]!r} is not supported")
    if values.get("hidden_act", "silu") != "silu":
        raise LayoutError(f"hidden_act={values['hidden_act']!r} is not supported; only silu is")
    if layout == "mixtral" and values.get("sliding_window") is not None:
        raise LayoutError(f"sliding_window={values['sliding_window']!r} is not supported")
    if layout == "qwen2_moe" and values.get("qkv_bias", True):
        raise LayoutError("qkv_bias=True is not supported")
    heads = values["num_attention_heads"]
    ours: dict[str, Any] = {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads") or heads,
        "head_dim": values.get("head_dim") or values["hidden_size"] // heads,
        "intermediate_size": values["moe_intermediate_size" if layout == "qwen2_moe" else "intermediate_size"],
        "seq_length": values["max_position_embeddings"],
        "norm_eps": values["rms_norm_eps"],
        "tie_word_embeddings": bool(values.get("tie_word_embeddings")),
        "use_moe": layout != "llama",
        **_rope_from_hf(values),
    }
    if layout == "mixtral":
        ours |= {
            "num_experts": values["num_local_experts"],
            "moe_top_k": values["num_experts_per_tok"],
            "router_normalize": True,
        }
    elif layout == "qwen2_moe":
        dense = sorted(values.get("mlp_only_layers") or [])
        if dense != list(range(len(dense))) or values.get("decoder_sparse_step", 1) != 1:
            raise LayoutError(f"mlp_only_layers={dense}: only the first layers may be dense, with decoder_sparse_step=1")
        ours |= {
            "num_experts": values["num_experts"],
            "moe_top_k": values["num_experts_per_tok"],
            "router_normalize": bool(values["norm_topk_prob"]),
            "num_dense_layers": len(dense),
            "dense_intermediate_size": values["intermediate_size"],
        }
    return DeepSeekConfig(**ours)


def _rope_from_hf(values: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    ours: dict[str, Any] = {"rope_theta": float(rope.get("rope_theta", values.get("rope_theta", 10_000.0)))}
    if kind == "default":
        return ours
    if kind not in ("linear", "yarn"):
        raise LayoutError(f"rope_type={kind!r} is not supported; supported are default, linear and yarn")
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    for key in sorted(rope.keys() - known):
        if rope[key] is not None:
            raise LayoutError(f"rope_scaling {key}={rope[key]!r} is not supported")
    ours |= {"rope_scaling": kind, "rope_scaling_factor": float(rope["factor"])}
    if kind == "yarn":
        ours["rope_original_length"] = rope.get("original_max_position_embeddings") or values["max_position_embeddings"]
    return ours


def to_hf(state: Mapping[str, Tensor], config: DeepSeekConfig) -> dict[str, Tensor]:
    """A model's state dict in the Hugging Face layout. Raises LayoutError, also for a router bias that is not zero."""
    layout = layout_of(config)
    out: dict[str, Tensor] = {}
    for theirs, ours in _shared_names(config):
        out[theirs] = state[ours]
    sizes = [heads * config.head_size for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        for name, part in zip("qkv", state[f"{ours}.attention.qkv.weight"].split(sizes), strict=True):
            out[f"{theirs}.self_attn.{name}_proj.weight"] = part
        if config.use_moe and layer >= config.num_dense_layers:
            out |= _experts_to_hf(state, layout, theirs, ours)
        else:
            gate, up = state[f"{ours}.ffn.gate_up.weight"].chunk(2)
            down = state[f"{ours}.ffn.down.weight"]
            out |= {f"{theirs}.mlp.{name}.weight": part for name, part in zip(_DENSE_PARTS, (gate, up, down), strict=True)}
    return {name: tensor.contiguous() for name, tensor in out.items()}


def _experts_to_hf(state: Mapping[str, Tensor], layout: str, theirs: str, ours: str) -> dict[str, Tensor]:
    if bool(state[f"{ours}.ffn.router.bias"].any()):
        raise LayoutError("router_bias_rate: the router has a bias, which this layout cannot hold")
    mlp = f"{theirs}.{_MLP[layout]}"
    router = state[f"{ours}.ffn.router.weight"]
    out = {f"{mlp}.gate.weight": router}
    for expert, (w13, w2) in enumerate(zip(state[f"{ours}.ffn.w13"], state[f"{ours}.ffn.w2"], strict=True)):
        for name, part in zip(_PARTS[layout], (*w13.chunk(2), w2), strict=True):
            out[f"{mlp}.experts.{expert}.{name}.weight"] = part
    if layout == "qwen2_moe":  # its shared expert has width 0, but its tensors must be there
        hidden = router.shape[1]
        shapes = ((0, hidden), (0, hidden), (hidden, 0))
        for name, shape in zip(_PARTS[layout], shapes, strict=True):
            out[f"{mlp}.shared_expert.{name}.weight"] = router.new_zeros(shape)
        out[f"{mlp}.shared_expert_gate.weight"] = router.new_zeros(1, hidden)
    return out


def from_hf(state: Mapping[str, Tensor], config: DeepSeekConfig) -> dict[str, Tensor]:
    """A Hugging Face state dict (names as on disk) in our layout, for `config` from `config_from_hf`.

    Raises LayoutError naming the tensors that are missing or left over.
    """
    layout = layout_of(config)
    left = dict(state)
    try:
        out = _from_hf(left, config, layout)
    except KeyError as missing:
        raise LayoutError(f"the tensor {missing.args[0]} is missing") from None
    ignored = ("rotary_emb.inv_freq", "lm_head.weight") if config.tie_word_embeddings else ("rotary_emb.inv_freq",)
    extra = [name for name in left if not name.endswith(ignored) and ".shared_expert" not in name]
    if extra:
        raise LayoutError(f"{len(extra)} tensors have no place in this model, the first is {extra[0]}")
    return out


def _from_hf(left: dict[str, Tensor], config: DeepSeekConfig, layout: str) -> dict[str, Tensor]:
    out = {ours: left.pop(theirs) for theirs, ours in _shared_names(config)}
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        out[f"{ours}.attention.qkv.weight"] = torch.cat([left.pop(f"{theirs}.self_attn.{name}_proj.weight") for name in "qkv"])
        if config.use_moe and layer >= config.num_dense_layers:
            mlp = f"{theirs}.{_MLP[layout]}"
            out[f"{ours}.ffn.router.weight"] = left.pop(f"{mlp}.gate.weight")
            out[f"{ours}.ffn.router.bias"] = torch.zeros(config.num_experts)
            names = [[f"{mlp}.experts.{e}.{part}.weight" for part in _PARTS[layout]] for e in range(config.num_experts)]
            out[f"{ours}.ffn.w13"] = torch.stack([torch.cat((left.pop(gate), left.pop(up))) for gate, up, _ in names])
            out[f"{ours}.ffn.w2"] = torch.stack([left.pop(down) for _, _, down in names])
        else:
            gate, up, down = (left.pop(f"{theirs}.mlp.{part}.weight") for part in _DENSE_PARTS)
            out[f"{ours}.ffn.gate_up.weight"] = torch.cat((gate, up))
            out[f"{ours}.ffn.down.weight"] = down
    return out


def _shared_names(config: DeepSeekConfig) -> Iterator[tuple[str, str]]:
    """(their name, our name) of the tensors that are the same in every layout."""
    yield "model.embed_tokens.weight", "embedding.weight"
    yield "model.norm.weight", "norm.weight"
    if not config.tie_word_embeddings:
        yield "lm_head.weight", "head.weight"
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        yield f"{theirs}.self_attn.o_proj.weight", f"{ours}.attention.out.weight"
        yield f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight"
        yield f"{theirs}.post_attention_layernorm.weight", f"{ours}.ffn_norm.weight"
