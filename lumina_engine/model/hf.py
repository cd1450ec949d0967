"""Weights to and from Hugging Face layouts that compute the same function (see `hf_layouts`), name by name.

State dicts are in the layout of the files on disk: one tensor per projection and expert.

Shapes: D hidden size, n and r parts of a latent head without and with rotary positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lumina_engine.config.schema import DeepSeekConfig
from lumina_engine.model.hf_layouts import LayoutError, config_from_hf, hf_config, layout_of

__all__ = ["LayoutError", "config_from_hf", "from_hf", "hf_config", "layout_of", "to_hf"]

# Names of gate, up and down in one feed-forward network, dense or expert; and where the experts of a layer are.
_DENSE_PARTS = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL_PARTS = ("w1", "w3", "w2")
_SIGMOID = ("glm4_moe", "deepseek_v3")


def to_hf(state: Mapping[str, Tensor], config: DeepSeekConfig) -> dict[str, Tensor]:
    """A model's state dict in the Hugging Face layout. Raises LayoutError, also for a router bias that it cannot hold."""
    layout = layout_of(config)
    out = {theirs: state[ours] for theirs, ours in _shared_names(config)}
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        for name, part in _attention_to_hf(state, config, f"{ours}.attention").items():
            out[f"{theirs}.self_attn.{name}.weight"] = part
        if config.use_moe and layer >= config.num_dense_layers:
            out |= _experts_to_hf(state, layout, theirs, ours)
        else:
            out |= _dense_to_hf(state, f"{theirs}.mlp", f"{ours}.ffn")
    return {name: tensor.contiguous() for name, tensor in out.items()}


def _dense_to_hf(state: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    parts = (*state[f"{ours}.gate_up.weight"].chunk(2), state[f"{ours}.down.weight"])
    return {f"{theirs}.{name}.weight": part for name, part in zip(_DENSE_PARTS, parts, strict=True)}


def _attention_to_hf(state: Mapping[str, Tensor], config: DeepSeekConfig, ours: str) -> dict[str, Tensor]:
    if config.attention == "mla":
        return _latent_to_hf(state, config, ours)
    sizes = [heads * config.head_size for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    parts = state[f"{ours}.qkv.weight"].split(sizes)
    return {f"{name}_proj": part for name, part in zip("qkv", parts, strict=True)}


def _latent_to_hf(state: Mapping[str, Tensor], config: DeepSeekConfig, ours: str) -> dict[str, Tensor]:
    compress = state[f"{ours}.compress.weight"]
    latents = config.kv_lora_rank + config.qk_rope_head_dim
    query, latent = compress.split((len(compress) - latents, latents))
    out = {"kv_a_proj_with_mqa": _interleaved(latent, config.kv_lora_rank, 1)}
    if config.q_lora_rank:
        out["q_a_proj"], query = query, state[f"{ours}.q_expand.weight"]
    out["q_b_proj" if config.q_lora_rank else "q_proj"] = _interleaved(query, config.qk_nope_head_dim, config.num_heads)
    return out


def _interleaved(weight: Tensor, nope: int, heads: int) -> Tensor:
    """The last r rows of each head, after `nope` others, from half-split rotary pairs (i, i + r/2) to (2i, 2i + 1)."""
    fixed, rope = weight.unflatten(0, (heads, -1)).tensor_split((nope,), dim=1)
    return torch.cat((fixed, rope.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)), dim=1).flatten(0, 1)


def _half_split(weight: Tensor, nope: int, heads: int) -> Tensor:
    """The reverse of `_interleaved`."""
    fixed, rope = weight.unflatten(0, (heads, -1)).tensor_split((nope,), dim=1)
    return torch.cat((fixed, rope.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)), dim=1).flatten(0, 1)


def _expert_names(layout: str) -> tuple[str, tuple[str, str, str]]:
    """Where the experts of a layer are, and the names of gate, up and down in one."""
    return ("block_sparse_moe", _MIXTRAL_PARTS) if layout == "mixtral" else ("mlp", _DENSE_PARTS)


def _experts_to_hf(state: Mapping[str, Tensor], layout: str, theirs: str, ours: str) -> dict[str, Tensor]:
    place, parts = _expert_names(layout)
    mlp, router = f"{theirs}.{place}", state[f"{ours}.ffn.router.weight"]
    out = {f"{mlp}.gate.weight": router}
    bias, shared = state[f"{ours}.ffn.router.bias"], f"{ours}.ffn.shared"
    if layout in _SIGMOID:
        out[f"{mlp}.gate.e_score_correction_bias"] = bias
    elif bool(bias.any()):
        raise LayoutError(f"router_bias_rate: the router has a bias, which {layout} cannot hold")
    split = state.get(f"{ours}.ffn.router.log2_multiplicity")
    if split is not None and bool(split.any()):
        raise LayoutError(f"num_experts: {ours} has an expert that was split in two, which {layout} cannot hold")
    for expert, (w13, w2) in enumerate(zip(state[f"{ours}.ffn.w13"], state[f"{ours}.ffn.w2"], strict=True)):
        for name, part in zip(parts, (*w13.chunk(2), w2), strict=True):
            out[f"{mlp}.experts.{expert}.{name}.weight"] = part
    if f"{shared}.down.weight" in state:
        out |= _dense_to_hf(state, f"{mlp}.shared_experts", shared)
    elif layout != "mixtral":  # the shared expert has width 0, but its tensors must be there
        name, hidden = ("shared_expert" if layout == "qwen2_moe" else "shared_experts"), router.shape[1]
        for part, shape in zip(_DENSE_PARTS, ((0, hidden), (0, hidden), (hidden, 0)), strict=True):
            out[f"{mlp}.{name}.{part}.weight"] = router.new_zeros(shape)
    if layout == "qwen2_moe":
        out[f"{mlp}.shared_expert_gate.weight"] = router.new_zeros(1, router.shape[1])
    return out


