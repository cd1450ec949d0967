"""The whole model: signature, initialisation, causality, gradient checkpointing, precision, what it refuses."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

from lumina_engine.config.memory import Layout, training_memory
from lumina_engine.config.schema import Config, ConfigError, DeepSeekConfig
from lumina_engine.model.attention import KVCache
from lumina_engine.model.transformer import DeepSeekTransformer, ModelOutput

from .kinds import KINDS, LATENT, peak_bytes


def ids(batch: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length))


def test_c007_r12_forward_gives_a_tensor_unless_asked(tiny):
    model = tiny()
    parameters = inspect.signature(model.forward).parameters
    assert list(parameters)[:2] == ["input_ids", "attention_mask"] and parameters["attention_mask"].default is None
    tokens = ids()
    for use_moe in (True, False):
        model = tiny(use_moe=use_moe)
        logits, loss = model(tokens), model(tokens, labels=tokens)
        assert logits.shape == (2, 16, 256) and loss.shape == ()
        torch.testing.assert_close(loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
        plain, trained = model(tokens, return_aux=True), model(tokens, labels=tokens, return_aux=True)
        assert isinstance(plain, ModelOutput) and plain.loss_sum is None and plain.num_labels is None
        torch.testing.assert_close(plain.logits, logits)
        assert trained.logits is None and trained.num_labels.item() == 30 and trained.weight_sum == 30
        torch.testing.assert_close(trained.loss_sum / 30, loss)
        assert (plain.router is not None) is use_moe
    torch.testing.assert_close(model(tokens, logits_to_keep=3), model(tokens)[:, -3:])


def test_c007_weights_multiply_labels(tiny):
    model, tokens = tiny(), ids()
    weights = torch.rand(2, 16) * 2
    out = model(tokens, labels=tokens, weights=weights, return_aux=True)
    each = F.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(out.loss_sum, (each * weights[:, 1:]).sum())
    torch.testing.assert_close(out.weight_sum, weights[:, 1:].sum())
    torch.testing.assert_close(model(tokens, labels=tokens, weights=weights), out.loss_sum / out.weight_sum)


def test_c007_evaluation_counts_correct_predictions(tiny):
    model, tokens = tiny().eval(), ids(2, 40)
    logits = model(tokens)
    labels = tokens.clone()
    labels[:, 1:30] = logits.argmax(-1)[:, :29]  # 29 per row are right, the others are by chance
    labels[1, 10:20] = -100
    expected = (logits.argmax(-1)[:, :-1] == labels[:, 1:]).sum()
    with torch.no_grad():
        out = model(tokens, labels=labels, return_aux=True)
    assert out.num_correct == expected and expected >= 48
    trained = model(tokens, labels=labels, return_aux=True)
    assert trained.num_correct is None
    torch.testing.assert_close(out.loss_sum, trained.loss_sum.detach())


def test_c140_latent_attention_refuses_norms_of_heads(tiny):
    with pytest.raises(ValueError, match="qk_norm=True: latent attention norms its latents"):
        tiny(qk_norm=True, **LATENT)


def test_c001_same_seed_same_weights(tiny):
    config = DeepSeekConfig(vocab_size=256, hidden_size=64, num_layers=3, num_heads=2, num_kv_heads=1, seq_length=32)
    one, two, other = DeepSeekTransformer(config), DeepSeekTransformer(config), DeepSeekTransformer(config)
    torch.randn(3)
    two.init_weights(0)
    other.init_weights(1)
    first = one.state_dict()
    assert all(torch.equal(first[name], value) for name, value in two.state_dict().items())
    assert all(not torch.equal(first[name], value) for name, value in other.named_parameters() if "norm" not in name)
    with torch.device("meta"):
        late = DeepSeekTransformer(config)
    late = late.to_empty(device="cpu")
    late.init_weights(0)
    assert all(torch.equal(first[name], value) for name, value in late.state_dict().items())
    tokens = ids()
    assert torch.equal(late(tokens), one(tokens))


def test_c001_seed_of_a_config_and_vocab_auto():
    shape = {"hidden_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 256, "intermediate_size": 64}
    one, two = DeepSeekTransformer(Config(seed=1, **shape)), DeepSeekTransformer(Config(seed=2, **shape))
    assert not torch.equal(one.embedding.weight, two.embedding.weight)
    assert isinstance(one.config, DeepSeekConfig) and one.config.head_dim == 32
    with pytest.raises(ConfigError, match="vocab_size"):
        DeepSeekTransformer(Config(**shape | {"vocab_size": "auto"}))


def test_c001_initial_scales():
    config = DeepSeekConfig(
        vocab_size=1024, hidden_size=256, num_layers=8, intermediate_size=512, init_std=0.05, num_shared_experts=1,
        num_dense_layers=1, tie_word_embeddings=False, seq_length=32,
    )  # fmt: skip
    narrow = 0.05 / 16**0.5
    for name, parameter in DeepSeekTransformer(config).named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
            continue
        written = name.endswith(("attention.out.weight", "ffn.down.weight", "shared.down.weight", "ffn.w2"))
        assert parameter.std().item() == pytest.approx(narrow if written else 0.05, rel=0.05), name


def test_c001_no_biases_and_names(tiny):
    names = {name for name, _ in tiny(num_shared_experts=1, num_dense_layers=1).named_parameters()}
    assert not any("bias" in name for name in names)
    assert "head.weight" not in names and "blocks.0.ffn.gate_up.weight" in names and "blocks.1.ffn.w13" in names
    assert "head.weight" in {name for name, _ in tiny(tie_word_embeddings=False).named_parameters()}


def test_c014_dense_model_has_no_router(tiny):
    model = tiny(use_moe=False)
    assert model.expert_layers == [] and model.router_bias_LE is None
    assert model.blocks[0].ffn.gate_up.weight.shape == (96, 64)


def test_c140_first_layers_dense(tiny):
    model = tiny(num_layers=3, num_dense_layers=2, moe_top_k=2)
    assert len(model.expert_layers) == 1 and model.blocks[1].ffn.gate_up.weight.shape == (2 * 2 * 48, 64)
    assert model(ids(), return_aux=True).router.counts_LE.shape == (1, 4)
    model = tiny(num_layers=3, num_dense_layers=1, dense_intermediate_size=40)
    assert model.blocks[0].ffn.gate_up.weight.shape == (80, 64)


@pytest.mark.parametrize("use_moe", [True, False])
def test_c001_causality_in_evaluation(tiny, use_moe):
    model, tokens = tiny(use_moe=use_moe, moe_top_k=1).eval(), ids(1, 10)
    before = model(tokens)
    for cut in range(1, 10):
        changed = tokens.clone()
        changed[:, cut:] = (changed[:, cut:] + 1) % 256
        after = model(changed)
        torch.testing.assert_close(after[:, :cut], before[:, :cut], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(after[:, cut], before[:, cut])


@pytest.mark.parametrize(
    "changes",
    [
        {"use_moe": False},
        {"moe_top_k": 2, "capacity_factor": 0.7, "router_jitter_noise": 0.1},
        {"num_shared_experts": 1, "num_dense_layers": 1, "qk_norm": True, "sliding_window": 16},
        LATENT | {"q_lora_rank": 20, "moe_top_k": 2, "router_score": "sigmoid"},
        LATENT,
    ],
    ids=["dense", "capacity, jitter", "shared, window", "latent queries", "latent"],
)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", [True, "selective"])
def test_c011_checkpointing_changes_nothing_but_memory(tiny, changes, dropout, packed, how):
    """Same loss, gradients and statistics (counts not doubled), dropout and jitter included."""
    documents = torch.tensor([[1] * 9 + [2] * 15, [1] * 20 + [0] * 4]) if packed else None
    results = []
    plain = tiny(dropout=dropout, **changes)
    tokens = ids(2, 24)
    for recompute in (False, how):
        model = tiny(dropout=dropout, gradient_checkpointing=recompute, **changes)
        model.load_state_dict(plain.state_dict())
        torch.manual_seed(3)
        out = model(tokens, labels=tokens, document_ids=documents, return_aux=True)
        loss = out.loss_sum
        if out.router is not None:
            loss = loss + (out.router.prob_sum_LE * out.router.counts_LE).sum() + out.router.z_sum_L.sum()
        loss.backward()
        stats = {} if out.router is None else {name: value.detach() for name, value in out.router._asdict().items()}
        results.append((out.loss_sum.detach(), stats, [parameter.grad for parameter in model.parameters()]))
    if how == "selective":  # a gate's gradient comes by another product: equal up to rounding of each tensor's largest value
        largest = [grad.abs().max() for grad in results[0][2]]
        for result in results:
            result[2][:] = [grad / most for grad, most in zip(result[2], largest, strict=True)]
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-6)


def test_c011_checkpointing_keeps_less(tiny):
    def kept(recompute: bool | str) -> int:
        sizes: dict[int, int] = {}
        model = tiny(num_layers=4, gradient_checkpointing=recompute)
        own = {parameter.data_ptr() for parameter in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                sizes[id(tensor.untyped_storage())] = tensor.nbytes
            return tensor

        tokens = ids(4, 64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens, labels=tokens).backward()
        return sum(sizes.values())

    assert kept(True) < kept(False) / 3 and kept("selective") < 0.75 * kept(False)


@pytest.mark.parametrize("kind", ["gqa", "mla"])
@pytest.mark.parametrize("use_moe", [True, False])
def test_c011_selective_lowers_the_peak_and_repeats_no_product_of_weights(tiny, kind, use_moe):
    """Measured by the allocator; the products counted are those of plain training and the attention's own."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = {"num_layers": 6, "hidden_size": 128, "intermediate_size": 256, "seq_length": 256, "loss_chunk_size": 128}
    tokens, peaks, flops = ids(4, 256), [], []
    for how in (False, "selective"):
        model = tiny(gradient_checkpointing=how, use_moe=use_moe, moe_dropless=True, **shape, **KINDS[kind])
        model.init_weights(0)
        model(tokens, labels=tokens).backward()
        peaks.append(peak_bytes(lambda model=model: model(tokens, labels=tokens).backward()))
        with FlopCounterMode(display=False) as counter:
            model(tokens, labels=tokens).backward()
        flops.append(counter.get_total_flops())
    assert peaks[1] < 0.75 * peaks[0], peaks
    router = 2 * 1024 * 128 * 4 * 6 if use_moe else 0
    square = 2 * model.estimate_flops(256, 4)["attention"]  # the counter takes causal attention for the whole square
    assert flops[1] - flops[0] <= 1.4 * square + router, flops


