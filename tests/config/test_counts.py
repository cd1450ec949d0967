"""C8, C9, C47, C48, R06: one counting function, equal to the module; operations and activations as the model has them."""

from __future__ import annotations

import pytest

from lumina_engine.config.activations import (
    WORST_DOCUMENT,
    activation_bytes,
    block_activation_bytes,
    selective_activation_bytes,
    worst_places,
)
from lumina_engine.config.counts import forward_flops, kv_cache_bytes_per_token, parameter_counts, training_flops_per_token
from lumina_engine.config.memory import Layout, training_memory
from lumina_engine.config.presets import NAMES, ConfigPresets
from lumina_engine.config.resolve import model_config
from lumina_engine.config.schema import DeepSeekConfig

# capabilities 4.1: active, active at k = 2, total, embeddings; exact for debug, four digits for the others
PRESETS = {
    "debug": (494_208, 887_424, 3_246_720, 131_072),
    "b1": (1.007e9, 1.913e9, 7.349e9, 0.154e9),
    "b7": (6.981e9, 12.62e9, 46.44e9, 0.411e9),
    "b14": (14.00e9, 25.48e9, 94.37e9, 0.514e9),
    "b50": (49.93e9, 90.20e9, 331.8e9, 0.822e9),
    "b100": (100.2e9, 174.2e9, 618.1e9, 1.233e9),
    "b200": (200.5e9, 343.9e9, 1.205e12, 1.644e9),
    "b300": (300.1e9, 494.5e9, 1.661e12, 2.055e9),
}
LATENT = {"attention": "mla", "kv_lora_rank": 40, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24}
SHAPES = {
    "dense": {"use_moe": False, "intermediate_size": 176},
    "untied": {"tie_word_embeddings": False},
    "mixed": {"num_layers": 4, "num_dense_layers": 2, "moe_top_k": 2, "num_shared_experts": 1, "qk_norm": True},
    "wide heads": {"head_dim": 48, "num_heads": 4, "num_kv_heads": 1, "num_experts": 3, "intermediate_size": 40},
    "latent": LATENT,
    "latent, compressed queries": LATENT | {"q_lora_rank": 96, "moe_top_k": 2, "num_shared_experts": 1},
    "window": {"sliding_window": 16},
}


def small(**changes) -> DeepSeekConfig:
    base = {"vocab_size": 512, "hidden_size": 128, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 64}
    return DeepSeekConfig(**(base | {"seq_length": 64} | changes)).resolved()


def agrees(value: float, printed: float) -> bool:
    """Whether a value rounds to the printed one (the table has at most four digits, three after the point)."""
    return abs(value - printed) <= max(0.0006 * printed, 0.0006e9)


@pytest.mark.parametrize("name", NAMES)
def test_c048_preset_numbers_as_in_the_table(name: str) -> None:
    model = model_config(ConfigPresets.get(name))
    counts = parameter_counts(model)
    top2 = parameter_counts(model.model_copy(update={"moe_top_k": 2}))
    got = (counts.active, top2.active, counts.total, counts.embeddings)
    if name == "debug":
        assert got == PRESETS[name]
    else:
        assert all(agrees(a, b) for a, b in zip(got, PRESETS[name], strict=True)), got
        assert counts.active == pytest.approx(float(name[1:]) * 1e9, rel=0.02)


def test_r05_mixtral_8x7b_by_the_same_formula() -> None:
    shape = {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "intermediate_size": 14336}
    counts = parameter_counts(DeepSeekConfig(vocab_size=32_000, tie_word_embeddings=False, moe_top_k=2, **shape))
    assert round(counts.stored / 1e9, 2) == 46.70
    assert round((counts.active + counts.embeddings) / 1e9, 2) == 12.88


