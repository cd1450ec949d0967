"""`Config`: every key of Lumina, once. `DeepSeekConfig`: the part of it that shapes the model.

Keys are flat in Python and on the command line and grouped by section in YAML. Names are unique over all sections. Building a
`Config` has no side effects, and `auto` stays `auto` until `resolve` replaces it at launch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lumina_engine.config.declare import HINTS, FieldInfo, Section, show
from lumina_engine.config.finding import ConfigError, Finding, has_errors, unknown_key
from lumina_engine.config.keys_model import ExpertKeys, ModelKeys
from lumina_engine.config.keys_run import AdaptiveKeys, CheckpointKeys, DeepSpeedKeys, MonitoringKeys, RunKeys
from lumina_engine.config.keys_training import DataKeys, TrainingKeys

__all__ = ["SECTIONS", "Config", "ConfigError", "DeepSeekConfig", "FieldInfo", "Finding", "fields_info"]

_PARTS: tuple[type[Section], ...] = (
    ModelKeys,
    ExpertKeys,
    TrainingKeys,
    DataKeys,
    DeepSpeedKeys,
    RunKeys,
    CheckpointKeys,
    MonitoringKeys,
    AdaptiveKeys,
)
SECTIONS: tuple[str, ...] = tuple(part.section_name for part in _PARTS)


def problems(error: ValidationError, infos: Mapping[str, FieldInfo], where: Mapping[str, str] | None = None) -> list[Finding]:
    """One finding per key for what pydantic reports (it reports each branch of a union)."""
    places = where or {}
    found: dict[str, Finding] = {}
    for item in error.errors():
        name = str(item["loc"][0]) if item["loc"] else ""
        if name in found:
            continue
        if name not in infos:
            found[name] = unknown_key(name, list(infos), places.get(name, ""))
            continue
        info = infos[name]
        value = item["input"]
        message = f"{name} = {show(value)}: must be {info.requirement()}"
        if item["type"] == "value_error" and (hint := item["ctx"]["error"].args[0]) in HINTS:
            message += f" ({hint})"
        if len(item["loc"]) > 1 and info.kind in ("list", "mapping"):  # the place inside the value
            message = f"{name}, at {item['loc'][1]}: {item['msg'][0].lower()}{item['msg'][1:]}"
        found[name] = Finding("bad_value", "error", (name,), message, info.suggestion(value), places.get(name, ""))
    return list(found.values())


class _Checked(Section):
    """Keyword-only construction and assignment whose errors are `ConfigError`s that name key, value, bounds and fix."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(problems(error, infos_of(type(self)))) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).model_fields:
            raise ConfigError([unknown_key(name, list(type(self).model_fields))])
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise ConfigError(problems(error, infos_of(type(self)))) from None


@cache
def infos_of(cls: type[Section]) -> dict[str, FieldInfo]:
    """The declarations of a configuration class in the order of the sections."""
    infos = cls.infos()
    return {name: infos[name] for part in _PARTS for name in part.model_fields if name in infos}


class Config(
    _Checked,
    AdaptiveKeys,
    MonitoringKeys,
    CheckpointKeys,
    RunKeys,
    DeepSpeedKeys,
    DataKeys,
    TrainingKeys,
    ExpertKeys,
    ModelKeys,
):
    """The whole configuration of a run.

    Raises `ConfigError` for unknown names, wrong types and values outside their bounds, at construction and at assignment.
    Rules between keys are checked by `validate()`, not before, so that keys can be set in any order.
    """

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Read a YAML file, grouped by section or flat. Raises `ConfigError` with `file:line` for every problem."""
        from lumina_engine.config.loading import merge

        return merge(None, Path(path), []).config

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Build from a flat mapping, a mapping grouped by section, or a mixture."""
        from lumina_engine.config.loading import flatten_mapping

        flat, findings = flatten_mapping(values)
        if findings:
            try:
                cls(**flat)
            except ConfigError as error:
                findings = findings + error.findings
            raise ConfigError(findings)
        return cls(**flat)

    def to_dict(self, sectioned: bool = True) -> dict[str, Any]:
        """Every key with its value, grouped by section or flat."""
        flat = self.model_dump()
        if not sectioned:
            return {name: flat[name] for name in infos_of(Config)}
        return {part.section_name: {name: flat[name] for name in part.model_fields} for part in _PARTS}

    def save(self, path: str | Path) -> Path:
        """Write every key as YAML by section, atomically, and return the path. Folders are made."""
        from lumina_engine.config.loading import write_config

        return write_config(self, Path(path))

    def validate(self) -> list[Finding]:  # type: ignore[override]
        """All findings of the rules between keys; raises `ConfigError` (with all findings) if one is an error."""
        from lumina_engine.config.checks import check

        findings = check(self)
        if has_errors(findings):
            raise ConfigError(findings)
        return findings

    @classmethod
    def from_deepspeed(cls, given: Mapping[str, Any], world: int = 1) -> Config:
        """The `Config` of a DeepSpeed dictionary for `world` ranks: its keys as fields, the rest as checked overrides.

        Raises `ConfigError` for unknown, refused and contradicting keys.
        """
        from lumina_engine.config.from_deepspeed import config_from_deepspeed

        return config_from_deepspeed(given, world)

    def to_deepspeed(self, world: int = 1) -> dict[str, Any]:
        """The DeepSpeed configuration of a resolved `Config` for `world` ranks."""
        from lumina_engine.config.deepspeed import to_deepspeed

        return to_deepspeed(self, world)


