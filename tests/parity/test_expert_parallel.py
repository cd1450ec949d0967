"""Experts spread over ranks equal all experts on every rank (C20, C21, C16, C17, C25, R14, R20, RS02).

Every run has the same ranks and batches as the one that it is compared with; only where the experts lie differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.launch import last_line, launch
from tests.parity.modes import write_data

PROGRAM = Path(__file__).resolve().parents[1] / "training" / "spread.py"
LAYERS, STEPS, FEW = 2, 20, 8
PLAIN = {"use_deepspeed": False}
ENGINES = {"plain": PLAIN, **{f"zero{stage}": {"zero_stage": stage} for stage in (0, 1, 2)}}
# Every pair of values of top-k, capacity and accumulation is in one of these.
SHAPES: dict[str, dict[str, Any]] = {
    "k1-capacity": {"moe_top_k": 1, "moe_dropless": False, "capacity_factor": 1.0, "batch_size": 4, "max_steps": FEW},
    "k1-dropless-x4": {"moe_top_k": 1, "batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": FEW},
    "k2-dropless": {"moe_top_k": 2, "batch_size": 4, "num_shared_experts": 1},
    "k2-capacity-x4": {
        "moe_top_k": 2,
        "moe_dropless": False,
        "capacity_factor": 1.0,
        "batch_size": 1,
        "gradient_accumulation_steps": 4,
        "router_bias_rate": 0.01,
    },
}
# Which of them an engine runs, and which of those with gradient checkpointing.
RUN = {"plain": (0, 1, 2, 3), "zero0": (0, 3), "zero1": (1, 2), "zero2": (0, 1, 2, 3)}
CHECKPOINTED = {"plain": {0: True, 3: "selective"}, "zero0": {3: True}, "zero1": {2: True}, "zero2": {1: True, 2: "selective"}}
RESUMED = {"plain": "k2-dropless", "zero0": "k2-capacity-x4", "zero1": "k2-dropless", "zero2": "k2-capacity-x4"}
SPREAD = {"expert_parallel_size": 2}
OVERLAP = {**SPREAD, "overlap_alltoall": True}
IDLE = {"moe_top_k": 1, "batch_size": 4, "idle_experts": 2, "max_steps": FEW}
SHORT = {
    name: {"batch_size": 4, "precision": key, "max_steps": FEW} for name, key in (("bf16", "bf16"), ("mixed", "mixed_bf16"))
}
# Of each commit: plain PyTorch in every shape, and ZeRO 2 where it shards what the others keep whole. All else is slow.
EACH_TIME = {
    *(f"plain {shape}" for shape in SHAPES),
    *("zero2 k2-dropless", "zero2 k2-capacity-x4", "overlap plain k1-capacity", "overlap plain k2-dropless", "idle zero2"),
    *("bf16 plain", "bf16 zero2", "mixed zero2", "nan plain", "nan zero2"),
}
SLOW, BEFORE_A_MERGE = pytest.mark.slow, pytest.mark.fast


def references() -> dict[str, dict[str, Any]]:
    """The runs with all experts on both ranks."""
    found = {shape: {**keys, **PLAIN} for shape, keys in SHAPES.items()}
    found["idle"] = {**IDLE, **PLAIN}
    return found | {name: {**keys, **PLAIN} for name, keys in SHORT.items()}


def modes() -> dict[str, dict[str, Any]]:
    """The runs with half of the experts on each of two ranks."""
    found: dict[str, dict[str, Any]] = {}
    for engine, choice in ENGINES.items():
        for number in RUN[engine]:
            shape = list(SHAPES)[number]
            recompute = {"gradient_checkpointing": CHECKPOINTED[engine].get(number, False)}
            found[f"{engine} {shape}"] = {**SHAPES[shape], **choice, **SPREAD, **recompute}
        found[f"{engine} {RESUMED[engine]}"]["resume_at"] = 12
    for engine, shape in (("plain", "k1-capacity"), ("plain", "k2-dropless"), ("zero2", "k2-capacity-x4")):
        recompute = {"gradient_checkpointing": shape == "k2-dropless"}
        found[f"overlap {engine} {shape}"] = {**SHAPES[shape], **ENGINES[engine], **OVERLAP, **recompute}
    found["idle plain"] = {**IDLE, **PLAIN, **OVERLAP}
    found["idle zero2"] = {**IDLE, "zero_stage": 2, **SPREAD}
    for name, keys in SHORT.items():
        found |= {f"{name} {engine}": {**keys, **ENGINES[engine], **SPREAD} for engine in ("plain", "zero1", "zero2")}
    for engine in ENGINES:
        found[f"nan {engine}"] = {"batch_size": 4, "max_steps": 4, "nan_at": 3, **ENGINES[engine], **SPREAD}
    return found


def cases(wanted: Iterable[str], *more: pytest.MarkDecorator) -> list[Any]:
    """(fixture that has it, mode), slow where it is not of each time, with `more` marks then."""
    return [
        pytest.param("two", mode, id=mode) if mode in EACH_TIME else pytest.param("rest", mode, id=mode, marks=[SLOW, *more])
        for mode in wanted
    ]


def run(folder: Path, ranks: int, wanted: dict[str, dict[str, Any]]) -> dict[str, Any]:
    data = write_data(folder)
    figures: dict[str, Any] = last_line(launch(PROGRAM, ranks, str(data), str(folder), json.dumps(wanted)), "FIGURES ")
    return figures


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All of them in one process group, which costs less than a start for each."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run(folder, 2, references() | {mode: keys for mode, keys in modes().items() if mode in EACH_TIME})


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("rest")
    return folder, run(folder, 2, references() | {mode: keys for mode, keys in modes().items() if mode not in EACH_TIME})


def steps_of(mode: str) -> int:
    return FEW if mode in ("idle", "k1-capacity", "k1-dropless-x4") else STEPS


def assert_equal(folder: Path, figures: dict[str, Any], mode: str, reference: str) -> None:
    """Losses and norms of every step to 1e-5, the same tokens, the same routing records, and the same weights at the end."""
    got, want = figures[mode], figures[reference]
    assert len(got["steps"]) == len(want["steps"]) == steps_of(reference)
    for one, other in zip(got["steps"], want["steps"], strict=True):
        assert one[:4] == pytest.approx(other[:4], rel=1e-5), mode
        assert one[4:] == other[4:], mode
    assert got["experts"][0] == want["experts"][0], mode
    for (load, dropped), (want_load, want_dropped) in zip(got["experts"], want["experts"], strict=True):
        assert sum(map(sum, load)) == sum(map(sum, want_load)), mode
        for layer in range(LAYERS):  # later on a tie between two experts may fall the other way
            assert load[layer] == pytest.approx(want_load[layer], abs=2), mode
        assert dropped == pytest.approx(want_dropped, abs=0.002), mode
    for name in ("eval", "eval_padded"):
        assert got[name] == pytest.approx(want[name], rel=1e-5), mode
    spread, whole = load_file(folder / f"{mode}.safetensors"), load_file(folder / f"{reference}.safetensors")
    assert spread.keys() == whole.keys()
    for name, tensor in whole.items():
        assert (spread[name] - tensor).abs().max() < 5e-5, (mode, name)  # a weight moves by up to 5e-2 in these steps


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("part", "mode"), cases(f"{engine} {list(SHAPES)[number]}" for engine in ENGINES for number in RUN[engine])
)
def test_c020_two_ranks_with_half_of_the_experts_each_equal_all_on_both(
    part: str, mode: str, request: pytest.FixtureRequest
) -> None:
    assert_equal(*request.getfixturevalue(part), mode, mode.split()[1])


def test_c017_capacity_drops_in_these_runs(two: tuple[Path, dict]) -> None:
    """Otherwise equality would say nothing of it."""
    for shape in ("k1-capacity", "k2-capacity-x4"):
        assert two[1][shape]["experts"][0][1][0] > 0.01
    first, last = two[1]["k2-dropless"]["steps"][0], two[1]["k2-dropless"]["steps"][-1]
    assert last[0] < 0.8 * first[0] and first[3] > 1  # it learns, and the gradient is clipped


@pytest.mark.parametrize(
    ("part", "mode"), cases(["overlap plain k1-capacity", "overlap plain k2-dropless", "overlap zero2 k2-capacity-x4"])
)
def test_c021_overlap_gives_the_same_losses_by_twice_the_transfers(
    part: str, mode: str, request: pytest.FixtureRequest
) -> None:
    _, engine, shape = mode.split()
    folder, figures = request.getfixturevalue(part)
    assert_equal(folder, figures, mode, shape)
    recomputed = mode == "overlap plain k2-dropless"
    blocks = steps_of(shape) * SHAPES[shape].get("gradient_accumulation_steps", 1) * LAYERS
    counts, there, back = blocks, 2 * blocks, 2 * blocks
    forwards = 2 if recomputed else 1
    assert figures[mode]["collectives"] == forwards * (counts + 2 * there) + 2 * back
    forwards = 2 if CHECKPOINTED[engine].get(list(SHAPES).index(shape)) is True else 1
    one_by_one = request.getfixturevalue("two")[1][f"{engine} {shape}"]
    assert one_by_one["collectives"] == forwards * (counts + there) + back


@pytest.mark.parametrize(("part", "mode"), cases((f"{engine} {RESUMED[engine]}" for engine in ENGINES), BEFORE_A_MERGE))
def test_rs02_a_resumed_run_equals_the_unbroken_one_bit_for_bit(part: str, mode: str, request: pytest.FixtureRequest) -> None:
    folder, figures = request.getfixturevalue(part)
    assert figures[mode]["resumed"] == figures[mode]["steps"][12:]
    assert (folder / f"{mode} resumed.safetensors").read_bytes() == (folder / f"{mode}.safetensors").read_bytes()
    assert figures[mode]["refused"] == "", "a run without spread experts reads the state by name"


@pytest.mark.parametrize(("part", "mode"), cases(["idle plain", "idle zero2"]))
def test_r20_a_rank_that_never_chooses_half_of_the_experts_hangs_nothing(
    part: str, mode: str, request: pytest.FixtureRequest
) -> None:
    assert_equal(*request.getfixturevalue(part), mode, "idle")


@pytest.mark.parametrize(
    ("part", "mode"), cases(f"{precision} {engine}" for precision in SHORT for engine in ("plain", "zero1", "zero2"))
)
def test_c020_bf16_agrees_to_its_precision(part: str, mode: str, request: pytest.FixtureRequest) -> None:
    figures = request.getfixturevalue(part)[1]
    for one, other in zip(figures[mode]["steps"], figures[mode.split()[0]]["steps"], strict=True):
        assert one[0] == pytest.approx(other[0], rel=2e-2)
        assert one[3] == pytest.approx(other[3], rel=5e-2)


@pytest.mark.parametrize(("part", "mode"), cases((f"nan {engine}" for engine in ENGINES), BEFORE_A_MERGE))
def test_ft04_a_gradient_that_is_nan_on_one_rank_is_skipped_on_all(
    part: str, mode: str, request: pytest.FixtureRequest
) -> None:
    """Had one rank applied it, the weights would not be finite and the following losses neither."""
    folder, figures = request.getfixturevalue(part)
    steps = figures[mode]["steps"]
    assert [step[5] for step in steps] == [False, False, True, False]
    assert steps[3][3] < 10
    weights = load_file(folder / f"{mode}.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.slow
def test_c020_four_ranks_in_two_groups_equal_all_experts_on_each(tmp_path: Path) -> None:
    """EP 2 x DP 2: gradients of experts are summed over replicas only, those of all else over all ranks; EP 4 too."""
    keys = {"batch_size": 2, "moe_top_k": 2}
    wanted = {"whole": {**keys, **PLAIN}, "four": {**keys, **PLAIN, "expert_parallel_size": 4}}
    wanted |= {engine: {**keys, **choice, **SPREAD} for engine, choice in ENGINES.items()}
    figures = run(tmp_path, 4, wanted)
    for mode in (*ENGINES, "four"):
        assert_equal(tmp_path, figures, mode, "whole")
