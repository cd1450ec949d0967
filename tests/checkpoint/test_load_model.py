"""From a committed checkpoint to a model that talks: the same logits, its own tokenizer, or a refusal (C101, R11, R35)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lumina_engine.checkpoint.commit import CheckpointError, verify
from lumina_engine.checkpoint.consolidate import consolidate
from lumina_engine.checkpoint.manager import CheckpointManager, Payload, load_model
from lumina_engine.checkpoint.resume import check_ledger
from lumina_engine.config.schema import Config, DeepSeekConfig
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.model.transformer import DeepSeekTransformer
from tests.checkpoint.helpers import rewrite_manifest

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "seq_length": 64,
    "num_experts": 4,
}


def model_of(**changes: Any) -> DeepSeekTransformer:
    model = DeepSeekTransformer(DeepSeekConfig(**{**SHAPE, "intermediate_size": 64, **changes})).eval()
    generator = torch.Generator().manual_seed(1)
    for layer in model.expert_layers:
        layer.router.bias.copy_(torch.randn(layer.router.bias.shape, generator=generator))
    return model


def payload_of(model: DeepSeekTransformer, **changes: Any) -> Payload:
    tokenizer = ConversationTokenizer("lumina-1k")
    values: dict[str, Any] = {
        "step": 12,
        "epoch": 1,
        "tokens": 345,
        "model": dict(model.state_dict()),
        "model_config": model.config.to_dict(),
        "tokenizer": {"name": tokenizer.name, "digest": tokenizer.digest},
        "metrics": {"loss": 2.5},
    }
    return Payload(**{**values, **changes})


def commit(run: Path, made: Payload) -> Path:
    (result,) = CheckpointManager(Config(), run).save(made)
    assert result.path is not None, result
    return result.path


@pytest.mark.parametrize(
    "changes", [{}, {"use_moe": False, "tie_word_embeddings": False}, {"moe_top_k": 2, "num_shared_experts": 1}], ids=str
)
def test_c101_logits_equal_the_trainers_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = model_of(**changes)
    path = commit(tmp_path / "run", payload_of(model))
    loaded, tokenizer, info = load_model(path)
    ids = torch.tensor([tokenizer.encode_conversation([{"role": "user", "content": "How many legs has a spider?"}])])
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))
    assert not loaded.training and loaded.config == model.config
    assert {name: info[name] for name in ("run", "name", "step", "epoch", "tokens", "metrics", "dtype", "tokenizer")} == {
        "run": "run", "name": "step-000012", "step": 12, "epoch": 1, "tokens": 345, "metrics": {"loss": 2.5},
        "dtype": "float32", "tokenizer": "lumina-1k",
    }  # fmt: skip
    assert info["digest"] == verify(path).digest and info["parameters"] == sum(p.numel() for p in model.parameters())


def test_c101_other_precision_and_bf16_weights(tmp_path: Path) -> None:
    path = commit(tmp_path / "run", payload_of(model_of().to(torch.bfloat16)))
    ids = torch.arange(20)[None]
    loaded, _, info = load_model(str(path))
    assert info["dtype"] == "bfloat16" and loaded(ids).dtype == torch.bfloat16
    loaded, _, info = load_model(path, dtype=torch.float32)
    assert info["dtype"] == "float32" and loaded(ids).dtype == torch.float32


def test_c101_by_run_name_and_newest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUMINA_RUNS", str(tmp_path))
    path = commit(tmp_path / "run", payload_of(model_of()))
    assert load_model("run")[2]["path"] == load_model("run@latest")[2]["path"] == str(path)


def test_c101_damage_elsewhere_does_not_keep_the_model_from_talking(tmp_path: Path) -> None:
    path = commit(tmp_path / "run", payload_of(model_of()))
    state = path / "state" / "rank-00000.json"
    state.write_bytes(state.read_bytes().replace(b"0", b"1"))
    load_model(path)
    weights = path / "model" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 4)
    with pytest.raises(CheckpointError, match=r"model/model\.safetensors: has \d+ bytes, \d+ were written"):
        load_model(path)


@pytest.mark.parametrize("kind", ["missing", "shape", "unknown", "config", "no_config"])
def test_r35_never_random_partial_or_guessed_weights(tmp_path: Path, kind: str) -> None:
    model = model_of()
    made = payload_of(model)
    words = "the weights do not fit model/config.json: "
    if kind == "missing":
        del made.model["blocks.1.ffn.w2"]
        words += "missing in the checkpoint: blocks.1.ffn.w2"
    elif kind == "shape":
        made.model["norm.weight"] = torch.ones(32)
        words += r"other shape: norm.weight \(32,\) in the checkpoint, \(64,\) in the model"
    elif kind == "unknown":
        made.model["extra"] = torch.ones(1)
        words += "unknown to the model: extra"
    elif kind == "config":
        made.model_config["hidden_sizes"] = 3
        words = "model/config.json describes no model of this version"
    else:
        made.model_config = {}
        words = "model/config.json|do not fit"
    with pytest.raises(CheckpointError, match=words):
        load_model(commit(tmp_path / "run", made))


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        ({}, "names no tokenizer"),
        ({"name": "lumina-1k", "digest": "0" * 64}, "of digest 0000000000000000, the one here has"),
        ({"name": "gpt-9", "digest": "0" * 64}, "needs tokenizer gpt-9"),
    ],
)
def test_r11_a_tokenizer_is_never_replaced_by_another(tmp_path: Path, tokenizer: dict[str, str], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_model(commit(tmp_path / "run", payload_of(model_of(), tokenizer=tokenizer)))


def test_r07_an_embedding_smaller_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lumina-1k has 1024 ids, the embedding 512 rows"):
        load_model(commit(tmp_path / "run", payload_of(model_of(vocab_size=512))))


def test_c079_a_plain_script_saves_what_chat_can_load(tmp_path: Path) -> None:
    model = model_of()
    made = CheckpointManager(Config(tokenizer="lumina-1k"), tmp_path / "run")
    path = made.save_checkpoint(model=model, global_step=3, metrics={"loss": 1.0}, is_best=True)
    assert json.loads((path / "model" / "tokenizer.json").read_text())["name"] == "lumina-1k"
    loaded, _, _ = load_model(path)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))


def test_ck15_a_chat_that_is_loading_holds_retention_off(tmp_path: Path) -> None:
    """The load of chat, in a process of its own, stopped in the middle of the digests; the trainer's retention comes by."""
    path = commit(tmp_path, payload_of(model_of()))
    inside, tell_inside = os.pipe()
    wait_here, go_on = os.pipe()
    child = os.fork()
    if child == 0:
        stopped = False

        def progress(done: int, total: int) -> None:
            nonlocal stopped
            if not stopped:
                stopped = True
                os.write(tell_inside, b"x")
                os.read(wait_here, 1)

        try:
            model, _, facts = load_model(path, progress=progress)
            os._exit(0 if facts["step"] == 12 and len(list(model.parameters())) else 3)
        except BaseException:
            os._exit(1)
    assert os.read(inside, 1) == b"x"
    made = CheckpointManager(Config(keep_checkpoints=2), tmp_path)
    made.recover()
    for step in (13, 14, 15):
        (result,) = made.save(payload_of(model_of(), step=step))
        assert result.failed is None
    assert result.notes == ("step-000012 is being read and stays for now",) and path.is_dir()
    os.write(go_on, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    made.save(payload_of(model_of(), step=16))
    assert not path.exists()


@pytest.mark.parametrize("place", ["elsewhere/joined", "run/joined"])
@pytest.mark.parametrize("moved", [False, True])
def test_c081_a_consolidated_checkpoint_is_known_wherever_it_lies(tmp_path: Path, place: str, moved: bool) -> None:
    """It is no longer what the run committed at that step, but this user made it; replaced, it is refused as any other."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"id": "0123456789ab"}))
    source = commit(tmp_path / "run", payload_of(model_of()))
    out = tmp_path / ("made" if moved else place)
    made = Path(consolidate(source, out)["path"])
    if moved:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        out.rename(tmp_path / place)
        made = tmp_path / place / made.name
    report = verify(made)
    assert report.manifest["run"] != "0123456789ab"
    assert report.manifest["consolidated_from"] == {"run": "0123456789ab", "digest": verify(source).digest}
    assert check_ledger(report) == [] and load_model(made)[2]["step"] == 12
    rewrite_manifest(made, tokens=1)
    with pytest.raises(CheckpointError, match="was replaced after"):
        load_model(made)
