"""Runs side by side: what was opened, the table at the crosshair, results, configuration keys that differ. No Textual."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.cells import cell_len

from lumina_engine.run.directory import RunDirectory, RunError

from .feed import Feed, Mode
from .history import METRICS
from .paint import clean, count, duration, fit, fit_ends, whole
from .runs import held_out_score
from .widgets.bars import STATE_ROLES
from .widgets.picture import LETTERS, MOST_RUNS, Curve, Options, colour_slots
from .widgets.readings import Reading, difference_text, evaluation, read, value_text
from .widgets.table import Cell, Column, Row
from .widgets.text_panel import Line

COLUMNS = (
    Column("run", "run", 10, grow=True, ends=True),
    Column("state", "state", 10),
    Column("value", "value", 8, "right"),
    Column("ema", "EMA", 8, "right", rank=1),
    Column("base", "to base", 8, "right"),
    Column("pin", "to pin", 8, "right", rank=4),
    Column("best", "best", 8, "right", rank=2),
    Column("last", "last", 8, "right", rank=3),
)
PINNED = tuple(replace(column, rank=1) if column.key == "pin" else column for column in COLUMNS)  # while a place is pinned
# whether a metric is better when it is small; what is not named has no better side
_SMALL = {
    **dict.fromkeys(("loss", "aux_loss", "z_loss", "step_time", "imbalance", "dropped"), True),
    **dict.fromkeys(("tokens_per_s", "mfu", "entropy"), False),
}
_CELL = 8  # least width of a run's column in the side-by-side list


@dataclass
class Compared:
    """One run of a comparison. `error`: why it cannot be shown, or not any more; then its name is struck out."""

    run: RunDirectory
    identity: str
    letter: str = ""
    slot: int = 0
    feed: Feed | None = None
    config: dict[str, Any] = field(default_factory=dict)
    config_error: str = ""
    score: float | None = None
    error: str = ""
    gone: bool = False  # its folder was deleted while it was shown; what was read stays
    hidden: bool = False

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def curve(self) -> Curve | None:
        """Its line; None if there is nothing to draw."""
        if self.feed is None or (self.error and not self.gone):
            return None
        return Curve(self.feed.store, self.name, self.slot, self.letter)

    @property
    def drawn(self) -> bool:
        return not self.hidden and self.curve is not None

    def badge(self) -> tuple[str, str]:
        """State word and role: how its data stands."""
        if self.error:
            return ("gone" if self.gone else "unreadable"), "bad"
        if self.feed is None:
            return "opening", "accent"
        badge, state = self.feed.badge(), self.feed.store.state
        if self.feed.error and not len(self.feed.store.steps):
            return "unreadable", "bad"
        if self.feed.mode is Mode.LOADING or badge.text.startswith(("QUIET", "DEAD", "BUSY")):
            return badge.text.lower() if len(badge.text) < 11 else badge.text.split()[0].lower(), badge.role
        if self.feed.mode is Mode.LIVE:
            return (state if state not in ("", "running") else "live"), "good"
        return (state or "no record"), STATE_ROLES.get(state, "dim")

    def why(self) -> str:
        """The sentence behind a badge that is not good, without the run's own path; "" otherwise."""
        feed = self.feed
        text = self.error
        if not text and feed is not None and feed.mode is not Mode.LOADING:
            badge = feed.badge()
            text = feed.error or ("has no step yet" if not len(feed.store.steps) else "")
            text = text or (badge.why if badge.text.startswith(("QUIET", "DEAD")) else "")
        return text.replace(f"{self.run.path}{os.sep}", "")


def opened(paths: Sequence[Path]) -> list[Compared]:
    """The runs of a comparison with identity and configuration; at most MOST_RUNS. Reads files: not for the event loop."""
    runs = [_opened(RunDirectory(path)) for path in dict.fromkeys(Path(os.path.abspath(path)) for path in paths)][:MOST_RUNS]  # noqa: PTH100
    slots = colour_slots(run.identity for run in runs)
    for letter, run in zip(LETTERS, runs, strict=False):
        run.letter, run.slot = letter, slots[run.identity]
    return runs


def _opened(run: RunDirectory) -> Compared:
    try:
        identity = run.identity()
    except RunError as error:
        return Compared(run, str(run.path), error=str(error))
    found = Compared(run, str(identity["id"]), score=held_out_score(run.path))
    found.config, found.config_error = _config(run.config_path)
    return found


