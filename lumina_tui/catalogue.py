"""What the presets screen lists: built-in presets and own files, with computed numbers and a verdict for given devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumina_engine.config.budget import budget, count_text, devices_needed, gb_text, parameter_counts, stage_table
from lumina_engine.config.counts import kv_cache_bytes_per_token
from lumina_engine.config.declare import show
from lumina_engine.config.finding import Finding, has_errors
from lumina_engine.config.machine import Machine
from lumina_engine.config.presets import NAMES
from lumina_engine.config.resolve import model_config
from lumina_engine.config.schema import Config, ConfigError

from .config_text import count_words
from .form import INFOS, Form
from .own_presets import own_presets
from .widgets.text_panel import Line

OWN_FOLDER = Path("configs")  # of the folder one works in
MAX_FILES = 200  # of one folder
SORTS = ("size", "name", "fit")


@dataclass(frozen=True)
class Entry:
    """One row: a preset or a file. A file that cannot be used has its problem in `error`; without a `form` it is unreadable."""

    key: str  # the preset's name, or the path of the file
    name: str
    form: Form | None
    path: Path | None = None
    error: str = ""
    config: Config | None = None
    active: int | None = None  # parameters; None for a shape that cannot be counted
    total: int | None = None


def entry_of(key: str, name: str, form: Form | None, path: Path | None = None, error: str = "") -> Entry:
    """An entry with what is counted of its shape."""
    if form is None:
        return Entry(key, name, None, path, error)
    config = form.config()
    try:
        counts = parameter_counts(model_config(config))
    except (ConfigError, ArithmeticError, ValueError):
        return Entry(key, name, form, path, error, config)
    return Entry(key, name, form, path, error, config, counts.active, counts.total)


def preset_entries() -> list[Entry]:
    """The built-in presets, smallest first."""
    return [entry_of(name, name, Form.from_preset(name)) for name in NAMES]


def own_entries(folders: Sequence[Path] | None = None) -> list[Entry]:
    """The user's presets and the YAML files of ./configs; a broken one stays as a row with its problem. Reads the disk."""
    entries: list[Entry] = []
    for folder in (own_presets(), OWN_FOLDER) if folders is None else folders:
        try:
            paths = sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml") and path.is_file())
        except OSError:
            continue
        entries += [_own_entry(path) for path in paths[:MAX_FILES]]
    return entries


def _own_entry(path: Path) -> Entry:
    try:
        form = Form.from_file(path)
    except ConfigError as error:
        return entry_of(str(path), path.stem, None, path, _cause(path, error.findings[0]))
    problems = [*form.text_findings, *form.bad.values()]
    return entry_of(str(path), path.stem, form, path, _cause(path, problems[0]) if problems else "")


def _cause(path: Path, finding: Finding) -> str:
    """`line 12: unknown key; did you mean …` of a problem in a file."""
    line = finding.where.removeprefix(f"{path}:")
    text = finding.line().removeprefix(f"{finding.where}: ").removeprefix(f"{path}: ")
    return f"line {line}: {text}" if line.isdecimal() else text


def matching(entries: Iterable[Entry], words: str) -> list[Entry]:
    """Entries whose name, folder or preset holds every word."""
    wanted = words.casefold().split()

    def text(entry: Entry) -> str:
        preset = entry.form.preset if entry.form is not None and entry.form.preset else ""
        return f"{entry.name} {entry.path or 'built-in'} {preset} {'error' if entry.error else ''}".casefold()

    return [entry for entry in entries if all(word in text(entry) for word in wanted)]


def in_order(entries: Sequence[Entry], sort: str, verdicts: Mapping[str, Verdict]) -> list[Entry]:
    """By size (parameters), by name, or what fits first."""
    if sort == "name":
        return sorted(entries, key=lambda e: e.name)
    sized = sorted(entries, key=lambda e: (e.total is None, e.total or 0))
    return sized if sort == "size" else sorted(sized, key=lambda e: not verdicts.get(e.key, Verdict("", "dim", False)).fits)


@dataclass(frozen=True)
class Verdict:
    """In a word or two whether it runs on some devices, the role of that word, and the answer."""

    text: str
    role: str
    fits: bool


def verdicts(entries: Iterable[Entry], machine: Machine) -> dict[str, Verdict]:
    """The verdict of each entry, by key. Some milliseconds each: for a thread."""
    return {entry.key: verdict(entry.config, machine) for entry in entries if entry.config is not None}


def verdict(config: Config, machine: Machine) -> Verdict:
    """Whether a configuration runs on these devices."""
    try:
        figures = budget(config, machine)
    except (ConfigError, ArithmeticError, ValueError):
        return Verdict("errors", "bad", False)
    device = figures["device"]
    if device["total"] <= device["limit"]:
        if device["total"] > 0.9 * device["limit"]:
            return Verdict("tight", "warn", True)
        stage = figures["resolved"]["zero_stage"]
        return Verdict(f"ZeRO-{stage}" if machine.devices and stage else "yes", "good", True)
    if not machine.devices:
        return Verdict("no", "dim", False)
    count = devices_needed(config, machine, model_config(config), 3)
    return Verdict(f"{count:,}+ GPU" if count else "too big", "dim", False)


