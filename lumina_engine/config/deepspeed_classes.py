"""Settings of DeepSpeed that name modules of the model or their classes: a wrong name does nothing, or ends the run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lumina_engine.config.deepspeed_rules import value_at
from lumina_engine.config.finding import Finding, error, nearest
from lumina_engine.config.schema import Config

_LEAF = "zero_optimization.leaf_module"
_SHORT = "torch_autocast.lower_precision_safe_modules"
_LIST = "blocks"  # the list of blocks is never called, so nothing would gather its weights


def module_classes(config: Config) -> set[str]:
    """The classes of the modules inside the model that compute something, with the names that Python imports them by."""
    experts = _has_experts(config)
    dense = not experts or config.num_dense_layers > 0 or config.num_shared_experts > 0
    names = ["transformer.Block", "layers.RMSNorm", "product.Linear"]
    names += ["latent.LatentAttention" if config.attention == "mla" else "attention.Attention"]
    names += ["moe.MoE", "moe.Router"] if experts else []
    names += ["layers.SwiGLU"] if dense else []
    return {"torch.nn.modules.sparse.Embedding"} | {f"lumina_engine.model.{name}" for name in names}


def module_names(config: Config) -> list[str]:
    """The names that `named_modules` gives the modules of the model that compute something; the model itself is left out."""
    names = ["embedding", "norm"] + ([] if config.tie_word_embeddings else ["head"])
    linears = ["compress", "kv_norm", "kv_expand", "out"] if config.attention == "mla" else ["qkv", "out"]
    if config.attention == "mla" and config.q_lora_rank:
        linears += ["q_norm", "q_expand"]
    if config.attention != "mla" and config.qk_norm:
        linears += ["q_norm", "k_norm"]
    shared = ["ffn.shared", "ffn.shared.gate_up", "ffn.shared.down"] if config.num_shared_experts else []
    for layer in range(config.num_layers):
        is_dense = not config.use_moe or layer < config.num_dense_layers
        ffn = ["ffn.gate_up", "ffn.down"] if is_dense else ["ffn.router", *shared]
        inner = ["attention_norm", "attention", *(f"attention.{name}" for name in linears), "ffn_norm", "ffn", *ffn]
        names += [f"{_LIST}.{layer}", *(f"{_LIST}.{layer}.{name}" for name in inner)]
    return names


def _has_experts(config: Config) -> bool:
    return config.use_moe and config.num_dense_layers < config.num_layers


def wrong_names(config: Config) -> Iterator[Finding]:
    """An error for each class that an override names and no module inside the model has, and for leaves that cannot be one.

    DeepSpeed takes the classes of leaves by their bare names too, and imports those of short communication by dotted ones.
    """
    dotted = {name.rpartition(".")[2]: name for name in module_classes(config)}
    for name in _texts(config, f"{_LEAF}.classes"):
        if name not in dotted and name not in dotted.values():
            yield _no_class(f"{_LEAF}.classes", name, {bare: bare for bare in dotted})
    for name in _texts(config, _SHORT):
        if name not in dotted.values():
            yield _no_class(_SHORT, name, dotted)
    if _texts(config, _SHORT) and config.precision in ("fp32", "bf16", "fp16"):
        message = f"deepspeed_overrides: {_SHORT}: precision = {config.precision} has no autocast, and nothing else reads it"
        yield error("deepspeed_class", "deepspeed_overrides precision", message, "set precision=mixed_bf16, or remove it")
    whole = [("names", name) for name in _texts(config, f"{_LEAF}.names") if name in ("", _LIST)]
    whole += [("name_suffixes", end) for end in _texts(config, f"{_LEAF}.name_suffixes") if _LIST.endswith(end)]
    yield from _no_modules(config, whole)
    for key, name in whole:
        message = (
            f"deepspeed_overrides: {_LEAF}.{key} = '{name}': that is the whole model or its list of blocks, whose weights "
        )
        message += "are split again before the backward pass has used them"
        yield error("deepspeed_class", "deepspeed_overrides", message, f"name modules inside {_LIST}, such as {_LIST}.0.ffn")


def _no_modules(config: Config, whole: list[tuple[str, str]]) -> Iterator[Finding]:
    """An error for each name or suffix that no module has: DeepSpeed logs a warning and goes on. `whole` is refused already."""
    known = module_names(config)
    for key in ("names", "name_suffixes"):
        for name in _texts(config, f"{_LEAF}.{key}"):
            found = name in known if key == "names" else any(one.endswith(name) for one in known)
            if found or (key, name) in whole:
                continue
            ends = known if key == "names" else sorted({f".{one.rpartition('.')[2]}" for one in known if "." in one})
            near = nearest(name, ends)
            fix = f"did you mean {near}?" if near else f"name modules inside {_LIST}, such as {_LIST}.0.ffn"
            message = f"deepspeed_overrides: {_LEAF}.{key} = '{name}': no module of the model has that name or ends in it"
            yield error("deepspeed_class", "deepspeed_overrides", message, fix)


def _texts(config: Config, path: str) -> list[str]:
    given: Any = value_at(config.deepspeed_overrides, path)
    return [name for name in given if isinstance(name, str)] if isinstance(given, list) else []


def _no_class(path: str, name: str, known: dict[str, str]) -> Finding:
    """`known`: bare name of a class → how to write it."""
    near = nearest(name.rpartition(".")[2], known)
    fix = f"did you mean {known[near]}?" if near else "known here: " + ", ".join(sorted(known.values()))
    message = f"deepspeed_overrides: {path}: no module inside the model is of a class {name}"
    return error("deepspeed_class", "deepspeed_overrides", message, fix)