def _config(path: Path) -> tuple[dict[str, Any], str]:
    """The keys of a configuration file, and why there are none."""
    from lumina_engine.config import yaml_text
    from lumina_engine.config.loading import flatten_mapping

    try:
        content = yaml_text.plain(yaml_text.parse(yaml_text.read_text(path)))
    except yaml_text.YamlError as error:
        return {}, f"{path.name}: {error}"
    if not isinstance(content, dict):
        return {}, f"{path.name}: holds no keys"
    return flatten_mapping(content)[0], ""


def exists(run: RunDirectory) -> bool:
    """Whether the run's folder still holds a run."""
    return run.identity_path.exists()


# the table at the crosshair


def table_rows(runs: Sequence[Compared], baseline: Compared | None, options: Options, reach: float) -> list[Row]:
    """A row for each run: values at the crosshair (without one: the newest), difference to the baseline, best and last."""
    other = _reading(baseline, options, options.cross, reach) if baseline is not None else None
    return [Row(run.letter, _cells(run, baseline, other, options, reach)) for run in runs]


def _cells(run: Compared, baseline: Compared | None, other: Reading | None, options: Options, reach: float) -> tuple[Cell, ...]:
    word, role = run.badge()
    broken = bool(run.error)
    name = f"{run.letter} {run.name}" + (" (hidden)" if run.hidden else "")
    head: tuple[Cell, ...] = (
        (name, "struck" if broken else "dim" if run.hidden else f"run{run.slot}"),
        (word, role),
    )
    if broken and not run.gone:
        return (*head, ("-", "dim"), ("-", "dim"), ("-", "dim"), ("-", "dim"), ("-", "dim"), ("-", "dim"))
    at = _reading(run, options, options.cross, reach)
    pinned = _reading(run, options, options.pin, reach) if options.pin is not None else None
    metric = options.metric
    to_base = "base" if run is baseline else _change(metric, at, other)
    store = run.feed.store if run.feed is not None else None
    text = "dim" if run.hidden or run.gone or word.startswith(("quiet", "dead")) else "text"  # stale looks stale
    newest = read(store, options) if store is not None else None
    return (
        *head,
        (value_text(metric, at.value if at is not None else None), text),
        (value_text(metric, at.smooth if at is not None else None), text),
        (to_base, text),
        (_change(metric, at, pinned), text),
        (value_text(metric, best(run, options)), text),
        (value_text(metric, newest.shown if newest is not None else None), text),
    )


def _reading(run: Compared, options: Options, x: float | None, reach: float) -> Reading | None:
    return read(run.feed.store, options, x, reach) if run.feed is not None else None


def _change(metric: str, at: Reading | None, other: Reading | None) -> str:
    return difference_text(metric, at.shown - other.shown if at is not None and other is not None else None)


def best(run: Compared, options: Options) -> float | None:
    """The best smoothed value so far; None for a metric without a better side, or without values."""
    small = _SMALL.get(options.metric)
    if small is None or run.feed is None:
        return None
    history = run.feed.store.history(options.metric)
    pyramid = history.smooth(options.metric, options.weight) if options.weight else history.metrics[options.metric]
    low, high, known = pyramid.extremes()
    if not known:
        return None
    return low if small else high


# results and configuration side by side


@dataclass(frozen=True)
class Fields:
    """A name and a value for each run, in the order of the runs."""

    name: str
    values: tuple[str, ...]


def results(runs: Sequence[Compared]) -> list[Fields]:
    """What the runs came to. Unknown is `-`."""
    rows = [_result(run) for run in runs]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [Fields(name, tuple(row.get(name, "-") for row in rows)) for name in names]