@pytest.mark.parametrize(
    "changes", [{}, {"use_moe": False, "tie_word_embeddings": False}, {"num_shared_experts": 2, "qk_norm": True}, LATENT]
)
def test_c008_r06_footprint_is_that_of_the_module(tiny, changes):
    model = tiny(**changes)
    for dtype, per_value in ((torch.float32, 8), (torch.bfloat16, 12)):
        model.to(dtype)
        footprint = model.get_memory_footprint()
        numel = sum(parameter.numel() for parameter in model.parameters())
        assert footprint["parameters"] == footprint["gradients"] == sum(parameter.nbytes for parameter in model.parameters())
        assert footprint["optimizer"] == numel * per_value
        assert footprint["buffers"] == sum(buffer.nbytes for buffer in model.buffers())
        cache = KVCache(model.config, 1, 7, dtype)
        assert footprint["kv_cache_per_token"] == cache.nbytes / 7
        parts = ("parameters", "gradients", "optimizer", "buffers", "activations")
        assert footprint["parameters"] + footprint["optimizer"] < footprint["total"]
        layout = Layout(1, model.config.seq_length, "fp32" if dtype == torch.float32 else "bf16", use_deepspeed=False)
        assert footprint["total"] == training_memory(model.config, layout).total + footprint["buffers"]
        assert all(footprint[name] > 0 for name in parts if name != "buffers")
        assert model.get_memory_footprint(batch_size=4)["activations"] > 2 * footprint["activations"]


