"""C50: every template merges with every preset, changes what it names, and is as sound as the preset itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lumina_engine.config.checks import check
from lumina_engine.config.loading import merge
from lumina_engine.config.presets import NAMES, ConfigPresets, presets_folder

TEMPLATES = sorted((presets_folder() / "training").glob("*.yaml"))


def test_c050_there_are_templates() -> None:
    assert {path.stem for path in TEMPLATES} >= {"quick", "pretrain", "finetune", "low_memory", "stable_experts"}


@pytest.mark.parametrize("preset", NAMES)
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_c050_template_is_a_sound_part_of_any_preset(path: Path, preset: str) -> None:
    loaded = merge(preset, path, [])
    assert not [f for f in check(loaded.config) if f.severity != "info"]
    named = set(re.findall(r"^  (\w+):", path.read_text(), re.MULTILINE))
    assert named == {name for name, origin in loaded.origins.items() if origin == "file"}
    plain = ConfigPresets.get(preset)
    assert any(getattr(loaded.config, name) != getattr(plain, name) for name in named)
