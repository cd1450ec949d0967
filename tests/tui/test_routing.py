"""The routing history: bounded, the same however the records arrive, equal to brute force, cut by a rewind."""

from __future__ import annotations

import math
import pickle
import random

import numpy as np
import pytest

from lumina_engine.monitoring import record as rec
from lumina_tui import routing
from lumina_tui.routing import RoutingHistory
from lumina_tui.series import RunStore


def observation(step: int, generator: random.Random, layers: int = 3, experts: int = 5) -> rec.Experts:
    """Loads of which some are zero, now and then a whole layer, and figures of which some are unknown."""
    load = [
        [generator.choice([0.0, 1.0, 7.0, 30.0]) * (generator.random() > 0.02) for _ in range(experts)] for _ in range(layers)
    ]
    if generator.random() < 0.05:
        load[0] = [0.0] * experts
    known = generator.random() > 0.1
    figures = {
        name: [generator.random() if generator.random() > 0.1 else math.nan for _ in range(layers)] if known else []
        for name in ("entropy", "dropped", "bias_range", "confidence")
    }
    return rec.Experts(step=step, layers=list(range(layers)), load=load, **figures)


def run_of(count: int, seed: int = 0, **shape: int) -> list[rec.Experts]:
    generator = random.Random(seed)
    step, records = 0, []
    for _ in range(count):
        step += generator.choice([1, 1, 5])
        records.append(observation(step, generator, **shape))
    return records


def same(one: RoutingHistory, two: RoutingHistory) -> None:
    a, b = one.to_arrays(), two.to_arrays()
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)


@pytest.fixture
def small(monkeypatch):
    """So few columns that they are merged many times."""
    monkeypatch.setattr(routing, "COLUMNS", 8)
    monkeypatch.setattr(routing, "FEWEST", 8)


@pytest.mark.parametrize("seed", range(20))
def test_c132_history_does_not_depend_on_batches(small, seed):
    records = run_of(100, seed)
    whole, pieces = RoutingHistory(), RoutingHistory()
    whole.extend(records)
    generator = random.Random(seed)
    while records:
        size = generator.randrange(1, 30)
        pieces.extend(records[:size])
        records = records[size:]
    same(whole, pieces)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 63, 64, 65, 500])
def test_c132_columns_equal_brute_force(small, count):
    records = run_of(count, count)
    history = RoutingHistory()
    history.extend(records)
    stride = history._blocks[0].stride
    groups = [records[i : i + stride] for i in range(0, count, stride)]
    for layer in range(3):
        got = history.layer(layer)
        assert got is not None and len(groups) == len(got.last_T) <= 8
        for column, group in enumerate(groups):
            assert (got.first_T[column], got.last_T[column]) == (group[0].step, group[-1].step)
            loads = np.array([record.load[layer] for record in group])
            shares = [row / row.mean() for row in loads if row.sum() > 0]
            expected = np.mean(shares, axis=0) if shares else np.full(5, np.nan)
            np.testing.assert_allclose(got.share_TE[column], expected, rtol=1e-4)
            assert got.dead_TE[column].tolist() == (loads == 0).any(axis=0).tolist()
            dropped = [record.dropped[layer] for record in group if record.dropped and not math.isnan(record.dropped[layer])]
            np.testing.assert_allclose(got.figures["dropped"][column], max(dropped, default=math.nan), rtol=1e-5)
            entropy = [record.entropy[layer] for record in group if record.entropy and not math.isnan(record.entropy[layer])]
            np.testing.assert_allclose(got.figures["entropy"][column], min(entropy, default=math.nan), rtol=1e-5)
            assert got.figures["dead"][column] == max((row == 0).sum() for row in loads)


@pytest.mark.parametrize("seed", range(10))
def test_c132_a_rewind_cuts_and_goes_on(small, seed):
    generator = random.Random(seed)
    records = run_of(60, seed)
    to_step = records[generator.randrange(60)].step
    history = RoutingHistory()
    history.extend(records)
    history.truncate(to_step)
    kept = history.layer(0)
    assert all(step <= to_step for step in kept.last_T.tolist())
    again = [observation(to_step + 1 + i, generator) for i in range(40)]
    history.extend(again)
    got = history.layer(0)
    assert len(got.last_T) <= 8 and got.last_T[-1] == again[-1].step
    assert np.all(np.diff(got.first_T) > 0) and np.all(got.first_T[1:] > got.last_T[:-1])


def test_a_step_that_comes_again_replaces_the_old_one():
    history = RoutingHistory()
    records = [rec.Experts(step=step, load=[[1.0, n]]) for n, step in enumerate([1, 2, 3, 2, 3, 3])]
    summary = history.extend(records)
    assert summary.step_N.tolist() == [1, 2, 3]
    assert history.layer(0).share_TE[:, 1].tolist() == pytest.approx([0.0, 2 * 3 / 4, 2 * 5 / 6])


