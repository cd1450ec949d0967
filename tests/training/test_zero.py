"""ZeRO on two ranks: non-finite steps, idle experts, exact resume, whole weights in the checkpoint (FT04, R20, R34, RS09)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from lumina_engine.checkpoint.manager import load_model
from lumina_engine.config.budget import Machine, budget
from lumina_engine.config.offload_checks import async_io_problem
from lumina_engine.config.schema import Config
from tests.launch import last_line, launch
from tests.parity.modes import nvme_offload, write_data

NO_AIO = async_io_problem()
PROGRAM = Path(__file__).with_name("zero_ranks.py")
MODES: dict[str, dict[str, Any]] = {
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "zero3-bf16": {"zero_stage": 3, "precision": "bf16"},
}
PLAIN = {"use_deepspeed": False}
# modes that are only saved, for the size of their checkpoints
SAVED: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero1-bf16": {"zero_stage": 1, "precision": "bf16"},
    "zero1-offload": {"zero_stage": 1, "cpu_offload_optimizer": True},
    "zero2-mixed": {"zero_stage": 2, "precision": "mixed_bf16"},
    "plain-experts": {**PLAIN, "num_experts": 4, "expert_parallel_size": 2},
}
# widths that two ranks cannot share evenly, and norms that stay whole on every rank
UNEVEN = {"hidden_size": 65, "head_dim": 34, "num_experts": 3, "stage3_param_persistence_threshold": 100}


# stage, and keys of which `other` are set when the state is put back
REORDERED: dict[str, tuple[int, dict[str, Any]]] = {
    "round robin": (2, {"other": {"deepspeed_overrides": {"zero_optimization": {"round_robin_gradients": True}}}}),
    "sub-groups": (3, {"other": {"deepspeed_overrides": {"zero_optimization": {"sub_group_size": 1}}}}),
    "host memory": (2, {"other": {"cpu_offload_optimizer": True}}),
}
# the checks that are not of each commit
REST = {
    "skip-zero3-bf16",
    "resume-zero3",
    "idle-zero2",
    "saved-zero0",
    "saved-zero1",
    "saved-zero1-offload",
    "saved-zero2-mixed",
}
REST |= {"reordered-sub-groups", "reordered-host memory", "weights-alone"}


def all_checks() -> dict[str, Any]:
    """Name → (check, overrides), of two ranks."""
    checks: dict[str, Any] = {f"skip-{name}": ("skip", keys) for name, keys in MODES.items()}
    checks |= {f"resume-{name}": ("resume", keys) for name, keys in MODES.items()}
    checks |= {f"idle-{name}": ("idle", keys) for name, keys in {"plain": PLAIN, **MODES}.items() if "bf16" not in name}
    checks |= {f"weights-{name}": ("weights", {**keys, **UNEVEN}) for name, keys in {"plain": PLAIN, **MODES}.items()}
    checks |= {f"saved-{name}": ("weights", {**keys, "max_steps": 1}) for name, keys in SAVED.items()}
    checks |= {"masters": ("masters", {"zero_stage": 2})}
    return checks | {
        f"reordered-{name}": ("reordered", {"zero_stage": stage, **keys}) for name, (stage, keys) in REORDERED.items()
    }


def checked(folder: Path, ranks: int, checks: dict[str, Any]) -> dict[str, Any]:
    """What each check gave, all of them in one process group."""
    arguments = (str(write_data(folder)), str(folder), json.dumps(checks))
    return last_line(launch(PROGRAM, ranks, *arguments, XDG_STATE_HOME=str(folder / "state")), "CHECKS ")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return checked(tmp_path_factory.mktemp("zero"), 2, {name: one for name, one in all_checks().items() if name not in REST})


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    alone = {"weights-alone": ("weights", {**MODES["zero3"], **UNEVEN, "batch_size": 8})}
    two = {name: one for name, one in all_checks().items() if name in REST}
    folder = tmp_path_factory.mktemp("rest")
    return checked(folder, 2, two) | checked(folder, 1, alone)


def checks_of(kind: str, names: Iterable[str], *more: pytest.MarkDecorator) -> list[Any]:
    """(fixture that has it, name of the check), slow where it is not of each commit, with `more` marks then."""
    marks = {True: [pytest.mark.slow, *more], False: []}
    return [
        pytest.param("rest" if check in REST else "found", check, id=name, marks=marks[check in REST])
        for name, check in ((name, f"{kind}-{name}") for name in names)
    ]


@pytest.mark.parametrize(("part", "check"), checks_of("skip", MODES, pytest.mark.fast))
def test_ft04_a_gradient_that_is_not_finite_skips_one_step_on_all_ranks(
    part: str, check: str, request: pytest.FixtureRequest
) -> None:
    result = request.getfixturevalue(part)[check]
    assert result["skipped"] == [2] and result["counted"] == [1, 1]
    assert result["moved"] == [True, False, True, True, True, True]
    assert all(result["finite"])  # the loss itself was fine


@pytest.mark.parametrize(("part", "check"), checks_of("idle", [name for name in MODES if "bf16" not in name]))
def test_r20_a_rank_that_never_uses_half_of_the_experts(
    found: dict[str, Any], part: str, check: str, request: pytest.FixtureRequest
) -> None:
    result, plain = request.getfixturevalue(part)[check], found["idle-plain"]
    assert sum(result["chosen"][1][:2]) == 0 and min(result["chosen"][0]) > 0
    for got, want in zip(result["steps"], plain["steps"], strict=True):
        assert got[1] == pytest.approx(want[1], rel=1e-5)


@pytest.mark.parametrize(("part", "check"), checks_of("resume", MODES, pytest.mark.fast))
def test_rs09_given_up_twice_equals_unbroken_bit_for_bit(part: str, check: str, request: pytest.FixtureRequest) -> None:
    result = request.getfixturevalue(part)[check]
    assert result["broken"] == result["whole"] and len(result["whole"]) == 6
    assert result["digests"][0] == result["digests"][1]
    assert result["evals"][0] == result["evals"][1]


@pytest.mark.slow  # compiles the operator first, which takes minutes
@pytest.mark.timeout(900)
@pytest.mark.skipif(NO_AIO is not None, reason=f"async_io cannot be built here: {NO_AIO}")
@pytest.mark.parametrize("ranks", [1, 2])
def test_c057_given_up_twice_with_state_on_disk_equals_unbroken_bit_for_bit(tmp_path: Path, ranks: int) -> None:
    wanted = [mode for mode in nvme_offload(tmp_path / "swap") if mode.ranks == ranks]
    checks = {mode.name: ("resume", {"zero_stage": 3, "precision": mode.precision, **dict(mode.more)}) for mode in wanted}
    done = launch(PROGRAM, ranks, str(write_data(tmp_path)), str(tmp_path), json.dumps(checks))
    for name, result in last_line(done, "CHECKS ").items():
        assert result["broken"] == result["whole"] and len(result["whole"]) == 6, name
        assert result["digests"][0] == result["digests"][1], name


@pytest.mark.parametrize(("part", "check"), checks_of("weights", [*MODES, "alone"]))
def test_r34_the_checkpoint_holds_whole_weights(
    found: dict[str, Any], part: str, check: str, request: pytest.FixtureRequest
) -> None:
    paths = (request.getfixturevalue(part)[check]["path"], found["weights-plain"]["path"])
    loaded, plain = (load_model(Path(path))[0].state_dict() for path in paths)
    assert loaded.keys() == plain.keys()
    bound = 5e-2 if "bf16" in check else 2e-5
    for name, tensor in loaded.items():
        assert torch.allclose(tensor.float(), plain[name].float(), atol=bound, rtol=bound), name
        assert name.endswith("bias") or float(tensor.flatten()[-1]) != 0, name  # the last value is nobody's padding


@pytest.mark.parametrize(("part", "check"), [*checks_of("weights", ("plain", *MODES)), *checks_of("saved", SAVED)])
def test_c139_a_checkpoint_of_two_ranks_weighs_what_its_budget_says(
    part: str, check: str, request: pytest.FixtureRequest
) -> None:
    """At each stage; without ZeRO each rank saves the state of all that it holds."""
    path = Path(request.getfixturevalue(part)[check]["path"])
    config = Config(**json.loads((path / "state" / "config.json").read_text())).model_copy(update={"num_gpus": 2})
    held = [file.read_bytes() for file in path.rglob("*.safetensors")]
    tensors = sum(len(body) - 8 - int.from_bytes(body[:8], "little") for body in held)  # headers count more in a tiny model
    assert budget(config, Machine())["disk"]["checkpoint"] == pytest.approx(tensors, rel=0.02)


def test_c081_a_checkpoint_with_masters_of_fp32_weights_loads_the_same_bits(found: dict[str, Any]) -> None:
    result = found["masters"]
    assert result["saved"] == [False, False] and result["digests"][0] == result["digests"][1] != result["digests"][2]


@pytest.mark.parametrize(("part", "check"), checks_of("reordered", REORDERED))
def test_c081_state_goes_into_another_layout_value_by_value(part: str, check: str, request: pytest.FixtureRequest) -> None:
    """Round robin has the same number of values in another order; only the names of parameters tell them apart."""
    result = request.getfixturevalue(part)[check]
    assert result["differ"] == [[], []] and result["compared"] > 30
