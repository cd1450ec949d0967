"""The user's own presets: YAML files in the config folder, by name. They never stand in for a built-in one."""

from __future__ import annotations

import re
from pathlib import Path

from lumina_engine.config.presets import NAMES

from .places import config_dir

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def own_presets() -> Path:
    """The folder of the user's presets."""
    return config_dir() / "presets"


def wrong_name(text: str) -> str | None:
    """What is wrong with the name of an own preset; None if nothing is."""
    name = text.strip()
    if not name:
        return "give it a name"
    if name.lower() in NAMES:
        return f"{name} is a built-in preset: choose another name"
    if not _NAME.fullmatch(name):
        return "use up to 64 letters, digits, '.', '_' and '-', the first one a letter or digit"
    return None
