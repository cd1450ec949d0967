"""What the presets screen lists: built-in presets and own files, with computed numbers and a verdict for given devices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lumina_engine.config.budget import budget, count_text, devices_needed, gb_text, parameter_counts, stage_table
from lumina_engine.config.counts import kv_cache_bytes_per_token, training_flops_per_token
from lumina_engine.config.declare import show
from lumina_engine.config.finding import has_errors
from lumina_engine.config.machine import Machine
from lumina_engine.config.presets import NAMES
from lumina_engine.config.resolve import model_config
from lumina_engine.config.schema import Config, ConfigError

from .config_text import count_words
from .form import INFOS, Form
from .widgets.text_panel import Line

OWN_FOLDER = Path("configs")


@dataclass(frozen=True)
class Entry:
    """One row: a preset or a file. A file that cannot be used has its problem in `error` and no `form`."""

    key: str  # the preset's name, or the path of the file
    name: str
    form: Form | None
    path: Path | None = None
    error: str = ""

    @property
    def config(self) -> Config | None:
        return None if self.form is None else self.form.config()


def preset_entries() -> list[Entry]:
    """The built-in presets, smallest first."""
    return [Entry(name, name, Form.from_preset(name)) for name in NAMES]


def own_entries(folder: Path = OWN_FOLDER) -> list[Entry]:
    """The user's YAML files, by name; a broken one stays as a row with its problem. Reads the disk."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml") and path.is_file())[:200]
    except OSError:
        return []
    entries = []
    for path in paths:
        try:
            form = Form.from_file(path)
        except ConfigError as error:
            entries.append(Entry(str(path), path.stem, None, path, error.findings[0].line()))
            continue
        problems = [*form.text_findings, *form.bad.values()]
        entries.append(Entry(str(path), path.stem, form, path, problems[0].line() if problems else ""))
    return entries


def verdict(config: Config, machine: Machine) -> tuple[str, str]:
    """In a word or two whether it runs on these devices, and the role of that word."""
    try:
        figures = budget(config, machine)
    except (ConfigError, ArithmeticError, ValueError):
        return "errors", "bad"
    device = figures["device"]
    if device["total"] <= device["limit"]:
        stage = figures["resolved"]["zero_stage"]
        tight = device["total"] > 0.9 * device["limit"]
        return ("tight" if tight else f"ZeRO-{stage}" if machine.devices and stage else "yes"), "warn" if tight else "good"
    if machine.devices:
        count = devices_needed(config, machine, model_config(config), 3)
        return (f"{count:,}+ GPU" if count else "too big"), "dim"
    return "no", "dim"


def parameters_of(config: Config) -> tuple[str, str]:
    """Active and total parameters, short; dashes for a shape that cannot be counted."""
    try:
        counts = parameter_counts(model_config(config))
    except (ConfigError, ArithmeticError, ValueError):
        return "-", "-"
    return count_text(counts.active), count_text(counts.total)


def detail_lines(entry: Entry, machine: Machine | None) -> list[Line]:
    """The chosen entry in full: shape, memory by stage, time, chat cache, all computed or said to be guessed."""
    lines: list[Line] = []
    if entry.error:
        lines += [((entry.error, "bad"),), (("E in the editor mends it", "dim"),), (("", "dim"),)]
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
    head = "GB/GPU" if machine.devices else "GB/process"
    lines: list[Line] = [((f"{head:<11}{'state':>7}{'rest':>7}{'sum':>7} of {_in_gb(figures['device']['available'])}", "dim"),)]
    for row in stage_table(config, machine):
        if world == 1 and row["stage"] != chosen:  # one rank has nothing to split
            continue
        numbers = "".join(f"{_in_gb(row[key]):>7}" for key in ("state", "activations", "total"))
        fits = ("yes", "good") if row["fits"] else ("no", "dim")
        label = f"ZeRO-{row['stage']}" + ("" if row["built"] else " *")
        lines.append(((f"{label:<11}{numbers} ", "accent" if row["stage"] == chosen else "text"), fits))
    if world > 1:
        lines.append((("* not available yet", "dim"),))
    counts = parameter_counts(model_config(config))
    tokens = 20 * counts.active
    hours = (
        training_flops_per_token(model_config(config)) * tokens / (figures["time"]["tokens_per_s"] * figures["flops_per_token"])
    )
    lines += [
        (("", "text"),),
        ((f"{figures['tokens_per_step']:,} tokens per step", "text"),),
        ((f"{count_text(tokens)} tokens: {_hours(hours / 3600)} here (guessed)", "text"),),
    ]
    return lines + [((text, "warn"),) for text in figures["advice"]]


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
