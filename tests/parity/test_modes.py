"""Every mode trains as plain PyTorch on one rank does (C54, C63, C70-C72, R02, R03, R34); `modes.py` has the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lumina_engine.config.checks import check
from lumina_engine.config.offload_checks import async_io_problem
from lumina_engine.config.schema import Config
from tests.parity.modes import (
    BIAS_RATE,
    BOUNDS,
    NVME_SHAPE,
    Mode,
    biased,
    modes,
    nvme_offload,
    references,
    results,
    table,
    worst,
    write_data,
)
from tests.parity.plain_loop import plain_training
from tests.parity.rows import ROWS, config_of, store_of

RUN = [mode for mode in modes() if not mode.refused]


def each_time(mode: Mode) -> bool:
    """In fp32 every engine on one and two ranks; in bf16, with accumulation and checkpointing, every engine on two ranks and
    the plain one on one; of autocast and of the bias plain PyTorch on one rank and ZeRO 3 on two, which differ most; of offload
    the optimizer alone and both, on two ranks. All other rows are slow."""
    apart = (mode.stage, mode.ranks) in ((None, 1), (3, 2))
    if mode.label == "bias" or mode.precision == "mixed_bf16":
        return apart
    if mode.label:
        return mode.ranks == 2 and mode.precision == "fp32" and mode.label in ("cpu_offload_optimizer", "cpu_offload")
    if mode.precision == "bf16":
        return mode.accumulation > 1 and mode.checkpointing and (mode.ranks == 2 or apart)
    return mode.accumulation == 1 and not mode.checkpointing


MERGE = [mode for mode in RUN + biased() if each_time(mode)]
REST = [mode for mode in RUN + biased() if mode not in MERGE]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def reference(data: Path) -> dict[int, list[float]]:
    found = references(data)
    assert all(losses[-1] < 0.6 * losses[0] for losses in found.values())  # it learns, so equality says something
    return found


NO_AIO = async_io_problem()


@pytest.fixture(scope="module")
def found(data: Path) -> dict[str, dict[str, Any]]:
    return results(data, 1, MERGE) | results(data, 2, MERGE)


@pytest.fixture(scope="module")
def rest(data: Path) -> dict[str, dict[str, Any]]:
    return results(data, 1, REST) | results(data, 2, REST)


def grid(wanted: list[Mode]) -> list[Any]:
    """(fixture that has it, mode), slow where it is not of each time."""
    return [
        pytest.param("rest" if mode in REST else "found", mode, id=mode.name, marks=[pytest.mark.slow] if mode in REST else [])
        for mode in wanted
    ]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("part", "mode"), grid(RUN))
def test_c054_losses_equal_plain_pytorch(
    part: str, mode: Mode, reference: dict[int, list[float]], request: pytest.FixtureRequest
) -> None:
    losses = request.getfixturevalue(part)[mode.name]["losses"]
    assert worst(losses, reference[mode.accumulation]) <= BOUNDS[mode.precision]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_c054_the_table_of_all_modes(
    found: dict[str, dict[str, Any]],
    rest: dict[str, dict[str, Any]],
    reference: dict[int, list[float]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Writes it to `parity.md` in the folder of this session's temporary files."""
    of = found | rest
    rows = [(m, None if m.refused else worst(of[m.name]["losses"], reference[m.accumulation])) for m in modes()]
    path = tmp_path_factory.getbasetemp() / "parity.md"
    path.write_text(table(rows))
    print(path.read_text())
    assert path.read_text().count("\n| ") == len(rows) + 1


WHOLE = [mode for mode in MERGE if mode.precision == "fp32" and mode.accumulation == 1 and not mode.checkpointing]


@pytest.mark.parametrize("mode", WHOLE, ids=lambda mode: mode.name)
def test_c070_gradient_norms_balance_loss_and_tokens_are_those_of_one_rank(
    mode: Mode, found: dict[str, dict[str, Any]]
) -> None:
    """The balance loss is over the global batch, and every mode sees the same tokens."""
    got, want = found[mode.name], found[WHOLE[0].name]
    assert got["tokens"] == want["tokens"]
    for name, bound in (("grad_norm", 1e-4), ("aux_loss", 1e-5)):
        assert got[name] == pytest.approx(want[name], rel=bound), name


def test_c072_the_loop_by_hand_is_the_same_in_four_parts_or_whole(data: Path) -> None:
    """Rows of uneven length; without the balance loss, whose shares a part cannot know ahead."""
    found = references(data, load_balancing_weight=0.0)
    assert worst(found[4], found[1]) < 1e-5


@pytest.fixture(scope="module")
def moved(data: Path) -> tuple[list[float], list[list[float]]]:
    config = config_of(str(data), {"router_bias_rate": BIAS_RATE})
    return plain_training(config, store_of(config), ROWS, 4)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("part", "mode"), grid(biased()))
def test_c141_the_bias_moves_once_per_step_by_the_choices_of_all_ranks_and_parts(
    part: str, mode: Mode, moved: tuple[list[float], list[list[float]]], request: pytest.FixtureRequest
) -> None:
    losses, bias_LE = moved
    got = request.getfixturevalue(part)[mode.name]
    assert worst(got["losses"], losses) <= BOUNDS["fp32"]
    for got_E, want_E in zip(got["bias"], bias_LE, strict=True):
        assert got_E == pytest.approx(want_E, abs=1e-6)
    assert max(max(bias_E) for bias_E in bias_LE) > 2 * BIAS_RATE


@pytest.mark.parametrize("mode", [mode for mode in modes() if mode.refused], ids=lambda mode: mode.name)
def test_c054_bf16_at_stage_0_is_refused(mode: Mode) -> None:
    config = Config(zero_stage=mode.stage, precision=mode.precision)
    assert [f.code for f in check(config) if f.severity == "error"] == ["bf16_stage0"]


@pytest.mark.parametrize(("part", "mode"), grid([mode for mode in RUN if mode.more]))
def test_c056_what_is_offloaded_lies_in_host_memory(part: str, mode: Mode, request: pytest.FixtureRequest) -> None:
    for rank in request.getfixturevalue(part)[mode.name]["where"]:
        assert rank["optimizer"] == ("parameters" not in mode.label)
        assert rank["parameters"] == (mode.stage == 3 and "optimizer" not in mode.label)
        assert (rank["host_weights"] > 0) == rank["parameters"]


@pytest.mark.slow  # compiles the operator first, which takes minutes
@pytest.mark.timeout(900)
@pytest.mark.skipif(NO_AIO is not None, reason=f"async_io cannot be built here: {NO_AIO}")
@pytest.mark.parametrize("ranks", [1, 2])
def test_c057_offload_to_disk_changes_no_loss_and_the_files_are_there(data: Path, tmp_path: Path, ranks: int) -> None:
    wanted = [mode for mode in nvme_offload(tmp_path / "swap") if mode.ranks == ranks]
    reference = references(data, **NVME_SHAPE)[4]
    for name, result in results(data, ranks, wanted).items():
        mode = next(m for m in wanted if m.name == name)
        assert worst(result["losses"], reference) <= BOUNDS[mode.precision], name
        assert len(result["where"]) == ranks
        for rank in result["where"]:
            assert rank["files"]["exp_avg-"] > 0 and rank["files"]["_gradient_"] > 0, name
            assert (rank["files"]["_param"] > 0) == ("weights" in mode.label)
    assert not list((tmp_path / "swap").glob("*/*"))  # gone with the ranks
