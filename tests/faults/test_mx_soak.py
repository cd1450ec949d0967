"""MX08, five minutes in the nightly tier; `python -m tests.faults.soak --minutes 30` is the weekly one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .soak import problems, soak


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_mx08_five_minutes_of_everything(fault_seed: int, figure: Callable[[str, object], None]) -> None:
    figures = soak(300.0, fault_seed)
    for name, value in figures.items():
        figure(name, value)
    assert problems(figures) == []
