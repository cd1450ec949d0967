"""The look before the leap: everything that is checked and shown before a run starts. Plain Python; reads the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumina_engine.config.budget import count_text, gb_text
from lumina_engine.config.checks import check
from lumina_engine.config.finding import Finding, has_errors
from lumina_engine.config.machine import Machine
from lumina_engine.config.schema import Config
from lumina_engine.config.task_checks import train_paths
from lumina_engine.data import size
from lumina_engine.data.conversation import DataError
from lumina_engine.data.stream_open import is_streamed
from lumina_engine.run.directory import RunError, auto_name, free_space
from lumina_engine.run.interface import free_port
from lumina_engine.run.launch import MASTER_PORT
from lumina_engine.run.socket import prepare_folder, socket_folder

from .checking import Tokens, data_lines, figures_of
from .config_text import count_words
from .form import Form
from .preview import InForce, in_force
from .widgets.text_panel import Line

MARKS = {"ok": ("ok  ", "good"), "warn": ("?   ", "warn"), "fail": ("!   ", "bad"), "wait": ("…   ", "dim")}
_STATS = 1_000  # files whose times are compared


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
    in_force: InForce
    name: str
    arguments: tuple[str, ...]
    seen: tuple[Any, ...] = ()

    @property
    def blocked(self) -> bool:
        """Whether an error forbids the start."""
        return has_errors(self.findings) or any(row.status == "fail" for row in self.rows)

    @property
    def why_blocked(self) -> str:
        """The first error in words, empty if there is none."""
        first = next((f.line() for f in self.findings if f.severity == "error"), "")
        return first or next((f"{row.label}: {row.text}" for row in self.rows if row.status == "fail"), "")

    @property
    def warnings(self) -> list[str]:
        """What is asked once before the start."""
        found = [f.line() for f in self.findings if f.severity == "warning"]
        return found + [
            f"{row.label}: {row.text}" for row in self.rows if row.status == "warn" and row.label != "configuration"
        ]


def review(form: Form, machine: Machine, runs_root: Path, found: Callable[[Row], None] = lambda row: None) -> Review:
    """Check a form for a start on this machine below `runs_root`.

    `found` gets each row as it is found (in the caller's thread); a later row with the same label takes the place of the first.
    """
    config = form.config()
    seen = fingerprint(form, config)
    bad = [*form.text_findings, *form.bad.values()]
    findings = [*bad, *check(config, None if bad else machine)]
    rows: dict[str, Row] = {}

    def take(row: Row) -> None:
        rows[row.label] = row
        found(row)

    take(_configuration(findings))
    name = config.experiment_name if config.experiment_name != "auto" else auto_name(_stem(form))
    take(_name(config, name, runs_root))
    take(_folder(runs_root))
    force = in_force(config, machine, findings)
    for row in _machine_rows(machine, force, config):
        take(row)
    tokens = _data(config, take)
    data = [] if has_errors(findings) else data_lines(config, force.world)
    figures = None if has_errors(bad) else figures_of(config, machine, tokens, data)[0]
    for row in (*_fit(figures), _cache(config), _checkpoints(config), *_ports(force), _sockets()):
        take(row)
    words = [*form.arguments(), *([] if config.experiment_name != "auto" else ["--run", name])]
    return Review(tuple(rows.values()), tuple(findings), figures, force, name, tuple(words), seen)


def _stem(form: Form) -> str:
    return form.path.stem if form.path is not None else form.preset or "run"


def fingerprint(form: Form, config: Config) -> tuple[Any, ...]:
    """Changes when values, the file or the data files change."""
    paths = [
        *(path for given in train_paths(config).values() for path in size.data_files(given)),
        *size.data_files(config.eval_data_path),
        *([form.path] if form.path else []),
    ]
    stats = []
    for path in paths[:_STATS]:
        try:
            found = path.stat()
            stats.append((str(path), found.st_size, found.st_mtime_ns))
        except OSError:
            stats.append((str(path), -1, -1))
    return (json.dumps(config.to_dict(sectioned=False), sort_keys=True), tuple(form.bad), *stats)


# rows


def _configuration(findings: Sequence[Finding]) -> Row:
    status = "fail" if has_errors(findings) else "warn" if any(f.severity == "warning" for f in findings) else "ok"
    words = count_words(findings)
    return Row(status, "configuration", "no findings" if words == "none" else words)


def _name(config: Config, name: str, runs_root: Path) -> Row:
    if (runs_root / name).exists():
        return Row("fail", "run name", f"{name} exists in {runs_root}: set another experiment_name")
    made = " (experiment_name is auto)" if config.experiment_name == "auto" else ""
    return Row("ok", "run name", f"{name} is free{made}")


def _folder(runs_root: Path) -> Row:
    place = runs_root
    while not place.exists() and place != place.parent:
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        return Row("fail", "runs folder", f"{place} cannot be written: name another with --runs")
    return Row("ok", "runs folder", f"{runs_root}" + ("" if runs_root.exists() else " (will be made)"))


def _machine_rows(machine: Machine, force: InForce, config: Config) -> list[Row]:
    devices = Row("ok", "devices", machine.label)
    if force.resolved is None:
        return [devices, Row("wait", "ranks", "not known before the errors are mended")]
    engine = "DeepSpeed" if config.use_deepspeed else "plain torch"
    starter = "Lumina" if force.resolved.launcher == "none" else force.resolved.launcher
    how = "one process" if force.world == 1 else f"started by {starter}"
    stage = f"ZeRO-{force.resolved.zero_stage}, {force.resolved.precision}, {how}"
    return [devices, Row("ok", "ranks", f"{force.world} rank{'s' if force.world > 1 else ''}, {engine}, {stage}")]


def _data(config: Config, take: Callable[[Row], None]) -> Tokens:
    """Rows about the data: path, fingerprint, tokens. Gives how long one epoch is."""
    train = train_paths(config)
    try:
        for key, given in {**train, "eval_data_path": config.eval_data_path}.items():
            if given is not None:
                size.check_head(given, config.data_format, key=key)
    except DataError as error:
        take(Row("fail", "data", str(error)))
        return None, ""
    for key, given in train.items():
        take(Row("ok", f"data of {key.partition('.')[2]}" if "." in key else "data", _paths(given)))
    if config.eval_data_path is not None:
        take(Row("ok", "evaluation", _paths(config.eval_data_path)))
    elif None not in train.values():
        text = f"{config.eval_split:.2%} held out of it" if config.eval_split else "none: nothing is held out"
        take(Row("ok", "evaluation", text))
    amount = sum(size.data_bytes(given) for given in train.values())
    take(Row("wait", "fingerprint", f"reading {gb_text(amount)} …" if amount else "…"))
    try:
        digest = size.content_digest(config)
    except (DataError, OSError) as error:
        take(Row("fail", "fingerprint", str(error)))
        return None, ""
    known = size.counted(config, digest)
    streamed = any(is_streamed(given, config, key) for key, given in train.items())
    basis = "names, sizes and times: it is streamed" if streamed else "sha256 of the content"
    take(Row("ok", "fingerprint", f"{digest[:16]} ({basis})"))
    if known is not None:
        take(Row("ok", "tokens", f"{known.tokens:,} in {known.documents:,} conversations (measured by an earlier start)"))
        return known.tokens, "measured by an earlier start"
    tokens, basis = size.train_tokens(config)
    counted = "counted at the start"
    take(Row("ok", "tokens", f"about {count_text(tokens)} ({basis}); {counted}" if tokens else f"-: {counted}"))
    return tokens, basis


def _paths(value: str | list[str] | None) -> str:
    if value is None:
        return "the built-in corpus"
    files = size.data_files(value)
    shown = value if isinstance(value, str) else value[0] + (f" and {len(value) - 1} more" if len(value) > 1 else "")
    return f"{shown}: {len(files)} file{'s' if len(files) != 1 else ''}, {gb_text(size.data_bytes(value))}"


def _fit(figures: dict[str, Any] | None) -> Iterator[Row]:
    if figures is None:
        yield Row("wait", "memory", "not known before the errors are mended")
        return
    device, host, disk = figures["device"], figures["host"], figures["disk"]
    memory = f"{gb_text(device['total'])} of {gb_text(device['limit'])} allowed per rank (computed)"
    yield Row("ok" if device["total"] <= device["limit"] else "fail", "memory", memory)
    text = f"{gb_text(host['total'])} of {gb_text(host['available'])} (computed, processes guessed)"
    yield Row("ok" if host["total"] <= host["available"] else "warn", "host memory", text)
    if disk["available"] is not None:
        fits = disk["total"] <= disk["available"]
        yield Row("ok" if fits else "fail", "disk", f"{gb_text(disk['total'])} of {gb_text(disk['available'])} free (computed)")


def _cache(config: Config) -> Row:
    place, free = free_space(Path(config.data_cache_dir).expanduser())
    need = size.cache_bytes(config)
    text = f"{gb_text(need)} of {gb_text(free)} free in {place} (guessed)"
    if not os.access(place, os.W_OK | os.X_OK):
        return Row("fail", "data cache", f"{place} cannot be written: set data_cache_dir")
    return Row("ok", "data cache", text) if need <= free else Row("warn", "data cache", f"{text}: set data_cache_dir")


def _checkpoints(config: Config) -> Row:
    when = f"every {config.save_interval:,} steps" if config.save_interval else "at the end only"
    text = f"{when}, {config.keep_checkpoints} kept and the best by {config.best_metric}"
    if config.backup_every_n_hours and config.backup_path is not None:
        place, _ = free_space(Path(config.backup_path).expanduser())
        if not os.access(place, os.W_OK | os.X_OK):
            return Row("fail", "checkpoints", f"backup_path: {place} cannot be written")
    if config.max_steps is not None and config.save_interval >= config.max_steps:
        return Row("ok", "checkpoints", f"{text}; none before the end at step {config.max_steps:,}")
    return Row("ok", "checkpoints", text)


def _ports(force: InForce) -> Iterator[Row]:
    if force.resolved is None or force.world == 1:
        return
    wanted = force.resolved.master_port
    if wanted == "auto":
        alone = force.resolved.num_nodes == 1
        yield Row("ok", "port", "127.0.0.1, any free one" if alone else f"{MASTER_PORT} of the first machine")
        return
    port = free_port(wanted)
    text = f"127.0.0.1:{port}" + ("" if port == wanted else f" ({wanted} is taken)")
    yield Row("ok", "port", text)


def _sockets() -> Row:
    folder = socket_folder()
    try:
        prepare_folder(folder)
    except RunError as error:
        return Row("fail", "sockets", str(error))
    except OSError as error:
        return Row("fail", "sockets", f"{folder}: {error.strerror or error}: set LUMINA_SOCKETS to a folder of your own")
    return Row("ok", "sockets", str(folder))


def check_lines(rows: Sequence[Row]) -> list[Line]:
    """One line per check."""
    return [
        (MARKS[row.status], (f"{row.label:<14}", "dim"), (row.text, "bad" if row.status == "fail" else "text")) for row in rows
    ]