@pytest.mark.parametrize("name", NAMES)
def test_r06_counts_equal_the_module_of_each_preset(name: str) -> None:
    torch = pytest.importorskip("torch")
    from lumina_engine.model.transformer import DeepSeekTransformer

    model = model_config(ConfigPresets.get(name))
    with torch.device("meta"):
        module = DeepSeekTransformer(model)
    assert sum(p.numel() for p in module.parameters()) == parameter_counts(model).stored


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_r06_counts_equal_the_module_of_other_shapes(shape: dict) -> None:
    torch = pytest.importorskip("torch")
    from lumina_engine.model.transformer import DeepSeekTransformer

    model = small(**shape)
    with torch.device("meta"):
        module = DeepSeekTransformer(model)
    counts = parameter_counts(model)
    assert sum(p.numel() for p in module.parameters()) == counts.stored
    assert counts.active <= counts.total and min(counts.to_dict().values()) >= 0
    parts = (counts.attention, counts.experts, counts.shared, counts.router, counts.dense, counts.norms)
    assert sum(parts) == counts.total


@pytest.mark.parametrize("shape", [{}, *SHAPES.values()], ids=["plain", *SHAPES])
def test_c009_forward_flops_equal_those_counted(shape: dict) -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from lumina_engine.model.transformer import DeepSeekTransformer

    model = small(moe_dropless=True, use_flash_attention=False, **shape)
    module = DeepSeekTransformer(model).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(2, 64, dtype=torch.long))
    ours = forward_flops(model, 64, 2)
    # the reference attention computes all of S x S, what is counted is what a token sees
    square = 2 * 64**2 / (model.sliding_window * (2 * 64 - model.sliding_window)) if model.sliding_window else 2
    assert counter.get_total_flops() == pytest.approx(ours["total"] + (square - 1) * ours["attention"], rel=0.01)
    parts = ("projections", "attention", "experts", "router", "head")
    assert sum(ours[part] for part in parts) == ours["total"] and ours["per_token"] == ours["total"] // 128


