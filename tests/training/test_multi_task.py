"""C39, C139: a real run on two tasks: each task's loss in its evaluations, and what its start tells of the data."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from lumina_engine.checkpoint.manager import load_model
from lumina_engine.config.schema import Config
from lumina_engine.data.batch import TrainLoader
from lumina_engine.data.mixed import Mixture
from lumina_engine.data.store import open_data
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.monitoring.log import read_records
from lumina_engine.monitoring.record import Eval, Note, Record
from lumina_engine.run.directory import RunDirectory
from lumina_engine.training.comm import Comm
from lumina_engine.training.trainer import EnhancedConversationTrainer
from tests.parity.rows import Records

from .tiny import TINY

STEPS = 4
KEYS = {"max_steps": STEPS, "eval_interval": STEPS, "save_interval": STEPS, "batch_size": 4, "eval_split": 0.25}
KEYS |= {"eval_batches": 0, "packing": "fit", "use_deepspeed": False, "multi_task": True, "experiment_name": "two"}


def conversations(path: Path, count: int, word: str) -> str:
    """A task whose answers repeat `word`; every tenth conversation is longer than a row."""
    lines = []
    for number in range(count):
        turns = [(f"say it {number} times", f"{word} " * (number % 9 + 1))] * (12 if number % 10 == 0 else 1)
        messages = [{"role": r, "content": c} for turn in turns for r, c in zip(("user", "assistant"), turn, strict=True)]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run on 40 conversations of one task and 160 of another, evaluated and saved at its last step."""
    folder = tmp_path_factory.mktemp("tasks")
    paths = {
        "birds": conversations(folder / "birds.jsonl", 40, "swallow"),
        "sea": conversations(folder / "sea.jsonl", 160, "o"),
    }
    config = Config(**(TINY | KEYS), task_data_paths=paths, data_cache_dir=str(folder / "cache"))
    words = ["train", "--config", str(config.save(folder / "two.yaml"))]
    command = [sys.executable, "-m", "lumina_engine.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return RunDirectory(folder / "runs" / "two")


@pytest.fixture(scope="module")
def records(run: RunDirectory) -> list[Record]:
    return list(read_records(run.metrics_path))


@pytest.fixture(scope="module")
def config(run: RunDirectory) -> Config:
    return Config.load(run.config_path)


def test_c039_an_evaluation_tells_each_task_as_if_it_were_evaluated_alone(
    run: RunDirectory, records: list[Record], config: Config
) -> None:
    told = [record for record in records if isinstance(record, Eval)][-1]
    model, tokenizer, _ = load_model(run.checkpoints / f"step-{STEPS:06d}")
    trainer = EnhancedConversationTrainer(model, tokenizer, config, Records(), comm=Comm())
    data = open_data(config, tokenizer).eval
    assert told.step == STEPS and isinstance(data, Mixture) and told.tasks is not None

    alone = {name: trainer.evaluate(store, max_batches=0) for name, store in data.stores.items()}
    assert told.tasks == pytest.approx({name: alone[name]["loss"] for name in ("birds", "sea")}, rel=1e-6)
    tokens = {name: found["tokens"] for name, found in alone.items()}
    assert told.tokens == sum(tokens.values()) and tokens["birds"] != tokens["sea"]
    mean = sum(tokens[name] * alone[name]["loss"] for name in tokens) / sum(tokens.values())
    assert told.loss == pytest.approx(mean, rel=1e-6) and told.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert abs(told.loss - sum(told.tasks.values()) / 2) > 1e-4  # which the mean of the two would be

    # of few batches each task gets an equal part, and at least one
    for most, each in ((3, 2), (1, 1)):
        some = trainer.evaluate(data, max_batches=most)
        parts = {name: trainer.evaluate(store, max_batches=each) for name, store in data.stores.items()}
        assert {name: some[f"loss/{name}"] for name in parts} == {name: part["loss"] for name, part in parts.items()}
        assert some["tokens"] == sum(part["tokens"] for part in parts.values()) < told.tokens


def test_c139_r08_the_start_of_a_run_tells_padding_what_is_cut_and_what_is_trained(
    records: list[Record], config: Config
) -> None:
    """Against the batches of one epoch of each task and what the stores hold."""
    stores = open_data(config, ConversationTokenizer(config.tokenizer)).train.stores
    once = config.model_copy(update={"num_epochs": 1, "max_steps": None})
    loaders = [TrainLoader(store, once, micro_batch=1, accumulation=1) for store in stores.values()]
    batches = [batch for loader in loaders for step in loader for batch in step]
    tokens, labels = (sum(getattr(batch, name) for batch in batches) for name in ("num_tokens", "num_labels"))
    held = sum(store.num_tokens for store in stores.values())
    lengths = [len(store.document(i)[0]) for store in stores.values() for i in range(len(store))]
    filled, longer = tokens / (64 * len(batches)), sum(length > 64 for length in lengths)
    assert 0.001 < filled < 0.999 and longer > 0 and 0 < labels < tokens < held

    told = [record.message for record in records if isinstance(record, Note) and record.message.startswith("data: ")]
    assert told[:2] == [
        f"data: {len(batches)} rows of 64 an epoch (packing fit), {100 * filled:.1f} % filled, "
        f"{100 * (1 - filled):.1f} % padding",
        f"data: {100 * labels / tokens:.1f} % of the tokens trained; {longer} of {len(lengths)} conversations cut, "
        f"{100 * (held - tokens) / held:.1f} % of the tokens",
    ]
    assert [line.split(":")[1] for line in told[2:]] == [" task birds", " task sea"]
