"""From preset, file and command line to one `Config`: default < preset < file < key=value, with the origin of each value.

Every problem is collected before anything is raised, each with the file and line or the command line word it comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lumina_engine.config import yaml_text
from lumina_engine.config.finding import ConfigError, Finding, nearest, unknown_key
from lumina_engine.config.schema import SECTIONS, Config, fields_info, infos_of
from lumina_engine.config.yaml_text import Entries, Entry, YamlError

Origin = Literal["default", "preset", "file", "cli"]


@dataclass
class Layer:
    """The values of one source, flat, with the place of each and the problems met while reading it."""

    origin: Origin
    values: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


@dataclass
class Loaded:
    """A merged configuration. `origins` has every key; `where` has the place of those that a file or the command line gave."""

    config: Config
    origins: dict[str, Origin]
    preset: str | None = None
    where: dict[str, str] = field(default_factory=dict)


def merge(preset: str | None, file: Path | None, overrides: Iterable[str]) -> Loaded:
    """Merge the sources and build the `Config`.

    Rules between keys are not checked here (`checks.check` does), but when this raises for another reason their findings are
    included, so that all problems come at once.

    Raises:
        ConfigError: unknown preset, unreadable file, unknown keys, wrong values; all of them.
    """
    layers: list[Layer] = []
    if preset is not None:
        layers.append(preset_layer(preset))
    if file is not None:
        layers.append(file_layer(file))
    layers.append(override_layer(overrides))
    return combine(layers, preset)


def combine(layers: Iterable[Layer], preset: str | None = None) -> Loaded:
    """Build the `Config` of layers, later ones over earlier ones. Raises `ConfigError` like `merge`."""
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = dict.fromkeys(infos_of(Config), "default")
    where: dict[str, str] = {}
    findings: list[Finding] = []
    for layer in layers:
        findings += layer.findings
        for name, value in layer.values.items():
            values[name] = value
            origins[name] = layer.origin
            where.pop(name, None)
        where |= layer.where
    config, bad = build(values, where)
    findings += bad
    if findings:
        raise ConfigError(findings + _rules(config, {key for f in findings for key in f.keys}))
    return Loaded(config, origins, preset, where)


def build(values: Mapping[str, Any], where: Mapping[str, str] | None = None) -> tuple[Config, list[Finding]]:
    """A `Config` of those values that are valid, and the findings of those that are not."""
    try:
        return Config(**values), []
    except ConfigError as error:
        places = where or {}
        findings = [
            Finding(f.code, f.severity, f.keys, f.message, f.fix, places.get(f.keys[0], f.where)) for f in error.findings
        ]
        bad = {key for f in findings for key in f.keys}
        return Config(**{name: value for name, value in values.items() if name not in bad}), findings


def _rules(config: Config, bad: set[str]) -> list[Finding]:
    """Findings of the rules between keys that do not concern a key already found bad."""
    from lumina_engine.config.checks import check

    return [f for f in check(config) if f.severity == "error" and not bad.intersection(f.keys)]


def preset_layer(name: str) -> Layer:
    """The keys that a preset sets."""
    from lumina_engine.config.presets import NAMES, preset_path

    if name not in NAMES:
        near = nearest(name, NAMES)
        fix = f"did you mean {near}?" if near else "presets: " + ", ".join(NAMES)
        return Layer("preset", findings=[Finding("unknown_preset", "error", (), f"preset {name}: no such preset", fix)])
    layer = file_layer(preset_path(name))
    layer.origin = "preset"
    return layer


def file_layer(path: Path) -> Layer:
    """The keys of a YAML file."""
    try:
        text = yaml_text.read_text(path)
    except YamlError as error:
        fix = error.fix or _file_fix(path)
        where = f"{path}:{error.line}" if error.line else str(path)
        return Layer("file", findings=[Finding("file", "error", (), str(error), fix, where)])
    return text_layer(text, str(path))


def _file_fix(path: Path) -> str:
    if path.exists() or not path.parent.is_dir():
        return "name a YAML file with configuration keys"
    near = nearest(path.name, [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")][:1_000])
    return f"did you mean {path.with_name(near)}?" if near else "name a YAML file with configuration keys"


def text_layer(text: str, name: str) -> Layer:
    """The keys of YAML text; `name` stands for the file in messages."""
    layer = Layer("file")
    try:
        parsed = yaml_text.parse(text)
    except YamlError as error:
        where = f"{name}:{error.line}" if error.line else name
        layer.findings.append(Finding("yaml", "error", (), str(error), error.fix, where))
        return layer
    if parsed is None:
        return layer
    if not isinstance(parsed, Entries):
        fix = "write keys and values, for example `learning_rate: 3e-4`"
        layer.findings.append(Finding("yaml", "error", (), "is not a mapping of keys to values", fix, f"{name}:1"))
        return layer
    _flatten(parsed, name, layer)
    return layer


def _flatten(entries: Entries, name: str, layer: Layer) -> None:
    """Spread sections out into flat keys, and collect keys that are unknown, in the wrong section or given twice."""
    infos = infos_of(Config)
    for entry in entries:
        inner = entry.value
        is_mapping = isinstance(inner, Entries)
        # `adaptive` is both a section and a key: a single value means the key
        is_section = entry.key in SECTIONS and (is_mapping or inner is None or entry.key not in infos)
        if is_section and not is_mapping and inner is not None:
            fix = f"put the keys of {entry.key} below it, indented"
            layer.findings.append(
                Finding("section", "error", (), f"{entry.key} is a section, not a key", fix, f"{name}:{entry.line}")
            )
        elif is_section:
            for item in inner or ():
                known = infos.get(item.key)
                if known is not None and known.section != entry.key:
                    message = f"{item.key} stands in section {entry.key}"
                    fix = f"move it to section {known.section}"
                    layer.findings.append(Finding("wrong_section", "error", (item.key,), message, fix, f"{name}:{item.line}"))
                _take(item, name, layer)
        else:
            _take(entry, name, layer)


def _take(entry: Entry, name: str, layer: Layer) -> None:
    where = f"{name}:{entry.line}"
    if entry.key not in infos_of(Config):
        names = [*infos_of(Config), *SECTIONS]
        layer.findings.append(unknown_key(entry.key, names, where))
    elif entry.key in layer.values:
        message = f"{entry.key} is given twice, first at {layer.where[entry.key]}"
        layer.findings.append(Finding("duplicate", "error", (entry.key,), message, "remove one of them", where))
    else:
        layer.values[entry.key] = yaml_text.plain(entry.value)
        layer.where[entry.key] = where


def override_layer(overrides: Iterable[str]) -> Layer:
    """The keys of `key=value` words; a value is a YAML scalar or flow YAML. The last word for a key wins."""
    layer = Layer("cli")
    for word in overrides:
        name, sign, text = word.partition("=")
        name = name.strip().replace("-", "_")
        if not sign:
            near = nearest(name, infos_of(Config))
            fix = f"write {near}=VALUE" if near else "write key=value"
            layer.findings.append(Finding("override", "error", (), f"{word}: not of the form key=value", fix, "command line"))
        elif name not in infos_of(Config):
            layer.findings.append(unknown_key(name, list(infos_of(Config)), "command line"))
        else:
            _override(name, text, layer)
    return layer


def _override(name: str, text: str, layer: Layer) -> None:
    try:
        value = yaml_text.plain(yaml_text.parse(text))
    except YamlError as error:
        fix = f"put the value in quotes: '{name}=\"…\"'"
        layer.findings.append(Finding("yaml", "error", (name,), f"{name}: {error}", fix, "command line"))
        return
    layer.values[name] = value
    layer.where[name] = "command line"


def flatten_mapping(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """A mapping that may be grouped by section, as flat keys, and the problems of its grouping."""
    flat: dict[str, Any] = {}
    findings: list[Finding] = []
    infos = infos_of(Config)
    for name, value in values.items():
        is_section = name in SECTIONS and (isinstance(value, Mapping) or (value is None and name not in infos))
        for key, inner in (value or {}).items() if is_section else [(name, value)]:
            if is_section and key in infos and infos[key].section != name:
                message = f"{key} stands in section {name}"
                findings.append(Finding("wrong_section", "error", (key,), message, f"move it to section {infos[key].section}"))
            elif key in flat:
                findings.append(Finding("duplicate", "error", (key,), f"{key} is given twice", "remove one of them"))
            else:
                flat[str(key)] = inner
    return flat, findings


def to_yaml(config: Config, *, only: Iterable[str] | None = None, header: str = "") -> str:
    """A `Config` as YAML grouped by section: all keys, or only those named. `header` becomes comment lines."""
    wanted = {info.name for info in fields_info()} if only is None else set(only)
    sections = {
        section: {name: value for name, value in keys.items() if name in wanted} for section, keys in config.to_dict().items()
    }
    text = yaml_text.dump({section: keys for section, keys in sections.items() if keys})
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    return comment + ("" if text == "{}\n" else text)


def write_config(config: Config, path: Path, header: str = "") -> Path:
    """Write every key as YAML by section, atomically. Folders are made."""
    return yaml_text.write_atomic(path, to_yaml(config, header=header))
