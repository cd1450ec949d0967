"""Experts added to and taken from a committed checkpoint (C99): the function is kept, training goes on, the new count loads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lumina_engine.checkpoint.files import CheckpointError
from lumina_engine.checkpoint.growth import Merge, Split, coldest, grow, hottest, open_source, shrink
from lumina_engine.checkpoint.manager import CheckpointManager, Payload, load_model
from lumina_engine.checkpoint.verify import verify
from lumina_engine.commands.experts import loads
from lumina_engine.config.schema import Config, DeepSeekConfig
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.model.transformer import DeepSeekTransformer
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.decisions import of_controller, replay
from lumina_engine.monitoring.log import MetricLog
from tests.faults.tiny import KEYS, Tiny

ONE = {"moe_top_k": 1, "num_experts": 4, "num_dense_layers": 0}


@pytest.fixture(scope="module")
def tokenizer() -> ConversationTokenizer:
    return ConversationTokenizer("lumina-1k")


def committed(root: Path, tokenizer: ConversationTokenizer, **keys: Any) -> Path:
    """The checkpoint of a random model with opinions, biases and state, as a run without a log would have it."""
    config = Config(**{**KEYS, **ONE, "vocab_size": tokenizer.padded_vocab_size, "dropout": 0.0, **keys})
    model = DeepSeekTransformer(DeepSeekConfig.from_config(config).model_copy(update={"init_std": 0.1}))
    model.init_weights(7)
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if name.endswith("router.bias"):
            tensor.copy_(torch.linspace(-0.05, 0.05, len(tensor)))
    state = {
        f"optimizer.{kind}.{n}": torch.rand_like(p) for n, p in model.named_parameters() for kind in ("exp_avg", "exp_avg_sq")
    }
    state |= {f"optimizer.step.{n}": torch.tensor(5.0) for n, _ in model.named_parameters()}
    state["routing.counts"] = torch.tensor(
        [[5.0, 1, 2, 3, 0, 0][: config.num_experts]] * len(model.expert_layers), dtype=torch.float64
    )
    made = Payload(
        step=30,
        epoch=1,
        tokens=900,
        model=tensors,
        model_config=model.config.to_dict(),
        tokenizer={"name": tokenizer.name, "digest": tokenizer.digest},
        rank_tensors=state,
    )
    [result] = CheckpointManager(config, root / "old").save(made, best=True)
    assert result.path is not None, result.failed
    return result.path


def outputs(path: Path | str, training: bool = False) -> list[torch.Tensor]:
    """Logits, loss sum, z-loss, dropped choices and whole probability of the model in a checkpoint on fixed tokens."""
    model, _, _ = load_model(path)
    model.train(training)
    tokens = torch.randint(0, 1000, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens)
        out = model(tokens, labels=tokens, return_aux=True)
    assert out.router is not None
    return [logits, out.loss_sum, out.router.z_sum_L, out.router.dropped_L, out.router.prob_sum_LE.sum(-1)]


@pytest.mark.parametrize("router", [{"num_shared_experts": 1}, {"router_normalize": True}, {"router_score": "sigmoid"}])
def test_c099_a_grown_model_says_what_it_said(tmp_path: Path, tokenizer: ConversationTokenizer, router: dict[str, Any]) -> None:
    path = committed(tmp_path, tokenizer, **router)
    before, digest = outputs(path), verify(path).digest
    for turn in range(2):  # the second splits a twin once more
        source = open_source(str(path))
        done = grow(source, dict.fromkeys(source.layers, [1, 4][turn]), tmp_path, f"grown-{turn}")
        assert done["experts"] == {"before": 4 + turn, "after": 5 + turn} and done["parameters_added"] > 0
        path = Path(done["path"])
        compared = [0, 1, 3, 4] if "router_score" in router else range(5)  # the z-loss of sigmoid counts each logit
        after = outputs(path)
        for was, now in ((before[i], after[i]) for i in compared):
            torch.testing.assert_close(now, was, atol=1e-6, rtol=1e-6)
        model, _, facts = load_model(path)
        assert model.config.num_experts == 5 + turn and facts["step"] == 30
        assert Config.load(tmp_path / f"grown-{turn}" / "config.yaml").num_experts == 5 + turn
    assert verify(tmp_path / "old" / "checkpoints" / "step-000030").digest == digest


def test_c099_training_drops_no_more_than_it_did(tmp_path: Path, tokenizer: ConversationTokenizer) -> None:
    path = committed(tmp_path, tokenizer, capacity_factor=1.0, router_jitter_noise=0.0, num_layers=1)
    before = outputs(path, training=True)[3]
    for expert in range(4):
        done = grow(open_source(str(path)), {0: expert}, tmp_path, f"grown-{expert}")
        assert 0 <= float(outputs(done["path"], training=True)[3]) <= float(before)
        assert float(before) > 0 and load_model(done["path"])[0].config.capacity_factor == 1.25


def test_c099_state_follows_the_experts(tmp_path: Path, tokenizer: ConversationTokenizer) -> None:
    source = open_source(str(committed(tmp_path, tokenizer)))
    assert source.window() == {0: [5, 1, 2, 3], 1: [5, 1, 2, 3]}
    assert hottest(source.window() or {}, {1: 3}) == {0: 0, 1: 3} and coldest(source.window() or {}, {}) == {0: 1, 1: 1}
    after = open_source(grow(source, {0: 0, 1: 3}, tmp_path, "grown")["path"])
    old, new = source.loaded.rank_tensors, after.loaded.rank_tensors
    for layer, expert in {0: 0, 1: 3}.items():
        for part in ("w13", "w2", "router.weight"):
            for kind in ("exp_avg", "exp_avg_sq"):
                name = f"optimizer.{kind}.blocks.{layer}.ffn.{part}"
                assert torch.equal(new[name], torch.cat((old[name], old[name][expert : expert + 1])))
    assert new["routing.counts"].tolist() == [[5, 1, 2, 3, 0]] * 2
    same = [name for name in old if ".ffn." not in name and name != "routing.counts"]
    assert same and all(torch.equal(old[name], new[name]) for name in same)
    told = after.report.manifest["experts_changed"]
    assert told["from"] == source.report.digest and told["layers"]["1"] == {"expert": 3}


def test_c099_the_log_of_a_run_that_grew_tells_the_loads_of_each_of_its_checkpoints(tmp_path: Path) -> None:
    """Also of one from before: what came later, of other experts, is not its."""
    with MetricLog(tmp_path / "metrics.jsonl", 1, sync_interval=0) as log:
        for step, load in ((50, [9.0, 1.0]), (150, [1.0, 2.0]), (200, [3.0, 4.0]), (250, [1.0, 1.0, 1.0])):
            log.emit(rec.Experts(step=step, layers=[0], load=[load]))

    def told(step: int, experts: int) -> Any:
        path, loaded = tmp_path / "checkpoints" / f"step-{step:06d}", SimpleNamespace(step=step)
        return loads(SimpleNamespace(path=path, loaded=loaded, layers=[0], experts=experts, window=lambda: "its own"))  # type: ignore[arg-type]

    assert told(200, 2) == {0: [4.0, 6.0]} and told(300, 3) == {0: [1.0, 1.0, 1.0]}
    assert told(300, 2) == "its own", "the log has nothing of so many experts there"


def test_c099_growing_refuses_what_it_cannot_do_exactly(tmp_path: Path, tokenizer: ConversationTokenizer) -> None:
    two = open_source(str(committed(tmp_path / "two", tokenizer, moe_top_k=2)))
    with pytest.raises(CheckpointError, match="moe_top_k = 2: a twin would take the slot"):
        grow(two, {0: 0, 1: 0}, tmp_path, "new")
    full = open_source(str(committed(tmp_path / "full", tokenizer, max_num_experts=4)))
    with pytest.raises(CheckpointError, match="4 experts, and max_num_experts = 4"):
        grow(full, {0: 0, 1: 0}, tmp_path, "new")
    with pytest.raises(CheckpointError, match="expert_parallel_size = 2"):
        open_source(str(committed(tmp_path / "spread", tokenizer, expert_parallel_size=2)))
    with pytest.raises(CheckpointError, match="use_moe"):
        open_source(str(committed(tmp_path / "dense", tokenizer, use_moe=False)))
    plain = open_source(str(committed(tmp_path / "plain", tokenizer)))
    for experts, words in (({0: 4, 1: 0}, "no expert 4"), ({0: 0, 1: 0, 2: 0}, "layer 2 has no experts"), ({0: 0}, "layer 1")):
        with pytest.raises(CheckpointError, match=words):
            grow(plain, experts, tmp_path, "new")
    assert not (tmp_path / "new").exists()


def test_c099_twins_come_together_again(tmp_path: Path, tokenizer: ConversationTokenizer) -> None:
    path = committed(tmp_path, tokenizer)
    grown = open_source(grow(open_source(str(path)), {0: 2, 1: 0}, tmp_path, "grown")["path"])
    losses: list[int] = []

    def probe(shape: Any, weights: Any) -> float:
        losses.append(shape["num_experts"])
        return 2.0

    done = shrink(grown, {0: 4, 1: 4}, None, tmp_path, "back", probe)
    assert [row["into"] for row in done["layers"]] == [2, 0] and losses == [5, 4]
    was, now = open_source(str(path)).loaded.model, open_source(done["path"]).loaded.model
    assert all(torch.equal(was[name], now[name]) for name in was)
    for before, after in zip(outputs(path), outputs(done["path"]), strict=True):
        assert torch.equal(before, after)


def test_c099_a_removal_that_costs_is_undone(tmp_path: Path, tokenizer: ConversationTokenizer) -> None:
    source = open_source(str(committed(tmp_path, tokenizer)))
    with pytest.raises(CheckpointError, match=r"from 2\.0000 to 2\.0300 \(\+1\.5 %, more than 1 %\): undone"):
        shrink(source, {0: 0, 1: 0}, None, tmp_path, "less", lambda shape, _: 2.0 if shape["num_experts"] == 4 else 2.03)
    assert not (tmp_path / "less").exists()


def test_c099_a_merged_expert_is_the_mean_by_load() -> None:
    weights, logs = torch.tensor([[0.0], [4.0], [8.0]]), torch.tensor([1.0, 1.0, 2.0])
    assert Merge(2, 0, 0.25)("w2", weights).tolist() == [[2.0], [4.0]]
    assert Merge(0, 1, 0.5)("router.bias", weights).tolist() == [[4.0], [8.0]]
    assert Merge(1, 0, 0.5)("router.log2_multiplicity", logs).tolist() == [0.0, 2.0]
    assert Split(2)("router.log2_multiplicity", logs).tolist() == [1.0, 1.0, 3.0, 3.0]


def test_c099_training_goes_on_from_a_grown_checkpoint(tmp_path: Path) -> None:
    """Twins are one function at the first step, and two that are both used some steps later."""
    keys = {**ONE, "dropout": 0.0, "router_jitter_noise": 0.0, "max_steps": 28, "moe_dropless": True}
    first = Tiny(tmp_path, "old", **keys)
    first.train(until=8)
    seen = [record for record in first.records if isinstance(record, rec.Experts)][-1]
    source = open_source(str(tmp_path / "old" / "checkpoints" / "step-000008"))
    grow(source, hottest(dict(zip(seen.layers, seen.load, strict=True)), {}), tmp_path, "grown")
    runs = [Tiny(tmp_path, "old", **keys), Tiny(tmp_path, "grown", **{**keys, "num_experts": 5})]
    for run in runs:
        assert run.resume().changed == {}
        run.train()
    old, new = ([record for record in run.records if isinstance(record, rec.Step)] for run in runs)
    assert new[0].step == 9 and new[0].loss == pytest.approx(old[0].loss, abs=1e-6)
    assert new[-1].step == 28 and new[-1].loss < new[0].loss
    last = [record for record in runs[1].records if isinstance(record, rec.Experts)][-1]
    assert all(len(load) == 5 and load[4] > 0 for load in last.load)
    model, _, _ = load_model(tmp_path / "grown")
    assert model.config.num_experts == 5 and [len(layer.w13) for layer in model.expert_layers] == [5, 5]


@pytest.mark.parametrize("change", [1, -1], ids=["grow", "shrink"])
def test_c099_the_controllers_of_the_new_run_begin_with_its_log(tmp_path: Path, change: int) -> None:
    """What they saw and did of another number of experts, in a log that the new run has not, is none of its own."""
    keys = {
        **ONE,
        "adaptive": "act",
        "adaptive_cooldown_steps": 10,
        "expert_log_interval": 2,
        "router_bias_rate": 0.0,
        "load_balancing_weight": 0.005,
        "moe_dropless": True,
        "max_steps": 60,
        "spike_policy": "alert",
    }
    first = Tiny(tmp_path, "old", **keys)
    for layer in first.trainer.model.expert_layers:
        layer.router.bias[1:] = -1e9
    first.train(until=20)
    decided = [record for record in first.records if of_controller(record)]
    assert decided and first.trainer.adaptive.load_balancing_weight == 0.01
    source = open_source(str(tmp_path / "old" / "checkpoints" / "step-000020"))
    if change > 0:
        grow(source, {0: 0, 1: 0}, tmp_path, "new")
    else:
        shrink(source, {0: 3, 1: 3}, None, tmp_path, "new", lambda shape, weights: 2.0)
    new = Tiny(tmp_path, "new", **{**keys, "num_experts": 4 + change})
    new.resume()
    assert new.trainer.adaptive.load_balancing_weight == 0.005
    new.train()
    assert [r.step for r in new.records if isinstance(r, rec.Experts)][-1] == 60
    log = [rec.Rewind(to_step=20), *new.records]
    found = replay([rec.decode(rec.encode(record)) for record in log], new.config)
    assert found.agrees and found.differences == []
    assert change < 0 or [record.what for record in found.decisions][:1] == ["load_balancing_weight"]
