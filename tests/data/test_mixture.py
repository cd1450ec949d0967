"""The mixture of tasks: exact shares, every row once in an epoch of its task, one sequence for any split and resume."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumina_engine.data.batch import Position, TrainLoader
from lumina_engine.data.conversation import Conversation, Message
from lumina_engine.data.mixed import MixedRows, Mixture
from lumina_engine.data.mixture import BLOCK, UNITS, MixturePlan, Place, apportion, temper
from lumina_engine.data.rows import RowOptions
from lumina_engine.data.skip_list import SkipList
from lumina_engine.data.token_store import build_store

QUICK = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
TASKS = st.lists(st.tuples(st.integers(1, 90), st.floats(0.01, 100)), min_size=1, max_size=6)
CAPS = st.one_of(st.none(), st.floats(0.1, 6))


def plan_of(tasks, seed=0, cap=None):
    return MixturePlan("f", [rows for rows, _ in tasks], temper([w for _, w in tasks], 1.0), seed, cap)


@given(tasks=TASKS, cap=CAPS, seed=st.integers(0, 3))
@settings(max_examples=50, **QUICK)
def test_c039_no_row_twice_or_never_in_an_epoch_of_its_task(tasks, cap, seed):
    """Place by place: each task counts its own rows up, none ends before its cap or goes on behind it, `taken` agrees."""
    plan = plan_of(tasks, seed, cap)
    counts = [0] * len(tasks)
    for number in range(1200):
        assert number % 97 or plan.taken(number) == counts
        epoch, index = divmod(number, plan.num_rows)
        place = plan.at(epoch, index)
        assert place.epoch * tasks[place.task][0] + place.index == counts[place.task]
        counts[place.task] += 1
        if plan.capacity is not None and number < plan.capacity:
            assert counts[place.task] <= plan.limits[place.task]
    if plan.capacity is not None:
        assert plan.taken(plan.capacity) == plan.limits == [max(1, int(rows * cap + 1e-9)) for rows, _ in tasks]


@given(tasks=TASKS, seed=st.integers(0, 3), block=st.integers(0, 10_000))
@settings(max_examples=50, **QUICK)
def test_c039_each_block_has_each_task_in_its_share(tasks, seed, block):
    plan = plan_of(tasks, seed)
    begin, end = plan.taken(block * BLOCK), plan.taken((block + 1) * BLOCK)
    for share, low, high in zip(plan.shares, begin, end, strict=True):
        assert abs((high - low) - BLOCK * share) < 2.001
        assert abs(low - block * BLOCK * share) < 7  # the rounding averages out


def test_c039_shares_within_one_percent_after_100k_samples():
    for weights in ([1.0, 0.5, 0.3], [1, 1, 1, 1], [100, 3, 1.5, 1], [0.9, 0.02, 0.02, 0.06]):
        plan = plan_of([(1000, w) for w in weights], seed=3)
        seen = Counter(plan.at(*divmod(number, plan.num_rows)).task for number in range(100_000))
        for task, share in enumerate(plan.shares):
            assert abs(seen[task] / 100_000 - share) < 0.01 * share, (weights, task)
    assert plan.taken(3 * UNITS) == [3 * n for n in apportion(plan.shares, UNITS)]  # exact


def test_c039_a_place_costs_the_same_anywhere():
    rows = [10**9, 10**7, 10**5]
    plan = MixturePlan("f", rows, [0.5, 0.3, 0.2], 0, 4)
    assert [phase.tasks for phase in plan._phases[:-1]] == [[0, 1, 2], [0, 1], [0]]
    assert plan.capacity == 4 * sum(rows) and plan.taken(plan.capacity) == [4 * count for count in rows]
    last = plan.at(3, plan.num_rows - 1)
    assert last == Place(0, 3, 10**9 - 1)
    assert plan.places(2) == 2 * sum(rows) and plan.places(9) == plan.capacity


def test_c039_the_share_of_a_task_that_ended_goes_to_the_others():
    plan = MixturePlan("f", [100_000, 100_000, 50], [0.6, 0.3, 0.1], 0, 1)
    end = plan._phases[1].begin
    assert plan.taken(end)[2] == 50 == plan.taken(end + 50_000)[2]
    after = np.subtract(plan.taken(end + 51_200), plan.taken(end))
    assert np.allclose(after / 51_200, [2 / 3, 1 / 3, 0], atol=1e-4)


def test_c039_the_sequence_is_fixed_for_ever():
    # a change here changes every resumed run: raise MIX_VERSION
    plan = MixturePlan("fingerprint", [100, 50, 7], temper([1, 0.5, 0.3], 1), 7, 3)
    assert "".join(str(plan.at(0, i).task) for i in range(40)) == "1100000102021111020001100100000001010012"
    assert [plan.at(2, i) for i in range(3)] == [Place(1, 2, 0), Place(0, 1, 93), Place(0, 1, 94)]


def test_c039_order_differs_by_seed_and_data():
    sequences = [
        [MixturePlan(fingerprint, [50, 50], [1, 1], seed).at(0, i).task for i in range(100)]
        for fingerprint, seed in (("f", 0), ("f", 1), ("g", 0))
    ]
    assert len({tuple(sequence) for sequence in sequences}) == 3
    assert len({tuple(sequences[0][at : at + 10]) for at in range(0, 100, 10)}) > 5  # no fixed beat of the tasks


def test_c039_temperature_and_largest_remainder():
    assert temper([1, 3], 1) == pytest.approx([0.25, 0.75])
    assert temper([1, 16], 2) == pytest.approx([0.2, 0.8]) and temper([1, 16], 1e9) == pytest.approx([0.5, 0.5])
    assert temper([1, 2], 0.001) == pytest.approx([0, 1])
    assert apportion([0.5, 0.3, 0.2], 13) == [6, 4, 3] and apportion([1, 1e-9], 100) == [99, 1]
    for weights in ([], [0.0], [-1.0], [float("nan")]):
        with pytest.raises(ValueError, match="above 0"):
            temper(weights, 1)
    for rows, shares in (([], []), ([0], [1.0]), ([1, 2], [1.0]), ([1], [0.0])):
        with pytest.raises(ValueError, match="each needs rows"):
            MixturePlan("f", rows, shares, 0)


# rows and loaders


def conversations(tag, count):
    return [
        Conversation((Message("user", f"{tag}{i}" + "q" * (i % 13)), Message("assistant", tag * (i % 7 + 1))))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def stores(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return {
        tag: build_store(conversations(tag, n), tokenizer, folder, source_digest=tag)
        for tag, n in (("a", 90), ("b", 40), ("c", 11))
    }


@pytest.fixture(scope="module")
def mixture(stores):
    return Mixture(stores, {"a": 1.0, "b": 0.5, "c": 0.5}, max_epochs=3)


def rows_of(data, config, world, micro, accumulation, start=None, workers=0, skip=None):
    """The planned rows of each step over all ranks, and where the run stands at the end."""
    config.num_workers = workers
    loaders = [
        TrainLoader(data, config, rank=r, world=world, micro_batch=micro, accumulation=accumulation, start=start, skip=skip)
        for r in range(world)
    ]
    found = []
    for parts in zip(*loaders, strict=True):
        found.append([row for m in range(accumulation) for part in parts for row in part[m].rows])
        yield found[-1], loaders[0].position


@given(data=st.data())
@settings(max_examples=12, **QUICK)
def test_rs05_any_split_and_any_resume_give_the_same_sequence(mixture, stores, settings, data):
    """World 1 → 2 → 1 with other workers and micro batches, with and without tasks, packing and a skip list."""
    body = data.draw(st.sampled_from([mixture, Mixture(stores, {}, 2.0), stores["a"]]))
    config = settings(
        num_epochs=2, packing=data.draw(st.sampled_from(["fit", "concat", "none"])), seed=data.draw(st.integers(0, 3))
    )
    skip = SkipList.of(data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=2)))
    splits = [(1, 8, 1), (1, 2, 4), (2, 2, 2), (2, 4, 1), (4, 1, 2), (8, 1, 1)]
    whole = [rows for rows, _ in rows_of(body, config, 1, 8, 1, skip=skip)]
    position, got = Position(), []
    for stop in [*sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=2))), len(whole)]:
        steps = rows_of(body, config, *data.draw(st.sampled_from(splits)), position, data.draw(st.sampled_from([0, 3])), skip)
        for _ in range(stop - len(got)):
            rows, position = next(steps)
            got.append(rows)
        steps.close()
    assert got == whole


@given(
    packing=st.sampled_from(["fit", "concat", "none"]), seed=st.integers(0, 9), world=st.integers(1, 3), micro=st.integers(1, 4)
)
@settings(max_examples=8, **QUICK)
def test_c035_each_row_once_in_each_epoch_of_its_task(mixture, settings, packing, seed, world, micro):
    config = settings(num_epochs=4, packing=packing, seed=seed)
    plan = TrainLoader(mixture, config).plan
    flat = [row for rows, _ in rows_of(mixture, config, world, micro, 1) for row in rows if row >= 0]
    assert len(flat) == plan.rows_of_run(4) == 3 * plan.num_rows  # all tasks end at their cap
    for task, own in enumerate(plan.plans):
        mine = [row - plan._begins[task] for row in flat if plan.task_of(row) == task]
        for epoch in range(3):
            assert sorted(mine[epoch * own.num_rows : (epoch + 1) * own.num_rows]) == list(range(own.num_rows))


@pytest.mark.parametrize("packing", ["fit", "concat", "none"])
def test_c039_rows_of_all_tasks_are_those_of_each(stores, mixture, packing):
    plan = MixedRows(mixture, RowOptions(48, packing))
    order = [5, plan.num_rows - 1, 0, -1, plan._begins[1], 5]
    built = plan.build(order)
    for place, row in enumerate(order):
        task = max(plan.task_of(row), 0)
        alone = plan.plans[task].build([row - plan._begins[task] if row >= 0 else -1])
        for name in ("input_ids", "labels", "document_ids", "position_ids"):
            assert np.array_equal(getattr(built, name)[place], getattr(alone, name)[0]), (name, row)
    assert built.weights is None
    everything = [sample for row in range(plan.num_rows) for sample in plan.members(row)]
    assert set(everything) == set(range(sum(map(len, stores.values()))))


def test_c039_a_task_with_weights_makes_all_batches_weighted(stores, tokenizer, settings, tmp_path):
    heavy = Conversation((Message("user", "q"), Message("assistant", "hhh", 0.5)))
    mixed = Mixture({"a": stores["a"], "h": build_store([heavy], tokenizer, tmp_path, source_digest="h")}, {"a": 1, "h": 1})
    batches = [batch for step in TrainLoader(mixed, settings(seq_length=48)) for batch in step]
    assert all(batch.weights_BS is not None for batch in batches)
    kinds = {float(w) for batch in batches for w in batch.weights_BS[batch.labels_BS >= 0]}
    assert kinds == {0.5, 1.0} and all(torch.equal(b.weights_BS > 0, b.labels_BS >= 0) for b in batches)


def test_c039_the_fingerprint_names_everything_that_decides_the_order(stores):
    base = Mixture(stores, {"a": 1.0, "b": 1.0, "c": 1.0})
    others = [
        Mixture(stores, {"a": 1.0, "b": 1.0, "c": 2.0}),
        Mixture(stores, base.weights, 2.0),
        Mixture(stores, base.weights, max_epochs=2),
        Mixture({"a": stores["a"], "b": stores["b"]}, base.weights),
        Mixture({**stores, "c": stores["b"]}, base.weights),
    ]
    assert len({mixture.fingerprint for mixture in [base, *others]}) == 6
    assert base.fingerprint == Mixture(dict(stores), dict(base.weights)).fingerprint
    assert len(base) == 141 and base.num_tokens == sum(store.num_tokens for store in stores.values())