def detail_lines(entry: Entry, machine: Machine | None) -> list[Line]:
    """The chosen entry in full: shape, memory by stage, time, chat cache, all computed or said to be guessed."""
    lines: list[Line] = []
    if entry.error:
        hint = "Enter opens it at the line" if entry.form is not None else "mend it and r reads it again"
        lines += [((entry.error, "bad"),), ((hint, "dim"),), (("", "dim"),)]
    config = entry.config
    if config is None:
        return lines
    try:
        lines += _shape_lines(config)
        return lines + (_machine_lines(config, machine) if machine else [(("looking at this machine …", "dim"),)])
    except (ConfigError, ArithmeticError, ValueError) as error:
        return [*lines, ((str(error), "bad"),)]


def _shape_lines(config: Config) -> list[Line]:
    model = model_config(config)
    counts = parameter_counts(model)
    experts = f"{model.num_experts} experts" if model.use_moe else "dense"
    choice = f", top-{model.moe_top_k}" if model.use_moe else ""
    cache = kv_cache_bytes_per_token(model, 2)
    texts = (
        f"{model.num_layers} layers x {model.hidden_size:,}, {model.num_heads} heads, {model.num_kv_heads} KV",
        f"{experts} x {model.expert_width:,}{choice}",
        f"{config.seq_length:,} tokens, vocabulary {model.vocab_rows:,}",
        f"{counts.active:,} active ({counts.active / counts.total:.1%})",
        f"of {counts.total:,}, embedding {count_text(counts.embeddings)}",
        f"chat: {gb_text(2 * counts.stored)} bf16, {gb_text(cache)} a token",
        "",
    )
    return [((text, "text"),) for text in texts]


def _machine_lines(config: Config, machine: Machine) -> list[Line]:
    figures = budget(config, machine)
    world, chosen = figures["resolved"]["world"], figures["resolved"]["zero_stage"]
    head = "GB per GPU" if machine.devices else "GB/process"
    available = _in_gb(figures["device"]["available"])
    lines: list[Line] = [((f"{head:<12}{'state':>6}{'rest':>6}{'sum':>6} of {available}", "dim"),)]
    table = stage_table(config, machine)
    for row in table:
        lines.append(_stage_line(row, row["stage"] == chosen and not row["offload"]))
    if world == 1:
        lines.append((("one rank has nothing to split", "dim"),))
    tokens = 20 * figures["parameters"]["active"]
    hours = tokens / figures["time"]["tokens_per_s"] / 3600
    lines += [
        ((f"{figures['tokens_per_step']:,} tokens per step", "text"),),
        ((f"{count_text(tokens)} tokens: {_hours(hours)} here ({figures['basis']['time']})", "text"),),
        (("  (20 tokens per active parameter)", "dim"),),
    ]
    return lines + [((text, "warn"),) for text in figures["advice"]]


def _stage_line(row: Mapping[str, Any], chosen: bool) -> Line:
    numbers = "".join(f"{_in_gb(row[key]):>6}" for key in ("state", "activations", "total"))
    name = "3 + offload" if row["offload"] else f"ZeRO-{row['stage']}"
    mark = ">" if chosen else " "
    fits = ("yes", "good") if row["fits"] else ("no", "dim")
    return ((f"{mark}{name:<11}{numbers} ", "accent" if chosen else "text"), fits)


def _in_gb(count: float) -> str:
    value = count / 1e9
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.0f} h" if hours < 72 else f"{hours / 24:,.0f} days" if hours < 24 * 1000 else "decades"


def difference_lines(one: Entry, other: Entry) -> list[Line]:
    """Keys in which two entries differ, both values side by side."""
    first, second = one.config, other.config
    if first is None or second is None:
        return [(("one of them cannot be read", "bad"),)]
    names = [n for n in INFOS if getattr(first, n) != getattr(second, n)]
    if not names:
        return [(("all keys are the same", "dim"),)]
    left = {n: show(getattr(first, n)) for n in names}
    width, middle = max(len(n) for n in names), max(len(one.name), *(len(text) for text in left.values()))
    head: Line = ((f"{'':<{width}}  {one.name:<{middle}}  {other.name}", "dim"),)
    rows: Iterable[Line] = (
        ((f"{n:<{width}}  ", "text"), (f"{left[n]:<{middle}}  ", "text"), (show(getattr(second, n)), "accent")) for n in names
    )
    return [head, *rows]


def state_of(entry: Entry) -> tuple[str, str]:
    """A word about a file of the user: its changes, or its problems."""
    if entry.form is None or entry.error:
        return entry.error or "unreadable", "bad"
    findings = entry.form.findings()
    if has_errors(findings):
        return count_words(findings), "bad"
    count = len(entry.form.changes())
    return f"{entry.form.preset or 'defaults'} + {count}", "dim"
