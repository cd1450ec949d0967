"""Row lengths of the curriculum: halves of the longest, equal shares of the steps, what is rounded is said (C74)."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina_engine.config.checks import check
from lumina_engine.config.curriculum import MOST_LENGTHS, Curriculum, row_lengths
from lumina_engine.config.machine import GB, Machine
from lumina_engine.config.resolve import resolve
from lumina_engine.config.schema import Config


def config(**keys: object) -> Config:
    return Config(**{"curriculum_learning": True, "tokenizer": "lumina-1k", "seq_length": 4096, **keys})


def test_c074_thousand_to_four_thousand_in_a_thousand_steps() -> None:
    ramp = Curriculum.of(config(min_seq_length=1024, max_seq_length=4096, curriculum_steps=1000))
    assert ramp.lengths == (1024, 2048, 4096)
    assert [ramp.length(step) for step in (1, 500, 501, 1000, 1001, 99_999)] == [1024, 1024, 2048, 2048, 4096, 4096]


def test_c074_off_is_one_length_and_auto_is_an_eighth() -> None:
    assert Curriculum.of(config(curriculum_learning=False, min_seq_length=64)).lengths == (4096,)
    assert Curriculum.of(config()).lengths == (512, 1024, 2048, 4096)
    assert Curriculum.of(config(seq_length=256)).lengths == (64, 128, 256)


@given(
    size=st.integers(16, 5000),
    low=st.integers(16, 5000),
    high=st.integers(16, 5000),
    steps=st.integers(1, 40),
)
def test_c074_lengths_divide_the_row_and_share_the_steps(size: int, low: int, high: int, steps: int) -> None:
    low, high = sorted((min(low, size), min(high, size)))
    lengths = row_lengths(size, low, high)
    assert len(lengths) <= MOST_LENGTHS and list(lengths) == sorted(set(lengths))
    assert all(size % n == 0 and n <= high and (n % 8 == 0 or n == size) for n in lengths)
    assert all(2 * a == b for a, b in itertools.pairwise(lengths))
    assert bool(lengths) or high < size
    if len(lengths) > 1:
        assert lengths[0] >= low
        ramp = [Curriculum(lengths, steps).length(step) for step in range(1, steps + 3)]
        assert ramp == sorted(ramp) and ramp[-2:] == [lengths[-1]] * 2
        shares = [ramp[:steps].count(n) for n in lengths[:-1]]
        assert sum(shares) == steps and max(shares) - min(shares) <= 1


def test_c074_at_most_eight_shapes() -> None:
    assert row_lengths(2**20, 16, 2**20) == tuple(2**n for n in range(13, 21))


@pytest.mark.parametrize(
    ("keys", "code", "severity", "words"),
    [
        ({"min_seq_length": 8192}, "curriculum", "error", "longer than seq_length = 4,096"),
        ({"seq_length": 256, "min_seq_length": 1024}, "curriculum", "error", "longer than seq_length = 256"),
        ({"min_seq_length": 1000}, "curriculum_lengths", "info", "becomes 1,024: rows are halved"),
        ({"max_seq_length": 3000}, "curriculum_lengths", "info", "becomes 2,048"),
        ({"min_seq_length": 16}, "curriculum_lengths", "info", "becomes 32: rows are halved (at most 8 lengths): 32 - 64"),
        ({"seq_length": 1001, "max_seq_length": 500, "min_seq_length": 16}, "curriculum", "error", "cannot be cut"),
        ({"seq_length": 1000}, "curriculum_one", "warning", "all rows have 1,000 tokens"),
        ({"max_steps": 900}, "curriculum_end", "warning", "before full length"),
        ({"curriculum_learning": False, "min_seq_length": 64}, "switched_off", "info", "has no effect"),
    ],
)
def test_c074_findings(keys: dict, code: str, severity: str, words: str) -> None:
    found = [f for f in check(config(**keys)) if f.code == code]
    assert len(found) == 1 and found[0].severity == severity and words in found[0].line(), check(config(**keys))


def test_c074_lengths_in_force_are_resolved_at_launch() -> None:
    resolved = resolve(config(min_seq_length=1000), Machine([], 16 * GB, 4, None), tokenizer_vocab=1024)
    assert (resolved.min_seq_length, resolved.max_seq_length) == (1024, 4096)
    assert not [f for f in check(resolved) if "curriculum" in f.code]
