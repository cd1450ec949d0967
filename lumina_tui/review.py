"""The look before the leap: everything that is checked and shown before a run starts. Plain Python; reads the disk."""

from __future__ import annotations

import glob
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumina_engine.config.budget import budget, gb_text
from lumina_engine.config.checks import check
from lumina_engine.config.deepspeed import to_deepspeed
from lumina_engine.config.finding import Finding, has_errors
from lumina_engine.config.machine import Machine
from lumina_engine.config.resolve import TOKENIZER_IDS, model_config, resolve
from lumina_engine.config.schema import Config, ConfigError

from .config_text import count_words
from .form import Form
from .launching import train_argv
from .widgets.text_panel import Line

MARKS = {"ok": ("ok  ", "good"), "warn": ("?   ", "warn"), "fail": ("!   ", "bad"), "wait": ("…   ", "dim")}


@dataclass(frozen=True)
class Row:
    """One check: ok, warn, fail or wait; what; what was found."""

    status: str
    label: str
    text: str


@dataclass(frozen=True)
class Review:
    """What was found. `seen` is compared before the start: a review of other data or values is stale."""

    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]
    figures: dict[str, Any] | None
    resolved: Config | None
    deepspeed: str
    arguments: tuple[str, ...]
    seen: tuple[Any, ...] = field(default=())

    @property
    def blocked(self) -> bool:
        """Whether an error forbids the start."""
        return has_errors(self.findings) or any(row.status == "fail" for row in self.rows)

    @property
    def warnings(self) -> list[str]:
        """What is asked once before the start."""
        found = [f.line() for f in self.findings if f.severity == "warning"]
        return found + [
            f"{row.label}: {row.text}" for row in self.rows if row.status == "warn" and row.label != "configuration"
        ]


def review(form: Form, machine: Machine, runs_root: Path) -> Review:
    """Check a form for a start on this machine below `runs_root`."""
    config = form.config()
    bad = [*form.text_findings, *form.bad.values()]
    findings = [*bad, *check(config, None if bad else machine)]
    rows = [
        _configuration(findings),
        _name(config, runs_root),
        _folder(runs_root),
        _data(config),
        *_fit(config, machine, findings),
    ]
    resolved, deepspeed, world = _resolved(config, machine, findings)
    if resolved is not None:
        engine = "DeepSpeed" if config.use_deepspeed else "plain torch"
        rows.append(Row("ok", "ranks", f"{world} rank{'s' if world > 1 else ''}, {engine}, {_how(resolved)}"))
    figures = None if has_errors(bad) else _figures(config, machine)
    return Review(
        tuple(rows), tuple(findings), figures, resolved, deepspeed, tuple(form.arguments()), fingerprint(form, config)
    )


def fingerprint(form: Form, config: Config) -> tuple[Any, ...]:
    """Changes when values, the file or the data files change."""
    paths = [*data_files(config.train_data_path), *data_files(config.eval_data_path), *([form.path] if form.path else [])]
    stats = []
    for path in paths[:1000]:
        try:
            found = path.stat()
            stats.append((str(path), found.st_size, found.st_mtime_ns))
        except OSError:
            stats.append((str(path), -1, -1))
    return (json.dumps(config.to_dict(sectioned=False), sort_keys=True), *stats)


def data_files(value: str | Sequence[str] | None) -> list[Path]:
    """The files that a data path names."""
    found: list[Path] = []
    for text in [value] if isinstance(value, str) else value or []:
        for name in sorted(glob.glob(text, recursive=True)) or [text]:  # noqa: PTH207  (a pattern may be absolute)
            path = Path(name)
            found += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return found


def _configuration(findings: Sequence[Finding]) -> Row:
    status = "fail" if has_errors(findings) else "warn" if any(f.severity == "warning" for f in findings) else "ok"
    words = count_words(findings)
    return Row(status, "configuration", "no findings" if words == "none" else words)


def _name(config: Config, runs_root: Path) -> Row:
    if config.experiment_name == "auto":
        return Row("ok", "run name", "auto: the preset and the time")
    if (runs_root / config.experiment_name).exists():
        return Row("fail", "run name", f"{config.experiment_name} exists in {runs_root}: set another experiment_name")
    return Row("ok", "run name", f"{config.experiment_name} is free")


def _folder(runs_root: Path) -> Row:
    place = runs_root
    while not place.exists() and place != place.parent:
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        return Row("fail", "runs folder", f"{place} cannot be written: name another with --runs")
    return Row("ok", "runs folder", f"{runs_root}" + ("" if runs_root.exists() else " (will be made)"))


def _data(config: Config) -> Row:
    if config.train_data_path is None:
        return Row("ok", "data", "the built-in corpus")
    files = data_files(config.train_data_path)
    missing = [str(path) for path in files if not path.exists()]
    if missing:
        return Row("fail", "data", f"{missing[0]}: no such file or folder")
    size = sum(path.stat().st_size for path in files)
    if not size:
        return Row("fail", "data", "the files are empty: at least one conversation is needed")
    return Row(
        "ok", "data", f"{len(files)} file{'s' if len(files) > 1 else ''}, {gb_text(size)}; tokens are counted at the start"
    )


def _figures(config: Config, machine: Machine) -> dict[str, Any] | None:
    try:
        return budget(config, machine)
    except (ConfigError, ArithmeticError, ValueError):
        return None


def _fit(config: Config, machine: Machine, findings: Sequence[Finding]) -> list[Row]:
    figures = _figures(config, machine)
    if figures is None:
        return [Row("wait", "memory", "not known before the errors are mended")]
    device, disk = figures["device"], figures["disk"]
    memory = f"{gb_text(device['total'])} of {gb_text(device['limit'])} allowed per rank (computed)"
    rows = [Row("ok" if device["total"] <= device["limit"] else "fail", "memory", memory)]
    if disk["available"] is not None:
        fits = disk["total"] <= disk["available"]
        text = f"{gb_text(disk['total'])} of {gb_text(disk['available'])} free (computed)"
        rows.append(Row("ok" if fits else "fail", "disk", text))
    return rows


def _resolved(config: Config, machine: Machine, findings: Sequence[Finding]) -> tuple[Config | None, str, int]:
    """The values in force and the DeepSpeed JSON; without them the reason stands in their place."""
    if has_errors(findings):
        return None, "not before the errors are mended", 0
    ids = TOKENIZER_IDS.get(config.tokenizer, model_config(config).vocab_rows)
    try:
        resolved = resolve(config, machine, tokenizer_vocab=ids)
        world = int(resolved.num_gpus) * resolved.num_nodes
        if not config.use_deepspeed:
            return resolved, "use_deepspeed is false: plain torch", world
        return resolved, json.dumps(to_deepspeed(resolved, world), indent=2), world
    except ConfigError as error:
        return None, str(error), 0


def _how(resolved: Config) -> str:
    launcher = "one process" if resolved.launcher == "none" else f"started by {resolved.launcher}"
    return f"ZeRO-{resolved.zero_stage}, {resolved.precision}, {launcher}"


def command(arguments: Sequence[str]) -> str:
    """The command for use without lumina, as one pastes it into a shell."""
    words = train_argv(arguments)
    return shlex.join(["lumina-engine", *words[3:-2]])


def check_lines(rows: Sequence[Row]) -> list[Line]:
    """One line per check."""
    return [
        (MARKS[row.status], (f"{row.label:<14}", "dim"), (row.text, "bad" if row.status == "fail" else "text")) for row in rows
    ]
