"""From the settings of a mixed run to its tasks: by paths, by records, with what is held out, missing, or changed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lumina_engine.data import sample
from lumina_engine.data.batch import TrainLoader
from lumina_engine.data.conversation import DataError
from lumina_engine.data.facts import facts_of, rows_of_run
from lumina_engine.data.mixed import Mixture
from lumina_engine.data.store import open_data
from lumina_engine.data.tasks import changed_sources, data_rules, why_other_rows


def records(tag, count, task=None):
    made = []
    for i in range(count):
        turns = [{"role": "user", "content": f"{tag}{i}" + "q" * (i % 9)}, {"role": "assistant", "content": tag * (i % 5 + 1)}]
        made.append({"messages": turns} | ({} if task is None else {"task": task}))
    return made


@pytest.fixture
def mixed(write, settings):
    """Settings of two tasks with files of their own; `**changes` as given."""
    paths = {tag: str(write(f"{tag}.jsonl", records(tag, n))) for tag, n in (("code", 60), ("chat", 90))}

    def make(**changes):
        values = {
            "multi_task": True,
            "task_data_paths": paths,
            "task_weights": {"code": 1.0, "chat": 3.0},
            "task_temperature": 1.0,
            "task_max_epochs": None,
            "max_steps": None,
        }
        return settings(**{**values, **changes})

    return make


def test_c039_tasks_by_path(mixed, tokenizer):
    data = open_data(mixed(eval_split=0.1), tokenizer)
    assert isinstance(data.train, Mixture) and isinstance(data.eval, Mixture) and not data.is_sample
    assert list(data.train.stores) == list(data.eval.stores) == ["chat", "code"]
    sizes = {name: len(store) + len(data.eval.stores[name]) for name, store in data.train.stores.items()}
    assert sizes == {"chat": 90, "code": 60} and min(map(len, data.eval.stores.values())) > 0
    assert any(note.startswith("task code: ") and "held out" in note for note in data.notes)
    assert [name.split(": ")[0] for name in data.sources] == ["chat", "code"]


def test_c039_tasks_by_record(write, settings, tokenizer, mixed):
    path = str(
        write("all.jsonl", [*records("a", 30, "code"), *records("b", 20, "chat"), *records("c", 5), *records("d", 3, "poem")])
    )
    by_record = mixed(task_data_paths={}, train_data_path=path)
    data = open_data(by_record, tokenizer)
    assert {name: len(store) for name, store in data.train.stores.items()} == {"chat": 20, "code": 30} and data.eval is None
    notes = [note for note in data.notes if note.startswith("task chat")]
    assert notes == [
        f"task chat: {path}: 3 of 28 conversations dropped: task 'poem' has no weight",
        f"task chat: {path}: 5 of 28 conversations dropped: without a task",
    ]
    evaluation = str(write("eval.jsonl", records("e", 7, "code")))
    data = open_data(mixed(task_data_paths={}, train_data_path=path, eval_data_path=evaluation), tokenizer)
    assert {name: len(store) for name, store in data.eval.stores.items()} == {"code": 7}
    assert any("task chat: nothing of it in" in note for note in data.notes)


def test_c039_tasks_of_the_built_in_corpus(mixed, tokenizer, monkeypatch):
    monkeypatch.setattr(sample, "NUM_TRAIN", 1000)
    data = open_data(mixed(task_data_paths={}, task_weights={"sorting": 1.0, "addition": 1.0}), tokenizer)
    assert data.is_sample and list(data.train.stores) == list(data.eval.stores) == ["addition", "sorting"]


def test_r30_a_task_without_data_is_refused_with_the_nearest_name(write, mixed, tokenizer):
    path = str(write("all.jsonl", records("a", 30, "code")))
    with pytest.raises(DataError, match=r"no record of it carries the task 'coed'; tasks there: code; did you mean code\?"):
        open_data(mixed(task_data_paths={}, task_weights={"coed": 1.0}, train_data_path=path), tokenizer)
    plain = str(write("plain.jsonl", records("a", 3)))
    with pytest.raises(DataError, match="no record of it carries a task"):
        open_data(mixed(task_data_paths={}, task_weights={"code": 1.0}, train_data_path=plain), tokenizer)


def test_c039_every_key_of_a_mixture_changes_the_run(mixed, write, tokenizer):
    """multi_task, task_weights, task_data_paths, task_temperature, task_max_epochs: each gives another sequence or length."""
    other = str(write("other.jsonl", records("z", 60)))

    def rows(**changes):
        config = mixed(num_epochs=6, **changes)
        loader = TrainLoader(open_data(config, tokenizer).train, config)
        return [(batch.rows, batch.input_ids_BS.sum().item()) for step in loader for batch in step]

    base = rows()
    assert rows() == base
    changed = [
        rows(multi_task=False, train_data_path=other),
        rows(task_weights={"code": 3.0, "chat": 1.0}),
        rows(task_weights={}),
        rows(task_data_paths={**mixed().task_data_paths, "code": other}),
        rows(task_temperature=3.0),
        rows(task_max_epochs=2.5),
    ]
    assert all(found != base for found in changed)
    assert len(changed[-1]) < len(base)


def test_c034_streamed_tasks_give_the_same_rows(mixed, tokenizer):
    def loader(**changes):
        config = mixed(num_epochs=3, eval_split=0.1, **changes)
        return TrainLoader(open_data(config, tokenizer).train, config)

    stored, streamed = loader(), loader(streaming_threshold_gb=0.0)
    assert streamed.plan.streamed and not stored.plan.streamed
    assert not stored.waits() and streamed.waits()
    rows = [[(b.rows, b.input_ids_BS.sum().item()) for step in each for b in step] for each in (stored, streamed)]
    assert rows[0] == rows[1]
    assert facts_of(streamed.plan, 9).trained is None and facts_of(streamed.plan, 9).fill == facts_of(stored.plan, 9).fill


def test_c039_the_realised_mix_is_told(mixed, tokenizer):
    config = mixed(num_epochs=4, task_max_epochs=3.0, packing="none")
    data = open_data(config, tokenizer)
    loader = TrainLoader(data.train, config)
    seen = Counter(loader.plan.task_of(row) for step in loader for batch in step for row in batch.rows if row >= 0)
    facts = facts_of(loader.plan, rows_of_run(loader.plan, config, 1))
    assert [(t.name, t.run_rows, t.epochs) for t in facts.tasks] == [("chat", 270, 3.0), ("code", 180, 3.0)]
    assert [task.run_rows for task in facts.tasks] == [seen[0], seen[1]] and facts.run_rows == 450
    assert [task.tokens for task in facts.tasks] == [3 * store.num_tokens for store in data.train.stores.values()]
    assert any(line.startswith("task chat: 75.0 % of the rows, 270 in this run, 3 epochs") for line in facts.lines())
    config.max_steps = 10
    assert rows_of_run(loader.plan, config, 2) == 40


def test_rs07_the_changed_file_of_a_task_is_named(mixed, tokenizer):
    then = open_data(mixed(), tokenizer)
    path = mixed().task_data_paths["code"]
    text = Path(path).read_text()
    Path(path).write_text(text.replace("code3q", "code3k", 1))  # one byte
    now = open_data(mixed(), tokenizer)
    assert now.train.fingerprint != then.train.fingerprint
    assert changed_sources(then.sources, now.sources) == f"code: {path} changed"
    assert changed_sources({}, now.sources) == "" == changed_sources(now.sources, now.sources)
    assert changed_sources({"a": "1", "b": "2"}, {"b": "3", "c": "4"}) == "b changed, a is gone, c is new"


def test_rs07_other_rules_are_not_told_as_changed_data():
    """A checkpoint of another version: its files are as they were, its rows are not."""
    saved = {"data_sources": {"a": "1", "b": "2"}, "data_rules": data_rules()}
    why, fix = why_other_rows(saved, {"a": "1", "b": "3"})
    assert why == "the training data changed since it was saved: b changed" and fix == "restore the data"
    older = saved | {"data_rules": {"order": 1, "reading": 1}}
    why, fix = why_other_rows(older, {"a": "1", "b": "2"})
    assert "version of Lumina" in why and "no file changed" in why and fix == "go on with that version"
    assert why_other_rows(older, {"a": "1", "b": "3"})[1] == "restore the data"
    del older["data_rules"]  # as before rules were saved
    assert "version of Lumina" in why_other_rows(older, {"a": "1", "b": "2"})[0]
    assert why_other_rows({}, {"a": "1"}) == ("the training data changed since it was saved", "restore the data")


@pytest.mark.parametrize("tasks", [False, True])
def test_c034_the_changed_file_of_a_stream_is_named(write, mixed, tokenizer, tasks):
    """One of two; a stream tells by size and time, for it does not read its files before it is counted."""
    paths = {name: write(f"s/{name}.jsonl", records(name, 40)) for name in ("code", "chat")}
    if tasks:
        config = mixed(streaming_threshold_gb=0.0, task_data_paths={name: str(path) for name, path in paths.items()})
    else:
        config = mixed(streaming_threshold_gb=0.0, multi_task=False, train_data_path=str(paths["code"].parent))
    then = open_data(config, tokenizer)
    saved = {"data_sources": then.sources, "data_rules": data_rules()}
    write("s/code.jsonl", records("more", 41))
    now = open_data(config, tokenizer)
    assert now.train.fingerprint != then.train.fingerprint
    named = f"code: {paths['code']}" if tasks else str(paths["code"])
    assert why_other_rows(saved, now.sources) == (
        f"the training data changed since it was saved: {named} changed",
        "restore the data",
    )


def test_c034_the_version_of_a_streamed_file_says_nothing_beside_a_digest():
    """The same file may be streamed in one run and read whole in the next."""
    assert changed_sources({"a": "unread:1"}, {"a": "2"}) == changed_sources({"a": "1"}, {"a": "unread:2"}) == ""
    assert changed_sources({"a": "unread:1"}, {"a": "unread:2"}) == "a changed"