def _result(run: Compared) -> dict[str, str]:
    store = run.feed.store if run.feed is not None else None
    if store is None or not len(store.steps):
        return {"state": run.badge()[0]}
    evals = store.evals.metrics["loss"].values
    good = np.flatnonzero(np.isfinite(evals))
    low = int(good[np.argmin(evals[good])]) if len(good) else -1
    newest = evaluation(store, store.step or 0)
    hours = float(store.steps.hours.values[-1])
    return {
        "state": run.badge()[0],
        "steps": whole(store.step),
        "tokens": count(store.tokens),
        "time": duration(hours * 3600),
        "tokens/s": count(store.steps.tokens.values[-1] / hours / 3600) if hours > 0 else "-",
        "recent loss": value_text("loss", store.steps.mean("loss")),
        "best eval": value_text("loss", float(evals[low])) if low >= 0 else "-",
        "at step": whole(int(store.evals.step.values[low])) if low >= 0 else "-",
        "last eval": value_text("loss", newest[1]) if newest is not None else "-",
        "held-out": f"{100 * run.score:.0f} %" if run.score is not None else "-",
        "restarts": whole(max(0, store.inc - 1)),
    }


def differing(runs: Sequence[Compared]) -> list[Fields]:
    """Configuration keys (but for the name) in which the readable runs differ; a key that a run does not have is `-`."""
    known = [run for run in runs if run.config]
    names = [name for name in dict.fromkeys(name for run in known for name in run.config) if name != "experiment_name"]
    fields = []
    for name in names:
        if len({_shown(run.config, name) for run in known}) > 1:
            fields.append(Fields(name, tuple(_shown(run.config, name) if run.config else "-" for run in runs)))
    return fields


def _shown(config: dict[str, Any], name: str) -> str:
    if name not in config:
        return "-"
    value = config[name]
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def side_by_side(runs: Sequence[Compared], width: int) -> list[Line]:
    """Differing keys, then results: one column a run if they fit into `width` cells, else one wrapped line a key."""
    parts: list[Line] = []
    for run in runs:
        if run.why():
            parts.append(((f"{run.letter} {run.name}: ", "bad"), (run.why(), "text")))
        if run.config_error:
            parts.append(((f"{run.letter} {run.name}: ", "warn"), (run.config_error, "text")))
    keys = differing(runs)
    if keys:
        parts += _block(f"{len(keys)} configuration key{' differs' if len(keys) == 1 else 's differ'}", keys, runs, width)
    elif sum(bool(run.config) for run in runs) > 1:
        parts.append((("no configuration key differs", "dim"),))
    parts += _block("results", results(runs), runs, width)
    return parts


def _block(title: str, fields: Sequence[Fields], runs: Sequence[Compared], width: int) -> list[Line]:
    lines: list[Line] = [((title, "title"),)]
    if not fields:
        return lines
    label = min(26, max(len(entry.name) for entry in fields)) + 1
    each = min(16, (width - label) // max(1, len(runs)) - 1)
    need = max(len(value) for entry in fields for value in entry.values)
    if each >= min(need, _CELL) and each >= 4:
        heads = [(" " + _right(f"{run.letter} {run.name}", each), f"run{run.slot}") for run in runs]
        lines.append(((" " * label, "dim"), *heads))
        for entry in fields:
            row = [(" " + _right(value, each), "text") for value in entry.values]
            lines.append(((fit(entry.name, label - 1) + " ", "dim"), *row))
        return lines
    for entry in fields:
        pairs = zip(runs, entry.values, strict=True)
        parts = [part for run, value in pairs for part in ((f"  {run.letter} ", f"run{run.slot}"), (value, "text"))]
        lines.append(((entry.name, "dim"), *parts))
    return lines


def _right(text: str, width: int) -> str:
    return fit_ends(text, width) if cell_len(text) > width else fit(text, width, "right")


def as_text(rows: Sequence[Row], lines: Sequence[Line]) -> list[str]:
    """The table and the side-by-side list as plain text."""
    widths = (
        [max(len(column.title), *(len(row.cells[i][0]) for row in rows)) for i, column in enumerate(COLUMNS)] if rows else []
    )
    table = ["  ".join(column.title.ljust(widths[i]) for i, column in enumerate(COLUMNS))] if rows else []
    table += ["  ".join(cell.ljust(widths[i]) for i, (cell, _) in enumerate(row.cells)).rstrip() for row in rows]
    return [*table, "", *("".join(clean(text) for text, _ in line).rstrip() for line in lines)]


def metrics_beside(known: Sequence[str], main: str, most: int = 4) -> list[str]:
    """The metrics of the small charts beside the main one."""
    order = ["loss", "tokens_per_s", "grad_norm", "lr", *METRICS]
    return [name for name in dict.fromkeys(order) if name in known and name != main][:most]