def saved_bytes(module, ids, documents=None) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass, parameters not counted. Without `documents`
    each row is one."""
    import torch

    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.numel() > 1:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # an address must not be used twice while we count
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        documents = torch.ones_like(ids) if documents is None else documents
        out = module(ids, labels=ids, document_ids=documents, return_aux=True)
        loss = out.loss_sum if out.router is None else out.loss_sum + out.router.prob_sum_LE.sum() + out.router.z_sum_L.sum()
    assert loss.requires_grad
    return sum(kept.values())


KEPT = {
    "plain": {},
    "full heads": {"num_kv_heads": 2},
    "top-2": {"num_experts": 4, "moe_top_k": 2, "intermediate_size": 256},
    "dense": {"use_moe": False, "intermediate_size": 352},
    "qk_norm": {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 4, "qk_norm": True},
    "shared": {"num_shared_experts": 1},
    "many": {"num_experts": 64},
    "many, sigmoid": {"num_experts": 64, "router_score": "sigmoid"},
    "latent": LATENT,
    "latent, compressed queries": LATENT | {"q_lora_rank": 96},
    "latent, values as wide as keys": LATENT | {"v_head_dim": 48},
    "latent, wider values": LATENT | {"v_head_dim": 64, "use_moe": False},
    "window": {"sliding_window": 16},
    "dropout": {"dropout": 0.1},
    "dropout, dense": {"dropout": 0.1, "use_moe": False, "intermediate_size": 352},
    "jitter": {"router_jitter_noise": 0.1, "num_experts": 64},
    "jitter, shared": {"router_jitter_noise": 0.1, "num_shared_experts": 1},
    "dropout and jitter": {"dropout": 0.1, "router_jitter_noise": 0.1, "intermediate_size": 128},
}
WRITTEN_OUT = {"written out": {"use_flash_attention": False}, "written out, latent": LATENT | {"use_flash_attention": False}}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", (KEPT | WRITTEN_OUT).values(), ids=KEPT | WRITTEN_OUT)
def test_c008_activations_are_those_that_autograd_keeps(shape: dict, precision: str) -> None:
    """Two blocks more keep what two blocks are said to keep, within 5 %."""
    torch = pytest.importorskip("torch")
    from lumina_engine.model.transformer import DeepSeekTransformer

    dtype, value = (torch.float32, 4) if precision == "fp32" else (torch.bfloat16, 2)
    ids = torch.arange(256).reshape(4, 64)
    kept = []
    for layers in (2, 4):
        model = small(moe_dropless=True, num_layers=layers, **shape)
        kept.append(saved_bytes(DeepSeekTransformer(model).to(dtype).train(), ids))
    assert kept[1] - kept[0] == pytest.approx(2 * block_activation_bytes(model, 256, value), rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", (KEPT | WRITTEN_OUT).values(), ids=KEPT | WRITTEN_OUT)
def test_c008_filler_of_short_documents_is_in_what_is_kept(shape: dict, precision: str) -> None:
    """The documents of a dry run, laid into rectangles that are nearly twice as wide: within 5 % too."""
    torch = pytest.importorskip("torch")
    from lumina_engine.model.segments import Segments
    from lumina_engine.model.transformer import DeepSeekTransformer

    dtype, value = (torch.float32, 4) if precision == "fp32" else (torch.bfloat16, 2)
    ids, documents = torch.arange(256).reshape(4, 64), (torch.arange(64) // WORST_DOCUMENT + 1).expand(4, 64)
    kept = []
    for layers in (2, 4):
        model = small(moe_dropless=True, num_layers=layers, **shape)
        kept.append(saved_bytes(DeepSeekTransformer(model).to(dtype).train(), ids, documents))
    places = worst_places(model, 4, 64)
    assert places == (Segments.of(documents).num_places if model.use_flash_attention else None)
    assert kept[1] - kept[0] == pytest.approx(2 * block_activation_bytes(model, 256, value, places=places), rel=0.05)


def test_c008_attention_written_out_is_in_the_budget() -> None:
    """Scores grow with the square of the length: kept in every block, and twice more in the backward pass."""
    for recompute, blocks in ((False, 2), (True, 1)):
        fused = small(gradient_checkpointing=recompute, seq_length=2048)
        written = fused.model_copy(update={"use_flash_attention": False})
        scores = 4 * 2048 * 2048 * fused.num_heads * 4
        plain, more = (training_memory(model, Layout(4, 2048, "fp32")).total for model in (fused, written))
        assert more - plain > (blocks + 2) * 0.9 * scores


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", KEPT.values(), ids=KEPT)
def test_c011_selective_checkpointing_keeps_what_is_predicted(shape: dict, precision: str) -> None:
    """Within 5 %, and clearly less than without; the peak is that of one block more than all keep."""
    torch = pytest.importorskip("torch")
    from lumina_engine.model.transformer import DeepSeekTransformer

    dtype, value = (torch.float32, 4) if precision == "fp32" else (torch.bfloat16, 2)
    ids = torch.arange(256).reshape(4, 64)
    kept = []
    for layers in (2, 4):
        model = small(moe_dropless=True, num_layers=layers, gradient_checkpointing="selective", **shape)
        kept.append(saved_bytes(DeepSeekTransformer(model).to(dtype).train(), ids))
    predicted = selective_activation_bytes(model, 256, value)
    assert kept[1] - kept[0] == pytest.approx(2 * predicted, rel=0.05)
    assert predicted < 0.75 * block_activation_bytes(model, 256, value)
    plain = model.model_copy(update={"gradient_checkpointing": False})
    saved = activation_bytes(plain, 4, 64, value) - activation_bytes(model, 4, 64, value)
    assert saved == 3 * (block_activation_bytes(model, 256, value) - predicted)


def test_c140_a_window_counts_the_pairs_that_see_each_other() -> None:
    """W·S - W²/2 pairs instead of S²/2, up to the diagonal."""
    one = small(num_layers=1, sliding_window=16)
    pairs = sum(min(i + 1, 16) for i in range(64))
    per_pair = 2 * one.num_heads * 2 * one.head_size
    flops = forward_flops(one, 64)["attention"]
    assert flops == per_pair * (pairs - 16 / 2) and forward_flops(one, 64, 3)["attention"] == 3 * flops
    assert forward_flops(one, 16) == forward_flops(small(num_layers=1), 16)
    assert (
        training_flops_per_token(one) == training_flops_per_token(small(num_layers=1)) - 3 * per_pair * (64**2 / 2 - 896) / 64
    )


def test_c140_latent_cache_bytes_as_in_deepseek_v2() -> None:
    """512 + 64 values per token and block: 4.5 heads of 128 keys (arXiv:2405.04434, table 1), 70 KiB for 61 blocks in bf16."""
    shape = {"attention": "mla", "num_layers": 61, "num_heads": 128, "hidden_size": 7168, "q_lora_rank": 1536}
    assert kv_cache_bytes_per_token(DeepSeekConfig(vocab_size=1024, **shape), 2) == 61 * 576 * 2


def test_r06_deepseek_v3_by_the_same_formula() -> None:
    """671B parameters, 37B of them active, as published (the multi-token prediction module of 14B not counted)."""
    shape = {"hidden_size": 7168, "num_layers": 61, "num_heads": 128, "intermediate_size": 2048, "num_dense_layers": 3}
    experts = {"num_experts": 256, "moe_top_k": 8, "num_shared_experts": 1, "dense_intermediate_size": 18_432}
    latent = {"attention": "mla", "q_lora_rank": 1536, "tie_word_embeddings": False}
    counts = parameter_counts(DeepSeekConfig(vocab_size=129_280, **shape, **experts, **latent))
    assert counts.stored == 671_026_404_352
    assert round((counts.active + counts.embeddings / 2) / 1e9, 1) == 36.6


def test_c004_kv_cache_bytes() -> None:
    assert kv_cache_bytes_per_token(model_config(ConfigPresets.b7()), 2) == 128 * 1024
    assert kv_cache_bytes_per_token(model_config(ConfigPresets.debug()), 2) == 512


def test_c009_training_flops_formula() -> None:
    model = model_config(ConfigPresets.debug())
    assert training_flops_per_token(model) == 6 * (494_208 + 1024 * 128) + 6 * 2 * 2 * 64 * 256
    again = model.model_copy(update={"gradient_checkpointing": True})
    assert training_flops_per_token(again) == pytest.approx(training_flops_per_token(model) * 4 / 3)


def test_c063_bytes_per_parameter_by_stage() -> None:
    """16; 4 + 12/N; 2 + 14/N; 16/N bytes a parameter in bf16 on N ranks; the optimizer moves to the host, with fp32 grads."""
    model = model_config(ConfigPresets.b1())
    count = parameter_counts(model).stored
    for stage, expected in ((0, 16), (1, 4 + 12 / 4), (2, 2 + 14 / 4), (3, 16 / 4)):
        memory = training_memory(model, Layout(1, 2048, "bf16", world=4, zero_stage=stage))
        assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(count * expected, rel=1e-6)
    moved = training_memory(model, Layout(1, 2048, "bf16", world=4, zero_stage=2, offload_optimizer=True))
    assert moved.optimizer == 0 and moved.host == pytest.approx(count * (3 + 1), rel=1e-6)


def test_c063_gradients_that_no_bucket_takes_stay_at_stage_1() -> None:
    """Without either key, what the other ranks reduce is there until the end of the backward pass."""
    model = model_config(ConfigPresets.b1())
    count = parameter_counts(model).stored

    def backward(stage: int, overlap: bool, contiguous: bool) -> int:
        keys = {"reduce_bucket_size": 100_000, "overlap_comm": overlap, "contiguous_gradients": contiguous}
        return training_memory(model, Layout(1, 64, "bf16", world=4, zero_stage=stage, **keys)).moments["backward"]

    early = backward(1, True, True)
    assert backward(2, False, False) == early
    for overlap, contiguous in ((True, False), (False, True), (False, False)):
        assert backward(1, overlap, contiguous) - early == pytest.approx(count * 2 * 3 / 4, rel=0.01)


def test_c139_memory_falls_with_checkpointing_batch_and_chunks() -> None:
    model = model_config(ConfigPresets.b1())
    layout = Layout(4, 2048, "bf16", world=2, zero_stage=2)
    plain = training_memory(model, layout)
    less = training_memory(model.model_copy(update={"gradient_checkpointing": True}), layout)
    small_chunk = training_memory(model.model_copy(update={"loss_chunk_size": 128}), layout)
    assert less.activations < plain.activations / 3 and less.logits == plain.logits
    assert small_chunk.logits < plain.logits and plain.experts < plain.weights
