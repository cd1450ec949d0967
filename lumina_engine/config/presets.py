"""The eight presets: where their files are, and what is computed about them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from lumina_engine.config.finding import ConfigError, Finding, nearest
from lumina_engine.config.schema import Config

NAMES = ("debug", "b1", "b7", "b14", "b50", "b100", "b200", "b300")

# What each preset is for, and the figures that users of earlier implementations know. Those are labels: total parameters, least
# memory, hardware and time were claimed, not computed or measured.
_USE = {
    "debug": "development and tests",
    "b1": "small machines",
    "b7": "general purpose",
    "b14": "high performance",
    "b50": "large research",
    "b100": "enterprise",
    "b200": "frontier research",
    "b300": "state of the art",
}
_NOMINAL = {
    "debug": ("4M", "2GB", "any GPU", "minutes"),
    "b1": ("8B", "8GB", "RTX 3090/4090", "hours"),
    "b7": ("56B", "40GB", "A100 40/80GB", "1-3 days"),
    "b14": ("112B", "80GB", "several A100 80GB", "3-7 days"),
    "b50": ("400B", "200GB+", "multi-node H100", "1-2 weeks"),
    "b100": ("800B", "400GB+", "large H100 clusters", "2-4 weeks"),
    "b200": ("1.6T", "800GB+", "massive clusters + NVMe", "1-2 months"),
    "b300": ("2.4T", "1.2TB+", "supercomputer", "2-3 months"),
}


@cache
def presets_folder() -> Path:
    """The folder of the preset files: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "presets", package.parent / "presets"):
        if (folder / "debug.yaml").is_file():
            return folder
    message = f"the preset files are missing beside {package}"
    raise ConfigError([Finding("installation", "error", (), message, "install lumina again")])


def preset_path(name: str) -> Path:
    """The YAML file of a preset. Raises `ConfigError` with the nearest name for an unknown one."""
    if name not in NAMES:
        near = nearest(name, NAMES)
        fix = f"did you mean {near}?" if near else "presets: " + ", ".join(NAMES)
        raise ConfigError([Finding("unknown_preset", "error", (), f"preset {name}: no such preset", fix)])
    return presets_folder() / f"{name}.yaml"


class ConfigPresets:
    """The presets as fresh `Config` objects, one method each, and computed facts about them."""

    @staticmethod
    def names() -> list[str]:
        """The preset names, smallest first."""
        return list(NAMES)

    @staticmethod
    def get(name: str) -> Config:
        """A fresh `Config` of the preset. Raises `ConfigError` for an unknown name."""
        return Config.load(preset_path(name))

    @staticmethod
    def debug() -> Config:
        """Half a million active parameters: development and tests."""
        return ConfigPresets.get("debug")

    @staticmethod
    def b1() -> Config:
        """One billion active parameters."""
        return ConfigPresets.get("b1")

    @staticmethod
    def b7() -> Config:
        """Seven billion active parameters."""
        return ConfigPresets.get("b7")

    @staticmethod
    def b14() -> Config:
        """14 billion active parameters."""
        return ConfigPresets.get("b14")

    @staticmethod
    def b50() -> Config:
        """50 billion active parameters."""
        return ConfigPresets.get("b50")

    @staticmethod
    def b100() -> Config:
        """100 billion active parameters."""
        return ConfigPresets.get("b100")

    @staticmethod
    def b200() -> Config:
        """200 billion active parameters."""
        return ConfigPresets.get("b200")

    @staticmethod
    def b300() -> Config:
        """300 billion active parameters."""
        return ConfigPresets.get("b300")

    @staticmethod
    def get_preset_info() -> dict[str, dict[str, Any]]:
        """Per preset: `description`, `active_params`, `hardware`, `memory_usage` as text, and the numbers behind them.

        All of it is computed from the geometry (`config.budget`) but `nominal`, which holds earlier claims as labels.
        """
        return {name: _info(name) for name in NAMES}

    @staticmethod
    def compare_presets() -> dict[str, dict[str, Any]]:
        """All presets side by side: the numbers of `get_preset_info` and `parameter_efficiency` (text, active / total)."""
        return {name: preset_row(name) for name in NAMES}


def _facts(name: str) -> dict[str, Any]:
    """The computed numbers of one preset. bf16, training state of 16 bytes a parameter, activations not included."""
    from lumina_engine.config.budget import GB, kv_cache_bytes_per_token, parameter_counts
    from lumina_engine.config.resolve import model_config

    model = model_config(ConfigPresets.get(name))
    counts = parameter_counts(model)
    top2 = parameter_counts(model.model_copy(update={"moe_top_k": 2}))
    stored = counts.total + counts.embeddings
    per_gpu = 80 * GB
    return {
        "active_parameters": counts.active,
        "active_parameters_top2": top2.active,
        "total_parameters": counts.total,
        "embedding_parameters": counts.embeddings,
        "active_share": counts.active / counts.total,
        "weights_bytes": 2 * stored,
        "training_state_bytes": 16 * stored,
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(model, 2),
        "gpus_80gb_zero3": -(-16 * stored // per_gpu),
        "gpus_80gb_optimizer_on_host": -(-4 * stored // per_gpu),
        "host_bytes_optimizer": 12 * stored,
    }


def preset_row(name: str) -> dict[str, Any]:
    """One row of `lumina-engine presets list`."""
    from lumina_engine.config.budget import gb_text

    facts = _facts(name)
    total, memory, hardware, time = _NOMINAL[name]
    needed = facts["gpus_80gb_zero3"]
    if facts["training_state_bytes"] < 2e9:
        text = "CPU or any GPU"
    else:
        text = f"{needed:,} x 80 GB (ZeRO-3), {facts['gpus_80gb_optimizer_on_host']:,} with the optimizer on the host"
        text += f" ({gb_text(facts['host_bytes_optimizer'])}); activations on top"
    return {
        "name": name,
        "description": _USE[name],
        **facts,
        "parameter_efficiency": f"{facts['active_share']:.1%} active (total/active {1 / facts['active_share']:.2f})",
        "hardware": text,
        "nominal": {"total": total, "memory": memory, "hardware": hardware, "time": time},
    }


def _info(name: str) -> dict[str, Any]:
    from lumina_engine.config.budget import count_text, gb_text

    row = preset_row(name)
    weights, state = gb_text(row["weights_bytes"]), gb_text(row["training_state_bytes"])
    row["active_params"] = f"{count_text(row['active_parameters'])} of {count_text(row['total_parameters'])}"
    row["memory_usage"] = f"{weights} weights, {state} training state, activations on top (computed, bf16)"
    return row