@pytest.mark.parametrize(
    "changes", [{}, {"use_moe": False}, {"moe_top_k": 2, "num_shared_experts": 1, "num_dense_layers": 1}, LATENT]
)
def test_c009_flops_within_one_percent_of_those_counted(tiny, changes):
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny(use_flash_attention=False, **changes).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids(3, 64))
    flops = model.estimate_flops(64, batch_size=3)
    # written-out attention computes the whole square, a causal kernel half of it
    assert counter.get_total_flops() == pytest.approx(flops["total"] + flops["attention"], rel=0.01)
    assert flops["per_token"] == flops["total"] // 192


def test_dropout_is_on_both_branches_and_only_in_training(tiny):
    model, plain = tiny(dropout=0.5, num_layers=1, use_moe=False), tiny(num_layers=1, use_moe=False)
    plain.load_state_dict(model.state_dict())
    tokens = ids()
    assert torch.equal(model.eval()(tokens), plain.eval()(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    seen = []
    model.blocks[0].ffn_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(tokens)
    embedded = model.embedding(tokens)
    for before, after in ((embedded, seen[0]), (seen[0], seen[1])):
        assert 0.4 < (before == after).float().mean() < 0.6


@pytest.mark.parametrize("mode", ["bf16", "autocast"])
@pytest.mark.parametrize(
    "changes", [{"use_moe": False}, {"moe_top_k": 2, "moe_dropless": True}, {"qk_norm": True}, LATENT, {"sliding_window": 16}]
)
def test_c066_low_precision_is_close_to_fp32(tiny, mode, changes):
    """Loss and gradients in bf16 and under autocast are those of fp32 up to rounding."""
    exact, rounded = tiny(**changes), tiny(**changes)
    with torch.no_grad():
        for a in exact.parameters():
            a.copy_(a.bfloat16())
    rounded.load_state_dict(exact.state_dict())
    tokens = ids(2, 32)
    documents = torch.tensor([[1] * 20 + [2] * 12, [1] * 30 + [0] * 2])
    expected = exact(tokens, labels=tokens, document_ids=documents)
    expected.backward()
    if mode == "bf16":
        rounded.to(torch.bfloat16)
        loss = rounded(tokens, labels=tokens, document_ids=documents)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            loss = rounded(tokens, labels=tokens, document_ids=documents)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0.05, rtol=0.02)
    flat = [torch.cat([p.grad.flatten().float() for p in model.parameters()]) for model in (exact, rounded)]
    assert F.cosine_similarity(*flat, dim=0) > 0.98
    assert all(p.grad.dtype == p.dtype for p in rounded.parameters())


def test_default_positions_restart_in_each_document(tiny):
    model, tokens = tiny(rope_scaling="yarn", rope_scaling_factor=4.0).eval(), ids(1, 9)
    documents = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0, 0]])
    explicit = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    assert torch.equal(model(tokens, document_ids=documents), model(tokens, document_ids=documents, position_ids=explicit))
    shifted = model(tokens, position_ids=torch.arange(5, 14)[None])
    torch.testing.assert_close(shifted, model(tokens), atol=1e-4, rtol=1e-4)  # rotary attention sees differences only


