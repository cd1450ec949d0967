"""`lumina-engine train` refuses before anything is made: malformed data, no room, keys that a resumed run must keep."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from lumina_engine.cli import main
from lumina_engine.commands import train
from lumina_engine.config.presets import ConfigPresets
from lumina_engine.config.resolve import left_to_auto
from lumina_engine.config.schema import Config, ConfigError
from lumina_engine.data import size
from lumina_engine.data.conversation import DataError
from lumina_engine.data.vocabulary import tiktoken_file
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MetricLog
from lumina_engine.run import directory
from lumina_engine.run.directory import RunDirectory, RunError, auto_name, check_name

GOOD = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}) + "\n"


def call(root: Path, *words: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    argv = [sys.executable, "-m", "lumina_engine.cli", "train", "--preset", "debug", "--runs", str(root / "runs"), *words]
    return subprocess.run(
        argv, cwd=root, capture_output=True, text=True, timeout=120, preexec_fn=small_files if limit else None
    )


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"messages": [\n', "d.jsonl:2"),
        (GOOD + "not json\n", "d.jsonl:2"),
        ('{"a": 1}\n', "no known layout"),
        ("[" + GOOD.strip(), "not closed"),
    ],
)
def test_c130_malformed_data_is_refused_before_the_folder_exists(tmp_path: Path, text: str, place: str) -> None:
    (tmp_path / "d.jsonl").write_text(text)
    done = call(tmp_path, "--run", "mine", "--detach", "train_data_path=d.jsonl")
    assert done.returncode == 65 and place in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "mine").exists()


def test_c130_the_head_of_every_file_is_read_and_no_more(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text(GOOD * 50)
    size.check_head(str(tmp_path), conversations=30)
    (tmp_path / "2.jsonl").write_text(GOOD * 50 + "x\n")
    size.check_head(str(tmp_path), conversations=30)
    with pytest.raises(DataError, match=r"2\.jsonl:51"):
        size.check_head(str(tmp_path), conversations=300)


def test_c130_a_disk_that_fills_while_the_folder_is_made_leaves_the_name_free(tmp_path: Path) -> None:
    done = call(tmp_path, "--run", "mine", "--detach", limit=1024)
    assert done.returncode == 1 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "mine").exists()


def test_c130_room_for_the_token_stores_is_asked_unless_they_are_there(tmp_path: Path, monkeypatch) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text(GOOD * 1000)
    config = Config(train_data_path=str(data), data_cache_dir=str(tmp_path / "cache"), tokenizer="lumina-1k")
    need = size.cache_bytes(config)
    assert need >= 2 * data.stat().st_size
    monkeypatch.setattr(directory, "free_space", lambda path: (Path(path), need - 1))
    with pytest.raises(RunError, match="set data_cache_dir") as caught:
        train._require_cache_space(config)
    assert str(tmp_path / "cache") in str(caught.value)
    from lumina_engine.data.store import open_data
    from lumina_engine.data.tokenizer import ConversationTokenizer

    opened = open_data(config, ConversationTokenizer("lumina-1k"))
    train._require_cache_space(config)
    found = size.counted(config, size.content_digest(config))
    assert found is not None and found.tokens == opened.train.num_tokens and found.fingerprint == opened.train.fingerprint
    data.write_text(GOOD * 999)
    assert size.counted(config, size.content_digest(config)) is None


def test_c139_tokens_are_guessed_from_what_training_would_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD * 10)
    (tmp_path / "notes.pdf").write_bytes(b"x" * 10_000)
    assert size.data_files(str(tmp_path)) == [tmp_path / "a.jsonl"]
    tokens, basis = size.train_tokens(Config(train_data_path=str(tmp_path)))
    assert tokens == len(GOOD) * 10 // 4 and basis.startswith("guessed")
    assert size.train_tokens(Config()) == (None, "") and size.train_tokens(Config(), 5) == (5, "given")
    assert size.data_bytes(["missing", str(tmp_path / "*.jsonl")]) == len(GOOD) * 10


def test_c085_resume_has_one_rule_for_what_may_change(tmp_path: Path) -> None:
    old = ConfigPresets.debug()
    for words, key in (
        (["hidden_size=256"], "hidden_size"),
        (["batch_size=3"], "batch_size"),
    ):
        arguments = train.argparse.Namespace(preset=None, config=None, overrides=words)
        with pytest.raises(ConfigError) as caught:
            train._changed(old, arguments, RunDirectory(tmp_path))
        assert [f.keys[0] for f in caught.value.findings] == [key]
    arguments.overrides = ["batch_size=4", "gradient_accumulation_steps=2", "max_steps=9", "zero_stage=1"]
    new = train._changed(old, arguments, RunDirectory(tmp_path))
    assert (new.batch_size, new.max_steps, new.hidden_size, new.zero_stage) == (4, 9, 128, 1)


def resumed(old: Config, *words: str, root: Path = Path("no-such-run")) -> Config:
    arguments = train.argparse.Namespace(preset=None, config=None, overrides=list(words))
    return train._changed(old, arguments, RunDirectory(root))


def test_c085_one_factor_of_the_batch_takes_the_other_with_it() -> None:
    """A requeued job gives its command again, although Lumina has halved the micro batch since."""
    old = Config(batch_size=8, gradient_accumulation_steps=2, num_gpus=1)
    for word, batch in (("batch_size=16", (16, 1)), ("batch_size=2", (2, 8)), ("gradient_accumulation_steps=1", (16, 1))):
        new = resumed(old, word)
        assert (new.batch_size, new.gradient_accumulation_steps) == batch
    new = resumed(old, "num_gpus=2", "batch_size=4")
    assert (new.batch_size, new.gradient_accumulation_steps) == (4, 2)


def test_c099_the_experts_that_a_run_changed_itself_stay_when_its_command_is_given_again(tmp_path: Path) -> None:
    """A requeued job gives the number and the room from before; any other number is as wrong as ever."""
    grown = Config(num_experts=5, capacity_factor=1.5625, moe_top_k=1)
    before = ["num_experts=4", "capacity_factor=1.25", "moe_top_k=1"]
    with pytest.raises(ConfigError, match="num_experts = 4: cannot change in a resumed run"):
        resumed(grown, *before, root=tmp_path)
    with MetricLog(tmp_path / "metrics.jsonl", 1, sync_interval=0) as log:
        log.emit(rec.Change(what="num_experts", step=9, before=4, after=5, by="adaptive"))
        with pytest.raises(ConfigError):
            resumed(grown, *before, root=tmp_path)
        log.emit(rec.Change(what="num_experts", step=9, before=4, after=5, by="recovery"))
        log.emit(rec.Change(what="capacity_factor", step=9, before=1.25, after=1.5625, by="recovery"))
    assert resumed(grown, *before, root=tmp_path) == grown
    assert resumed(grown, "num_experts=4", "capacity_factor=2", root=tmp_path).capacity_factor == 2
    assert resumed(grown, "num_experts=5", "capacity_factor=1.25", root=tmp_path).capacity_factor == 1.25
    with pytest.raises(ConfigError, match="num_experts = 8"):
        resumed(grown, "num_experts=8", root=tmp_path)


def test_c085_auto_on_the_command_line_is_resolved_anew() -> None:
    old = Config(master_port=29_500, reduce_bucket_size=200_000_000, hidden_size=256)
    new = resumed(old, "master_port=auto", "reduce_bucket_size=auto", "vocab_size=auto")
    assert (new.master_port, new.reduce_bucket_size, new.vocab_size) == ("auto", "auto", old.vocab_size)


REDUCTION = ("overlap_comm", "contiguous_gradients", "allgather_bucket_size", "reduce_bucket_size")


@pytest.mark.parametrize(
    ("keys", "values", "auto"),
    [
        ({"zero_stage": 1}, (False, False, 2_000_000, 2_000_000), True),  # auto on a CPU
        ({"zero_stage": 2}, (True, True, 2_000_000, 2_000_000), True),
        ({"zero_stage": 1}, (True, True, 200_000_000, 200_000_000), True),  # auto on a GPU
        ({"zero_stage": 3}, (True, True, "auto", 2_000_000), True),  # stage 3 does not read what is left at auto
        ({"zero_stage": 1}, (True, True, 2_000_000, 2_000_000), False),
        ({"zero_stage": 2}, (False, False, 2_000_000, 2_000_000), False),
        ({"zero_stage": 1}, (False, False, 2_000_000, 1_000_000), False),
        ({"zero_stage": 0}, (True, True, "auto", "auto"), True),  # no effect
        ({"use_deepspeed": False, "zero_stage": 1}, (True, True, "auto", "auto"), True),
    ],
)
def test_c085_a_resumed_run_leaves_to_auto_what_auto_chose(
    keys: dict[str, object], values: tuple[object, ...], auto: bool
) -> None:
    stored = Config(**{"use_deepspeed": True} | keys | dict(zip(REDUCTION, values, strict=True)))
    found = left_to_auto(stored)
    assert [getattr(found, name) for name in REDUCTION] == (["auto"] * 4 if auto else list(values))
    assert found.model_copy(update=dict(zip(REDUCTION, values, strict=True))) == stored


def test_c085_another_stage_on_resume_reduces_as_auto_says_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LUMINA_RUNS", str(tmp_path))
    path = RunDirectory.create(tmp_path, "old").path
    chosen = dict(zip(REDUCTION, (False, False, 2_000_000, 2_000_000), strict=True))
    Config(use_deepspeed=True, zero_stage=1, tokenizer="lumina-1k", num_gpus=1, **chosen).save(path / "config.yaml")
    assert main(["train", "--run", "old", "--resume", "--dry-run", "--json", "zero_stage=2"]) == 0
    zero = json.loads(capsys.readouterr().out)["deepspeed"]["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["contiguous_gradients"]) == (2, True, True)


@pytest.mark.parametrize("tasks", [False, True])
def test_c085_the_same_command_resumes_with_relative_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tasks: bool
) -> None:
    """One command serves a requeued job: what its first start stored as absolute paths is what the second one means."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "ev"):
        (tmp_path / f"{name}.jsonl").write_text(GOOD * 50)
    (tmp_path / "own.tiktoken").write_bytes(tiktoken_file([bytes((byte,)) for byte in range(256)]))
    words = ["train", "--preset", "debug", "--runs", "runs", "--run", "mine", "--resume", "--dry-run", "tokenizer=own.tiktoken"]
    words += ["eval_data_path=./ev.jsonl", "data_cache_dir=cache", "backup_path=../backups", "nvme_path=disk"]
    if tasks:
        words += ["multi_task=true", "task_data_paths={x: a.jsonl, y: [b.jsonl]}", "task_weights={x: 1, y: 1}"]
    else:
        words += ["train_data_path=[a.jsonl, b.jsonl]"]
    parser = train.argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args(words[1:])
    plan = train._plan(args, "mine")
    run = RunDirectory.create(tmp_path / "runs", "mine", preset=plan.preset)
    train._write_plan(run, plan)
    saved = Config.load(run.config_path)
    assert (saved.tokenizer, saved.nvme_path) == (str(tmp_path / "own.tiktoken"), str(tmp_path / "disk"))
    assert train.run(args) == 0
    args.overrides.append("tokenizer=other.tiktoken")
    with pytest.raises(ConfigError, match=r"tokenizer = .*other\.tiktoken: cannot change"):
        train.run(args)


def test_c130_names_made_up_are_names(tmp_path: Path) -> None:
    for number, stem in enumerate(("debug", "../x", "", "ä b\x1b", "a" * 200, "-.-")):
        name = auto_name(stem, float(number))
        check_name(name)
        assert RunDirectory.create(tmp_path, name).path.parent == tmp_path