class DeepSeekConfig(_Checked, ExpertKeys, ModelKeys):
    """The shape of a model: sections `model` and `moe` of `Config`, same declarations. Stored as JSON in each checkpoint."""

    @classmethod
    def from_config(cls, config: Config | DeepSeekConfig) -> DeepSeekConfig:
        """The model's part of a `Config`."""
        return cls(**{name: getattr(config, name) for name in cls.model_fields})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeepSeekConfig:
        """The reverse of `to_dict`. Raises `ConfigError` for unknown or bad keys."""
        return cls(**dict(values))

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, flat, in the order of declaration."""
        flat = self.model_dump()
        return {name: flat[name] for name in infos_of(DeepSeekConfig)}

    @property
    def vocab_rows(self) -> int:
        """`vocab_size` as a number. Raises `ConfigError` while it is `auto`: only a tokenizer can resolve it."""
        if self.vocab_size == "auto":
            fix = "set vocab_size=tokenizer.padded_vocab_size"
            raise ConfigError(
                [Finding("vocab_auto", "error", ("vocab_size",), "vocab_size = auto: a model needs a number", fix)]
            )
        return self.vocab_size

    @property
    def head_size(self) -> int:
        """`head_dim` as a number; with latent attention that of the keys."""
        if self.attention == "mla":
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.hidden_size // self.num_heads if self.head_dim == "auto" else self.head_dim

    @property
    def expert_width(self) -> int:
        """`intermediate_size` as a number: 8/3 of the hidden size up to the next 256 when `auto`."""
        if self.intermediate_size != "auto":
            return self.intermediate_size
        return -(-8 * self.hidden_size // (3 * 256)) * 256

    @property
    def dense_width(self) -> int:
        """Width of a block without experts: `dense_intermediate_size`, top-k times the expert width when `auto`.

        Of a model without experts all blocks have the expert width.
        """
        if not self.use_moe:
            return self.expert_width
        return self.moe_top_k * self.expert_width if self.dense_intermediate_size == "auto" else self.dense_intermediate_size

    @property
    def normalizes_gates(self) -> bool:
        """`router_normalize` as a truth value: from top-2 on when `auto`."""
        return self.moe_top_k >= 2 if self.router_normalize == "auto" else self.router_normalize

    @property
    def expert_layers(self) -> int:
        """Blocks that have experts."""
        return self.num_layers - self.num_dense_layers if self.use_moe else 0

    def resolved(self) -> DeepSeekConfig:
        """A copy in which every `auto` is a value. Raises `ConfigError` while `vocab_size` is `auto`."""
        return type(self)(
            **self.to_dict()
            | {
                "vocab_size": self.vocab_rows,
                "head_dim": self.head_size,
                "intermediate_size": self.expert_width,
                "dense_intermediate_size": self.dense_width,
                "router_normalize": self.normalizes_gates,
            }
        )


def fields_info(names: Iterable[str] | None = None) -> list[FieldInfo]:
    """The declaration of every key (or of those named), in the order of the sections."""
    infos = infos_of(Config)
    return list(infos.values()) if names is None else [infos[name] for name in names]