def from_hf(state: Mapping[str, Tensor], config: DeepSeekConfig, *, interleaved: bool = True) -> dict[str, Tensor]:
    """A Hugging Face state dict (names as on disk) in our layout, for `config` from `config_from_hf`.

    `interleaved` is the entry `rope_interleave` of a DeepSeek-V3 config.json. Raises LayoutError naming the tensors that are
    missing or left over.
    """
    layout = layout_of(config)
    left = dict(state)
    try:
        out = _from_hf(left, config, layout, interleaved)
    except KeyError as missing:
        raise LayoutError(f"the tensor {missing.args[0]} is missing") from None
    ignored = ("rotary_emb.inv_freq", "lm_head.weight") if config.tie_word_embeddings else ("rotary_emb.inv_freq",)
    extra = [
        name for name, tensor in left.items() if not name.endswith((*ignored, "shared_expert_gate.weight")) and tensor.numel()
    ]
    if extra:
        raise LayoutError(f"{len(extra)} tensors have no place in this model, the first is {extra[0]}")
    return out


def _from_hf(left: dict[str, Tensor], config: DeepSeekConfig, layout: str, interleaved: bool) -> dict[str, Tensor]:
    out = {ours: left.pop(theirs) for theirs, ours in _shared_names(config)}
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        if config.attention == "mla":
            out |= _latent_from_hf(left, config, f"{theirs}.self_attn", f"{ours}.attention", interleaved)
        else:
            parts = [left.pop(f"{theirs}.self_attn.{name}_proj.weight") for name in "qkv"]
            out[f"{ours}.attention.qkv.weight"] = torch.cat(parts)
        if config.use_moe and layer >= config.num_dense_layers:
            out |= _experts_from_hf(left, config, layout, theirs, f"{ours}.ffn")
        else:
            out |= _dense_from_hf(left, f"{theirs}.mlp", f"{ours}.ffn")
    return out


def _dense_from_hf(left: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    gate, up, down = (left.pop(f"{theirs}.{part}.weight") for part in _DENSE_PARTS)
    return {f"{ours}.gate_up.weight": torch.cat((gate, up)), f"{ours}.down.weight": down}


def _latent_from_hf(
    left: dict[str, Tensor], config: DeepSeekConfig, theirs: str, ours: str, interleaved: bool
) -> dict[str, Tensor]:
    latent = left.pop(f"{theirs}.kv_a_proj_with_mqa.weight")
    query = left.pop(f"{theirs}.{'q_b_proj' if config.q_lora_rank else 'q_proj'}.weight")
    if interleaved:
        latent = _half_split(latent, config.kv_lora_rank, 1)
        query = _half_split(query, config.qk_nope_head_dim, config.num_heads)
    if not config.q_lora_rank:
        return {f"{ours}.compress.weight": torch.cat((query, latent))}
    compressed = left.pop(f"{theirs}.q_a_proj.weight")
    return {f"{ours}.compress.weight": torch.cat((compressed, latent)), f"{ours}.q_expand.weight": query}


def _experts_from_hf(left: dict[str, Tensor], config: DeepSeekConfig, layout: str, theirs: str, ours: str) -> dict[str, Tensor]:
    place, parts = _expert_names(layout)
    mlp = f"{theirs}.{place}"
    out = {f"{ours}.router.weight": left.pop(f"{mlp}.gate.weight"), f"{ours}.router.bias": torch.zeros(config.num_experts)}
    if layout in _SIGMOID:
        out[f"{ours}.router.bias"] = left.pop(f"{mlp}.gate.e_score_correction_bias").float()
    if config.moe_top_k == 1 and config.router_score == "softmax":
        out[f"{ours}.router.log2_multiplicity"] = torch.zeros(config.num_experts)
    names = [[f"{mlp}.experts.{e}.{part}.weight" for part in parts] for e in range(config.num_experts)]
    out[f"{ours}.w13"] = torch.stack([torch.cat((left.pop(gate), left.pop(up))) for gate, up, _ in names])
    out[f"{ours}.w2"] = torch.stack([left.pop(down) for _, _, down in names])
    if config.num_shared_experts:
        out |= _dense_from_hf(left, f"{mlp}.shared_experts", f"{ours}.shared")
    return out


def _shared_names(config: DeepSeekConfig) -> Iterator[tuple[str, str]]:
    """(their name, our name) of the tensors that are the same in every layout."""
    yield "model.embed_tokens.weight", "embedding.weight"
    yield "model.norm.weight", "norm.weight"
    if not config.tie_word_embeddings:
        yield "lm_head.weight", "head.weight"
    attention = {"o_proj": "out"}
    if config.attention == "mla":
        attention |= {"kv_a_layernorm": "kv_norm", "kv_b_proj": "kv_expand"}
        attention |= {"q_a_layernorm": "q_norm"} if config.q_lora_rank else {}
    elif config.qk_norm:
        attention |= {"q_norm": "q_norm", "k_norm": "k_norm"}
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        for name, own in attention.items():
            yield f"{theirs}.self_attn.{name}.weight", f"{ours}.attention.{own}.weight"
        yield f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight"
        yield f"{theirs}.post_attention_layernorm.weight", f"{ours}.ffn_norm.weight"
