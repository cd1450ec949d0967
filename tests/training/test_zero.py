"""ZeRO on two ranks: non-finite steps, idle experts, exact resume, whole weights in the checkpoint (FT04, R20, R34, RS09)."""

from __future__ import annotations

import json
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


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("zero")
    checks: dict[str, Any] = {f"skip-{name}": ("skip", keys) for name, keys in MODES.items()}
    checks |= {f"resume-{name}": ("resume", keys) for name, keys in MODES.items()}
    checks |= {f"idle-{name}": ("idle", keys) for name, keys in {"plain": PLAIN, **MODES}.items() if "bf16" not in name}
    checks |= {f"weights-{name}": ("weights", {**keys, **UNEVEN}) for name, keys in {"plain": PLAIN, **MODES}.items()}
    checks |= {f"saved-{name}": ("weights", {**keys, "max_steps": 1}) for name, keys in SAVED.items()}
    checks |= {"masters": ("masters", {"zero_stage": 2})}
    checks |= {f"reordered-{name}": ("reordered", {"zero_stage": stage, **keys}) for name, (stage, keys) in REORDERED.items()}
    arguments = (str(write_data(folder)), str(folder), json.dumps(checks))
    state = {"XDG_STATE_HOME": str(folder / "state")}
    alone = {"weights-alone": ("weights", {**MODES["zero3"], **UNEVEN, "batch_size": 8})}
    one = launch(PROGRAM, 1, *arguments[:2], json.dumps(alone), **state)
    return last_line(launch(PROGRAM, 2, *arguments, **state), "CHECKS ") | last_line(one, "CHECKS ")


@pytest.mark.parametrize("mode", MODES)
def test_ft04_a_gradient_that_is_not_finite_skips_one_step_on_all_ranks(found: dict[str, Any], mode: str) -> None:
    result = found[f"skip-{mode}"]
    assert result["skipped"] == [2] and result["counted"] == [1, 1]
    assert result["moved"] == [True, False, True, True, True, True]
    assert all(result["finite"])  # the loss itself was fine


@pytest.mark.parametrize("mode", [name for name in MODES if "bf16" not in name])
def test_r20_a_rank_that_never_uses_half_of_the_experts(found: dict[str, Any], mode: str) -> None:
    result, plain = found[f"idle-{mode}"], found["idle-plain"]
    assert sum(result["chosen"][1][:2]) == 0 and min(result["chosen"][0]) > 0
    for got, want in zip(result["steps"], plain["steps"], strict=True):
        assert got[1] == pytest.approx(want[1], rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_rs09_given_up_twice_equals_unbroken_bit_for_bit(found: dict[str, Any], mode: str) -> None:
    result = found[f"resume-{mode}"]
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


@pytest.mark.parametrize("mode", [*MODES, "alone"])
def test_r34_the_checkpoint_holds_whole_weights(found: dict[str, Any], mode: str) -> None:
    loaded = {}
    for name in (mode, "plain"):
        model, _, _ = load_model(Path(found[f"weights-{name}"]["path"]))
        loaded[name] = model.state_dict()
    assert loaded[mode].keys() == loaded["plain"].keys()
    bound = 5e-2 if "bf16" in mode else 2e-5
    for name, tensor in loaded[mode].items():
        assert torch.allclose(tensor.float(), loaded["plain"][name].float(), atol=bound, rtol=bound), name
        assert name.endswith("bias") or float(tensor.flatten()[-1]) != 0, name  # the last value is nobody's padding


@pytest.mark.parametrize("name", [*(f"weights-{mode}" for mode in ("plain", *MODES)), *(f"saved-{mode}" for mode in SAVED)])
def test_c139_a_checkpoint_of_two_ranks_weighs_what_its_budget_says(found: dict[str, Any], name: str) -> None:
    """At each stage; without ZeRO each rank saves the state of all that it holds."""
    path = Path(found[name]["path"])
    config = Config(**json.loads((path / "state" / "config.json").read_text())).model_copy(update={"num_gpus": 2})
    held = [file.read_bytes() for file in path.rglob("*.safetensors")]
    tensors = sum(len(body) - 8 - int.from_bytes(body[:8], "little") for body in held)  # headers count more in a tiny model
    assert budget(config, Machine())["disk"]["checkpoint"] == pytest.approx(tensors, rel=0.02)


def test_c081_a_checkpoint_with_masters_of_fp32_weights_loads_the_same_bits(found: dict[str, Any]) -> None:
    result = found["masters"]
    assert result["saved"] == [False, False] and result["digests"][0] == result["digests"][1] != result["digests"][2]


@pytest.mark.parametrize("name", REORDERED)
def test_c081_state_goes_into_another_layout_value_by_value(found: dict[str, Any], name: str) -> None:
    """Round robin has the same number of values in another order; only the names of parameters tell them apart."""
    result = found[f"reordered-{name}"]
    assert result["differ"] == [[], []] and result["compared"] > 30