def test_c001_overfits_one_batch(tiny):
    """Loss < 0.01 on one batch, then greedy decoding through the cache gives it back."""
    model = tiny(moe_top_k=1, capacity_factor=2.0)
    model.init_weights(0)
    tokens = ids(4, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens)
        if loss < 0.008:
            break
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    model.eval()
    with torch.no_grad():
        cache = KVCache(model.config, 4, 24)
        out = [tokens[:, :2]]
        for _ in range(22):
            out.append(model(out[-1], cache=cache)[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(out, 1), tokens)


@pytest.mark.parametrize("changes", [{"use_moe": False}, {"moe_top_k": 2}, {"gradient_checkpointing": True}, LATENT])
def test_a_batch_of_padding_trains_nothing_and_breaks_nothing(tiny, changes):
    """The last step of a run may give a rank only padding: loss and gradients are 0, and every parameter has a gradient."""
    model = tiny(num_shared_experts=1, **changes)
    out = model(ids(), labels=torch.full((2, 16), -100), document_ids=torch.zeros(2, 16, dtype=torch.long), return_aux=True)
    loss = out.loss_sum if out.router is None else out.loss_sum + out.router.prob_sum_LE.sum() + out.router.z_sum_L.sum()
    loss.backward()
    assert loss == 0 and out.num_labels == 0
    assert all(parameter.grad is not None and parameter.grad.abs().sum() == 0 for parameter in model.parameters())


def test_deterministic(tiny):
    model, tokens = tiny(moe_top_k=2), ids(4, 32)
    grads = [torch.autograd.grad(model(tokens, labels=tokens), list(model.parameters())) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_inference_mode_first_does_not_spoil_training(tiny):
    model, tokens = tiny(), ids()
    with torch.inference_mode():
        model(tokens)
    model(tokens, labels=tokens).backward()


def test_state_dict_round_trip_on_meta(tiny):
    """A model built on meta and given a state dict computes the same: nothing needed lives outside parameters and buffers."""
    model, tokens = tiny(moe_top_k=2, router_score="sigmoid").eval(), ids()
    model.update_router_bias(torch.tensor([[9.0, 1, 1, 1]] * 2), 0.1)
    with torch.device("meta"):
        other = DeepSeekTransformer(DeepSeekConfig.from_dict(model.config.to_dict()))
    other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert torch.equal(other.eval()(tokens), model(tokens))


def test_c008_footprint_of_spread_experts_is_that_of_one_rank(tiny):
    from lumina_engine.model.exchange import ExpertGroup

    model = tiny(num_experts=4, expert_parallel_size=2)
    model.spread_experts(ExpertGroup(None, 0, 2, None, 1))
    assert model.get_memory_footprint()["parameters"] == 4 * sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="float64"):
        model.double().get_memory_footprint()
