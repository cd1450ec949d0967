"""Every mode trains as plain PyTorch on one rank does (C54, C63, C70-C72, R02, R03, R34); `modes.py` has the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lumina_engine.config.checks import check
from lumina_engine.config.schema import Config
from tests.parity.modes import BOUNDS, Mode, modes, references, results, worst, write_data

RUN = [mode for mode in modes() if not mode.refused]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def reference(data: Path) -> dict[int, list[float]]:
    found = references(data)
    assert all(losses[-1] < 0.6 * losses[0] for losses in found.values())  # it learns, so equality says something
    return found


@pytest.fixture(scope="module")
def found(data: Path) -> dict[str, dict[str, Any]]:
    return results(data, 1, RUN) | results(data, 2, RUN)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", RUN, ids=lambda mode: mode.name)
def test_c054_losses_equal_plain_pytorch(
    mode: Mode, found: dict[str, dict[str, Any]], reference: dict[int, list[float]]
) -> None:
    assert worst(found[mode.name]["losses"], reference[mode.accumulation]) <= BOUNDS[mode.precision]


@pytest.mark.parametrize("mode", [mode for mode in modes() if mode.refused], ids=lambda mode: mode.name)
def test_c054_bf16_at_stage_0_is_refused(mode: Mode) -> None:
    config = Config(zero_stage=mode.stage, precision=mode.precision)
    assert [f.code for f in check(config) if f.severity == "error"] == ["bf16_stage0"]
