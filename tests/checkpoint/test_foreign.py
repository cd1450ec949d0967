"""C143, R18: a checkpoint as a Hugging Face folder and back, by the command line; what cannot be is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch

from lumina_engine.checkpoint.manager import load_model
from lumina_engine.cli import main
from lumina_engine.data.tokenizer import ConversationTokenizer
from tests.chat.models import make_model, save_model
from tests.checkpoint.helpers import umask

LATENT = {"attention": "mla", "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
SHAPES = {
    "mixtral": {},
    "qwen2_moe": {"moe_top_k": 1},
    "glm4_moe": {"router_score": "sigmoid", "num_shared_experts": 1},
    "deepseek_v3": {"router_score": "sigmoid", "num_shared_experts": 1, "num_dense_layers": 1, **LATENT},
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tokenizer() -> ConversationTokenizer:
    return ConversationTokenizer("lumina-1k")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUMINA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "runs"


@pytest.fixture
def exported(runs: Path, tokenizer: ConversationTokenizer, tmp_path: Path) -> Path:
    save_model(make_model(tokenizer), tokenizer, runs / "mine")
    assert main(["checkpoint", "export", "mine", str(tmp_path / "out")]) == 0
    return tmp_path / "out"


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_c143_export_and_import_by_the_command_line(runs, tokenizer, tmp_path, capsys, layout):
    """transformers loads the folder and computes the same logits; imported again they are bit-equal."""
    transformers = pytest.importorskip("transformers")
    model = make_model(tokenizer, **SHAPES[layout])
    save_model(model, tokenizer, runs / "mine")
    out = tmp_path / "deep" / "out"
    assert main(["checkpoint", "export", "mine", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == layout
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    tokens = torch.randint(0, 1024, (2, 40))
    with torch.no_grad():
        expected = model(tokens)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True).eval()
        torch.testing.assert_close(theirs(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    assert main(["checkpoint", "import", str(out), "--run", "again", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        again, named, facts = load_model("again@best")
        assert torch.equal(again(tokens), expected)
    assert named.name == "lumina-1k" and facts["step"] == 0
    assert main(["checkpoint", "verify", "again"]) == 0
    assert main(["runs", "list", "--json"]) == 0
    [row] = [row for row in json.loads(capsys.readouterr().out.split("\n", 1)[1]) if row["name"] == "again"]
    assert row["state"] == "finished"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_c143_shards_and_links_of_another_writer(runs, tokenizer, tmp_path):
    """As transformers writes a large model, and as a model cache holds it."""
    transformers = pytest.importorskip("transformers")
    model = make_model(tokenizer)
    save_model(model, tokenizer, runs / "mine")
    out, cache = tmp_path / "out", tmp_path / "cache"
    assert main(["checkpoint", "export", "mine", str(out)]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, local_files_only=True)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    cache.mkdir()
    for file in (tmp_path / "shards").iterdir():
        (cache / file.name).symlink_to(file)
    assert len(list(cache.glob("*.safetensors"))) > 1
    assert main(["checkpoint", "import", str(cache), "--run", "again", "--tokenizer", "lumina-1k"]) == 0
    tokens = torch.randint(0, 1024, (1, 30))
    with torch.no_grad():
        torch.testing.assert_close(load_model("again")[0](tokens), model.bfloat16()(tokens))


def test_c143_our_own_names_round_trip(runs, tokenizer, tmp_path):
    model = make_model(tokenizer, num_shared_experts=1, qk_norm=True)
    save_model(model, tokenizer, runs / "mine")
    assert main(["checkpoint", "export", "mine", str(tmp_path / "out"), "--format", "safetensors"]) == 0
    assert main(["checkpoint", "import", str(tmp_path / "out"), "--run", "again"]) == 0
    tokens = torch.randint(0, 1024, (1, 30))
    with torch.no_grad():
        assert torch.equal(load_model("again")[0](tokens), model(tokens))


def test_r18_what_no_layout_can_hold_is_refused_by_the_key(runs, tokenizer, tmp_path, capsys):
    save_model(make_model(tokenizer, qk_norm=True), tokenizer, runs / "mine")
    assert main(["checkpoint", "export", "mine", str(tmp_path / "out")]) == 65
    assert "qk_norm=True has no Hugging Face layout here" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "state"]


def test_c143_export_never_overwrites(exported, capsys):
    before = (exported / "config.json").read_bytes()
    assert main(["checkpoint", "export", "mine", str(exported)]) == 65
    assert "exists: name a folder that does not" in capsys.readouterr().err
    assert (exported / "config.json").read_bytes() == before


def change(folder: Path, **entries: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in (values | entries).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


def test_ck17_the_modes_of_an_imported_run_do_not_depend_on_the_umask(exported: Path, runs: Path) -> None:
    with umask(0):
        assert main(["checkpoint", "import", str(exported), "--run", "again"]) == 0
    for path in (runs / "again").rglob("*"):
        assert path.is_symlink() or stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def drop_tokenizer(folder: Path) -> None:
    change(folder, lumina_tokenizer=...)


def other_tokenizer(folder: Path) -> None:
    change(folder, lumina_tokenizer={"name": "lumina-1k", "digest": "0" * 64})


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8])


def endless_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


def fifo_index(folder: Path) -> None:
    os.mkfifo(folder / "model.safetensors.index.json")


def long_config(folder: Path) -> None:
    with (folder / "config.json").open("a") as stream:
        stream.write(" " * (16 << 20))


def outside_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (drop_tokenizer, "does not say what its ids mean: give --tokenizer"),
        (other_tokenizer, "was trained with another tokenizer than lumina-1k"),
        (lambda folder: change(folder, vocab_size=1000), "other shape: embedding.weight (1024, 64)"),
        (lambda folder: change(folder, model_type="gemma"), "model_type='gemma' is not supported"),
        (lambda folder: change(folder, num_local_experts=...), "config.json has no entry num_local_experts"),
        (lambda folder: change(folder, num_hidden_layers=3), "the tensor model.layers.2"),
        (lambda folder: change(folder, num_hidden_layers=1), "tensors have no place in this model"),
        (lambda folder: change(folder, hidden_size=8), "hidden_size = 8"),
        (lambda folder: (folder / "config.json").write_text("[1"), "config.json"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (pickle_only, "pytorch_model.bin is a pickle: import that file itself, with --shape"),
        (truncated, "model.safetensors"),
        (outside_index, "names no files beside it"),
        (endless_config, "is no regular file"),
        (fifo_index, "is no regular file"),
        (long_config, "at most 16777216 are read"),
    ],
)
def test_c143_a_folder_that_does_not_fit_makes_no_run(exported, runs, capsys, spoil, words):
    spoil(exported)
    assert main(["checkpoint", "import", str(exported), "--run", "again"]) == 65
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and "unexpected" not in error
    assert not (runs / "again").exists()


def test_c143_an_existing_run_stays(exported, runs, capsys):
    assert main(["checkpoint", "import", str(exported), "--run", "mine"]) == 2
    assert "run mine exists" in capsys.readouterr().err
    assert main(["checkpoint", "import", str(exported), "--run", "../x"]) == 2
    assert main(["checkpoint", "import", str(exported), "--run", "again", "--tokenizer", "none-such"]) == 65
    change(exported, lumina_tokenizer=...)
    assert main(["checkpoint", "import", str(exported), "--run", "again", "--tokenizer", "gpt-4"]) == 65
    assert "tokenizer gpt-4 has 100,277 ids, the embedding 1,024 rows" in capsys.readouterr().err
    shutil.rmtree(exported)
    assert main(["checkpoint", "import", str(exported), "--run", "again"]) == 65
    assert main(["checkpoint", "import", str(runs / "mine" / "checkpoints" / "step-000100"), "--run", "again"]) == 65
