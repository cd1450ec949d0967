"""The reducers against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_engine.monitoring import reduce
from lumina_engine.monitoring.reduce import Pyramid, Smooth, percentile_range, smooth, thin


def noisy(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=n).astype(np.float32)
    values[rng.random(n) < 0.05] = np.nan
    values[rng.random(n) < 0.01] = np.inf
    return values


def brute(values: np.ndarray, edges: np.ndarray) -> list[tuple[float, float, float, int, int]]:
    rows = []
    for a, b in itertools.pairwise(edges):
        part = values[a:b]
        good = part[np.isfinite(part)].astype(np.float64)
        rows.append(
            (good.min(), good.max(), good.mean(), len(good), len(part) - len(good))
            if len(good)
            else (np.nan, np.nan, np.nan, 0, len(part))
        )
    return rows


@pytest.mark.parametrize("limit", [32_768, 40, 8])
def test_pyramid_equals_brute_force_on_random_windows(monkeypatch, limit):
    monkeypatch.setattr(reduce, "_MAX_BLOCKS", limit)  # small limits force the higher levels
    values = noisy(20_000)
    pyramid = Pyramid()
    rng = np.random.default_rng(1)
    for part in np.array_split(values, 37):
        pyramid.extend(part)
    for _ in range(60):
        a, b = sorted(rng.integers(0, len(values) + 1, 2))
        edges = np.sort(rng.integers(a, b + 1, rng.integers(2, 200)))
        got = pyramid.columns(edges)
        want = np.array(brute(values, edges))
        np.testing.assert_allclose(got.low_C, want[:, 0])
        np.testing.assert_allclose(got.high_C, want[:, 1])
        np.testing.assert_allclose(got.mean_C, want[:, 2], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(got.count_C, want[:, 3])
        np.testing.assert_array_equal(got.missing_C, want[:, 4])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20_000), st.integers(0, 5))
def test_extremes_of_everything_equal_brute_force(size, seed):
    values = noisy(size, seed)
    pyramid = Pyramid()
    pyramid.extend(values)
    good = values[np.isfinite(values)]
    low, high, count = pyramid.extremes()
    assert count == len(good)
    if len(good):
        assert (low, high) == (good.min(), good.max())
    else:
        assert np.isnan(low) and np.isnan(high)


def test_mx06_one_spike_in_a_million_is_in_every_picture():
    values = np.zeros(1_000_000, np.float32)
    values[654_321] = 7.0
    pyramid = Pyramid()
    pyramid.extend(values)
    for columns in (1, 3, 100, 300):
        for a, b in ((0, 1_000_000), (600_000, 700_000), (654_000, 655_000), (654_321, 654_322)):
            edges = np.linspace(a, b, columns + 1).astype(np.int64)
            assert np.nanmax(pyramid.columns(edges).high_C) == 7.0


def test_pyramid_after_a_cut_equals_a_new_one():
    values = noisy(9_000, 3)
    pyramid, fresh = Pyramid(), Pyramid()
    pyramid.extend(values)
    pyramid.truncate(4_321)
    pyramid.extend(values[:500])
    fresh.extend(np.concatenate([values[:4_321], values[:500]]))
    edges = np.linspace(0, 4_821, 50).astype(np.int64)
    for a, b in zip(vars(pyramid.columns(edges)).values(), vars(fresh.columns(edges)).values(), strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9_000), st.integers(0, 9_000), st.sampled_from([63, 64, 200])), min_size=2, max_size=8),
    st.sampled_from([20, 97]),
    st.sampled_from([8, 32_768]),
)
def test_pictures_one_after_the_other_equal_those_of_a_new_pyramid(ticks, stride, limit):
    """A series that grows or is cut between two pictures on the same, or another, axis."""
    before, reduce._MAX_BLOCKS = reduce._MAX_BLOCKS, limit
    try:
        source, pyramid, kept = noisy(80_000, 9), Pyramid(), np.array([], np.float32)
        for grow, size, columns in ticks:
            if size < len(kept):
                pyramid.truncate(size)
                kept = kept[:size]
            pyramid.extend(source[len(kept) : len(kept) + grow] + size)
            kept = np.concatenate([kept, source[len(kept) : len(kept) + grow] + np.float32(size)])
            edges = np.minimum(np.arange(columns + 1) * stride, len(kept))
            fresh = Pyramid()
            fresh.extend(kept)
            for a, b in zip(vars(pyramid.columns(edges)).values(), vars(fresh.columns(edges)).values(), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12)
    finally:
        reduce._MAX_BLOCKS = before


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300), st.floats(0, 100), st.floats(0, 100))
def test_percentiles_are_those_of_numpy(values, low, high):
    got = percentile_range(np.array(values, np.float32), low, high)
    np.testing.assert_allclose(got, np.percentile(np.array(values, np.float64), (low, high)), rtol=1e-9, atol=1e-6)


def loop(values: np.ndarray, weight: float) -> np.ndarray:
    m, n, shown = 0.0, 0, []
    for y in values.astype(np.float64):
        if not np.isfinite(y):
            shown.append(np.nan)
            continue
        m, n = weight * m + (1 - weight) * y, n + 1
        shown.append(m / (1 - weight**n))
    return np.array(shown)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9, 0.98, 0.999])
def test_smoothing_equals_the_plain_loop(weight):
    values = noisy(5_000, 5)
    np.testing.assert_allclose(smooth(values, weight), loop(values, weight), rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3_000), min_size=1, max_size=5), st.sampled_from([0.0, 0.5, 0.98, 0.999]), st.integers(0, 9_000))
def test_smoothing_in_pieces_with_a_cut_equals_the_whole(pieces, weight, cut):
    values = noisy(sum(pieces), 7)
    running, at = Smooth(weight), 0
    for piece in pieces:
        at += piece
        running.catch_up(values[:at])
    cut = min(cut, len(values))
    running.truncate(cut, values)
    assert len(running.pyramid) == cut
    tail = noisy(400, 8)
    whole = np.concatenate([values[:cut], tail])
    running.catch_up(whole)
    np.testing.assert_allclose(running.pyramid.values, loop(whole, weight), rtol=1e-5, atol=1e-6)


def test_smoothing_leaves_a_constant_series_as_it_is():
    values = np.full(10_000, 2.5, np.float32)
    assert np.all(smooth(values, 0.999).astype(np.float32) == np.float32(2.5))


def test_percentiles_ignore_what_is_not_finite():
    values = np.concatenate([np.arange(1000, dtype=np.float32), [np.nan, np.inf, -np.inf]])
    low, high = percentile_range(values)
    assert 45 <= low <= 55 and 945 <= high <= 955
    assert percentile_range(np.array([np.nan])) is None
    assert percentile_range(np.array([])) is None


def test_thin_keeps_both_extremes():
    values = np.zeros(100_000)
    values[5], values[77_777] = -3.0, 9.0
    thinned = thin(values, 200)
    assert len(thinned) == 400 and thinned.min() == -3.0 and thinned.max() == 9.0
