"""Packing and batches: every document once, borders respected, the same rows for any split of the work."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumina_engine.data.batch import Batch, ConversationDataset, EvalLoader, Position, TrainLoader, make_batch
from lumina_engine.data.conversation import Conversation, Message, TextDocument
from lumina_engine.data.rows import RowOptions, RowPlan
from lumina_engine.data.token_store import build_store

SIZE = 64
PACKINGS = ["fit", "concat", "none"]


def conversations(lengths):
    return [
        Conversation((Message("user", f"{i}" + "q" * n), Message("assistant", "a" * (n + 1))), str(i))
        for i, n in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory):
    lengths = np.random.default_rng(0).integers(0, 18, 300).tolist()
    return build_store(conversations(lengths), tokenizer, tmp_path_factory.mktemp("store"), source_digest="rows")


@pytest.fixture(scope="module")
def small(tokenizer, tmp_path_factory):
    lengths = np.random.default_rng(1).integers(0, 18, 50).tolist()
    return build_store(conversations(lengths), tokenizer, tmp_path_factory.mktemp("small"), source_digest="small")


def documents_of(batch: Batch):
    """(ids, positions, labels) of every document piece of a batch, row by row."""
    for ids, docs, positions, labels in zip(
        batch.input_ids_BS.tolist(),
        batch.document_ids_BS.tolist(),
        batch.position_ids_BS.tolist(),
        batch.labels_BS.tolist(),
        strict=True,
    ):
        for number in range(1, max(docs, default=0) + 1):
            at = [i for i, d in enumerate(docs) if d == number]
            assert at == list(range(at[0], at[-1] + 1))  # a document is one piece of its row
            yield [ids[i] for i in at], [positions[i] for i in at], [labels[i] for i in at]


def all_rows(plan):
    return make_batch(plan, list(range(plan.num_rows)))


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=60),
    size=st.integers(70, 130),
    packing=st.sampled_from(["fit", "none"]),
    seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_c035_every_document_once_and_none_is_split(tokenizer, tmp_path_factory, lengths, size, packing, seed):
    documents = conversations(lengths)
    store = build_store(documents, tokenizer, tmp_path_factory.mktemp("s"), source_digest="x")
    plan = RowPlan(store, RowOptions(size, packing, seed=seed))
    batch = all_rows(plan)
    found = Counter(tuple(ids) for ids, _, _ in documents_of(batch))
    assert found == Counter(tuple(tokenizer.encode_conversation(d)) for d in documents)
    assert batch.num_tokens == store.num_tokens and batch.num_labels == store.num_trained
    assert all(positions == list(range(len(ids))) for ids, positions, _ in documents_of(batch))
    if packing == "none":
        assert plan.num_rows == len(documents)


@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=40), size=st.integers(16, 70), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_c035_concat_holds_every_token_once(tokenizer, tmp_path_factory, lengths, size, seed):
    documents = conversations(lengths)
    store = build_store(documents, tokenizer, tmp_path_factory.mktemp("s"), source_digest="x")
    plan = RowPlan(store, RowOptions(size, "concat", seed=seed))
    batch = all_rows(plan)
    assert plan.num_rows == -(-store.num_tokens // size)
    assert (batch.document_ids_BS == 0).sum() == plan.num_rows * size - store.num_tokens
    flat = batch.input_ids_BS[batch.document_ids_BS > 0].tolist()
    order = plan._members  # documents end to end in the order of the seed
    assert flat == [i for d in order for i in tokenizer.encode_conversation(documents[d])]
    pieces = list(documents_of(batch))
    assert all(positions == list(range(len(ids))) and labels[0] == -100 for ids, positions, labels in pieces)


@pytest.mark.parametrize("packing", PACKINGS)
def test_r01_labels_lie_on_their_own_token(store, packing):
    batch = all_rows(RowPlan(store, RowOptions(SIZE, packing)))
    trained = batch.labels_BS >= 0
    assert torch.equal(batch.labels_BS[trained], batch.input_ids_BS[trained])
    assert bool(((batch.document_ids_BS == 0) <= (batch.labels_BS == -100)).all())
    assert bool((batch.labels_BS[batch.position_ids_BS == 0] == -100).all())
    assert batch.weights_BS is None


def test_c032_labels_decode_to_answers_and_end_of_turn(store, tokenizer):
    batch = all_rows(RowPlan(store, RowOptions(SIZE, "fit")))
    for ids, _, labels in documents_of(batch):
        answer = tokenizer.decode(ids).split("<S>assistant\n")[1].removesuffix("\n")
        assert tokenizer.decode([x for x in labels if x >= 0]) == answer
        assert answer.endswith("<E>")


def test_c035_fit_takes_the_fewest_rows(store):
    plan = RowPlan(store, RowOptions(256, "fit"))
    assert plan.num_rows == -(-store.num_tokens // 256)


@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=20),
    talks=st.lists(st.integers(0, 10), max_size=20),
    seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_c035_fit_cuts_long_texts_and_loses_nothing(tokenizer, tmp_path_factory, lengths, talks, seed):
    """Every token once, every conversation and every text that fits whole, each part of a text a document of its own."""
    texts = [TextDocument(chr(0x100 + i) * n + ".") for i, n in enumerate(lengths)]
    documents = [*texts, *conversations(talks)]
    store = build_store(documents, tokenizer, tmp_path_factory.mktemp("t"), source_digest="x")
    batch = all_rows(RowPlan(store, RowOptions(80, "fit", seed=seed)))
    found = [(tuple(ids), positions) for ids, positions, _ in documents_of(batch)]
    assert all(positions == list(range(len(ids))) for ids, positions in found)
    pieces = Counter(ids for ids, _ in found)
    whole = Counter(tuple(store.document(i)[0].tolist()) for i in range(len(store)))
    assert all(pieces[ids] >= count for ids, count in whole.items() if len(ids) <= 80)
    assert Counter(token for ids, _ in found for token in ids) == Counter(store.tokens.tolist())
    assert batch.num_tokens == store.num_tokens


def test_r09_padding_is_the_tokenizers_own_id(store, tokenizer):
    batch = all_rows(RowPlan(store, RowOptions(SIZE, "none")))
    padding = batch.input_ids_BS[batch.document_ids_BS == 0]
    assert len(padding) and set(padding.tolist()) == {tokenizer.pad_id}


def test_train_on_all_and_weights(tokenizer, talk, tmp_path):
    documents = [talk("qq", "aa", "q2", "a2", weights={1: 0.0, 3: 0.5}), TextDocument("text"), talk("q3", "a3")]
    store = build_store(documents, tokenizer, tmp_path, source_digest="x")

    def labelled(train_on, weight=1.0):
        batch = all_rows(RowPlan(store, RowOptions(80, "none", train_on, weight)))
        rows = []
        for row in range(3):
            found = {}
            for label, w in zip(batch.labels_BS[row].tolist(), batch.weights_BS[row].tolist(), strict=True):
                if label >= 0:
                    found.setdefault(w, []).append(label)
                else:
                    assert w == 0 or batch.position_ids_BS[row].tolist().count(0) > 1
            rows.append({w: tokenizer.decode(ids) for w, ids in found.items()})
        return rows

    assert labelled("assistant") == [{0.5: "a2<E>"}, {1.0: "ext<T>"}, {1.0: "a3<E>"}]
    everything = labelled("all", 3.0)
    assert everything[0][1.5] == "a2<E>" and "aa" not in everything[0][1.0] and everything[0][1.0].startswith("user\nqq<E>")
    assert everything[1] == {1.0: "ext<T>"} and everything[2][3.0] == "a3<E>"


# loaders


def rows_of(loader):
    return [[row for batch in step for row in batch.rows] for step in loader]


def global_rows(store, config, world, micro, accumulation, start=None):
    """The rows of each step over all ranks, in the order of micro batches, ranks, rows."""
    loaders = [
        TrainLoader(store, config, rank=r, world=world, micro_batch=micro, accumulation=accumulation, start=start)
        for r in range(world)
    ]
    steps = []
    for parts in zip(*loaders, strict=True):
        steps.append([row for m in range(accumulation) for part in parts for row in part[m].rows])
    return steps


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    ("world", "micro", "accumulation"), [(1, 12, 1), (1, 1, 12), (2, 3, 2), (3, 2, 2), (4, 1, 3), (12, 1, 1)]
)
def test_c035_row_order_does_not_depend_on_the_split(store, settings, packing, world, micro, accumulation):
    config = settings(num_epochs=2, packing=packing)
    reference = global_rows(store, config, 1, 2, 6)
    assert global_rows(store, config, world, micro, accumulation) == reference
    flat = [row for step in reference for row in step]
    count = TrainLoader(store, config).rows_per_epoch
    assert sorted(flat[:count]) == sorted(flat[count : 2 * count]) == list(range(count))
    assert flat[:count] != flat[count : 2 * count] and set(flat[2 * count :]) <= {-1}


def same(one: Batch, other: Batch) -> bool:
    names = ("input_ids_BS", "labels_BS", "document_ids_BS", "position_ids_BS")
    return one.rows == other.rows and all(torch.equal(getattr(one, n), getattr(other, n)) for n in names)


@pytest.mark.parametrize("workers", [1, 4])
def test_c037_workers_give_the_same_batches(store, settings, workers):
    plain = [b for step in TrainLoader(store, settings(gradient_accumulation_steps=2)) for b in step]
    config = settings(num_workers=workers, prefetch_batches=3, gradient_accumulation_steps=2)
    loader = TrainLoader(store, config)
    threaded = [b for step in loader for b in step]
    assert len(plain) == len(threaded) == 2 * loader.total_steps()
    assert all(same(a, b) for a, b in zip(plain, threaded, strict=True))


@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rs05_resume_at_any_step_gives_the_tail(small, settings, data):
    """Also with other workers, prefetch and split of the same global batch; twice in a row."""
    config = settings(num_epochs=3, packing=data.draw(st.sampled_from(PACKINGS)))
    reference = global_rows(small, config, 1, 4, 2)
    stop = data.draw(st.integers(0, len(reference)))
    loader = TrainLoader(small, config, micro_batch=4, accumulation=2)
    steps = iter(loader)
    for _ in range(stop):
        next(steps)
    again = settings(num_epochs=3, packing=config.packing, num_workers=data.draw(st.integers(0, 2)))
    assert global_rows(small, again, 2, 2, 2, start=loader.position) == reference[stop:]
    rest = TrainLoader(small, config, micro_batch=8, start=loader.position)
    assert len(rest) == len(reference) - stop
    if stop < len(reference):
        next(iter(rest))
        assert rows_of(TrainLoader(small, config, micro_batch=8, start=rest.position)) == reference[stop + 1 :]


def test_position_counts_rows_not_prefetched_steps(store, settings):
    loader = TrainLoader(store, settings(num_workers=2, prefetch_batches=8, batch_size=3))
    assert loader.position == Position(0, 0)
    steps = iter(loader)
    next(steps)
    assert loader.position == Position(0, 3)
    next(steps)
    assert loader.position == Position(0, 6)
    steps.close()


def test_total_steps_are_exact_and_the_end_is_filled_with_padding(store, settings):
    config = settings(num_epochs=2, batch_size=7, gradient_accumulation_steps=3)
    loader = TrainLoader(store, config)
    steps = list(loader)
    assert len(steps) == loader.total_steps() == loader.total_steps(2) == -(-2 * loader.rows_per_epoch // 21)
    assert loader.position == Position(2, 0) and len(loader) == 0 and list(loader) == []
    last = steps[-1]
    padding = [row for batch in last for row in batch.rows].count(-1)
    assert padding == len(steps) * 21 - 2 * loader.rows_per_epoch > 0
    empty = last[-1]
    assert empty.rows[-1] == -1 and not empty.document_ids_BS[-1].any() and bool((empty.labels_BS[-1] == -100).all())
    assert all(batch.input_ids_BS.shape == (7, SIZE) for step in steps for batch in step)
    assert sum(b.num_labels for step in steps for b in step) == 2 * store.num_trained


def test_rs07_other_data_seed_or_length_is_another_order(store, settings, tokenizer, tmp_path):
    base = rows_of(TrainLoader(store, settings()))
    assert rows_of(TrainLoader(store, settings())) == base
    assert rows_of(TrainLoader(store, settings(seed=1))) != base
    lengths = np.random.default_rng(0).integers(0, 18, 300).tolist()
    documents = conversations(lengths)
    documents[7] = Conversation((Message("user", "7"), Message("assistant", "b" * (lengths[7] + 1))))
    changed = build_store(documents, tokenizer, tmp_path, source_digest="other")
    assert changed.fingerprint != store.fingerprint
    none = settings(packing="none")  # the same lengths and rows, so only the order can differ
    assert sorted(TrainLoader(changed, none).plan.samples.lengths) == sorted(TrainLoader(store, none).plan.samples.lengths)
    assert rows_of(TrainLoader(changed, none)) != rows_of(TrainLoader(store, none))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 7), (2, 3), (5, 2)])
def test_r31_evaluation_drops_nothing(store, settings, packing, world, micro):
    loaders = [EvalLoader(store, settings(packing=packing, seed=r), r, world, micro) for r in range(world)]
    assert len({len(loader) for loader in loaders}) == 1
    batches = [list(loader) for loader in loaders]
    assert [len(part) for part in batches] == [len(loader) for loader in loaders]
    rows = [row for part in batches for batch in part for row in batch.rows if row >= 0]
    assert sorted(rows) == list(range(loaders[0].plan.num_rows))
    assert sum(batch.num_tokens for part in batches for batch in part) == store.num_tokens


def test_r31_a_limited_evaluation_takes_the_same_rows_for_any_split(store, settings):
    def rows(world, micro, workers=0):
        loaders = [EvalLoader(store, settings(batch_size=4, num_workers=workers), r, world, micro, 5) for r in range(world)]
        return {row for loader in loaders for batch in loader for row in batch.rows} - {-1}

    assert len(rows(1, 4)) == 20
    assert rows(1, 4) == rows(1, 3) == rows(2, 4) == rows(3, 7, workers=2)


def test_r31_a_set_smaller_than_a_batch(tokenizer, talk, settings, tmp_path):
    store = build_store([talk("q", "a")], tokenizer, tmp_path, source_digest="1")
    (batch,) = EvalLoader(store, settings(), 0, 1, 8, 100)
    assert batch.input_ids_BS.shape == (8, SIZE) and batch.num_labels == 2
    assert [b.num_labels for b in EvalLoader(store, settings(), 1, 2, 8, 100)] == [0]


def test_a_failing_worker_raises_in_the_loop(store, settings, monkeypatch):
    loader = TrainLoader(store, settings(num_workers=2))
    monkeypatch.setattr(loader, "_planned", lambda first: [10**9])
    with pytest.raises(IndexError):
        list(loader)


def test_batch_to_moves_everything(store):
    batch = make_batch(RowPlan(store, RowOptions(SIZE)), [0, -1])
    moved = batch.to("meta")
    assert moved.input_ids_BS.device.type == "meta" and moved.weights_BS is None and moved.rows == (0, -1)
    assert replace(batch, weights_BS=torch.ones(1)).to("meta").weights_BS.device.type == "meta"


def test_c032_map_style_dataset(write, tokenizer, settings, tmp_path, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.chdir(tmp_path)
    path = write("m.jsonl", [c.to_record() for c in conversations([3] * 10)])
    dataset = ConversationDataset(data_path=str(path), tokenizer=tokenizer, config=SimpleNamespace(seq_length=SIZE))
    assert len(dataset) == dataset.plan.num_rows > 1
    items = [dataset[i] for i in range(len(dataset))]
    assert set(items[0]) == {"input_ids", "labels", "document_ids", "position_ids"}
    assert all(value.shape == (SIZE,) and value.dtype == torch.int64 for value in items[0].values())
    answers = "".join(tokenizer.decode([x for x in item["labels"].tolist() if x >= 0]) for item in items)
    assert answers == "aaaa<E>" * 10
    assert sum(1 for _ in torch.utils.data.DataLoader(dataset, batch_size=2)) == -(-len(dataset) // 2)
    with pytest.raises(IndexError):
        dataset[len(dataset)]
