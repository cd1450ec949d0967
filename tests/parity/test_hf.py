"""Logits equal to transformers' models on shared random weights, through files on disk, both ways (C1, C15, C143, R18)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lumina_engine.config.schema import DeepSeekConfig
from lumina_engine.model.hf import LayoutError, config_from_hf, from_hf, hf_config, layout_of, to_hf
from lumina_engine.model.transformer import DeepSeekTransformer

BASE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 96,
    "seq_length": 128,
    "num_experts": 4,
    "init_std": 0.15,
    "norm_eps": 1e-6,
}
SIGMOID = {"router_score": "sigmoid", "moe_top_k": 2, "router_scale": 2.5, "num_shared_experts": 2}
LATENT = {"attention": "mla", "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
YARN = {"rope_scaling": "yarn", "rope_scaling_factor": 4.0, "rope_theta": 1e4}
CASES = {
    "llama": {"use_moe": False},
    "llama untied, multi-query": {"use_moe": False, "tie_word_embeddings": False, "num_kv_heads": 1, "head_dim": 32},
    "llama linear": {"use_moe": False, "rope_scaling": "linear", "rope_scaling_factor": 4.0},
    "llama yarn": {"use_moe": False, "rope_scaling": "yarn", "rope_scaling_factor": 4.0, "rope_theta": 1e4},
    "mixtral": {"moe_top_k": 2},
    "mixtral top-3, untied": {"moe_top_k": 3, "tie_word_embeddings": False, "num_experts": 5},
    "mixtral of one choice": {"moe_top_k": 1, "router_normalize": True},
    "qwen2_moe top-1": {"moe_top_k": 1},
    "qwen2_moe raw top-2": {"moe_top_k": 2, "router_normalize": False},
    "qwen2_moe with a dense layer": {"moe_top_k": 2, "num_dense_layers": 1},
    "mixtral sliding window": {"moe_top_k": 2, "sliding_window": 24},
    "glm4_moe": {**SIGMOID, "num_dense_layers": 1, "qk_norm": True, "head_dim": 32},
    "glm4_moe top-1, none shared": {"router_score": "sigmoid", "moe_top_k": 1},
    "deepseek_v3": {**SIGMOID, **LATENT, "q_lora_rank": 40, "num_dense_layers": 1},
    "deepseek_v3 plain queries, tied": {**SIGMOID, **LATENT, "router_normalize": False, "norm_eps": 1e-5},
    "deepseek_v3 yarn": {**SIGMOID, **LATENT, **YARN, "v_head_dim": 40, "tie_word_embeddings": False},
    "deepseek_v3 dense, linear": {**LATENT, "use_moe": False, "rope_scaling": "linear", "rope_scaling_factor": 2.0},
}
# What our configuration has and the layout does not need.
UNUSED = {"mla": {"num_kv_heads"}, "gqa": set()}


def build(changes: dict) -> DeepSeekTransformer:
    torch.manual_seed(0)
    model = DeepSeekTransformer(DeepSeekConfig(**(BASE | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            if "router" in name:
                parameter.mul_(4)
        if model.config.router_score == "sigmoid":
            for layer in model.expert_layers:
                layer.router.bias.uniform_(-0.3, 0.3)
    return model


def export(model: DeepSeekTransformer, folder: Path) -> None:
    save_file(to_hf(model.state_dict(), model.config), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("case", CASES)
def test_c143_logits_equal_transformers_both_ways(case: str, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = build(CASES[case])
    tokens = torch.randint(0, 320, (2, 100))
    there, back = tmp_path / "there", tmp_path / "back"
    there.mkdir()
    export(model, there)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        there, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert theirs.config.model_type == case.split()[0]
    with torch.no_grad():
        expected = theirs.eval()(tokens).logits
        ours = model(tokens)
        assert isinstance(ours, torch.Tensor) and ours.std() > 0.1
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
        theirs.save_pretrained(back)
        config = config_from_hf(json.loads((back / "config.json").read_text()))
        again = DeepSeekTransformer(config).eval()
        again.load_state_dict(from_hf(load_file(back / "model.safetensors"), config))
        torch.testing.assert_close(again(tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_c143_round_trip_is_exact(case: str):
    model = build(CASES[case])
    config = config_from_hf(hf_config(model.config))
    state = from_hf(to_hf(model.state_dict(), model.config), config)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    kept = {"init_std", "capacity_factor", "rope_original_length"}  # no part of the function, or written out
    ours, theirs = model.config.to_dict(), config.resolved().to_dict()
    different = {key for key in ours if ours[key] != theirs[key]} - kept
    unused = UNUSED[model.config.attention] | (
        {"num_experts", "moe_top_k", "router_normalize", "dense_intermediate_size"} if not model.config.use_moe else set()
    )
    if not model.config.num_dense_layers:
        unused.add("dense_intermediate_size")
    assert different <= unused


def test_r18_top1_with_raw_gates_is_not_mixtral(tmp_path: Path):
    """Loaded as Mixtral the same weights answer differently: the layout that is chosen matters."""
    transformers = pytest.importorskip("transformers")
    model = build({"moe_top_k": 1})
    assert layout_of(model.config) == "qwen2_moe"
    pretend = model.config.model_copy(update={"router_normalize": True})
    save_file(to_hf(model.state_dict(), pretend), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(hf_config(pretend)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True).eval()
    tokens = torch.randint(0, 320, (1, 20))
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True}, "qk_norm=True has no Hugging Face layout"),
        ({"sliding_window": 16}, "sliding_window=16 has no"),
        ({**LATENT}, "router_score='softmax' has no Hugging Face layout here with attention='mla'"),
        ({**LATENT, **SIGMOID, "sliding_window": 16}, "sliding_window=16 has no"),
        ({"router_score": "sigmoid", "num_experts": 1}, "num_experts=1: glm4_moe compares"),
        ({"num_shared_experts": 1}, "num_shared_experts=1 has no"),
        ({"router_scale": 2.0}, "router_scale=2.0 has no"),
        ({"head_dim": 32}, "head_dim=32: Qwen2-MoE fixes it"),
    ],
)
def test_c143_other_functions_are_refused_by_key(changes: dict, message: str):
    with pytest.raises(LayoutError, match=message):
        layout_of(DeepSeekConfig(**(BASE | changes)))
    if not changes.keys() & {"head_dim", "qk_norm", "sliding_window", "attention"}:
        assert layout_of(DeepSeekConfig(**(BASE | changes | {"use_moe": False}))) == "llama"


def test_c143_a_router_bias_is_refused():
    model = build({"moe_top_k": 2})
    model.update_router_bias(torch.tensor([[4.0, 0, 0, 0]] * 3), 0.1)
    with pytest.raises(LayoutError, match="router_bias_rate"):
        to_hf(model.state_dict(), model.config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type='gemma' is not supported; supported are llama, mixtral, qwen2_moe, glm"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16}}, "rope_scaling beta_fast=16"),
    ],
)
def test_c143_foreign_configurations_are_refused_by_entry(changes: dict, message: str):
    values = hf_config(DeepSeekConfig(**(BASE | {"use_moe": False})))
    with pytest.raises(LayoutError, match=message):
        config_from_hf(values | changes)


def test_c143_missing_and_extra_tensors_are_named():
    model = build({"use_moe": False})
    state = to_hf(model.state_dict(), model.config)
    with pytest.raises(LayoutError, match=r"1 tensors have no place in this model, the first is model\.layers\.9\.x"):
        from_hf(state | {"model.layers.9.x": torch.zeros(1)}, model.config)
    del state["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(LayoutError, match=r"the tensor model\.layers\.1\.self_attn\.k_proj\.weight is missing"):
        from_hf(state, model.config)
