"""The trainer in a plain script: overfitting and talking back, evaluation, guards, figures (C1, C64-C68, FT04, R13)."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lumina_engine.chat.events import ModelInfo
from lumina_engine.chat.generate import LocalBackend
from lumina_engine.chat.session import ChatSession
from lumina_engine.checkpoint.keep import pointer
from lumina_engine.checkpoint.manager import CheckpointError, CheckpointManager, load_model
from lumina_engine.checkpoint.universal import SavedState, Shard
from lumina_engine.config.schema import Config, ConfigError
from lumina_engine.data.batch import ConversationDataset
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.model.transformer import DeepSeekTransformer
from lumina_engine.monitoring import record as rec
from lumina_engine.run.rank import Command
from lumina_engine.training.comm import Comm
from lumina_engine.training.engine import StateMismatch
from lumina_engine.training.memory import dry_run
from lumina_engine.training.progress import Trouble
from lumina_engine.training.state import payload, restore
from lumina_engine.training.trainer import EnhancedConversationTrainer
from tests.parity.rows import Records

from .tiny import TINY

CHATS = [
    ("What is the capital of the moon?", "There is none, but the craters have lovely names."),
    ("Say three colours.", "Teal, ochre and violet."),
    ("Count down from five", "5, 4, 3, 2, 1 \N{ROCKET}"),
    ("Who are you?", "I am Lumina, a very small model."),
]


def setup(
    tmp_path: Path, manager: bool = False, **overrides: Any
) -> tuple[EnhancedConversationTrainer, ConversationDataset, Records]:
    """A trainer on four conversations, and what it needs."""
    path = tmp_path / "train.jsonl"
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in CHATS]
    path.write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    values = {
        **TINY,
        "data_cache_dir": str(tmp_path / "cache"),
        "train_data_path": str(path),
        "use_deepspeed": False,
        **overrides,
    }
    config = Config(**values)
    tokenizer = ConversationTokenizer(config.tokenizer)
    dataset = ConversationDataset(data_path=str(path), tokenizer=tokenizer, config=config)
    model = DeepSeekTransformer(config)
    records = Records()
    keeper = CheckpointManager(config, run_dir=tmp_path / "run") if manager else None
    trainer = EnhancedConversationTrainer(
        model, tokenizer, config, records, comm=Comm.start("gloo") if config.use_deepspeed else Comm(), manager=keeper
    )
    return trainer, dataset, records


def test_c001_one_batch_is_learned_by_heart_and_said_back_through_chat(tmp_path: Path) -> None:
    keys = {
        "batch_size": 4,
        "seq_length": 128,
        "max_steps": 400,
        "num_epochs": 1000,
        "packing": "none",
        "moe_top_k": 1,
        "save_interval": 0,
        "min_lr_ratio": 0.0,  # the loss spikes now and then at a rate that stays; at the end there is to be none
    }
    trainer, dataset, _ = setup(tmp_path, manager=True, **keys)
    summary = trainer.train(dataset)
    assert summary["loss"] < 0.01
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    model, tokenizer, _ = load_model(checkpoint)
    backend = LocalBackend(model, tokenizer, ModelInfo(path=str(checkpoint), context_limit=128))
    for question, answer in CHATS:
        session = ChatSession(backend, overrides={"temperature": 0.0}, seed=0, chats_dir=tmp_path)
        events = list(session.send(question))
        spoken = [e.token for e in events if type(e).__name__ == "Token"]
        assert session.messages()[-1]["content"] == answer
        assert [i for i in spoken if i not in tokenizer.special_ids] == tokenizer.encode(answer)


def test_c066_evaluation_is_the_same_for_any_batch_and_leaves_training_alone(tmp_path: Path) -> None:
    trainer, dataset, _ = setup(tmp_path, batch_size=4, dropout=0.1, router_jitter_noise=0.1)
    before = torch.get_rng_state()
    whole = trainer.evaluate(dataset)
    trainer.config = trainer.config.model_copy(update={"batch_size": 1})
    single = trainer.evaluate(dataset, max_batches=0)
    assert torch.equal(before, torch.get_rng_state())
    assert trainer.model.training
    for name in ("loss", "perplexity", "bits_per_byte", "accuracy", "tokens"):
        assert single[name] == pytest.approx(whole[name], rel=1e-5)
    assert whole["loss"] == pytest.approx(math.log(whole["perplexity"]))
    text_bytes = sum(len(answer.encode()) for _, answer in CHATS)
    assert whole["bits_per_byte"] == pytest.approx(whole["loss"] * whole["tokens"] / math.log(2) / text_bytes)


def test_r15_evaluation_without_data_says_so(tmp_path: Path) -> None:
    from lumina_engine.training.evaluation import evaluate

    trainer, _, _ = setup(tmp_path)
    figures = evaluate(trainer.model, [], Comm(), torch.zeros(1), trainer.precision.context)
    assert figures["tokens"] == 0 and math.isnan(figures["loss"])


@pytest.mark.parametrize("deepspeed", [False, True])
def test_ft04_one_nan_costs_exactly_one_step(tmp_path: Path, deepspeed: bool) -> None:
    trainer, dataset, records = setup(
        tmp_path, batch_size=4, max_steps=6, num_epochs=100, use_deepspeed=deepspeed, zero_stage=1 if deepspeed else "auto"
    )
    weights: list[dict[str, torch.Tensor]] = []
    forward = trainer.engine.forward

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        weights.append({name: t.detach().clone() for name, t in trainer.model.state_dict().items()})
        if len(weights) == 3:
            out = out._replace(loss_sum=out.loss_sum * math.nan)
        return out

    trainer.engine.forward = poisoned  # type: ignore[method-assign]
    trainer.train(dataset)
    steps = [r for r in records if isinstance(r, rec.Step)]
    assert [r.skipped for r in steps] == [False, False, True, False, False, False]
    assert math.isnan(steps[2].loss or 0.0)
    assert all(torch.equal(weights[2][name], weights[3][name]) for name in weights[2])  # bitwise unchanged
    assert not all(torch.equal(weights[3][name], weights[4][name]) for name in weights[3])
    assert [r.code for r in records if isinstance(r, rec.Alert)] == ["nonfinite_step"]


def test_ft05_endless_nan_ends_the_run_with_93(tmp_path: Path) -> None:
    trainer, dataset, _ = setup(tmp_path, batch_size=4, max_steps=20, num_epochs=100, max_nonfinite_in_row=3)
    forward = trainer.engine.forward

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out = out._replace(loss_sum=out.loss_sum * math.inf)
        return out

    trainer.engine.forward = poisoned  # type: ignore[method-assign]
    summary = trainer.train(dataset)
    assert (summary["state"], summary["exit_code"], summary["step"]) == ("failed", 93, 3)


def test_c068_learning_rate_can_be_changed_while_training(tmp_path: Path) -> None:
    trainer, dataset, records = setup(
        tmp_path, batch_size=4, max_steps=8, num_epochs=100, lr_schedule="constant", warmup_steps=0
    )
    trainer.prepare(dataset)
    trainer.adjust_learning_rate(1e-4)
    trainer.train(dataset)
    assert [r.lr for r in records if isinstance(r, rec.Step)] == pytest.approx([1e-4] * 8)
    change = next(r for r in records if isinstance(r, rec.Change))
    assert (change.what, change.before, change.after, change.by) == ("learning_rate", 3e-3, 1e-4, "user")
    assert payload(trainer).global_state["schedule"]["multiplier"] == pytest.approx(1e-4 / 3e-3)


@pytest.mark.parametrize("rate", [0.0, -1e-4, math.nan, math.inf])
def test_c068_a_rate_that_is_no_positive_number_is_refused(tmp_path: Path, rate: float) -> None:
    trainer, dataset, _ = setup(tmp_path, batch_size=4, max_steps=2, num_epochs=100)
    trainer.prepare(dataset)
    with pytest.raises(ValueError, match="positive number"):
        trainer.adjust_learning_rate(rate)
    assert trainer.schedule is not None and trainer.schedule.multiplier == 1.0


@pytest.mark.parametrize(
    "keys",
    [
        {"use_deepspeed": True, "zero_stage": 0, "cpu_offload": True},
        {"use_deepspeed": True, "zero_stage": 0, "precision": "bf16"},
        {"use_deepspeed": True, "zero_stage": 3, "expert_parallel_size": 2},
        {"compile": True, "gradient_checkpointing": "selective"},
        {"num_nodes": 2},
    ],
)
def test_c064_the_trainer_refuses_what_the_rules_refuse(tmp_path: Path, keys: dict[str, Any]) -> None:
    """In a plain script nothing else has looked at the configuration."""
    with pytest.raises(ConfigError):
        setup(tmp_path, **keys)


def test_c064_the_trainer_says_what_the_rules_warn_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    setup(tmp_path, warmup_steps=20, max_steps=20)
    assert any("ends at max_steps = 20 before the peak" in message for message in caplog.messages)


@pytest.mark.parametrize(("adaptive", "told"), [("act", True), ("advise", False)])
def test_c099_a_plain_script_is_told_that_its_experts_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, adaptive: str, told: bool
) -> None:
    trainer, _, _ = setup(tmp_path, adaptive=adaptive, expert_growth="act", moe_top_k=1)
    said = [message for message in caplog.messages if message.startswith("expert_growth: another number of experts needs")]
    assert bool(said) == told and trainer.growth is None


def other_data(tmp_path: Path, trainer: EnhancedConversationTrainer) -> ConversationDataset:
    path = tmp_path / "other.jsonl"
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody else, in twenty words or more."}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 12)
    return ConversationDataset(data_path=str(path), tokenizer=trainer.tokenizer, config=trainer.config)


def test_c064_train_takes_the_data_that_it_is_given(tmp_path: Path) -> None:
    keys = {"batch_size": 1, "num_epochs": 1, "max_steps": None, "warmup_steps": "auto", "packing": "none"}
    trainer, dataset, _ = setup(tmp_path, **keys)
    trainer.prepare(dataset)
    other = other_data(tmp_path, trainer)
    assert trainer.total_steps == 4
    summary = trainer.train(other)
    assert summary["step"] == summary["total_steps"] == 12 and trainer.train_data is other.store
    assert trainer.schedule is not None and trainer.schedule.total_steps == 12
    assert trainer.train(other)["step"] == 12  # done already
    with pytest.raises(ValueError, match="other data"):
        trainer.train(dataset)


def test_r15_an_evaluation_that_is_no_number_does_not_judge(tmp_path: Path) -> None:
    keys = {"batch_size": 4, "max_steps": 5, "num_epochs": 100, "eval_interval": 1, "early_stopping_patience": 2}
    trainer, dataset, _ = setup(tmp_path, manager=True, save_interval=1, async_save=False, **keys)
    losses = iter([math.nan, math.nan, math.nan, 2.0, 3.0])

    def figures(store: Any, batches: int) -> dict[str, float]:
        return {"loss": next(losses), "perplexity": 1.0, "bits_per_byte": 1.0, "accuracy": 0.0, "tokens": 0}

    trainer.evaluate = figures  # type: ignore[method-assign]
    summary = trainer.train(dataset, dataset)
    assert (summary["step"], trainer.progress.best, trainer.progress.evals_since_best) == (5, 2.0, 1)


def test_c076_the_evaluation_that_ended_a_run_is_not_counted_again(tmp_path: Path) -> None:
    """The checkpoint of a stop by patience is taken after its evaluation, unlike that of an interval."""
    keys = {"batch_size": 4, "max_steps": 9, "num_epochs": 100, "eval_interval": 1, "save_interval": 100, "async_save": False}
    losses = iter([1.0, 2.0])

    def figures(store: Any, batches: int) -> dict[str, float]:
        return {"loss": next(losses), "perplexity": 1.0, "bits_per_byte": 1.0, "accuracy": 0.0, "tokens": 0}

    trainer, dataset, _ = setup(tmp_path, manager=True, **keys, early_stopping_patience=1)
    trainer.evaluate = figures  # type: ignore[method-assign]
    assert trainer.train(dataset, dataset)["step"] == 2
    assert trainer.manager is not None
    again, dataset, _ = setup(tmp_path, **keys, early_stopping_patience=2)
    again.prepare(dataset, dataset)
    restore(again, trainer.manager.load(trainer.manager.recover()))
    again.evaluate = figures  # type: ignore[method-assign]
    again.boundary.begin()
    assert (again.progress.step, again.progress.evals_since_best) == (2, 1)


def evaluated(
    tmp_path: Path, losses: Callable[[int], float], trouble_at: int = 0, **keys: Any
) -> tuple[EnhancedConversationTrainer, Records]:
    """A run that saves every 5 steps, whose evaluation after step `n` gives `losses(n)`; at one step it decides to go back."""
    values = {"batch_size": 4, "num_epochs": 1000, "save_interval": 5, "async_save": True, "keep_checkpoints": 2, **keys}
    trainer, dataset, records = setup(tmp_path, manager=True, **values)
    observe, troubles = trainer.adaptive.observe, [trouble_at]

    def decide(record: Any) -> Trouble | None:
        if isinstance(record, rec.Step) and record.step == troubles[0]:
            troubles[0] = 0
            return Trouble(record.step, record.step, "a bad step")
        return observe(record)

    trainer.adaptive.observe = decide  # type: ignore[method-assign]

    def figures(store: Any, batches: int) -> dict[str, float]:
        loss = losses(trainer.progress.step)
        return {"loss": loss, "perplexity": 1.0, "bits_per_byte": 1.0, "accuracy": 0.0, "tokens": 0}

    trainer.evaluate = figures  # type: ignore[method-assign]
    trainer.prepare(dataset, dataset)
    assert trainer.manager is not None
    if (path := trainer.manager.recover()) is not None:
        restore(trainer, trainer.manager.load(path))
    trainer.train(dataset, dataset)
    trainer.manager.close()
    return trainer, records


def best_of(tmp_path: Path) -> str | None:
    return pointer(tmp_path / "run" / "checkpoints", "best")


def test_c080_best_is_the_lowest_evaluated_among_the_saved(tmp_path: Path) -> None:
    """Evaluated every 2 steps and saved every 5: both at 10, 20 and 30. The lower losses between are of no checkpoint."""
    losses = {10: 2.4, 20: 1.8, 30: 1.9}
    keys = {"eval_interval": 2, "max_steps": 40}
    trainer, _ = evaluated(tmp_path, lambda step: losses.get(step, 1.0 + step / 100 if step < 40 else 3.0), **keys)
    assert trainer.progress.best == 1.02 and best_of(tmp_path) == "step-000020"
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step-000040" / "MANIFEST.json").read_text())
    assert manifest["best"] == {"name": "step-000020", "metric": "eval_loss", "value": 1.8}


def test_c080_a_resumed_run_knows_what_best_has_to_be_beaten_by(tmp_path: Path) -> None:
    losses = {10: 2.4, 20: 1.8, 30: 1.9, 40: 1.7}
    for stop, wanted in ((25, "step-000020"), (35, "step-000020"), (45, "step-000040")):
        evaluated(tmp_path, lambda step: losses.get(step, 1.0 if step % 5 else 9.0), eval_interval=2, max_steps=stop)
        assert best_of(tmp_path) == wanted


def test_c080_the_checkpoint_of_a_stop_by_patience_may_be_the_best(tmp_path: Path) -> None:
    """Its evaluation ends the run, since it is no better than one that was never saved, and then it is saved."""
    losses = {2: 1.0, 4: 1.6, 6: 1.5}
    trainer, _ = evaluated(
        tmp_path, lambda step: losses[step], eval_interval=2, save_interval=4, early_stopping_patience=2, max_steps=40
    )
    assert trainer.progress.step == 6 and best_of(tmp_path) == "step-000006"


@pytest.mark.parametrize(
    ("first", "again", "trouble_at", "told", "best"),
    [  # losses by step, at its first and its second evaluation; what is told of `best` then, and what it is in the end
        ({10: 1.0, 20: 3.0, 30: 3.0, 40: 0.5}, {30: 3.0, 40: 1.2}, 45, "step-000010", ("step-000010", 1.0)),
        ({10: 2.0, 20: 1.0}, {10: 2.0, 20: 1.5}, 25, "nothing", ("step-000020", 1.5)),
    ],
)
def test_c080_after_a_rollback_best_is_of_the_branch_that_is_left(
    tmp_path: Path, first: dict[int, float], again: dict[int, float], trouble_at: int, told: str, best: tuple[str, float]
) -> None:
    seen: list[int] = []

    def losses(step: int) -> float:
        table = again if step in seen else first
        seen.append(step)
        return table.get(step, 9.0)

    keys = {"eval_interval": 10, "save_interval": 10, "max_steps": 50, "keep_checkpoints": 9}
    _, records = evaluated(tmp_path, losses, trouble_at, **keys)
    notes = [r.message for r in records if isinstance(r, rec.Alert) and r.code == "checkpoint_note"]
    assert notes == [f"the pointer best names a step that the run has gone back from: {told} takes its place"]
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step-000050" / "MANIFEST.json").read_text())
    assert manifest["best"] == {"name": best[0], "metric": "eval_loss", "value": best[1]} and best_of(tmp_path) == best[0]


# at stage 3 DeepSpeed would put its own function in place of torch's linear, for the whole process
STAGE_3 = {"zero_stage": 3, "deepspeed_overrides": {"zero_optimization": {"memory_efficient_linear": False}}}


@pytest.mark.parametrize(
    ("engine", "each"),  # bytes of a parameter's optimizer state: two moments, and a master where the weights are none
    [
        ({}, 8),
        ({"use_deepspeed": True, "zero_stage": 1}, 8),
        ({"use_deepspeed": True, "zero_stage": 1, "precision": "bf16"}, 12),
        ({"use_deepspeed": True, **STAGE_3}, 12),
    ],
)
def test_c067_memory_stats_are_measured(tmp_path: Path, engine: dict[str, Any], each: int) -> None:
    trainer, dataset, _ = setup(tmp_path, batch_size=4, max_steps=1, **engine)
    trainer.train(dataset)
    stats = trainer.get_memory_stats()
    parameters = trainer.debug_training_setup()["parameters"]
    assert stats["components"]["parameters"] == (2 if trainer.config.precision == "bf16" else 4) * parameters
    assert each * parameters <= stats["components"]["optimizer"] <= each * parameters + 8192  # and counters, and padding
    assert stats["host"]["rss"] > 8 * parameters and stats["device"]["peak"] >= stats["device"]["allocated"] > 0


@pytest.mark.parametrize("engine", [{}, {"use_deepspeed": True, "zero_stage": 1}, {"use_deepspeed": True, **STAGE_3}])
def test_c062_debug_training_setup_tells_the_truth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: dict[str, Any]
) -> None:
    trainer, dataset, _ = setup(tmp_path, batch_size=2, gradient_accumulation_steps=3, **engine)
    trainer.prepare(dataset)
    report = trainer.debug_training_setup()
    assert "2 micro x 3 accumulation x 1 ranks = 6 rows" in report["batch"]
    assert sum(g["parameters"] for g in report["parameter_groups"]) == report["parameters"]
    assert {g["weight_decay"] for g in report["parameter_groups"]} == {0.01, 0.0}
    assert any(answer in report["first_row_trained"] for _, answer in CHATS)
    assert "parameter_groups" in capsys.readouterr().out


def test_c076_dry_run_leaves_no_trace(tmp_path: Path) -> None:
    trainer, _, _ = setup(tmp_path, router_jitter_noise=0.1, dropout=0.1)
    before = torch.get_rng_state()
    dry_run(trainer.model, trainer.config, torch.device("cpu"), trainer.precision.context)
    assert all(p.grad is None for p in trainer.model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_c110_a_micro_batch_that_does_not_fit_is_told_with_advice(tmp_path: Path) -> None:
    trainer, _, _ = setup(tmp_path)

    def no_memory(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    trainer.model.forward = no_memory
    with pytest.raises(MemoryError, match="lower batch_size"):
        dry_run(trainer.model, trainer.config, torch.device("cpu"), trainer.precision.context)


def test_c076_save_comes_before_evaluate(tmp_path: Path) -> None:
    trainer, dataset, records = setup(
        tmp_path, manager=True, batch_size=4, max_steps=4, num_epochs=100, save_interval=2, eval_interval=2, async_save=False
    )
    trainer.train(dataset, dataset)
    order = [(type(r).__name__, r.step) for r in records if isinstance(r, rec.Checkpoint | rec.Eval)]
    assert order == [("Checkpoint", 2), ("Eval", 2), ("Checkpoint", 4), ("Eval", 4)]


class Channel:
    """A channel whose commands come all at once; `stop-unsaved` is a stop without a checkpoint."""

    def __init__(self, *names: str) -> None:
        self.commands = [
            Command(str(i), "stop", {"save": False}) if name == "stop-unsaved" else Command(str(i), name)
            for i, name in enumerate(names)
        ]
        self.sections: list[str] = []

    def report(self, step: int, section: str) -> None:
        self.sections.append(section)

    def poll(self) -> list[Command]:
        taken, self.commands = self.commands, []
        return taken


def commanded(tmp_path: Path, *names: str) -> tuple[dict[str, Any], Records, EnhancedConversationTrainer]:
    trainer, dataset, records = setup(tmp_path, manager=True, batch_size=4, max_steps=3, num_epochs=100, save_interval=0)
    trainer.control.channel = trainer.channel = Channel(*names)
    return trainer.train(dataset), records, trainer


def test_ps14_a_stop_behind_a_pause_is_obeyed(tmp_path: Path) -> None:
    summary, records, _ = commanded(tmp_path, "checkpoint", "pause", "pause", "stop")
    assert (summary["state"], summary["exit_code"], summary["id"]) == ("finished", 0, "3")
    assert [r.state for r in records if isinstance(r, rec.Run)] == ["running", "paused", "stopping"]


def test_ps14_ft07_a_run_that_saves_while_it_is_paused_says_that_it_is_paused(tmp_path: Path) -> None:
    """Or the watchdog would time the save for as long as the pause lasts."""
    _, _, trainer = commanded(tmp_path, "pause", "checkpoint", "resume")
    told = trainer.channel.sections
    begin = told.index("paused")
    assert told[begin : begin + 3] == ["paused", "save", "paused"] and told[begin + 3] in ("data", "forward")


@pytest.mark.parametrize(("names", "saves"), [(("stop", "stop"), 1), (("stop", "stop-unsaved"), 0)])
def test_ps14_a_stop_without_a_checkpoint_behind_one_with_it_saves_none(
    tmp_path: Path, names: tuple[str, ...], saves: int
) -> None:
    trainer, dataset, records = setup(tmp_path, manager=True, batch_size=4, max_steps=3, num_epochs=100, save_interval=0)
    channel = Channel(*names)
    poll = channel.poll
    channel.poll = lambda: poll() if trainer.progress.step else []  # type: ignore[method-assign]  before it there is nothing to save
    trainer.control.channel = trainer.channel = channel
    summary = trainer.train(dataset)
    assert (summary["state"], summary["exit_code"], summary["id"]) == ("finished", 0, "0")
    assert len([r for r in records if isinstance(r, rec.Checkpoint)]) == saves


def test_ps14_a_resume_behind_a_pause_goes_on(tmp_path: Path) -> None:
    summary, records, _ = commanded(tmp_path, "pause", "resume", "resume")
    assert summary["step"] == 3
    assert [r.id for r in records if isinstance(r, rec.Run) and r.id] == ["0", "1"]
    assert [r.id for r in records if isinstance(r, rec.Note) and r.id] == ["2"]


def test_ft01_preemption_saves_and_leaves_with_75(tmp_path: Path) -> None:
    trainer, dataset, _ = setup(tmp_path, manager=True, batch_size=4, max_steps=9, num_epochs=100, save_interval=0)
    forward = trainer.engine.forward

    def signalled(*args: Any, **kwargs: Any) -> Any:
        trainer.control._handle(signal.SIGTERM, None)
        return forward(*args, **kwargs)

    trainer.engine.forward = signalled  # type: ignore[method-assign]
    summary = trainer.train(dataset)
    assert (summary["state"], summary["exit_code"], summary["step"]) == ("preempted", 75, 1)
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()


def test_r29_a_rate_of_zero_cannot_be_scaled(tmp_path: Path) -> None:
    trainer, dataset, records = setup(
        tmp_path, max_steps=4, num_epochs=100, min_lr_ratio=0.0, warmup_steps=0, lr_schedule="linear"
    )
    trainer.prepare(dataset)
    trainer.progress.step = 3
    trainer.adjust_learning_rate(1e-4)
    assert trainer.schedule is not None and trainer.schedule.multiplier == 1.0
    assert "not changed" in records[-1].message


def test_r33_a_checkpoint_without_optimizer_state_is_refused(tmp_path: Path) -> None:
    trainer, dataset, _ = setup(tmp_path, batch_size=4, max_steps=2, num_epochs=100)
    trainer.train(dataset)
    state = trainer.engine.state_tensors()
    missing = {name: tensor for name, tensor in state.items() if "exp_avg_sq" not in name}
    with pytest.raises(StateMismatch, match="no optimizer state exp_avg_sq of embedding"):
        trainer.engine.load_state(SavedState(Shard(missing)))
    short = {name: tensor[:1] if "exp_avg." in name else tensor for name, tensor in state.items()}
    with pytest.raises(CheckpointError, match="lacks values"):
        trainer.engine.load_state(SavedState(Shard(short)))
