"""What is told of the data before a run and at its start, against what the loader gives."""

from __future__ import annotations

import argparse
import json

import pytest

from lumina_engine.config.schema import Config
from lumina_engine.data.batch import TrainLoader
from lumina_engine.data.facts import facts_of, look, rows_of_run
from lumina_engine.data.store import open_data
from lumina_engine.data.tokenizer import ConversationTokenizer


def turns(*texts):
    return {"messages": [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]}


@pytest.fixture
def config(write, tmp_path):
    records = [turns(f"what is {n}", "it is " + "very " * (n % 9)) for n in range(80)]
    records += [turns("tell " * 30, "long " * 40, "and", f"more {n}") for n in range(5)]  # longer than a row
    path = write("data.jsonl", records)
    return Config(
        train_data_path=str(path), data_cache_dir=str(tmp_path / "cache"), tokenizer="lumina-1k", seq_length=64, eval_split=0.0
    )


@pytest.mark.parametrize("packing", ["fit", "concat", "none"])
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_c139_facts_are_those_of_the_batches(config, packing, train_on):
    config = config.model_copy(update={"packing": packing, "train_on": train_on, "num_epochs": 1})
    assert look(config, 1)[0] is None and "prepared" in look(config, 1)[1]
    store = open_data(config, ConversationTokenizer("lumina-1k")).train
    facts, why = look(config, 1)
    loader = TrainLoader(store, config, micro_batch=1, accumulation=1)
    batches = [batch for step in loader for batch in step]
    tokens, labels = (sum(getattr(batch, name) for batch in batches) for name in ("num_tokens", "num_labels"))
    assert why == "" and facts == facts_of(loader.plan, rows_of_run(loader.plan, config, 1))
    assert facts.rows == facts.run_rows == len(batches) and facts.conversations == 85
    assert facts.fill == pytest.approx(tokens / (64 * len(batches))) and facts.padding == 1 - facts.fill
    assert facts.trained == pytest.approx(labels / tokens)
    cut = 0 if packing == "concat" else 5
    assert facts.shortened == cut and facts.lost == pytest.approx((store.num_tokens - tokens) / store.num_tokens)
    assert ("5 of 85 conversations cut" in facts.lines()[1]) == bool(cut)


def test_c139_the_budget_tells_shares_of_prepared_data_and_says_when_they_are_unknown(config, capsys, tmp_path):
    from lumina_engine.commands import budget

    file = config.save(tmp_path / "my.yaml")

    def told():
        parser = argparse.ArgumentParser()
        budget.add_arguments(parser)
        assert budget.run(parser.parse_args(["--config", str(file), "--json"])) == 0
        return json.loads(capsys.readouterr().out)

    assert told()["data"]["known"] is False
    open_data(config, ConversationTokenizer("lumina-1k"))
    figures = told()
    facts = look(config, 1)[0]
    assert figures["data"]["padding"] == facts.padding and figures["data"]["lines"] == facts.lines()
    assert figures["steps"] == -(-facts.run_rows // config.batch_size) and "counted" in figures["basis"]["steps"]


def test_c139_tasks_out_of_order_are_no_fault_of_a_look(config):
    assert look(config.model_copy(update={"multi_task": True}), 1) == (None, "multi_task = true, but no task is named")
    gone = config.model_copy(update={"train_data_path": "gone.jsonl"})
    assert look(gone, 1)[0] is None and "gone.jsonl" in look(gone, 1)[1]


def test_c139_the_panel_beside_the_form_shows_them():
    from lumina_tui.budget_text import _data_rows

    figures = {"data": {"lines": ["12 rows of 64 an epoch, 97.0 % filled, 3.0 % padding", "task a: 5 %"]}}
    rows = _data_rows(figures, 53)
    assert [label for label, _, _ in rows] == ["data", "", ""] and all(len(text) <= 40 for _, text, _ in rows)
