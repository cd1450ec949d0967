"""Where Lumina keeps a user's own files: settings, state, cache. The XDG folders, never the run directories."""

from __future__ import annotations

import os
from pathlib import Path


def _below(variable: str, *default: str) -> Path:
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home().joinpath(*default)) / "lumina"


def config_dir() -> Path:
    """What the user writes: keys.yaml, settings.yaml, presets/."""
    return _below("XDG_CONFIG_HOME", ".config")


def state_dir() -> Path:
    """What should survive but nobody edits: drafts, layout, input history."""
    return _below("XDG_STATE_HOME", ".local", "state")


def cache_dir() -> Path:
    """What can be computed again: safe to delete at any time."""
    return _below("XDG_CACHE_HOME", ".cache")