def test_c099_a_layer_that_got_an_expert_is_shown_with_it_and_without_it_after_a_rewind(small):
    generator = random.Random(5)
    before = [observation(step, generator, experts=4) for step in range(1, 30)]
    after = [observation(step, generator, experts=5) for step in range(30, 50)]
    history = RoutingHistory()
    summary = history.extend([*before, *after])
    assert summary.step_N.tolist() == list(range(1, 50))
    assert history.layer(1).share_TE.shape[1] == 5 and history.layer(1).first_T[0] == 30
    back = RoutingHistory.from_arrays(history.to_arrays())
    same(back, history)
    history.truncate(20)
    assert history.layer(1).share_TE.shape[1] == 4 and history.layer(1).last_T[-1] <= 20


@pytest.mark.parametrize("count", [0, 1, 40, 500])
def test_c132_arrays_give_the_same_history_back(small, count):
    records = run_of(count + 20, count)
    history = RoutingHistory()
    history.extend(records[:count])
    back = RoutingHistory.from_arrays(pickle.loads(pickle.dumps(history.to_arrays())))
    same(history, back)
    for one in (history, back):
        one.extend(records[count:])
    same(history, back)
    arrays = history.to_arrays()
    with pytest.raises(ValueError, match="dead_TLE"):
        RoutingHistory.from_arrays({**arrays, "0.dead_TLE": arrays["0.dead_TLE"][:, :1]})


def test_c132_memory_is_bounded_for_the_largest_model():
    history = RoutingHistory()
    for start in range(0, 600, 20):
        records = [rec.Experts(step=start + i, load=[[1.0] * 256] * 61) for i in range(20)]
        history.extend(records)
    size = sum(array.nbytes for array in history.to_arrays().values())
    assert size < 32 << 20 and 64 <= len(history.layer(60).last_T) <= 256


def test_c132_layers_split_over_several_records_become_one_row():
    one = [rec.Experts(step=s, layers=[0, 1], load=[[1, 3], [2, 2]], entropy=[0.8, 1.0], dropped=[0.1, 0.1]) for s in (5, 10)]
    two = [rec.Experts(step=s, layers=[2], load=[[0, 4]], entropy=[0.0], dropped=[0.4]) for s in (5, 10)]
    history = RoutingHistory()
    got = history.extend([one[0], two[0], one[1], two[1]])
    assert history.layers == [0, 1, 2] and got.step_N.tolist() == [5, 10] and got.layers_N.tolist() == [3, 3]
    np.testing.assert_allclose(got.imbalance_N, 2.0)
    np.testing.assert_allclose(got.entropy_N, 0.6)
    np.testing.assert_allclose(got.dropped_N, 0.2)


def test_ragged_empty_and_hostile_records_do_no_harm():
    history = RoutingHistory()
    records = [
        rec.Experts(step=1),
        rec.Experts(step=2, load=[[]]),
        rec.Experts(step=3, layers=[4, 2], load=[[1.0, 2.0, math.nan], [5.0]], imbalance=[math.nan]),
        rec.Experts(step=4, load=[[math.inf, 1e308, 1e308, -5.0]], dead=[2**31]),
        rec.Experts(step=0, load=[[0.0, 0.0]], imbalance=[1e308]),
    ]
    for record in records:
        history.extend([record])
    assert history.layers == [0, 2, 4]
    assert history.layer(2).share_TE[0, 0] == 1.0 and np.isnan(history.layer(2).share_TE[0, 1:]).all()
    assert history.layer(7) is None
    for n in range(100):
        history.extend([rec.Experts(step=n, layers=[n, n + 1], load=[[1], [1]])])
    assert len(history._blocks) <= routing.BLOCKS


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_c132_store_has_one_row_per_observed_step(size):
    records: list[rec.Record] = []
    for n in range(1, 41):
        records.append(rec.Step(step=n, tokens=10 * n, loss=1.0, step_time=36.0))
        if n % 5 == 0:  # two records of one step: a long one is split by layers
            records.append(rec.Experts(step=n, layers=[0, 1], load=[[1, 3], [2, 2]], entropy=[0.8, 1.0], dropped=[0.0, 0.2]))
            records.append(rec.Experts(step=n, layers=[2], load=[[0, 4]], entropy=[0.0], dropped=[0.4]))
    for seq, record in enumerate(records, start=1):
        record.seq = seq
    store = RunStore()
    for start in range(0, len(records), size):
        store.apply(records[start : start + size])
    history = store.history("imbalance")
    assert history is store.experts and store.history("loss") is store.steps
    assert history.step.values.tolist() == list(range(5, 41, 5))
    np.testing.assert_allclose(history.metrics["imbalance"].values, 2.0)
    np.testing.assert_allclose(history.metrics["entropy"].values, 0.6, rtol=1e-6)
    np.testing.assert_allclose(history.metrics["dropped"].values, 0.2, rtol=1e-6)
    assert history.x("tokens").tolist() == [10.0 * n for n in range(5, 41, 5)]
    store.apply([rec.Rewind(seq=len(records) + 1, to_step=22)])
    assert history.step.values.tolist() == [5, 10, 15, 20] and store.routing.layer(2).last_T[-1] == 20
