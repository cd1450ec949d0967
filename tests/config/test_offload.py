"""C56, C57, R19, R26: where state goes, what that asks for, and what is refused before anything starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.config import offload_checks
from lumina_engine.config.checks import check
from lumina_engine.config.deepspeed import to_deepspeed
from lumina_engine.config.finding import has_errors
from lumina_engine.config.loading import merge
from lumina_engine.config.machine import GB, Accelerator, Machine
from lumina_engine.config.offload import offload_of
from lumina_engine.config.presets import presets_folder
from lumina_engine.config.schema import Config

CPU = Machine([], 64 * GB, 4, None)
GPU = Machine([Accelerator("H100", 80 * GB)] * 2, 900 * GB, 32, None)
BASE = {"precision": "bf16", "vocab_size": 1024, "tokenizer": "lumina-1k"}


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return to_deepspeed(Config(zero_stage=stage, **BASE, **keys), 1)["zero_optimization"]


def places(block: dict[str, Any]) -> tuple[str | None, str | None]:
    return tuple(block.get(name, {}).get("device") for name in ("offload_optimizer", "offload_param"))


def test_r26_cpu_offload_is_the_optimizer_and_at_stage_3_the_weights_too() -> None:
    assert places(zero(1, cpu_offload=True)) == places(zero(2, cpu_offload=True)) == ("cpu", None)
    assert places(zero(3, cpu_offload=True)) == ("cpu", "cpu")
    assert places(zero(3, cpu_offload_optimizer=True)) == ("cpu", None)
    assert places(zero(3, cpu_offload_parameters=True)) == (None, "cpu")
    assert places(zero(3, nvme_offload_optimizer=True, cpu_offload=True)) == ("nvme", "cpu")
    assert places(zero(3, nvme_offload_parameters=True)) == (None, "nvme")
    assert places(zero(3)) == (None, None)
    assert offload_of(Config(nvme_offload_optimizer=True), 3).nvme


def test_c057_the_json_of_offload_to_disk() -> None:
    block = zero(3, nvme_offload_optimizer=True, nvme_offload_parameters=True, nvme_path="/x")
    assert block["offload_optimizer"] == {"device": "nvme", "nvme_path": "/x"}
    largest = 8 * 2 * 1536 * 512  # the stacked experts of one layer
    assert block["offload_param"] == {"device": "nvme", "nvme_path": "/x", "buffer_count": 5, "buffer_size": largest}
    assert block["sub_group_size"] == 1  # each parameter begins at 0: no gradient at an odd place
    assert "sub_group_size" not in zero(3, cpu_offload=True)


CASES = [
    ({"zero_stage": 0, "cpu_offload": True}, "offload_stage", "error", {"zero_stage": 1}),
    ({"zero_stage": 0, "cpu_offload_optimizer": True}, "offload_stage", "error", {"zero_stage": 2}),
    ({"zero_stage": 2, "cpu_offload_parameters": True}, "offload_stage", "error", {"zero_stage": 3}),
    ({"zero_stage": 2, "nvme_offload_optimizer": True}, "offload_stage", "error", {"zero_stage": "auto"}),
    ({"zero_stage": 1, "nvme_offload_parameters": True, "precision": "bf16"}, "offload_stage", "error", {"zero_stage": 3}),
    ({"use_deepspeed": False, "cpu_offload": True}, "offload_off", "error", {"use_deepspeed": True}),
    ({"expert_parallel_size": 2, "cpu_offload": True}, "offload_experts", "error", {"expert_parallel_size": 1}),
    ({"nvme_offload_parameters": True, "precision": "fp32"}, "nvme_weights", "error", {"precision": "bf16"}),
    ({"nvme_offload_optimizer": True, "cpu_offload": True}, "nvme_wins", "info", {"cpu_offload": False}),
    ({"nvme_path": "/x"}, "nvme_path", "info", {"nvme_offload_optimizer": True}),
    ({"partition_activations": True}, "partition", "info", {"partition_activations": False}),
]


@pytest.mark.parametrize(("changes", "code", "severity", "mend"), CASES, ids=[f"{c[1]}-{i}" for i, c in enumerate(CASES)])
def test_r19_r26_each_rule_and_its_fix(changes: dict, code: str, severity: str, mend: dict) -> None:
    config = Config(**changes)
    found = [f for f in check(config) if f.code == code]
    assert len(found) == 1 and found[0].severity == severity and found[0].fix
    for name, value in mend.items():
        setattr(config, name, value)
    assert code not in {f.code for f in check(config)}


def codes(machine: Machine, **keys: Any) -> dict[str, str]:
    return {f.code: f.severity for f in check(Config(**{**BASE, **keys}), machine)}


def test_c056_a_machine_without_a_gpu_has_nothing_to_free() -> None:
    assert codes(CPU, cpu_offload=True) == {"offload_cpu": "info"}
    assert codes(GPU, cpu_offload=True) == {}


def test_c057_the_disk_is_looked_at_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_checks, "async_io_problem", lambda: None)
    keys = {"nvme_offload_optimizer": True, "nvme_path": str(tmp_path / "new" / "er")}
    assert codes(GPU, **keys) == {} and not (tmp_path / "new").exists()
    monkeypatch.setattr(offload_checks, "file_system", lambda path: "tmpfs")
    assert codes(GPU, **keys) == {"nvme_tmpfs": "warning"}
    full = type("usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert codes(GPU, **keys)["nvme_room"] == "error"
    assert codes(CPU, nvme_offload_parameters=True, precision="auto")["nvme_weights"] == "error"


def test_c057_room_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    assert offload_checks.existing_parent(tmp_path / "x" / "y" / "z") == tmp_path / "x"


def test_c057_why_async_io_cannot_be_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    problem = offload_checks.async_io_problem()
    assert problem is not None and "no g++" in problem[0]
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(broken))
    problem = offload_checks.async_io_problem()
    assert problem is not None and "libaio" in problem[0] and "libaio-dev" in problem[1]
    monkeypatch.setattr(offload_checks, "async_io_problem", lambda: problem)
    assert codes(GPU, nvme_offload_optimizer=True)["async_io"] == "error"


@pytest.mark.parametrize("template", sorted(p.name for p in (presets_folder() / "deepspeed").glob("*.yaml")))
def test_c050_each_deepspeed_template_goes_with_a_preset(template: str) -> None:
    merged = merge("debug", presets_folder() / "deepspeed" / template, [])
    assert merged.config.use_deepspeed and merged.config.zero_stage in (1, 2, 3)
    assert not has_errors(check(merged.config))
