"""A report as one page of HTML: no script, nothing from outside, readable in light and dark and on paper.

All text is escaped in one place (`tag`); only `Markup` made there passes as it is.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from . import scaling_page
from .curves import SMOOTHING, SPLIT, History
from .html import Markup, document, table, tag
from .plot import LABELS, curve, own_ids, svg
from .routing_page import sections
from .svg import Series, line_svg

_CHARTS = ("loss", "tokens_per_s", "grad_norm", "lr", "imbalance", "entropy", "dead")
_SIZE = (960, 300)  # px of a chart
_HEALTH = 101  # number of its chart among those of a page
_LEVELS = (0.25, 0.75, 1.25, 2.0)  # of the fair load: the five levels of the expert map
_SIGNS = " .:+#"
_MOST_FIGURES = 16  # experts up to which the cells of the map hold figures
_MOST_EXPERTS = 512  # columns of the map


def page(found: Mapping[str, Any], history: History) -> str:
    """The page of a report document and its history."""
    run = found["run"]
    parts = [
        tag("h1", run["name"]),
        _lead(found),
        _missing(found["missing"]),
        _summary(found),
        *_charts(found, history),
        _health(found["health"]),
        *scaling_page.sections(found["scaling"], history),
        _split(found["step_split"]),
        _routing(found["routing"]),
        *sections(found.get("moe", {})),
        _timeline(found["timeline"]),
        _checkpoints(found["checkpoints"]),
        _starts(found["starts"]),
        _sample_eval(found["sample_eval"]),
        _config(found["config"]),
        _environment(found),
    ]
    return document(f"{run['name']}: report", parts)


# parts


def _lead(found: Mapping[str, Any]) -> Markup:
    run = found["run"]
    state = run["state"] + (f": {run['reason']}" if run["reason"] else "")
    kind = "bad" if run["state"] in ("failed", "crashed", "unreadable") else None
    more = f", exit code {run['exit_code']}" if run["exit_code"] else ""
    live = ", still running: the figures are those of now" if run["alive"] else ""
    return tag("p", tag("span", state, class_=kind), f"{more}{live}. Report of {_when(found['made'])}, {run['path']}")


def _missing(missing: Sequence[str]) -> Markup:
    if not missing:
        return Markup("")
    return tag("div", tag("b", "Not in this report"), tag("ul", *[tag("li", text) for text in missing]), class_="box")


def _summary(found: Mapping[str, Any]) -> Markup:
    summary, run = found["summary"], found["run"]
    of = f" of {run['total_steps']:,}" if isinstance(run["total_steps"], int) else ""
    best, last = summary["best_eval"], summary["last_eval"]
    cards = [
        ("steps", "-" if summary["step"] is None else f"{summary['step']:,}{of}"),
        ("tokens", _count(summary["tokens"])),
        ("training time (sum of steps)", _duration(summary["training_seconds"])),
        ("from first to last record", _duration(summary["wall_seconds"])),
        ("tokens/s, median", _figure(summary["tokens_per_s_median"])),
        ("MFU, median", "-" if summary["mfu_median"] is None else f"{100 * summary['mfu_median']:.1f} %"),
        (f"loss, EMA {SMOOTHING:g}", _figure(summary["loss_ema"])),
        ("lowest loss", _figure(summary["lowest_loss"])),
        ("best eval loss", "-" if best is None else f"{_figure(best['loss'])} at {best['step']:,}"),
        ("last eval loss", "-" if last is None else f"{_figure(last['loss'])} at {last['step']:,}"),
        *((f"last eval loss of {name}", _figure(loss)) for name, loss in found["eval_tasks"].items()),
        ("skipped updates", f"{summary['skipped_steps']:,}"),
        ("steps without finite loss", f"{summary['steps_without_finite_loss']:,}"),
        ("alerts", ", ".join(f"{n:,} {word}" for word, n in summary["alerts"].items()) or "none"),
        ("starts", f"{summary['starts']:,}"),
    ]
    return tag("div", *[tag("div", tag("span", name), tag("b", value)) for name, value in cards], class_="cards")


def _charts(found: Mapping[str, Any], history: History) -> Iterable[Markup]:
    drawn = [svg(curve(history, n), LABELS[n], width=_SIZE[0], height=_SIZE[1]) for n in _CHARTS if n in found["curves"]]
    if found["step_split"] is not None:
        drawn.append(_split_chart(history))
    if drawn:
        yield tag("h2", "Curves")
    for number, picture in enumerate(drawn):
        yield Markup(own_ids(picture, number).replace(' xmlns="http://www.w3.org/2000/svg"', "", 1))


def _split_chart(history: History) -> str:
    series = [
        Series(name.removesuffix("_time"), history.steps.step, history.ema(name))
        for name in (*SPLIT, "step_time")
        if np.isfinite(history.steps[name]).any()
    ]
    return line_svg(series, title=f"parts of a step in seconds, EMA {SMOOTHING:g}", width=_SIZE[0], height=_SIZE[1])


def _health(health: Mapping[str, Any] | None) -> Markup:
    """Scores over steps as the monitor gave them, and what it says at the end."""
    if health is None or not health["step"]:
        return Markup("")
    last, names = health["last"], list(health["scores"])
    status = last["health_status"].replace("_", " ")
    total = _score(last["overall_health_score"])
    alerts = ", ".join(last["open_alerts"]) or "none"
    rows = [(name, _score(last["scores"][name]["value"]), last["scores"][name]["from"]) for name in names]
    columns = {"overall": health["overall_health_score"], **health["scores"]}
    step_N = np.array(health["step"])
    series = [Series(name, step_N, np.array([_number(value) for value in values])) for name, values in columns.items()]
    picture = line_svg(series, title="health scores, 1 is best", y_range=(0.0, 1.02), width=_SIZE[0], height=_SIZE[1])
    return Markup(
        tag("h2", "Health")
        + tag("p", tag("b", status), f", overall {total} at step {last['step']:,}; open alerts: {alerts}")
        + own_ids(picture, _HEALTH).replace(' xmlns="http://www.w3.org/2000/svg"', "", 1)
        + table(("score", "last", "from"), rows, right=(1,))
    )


def _score(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"


def _number(value: float | str) -> float:
    """What a chart draws: a gap where a score is not known."""
    return math.nan if isinstance(value, str) else value


def _split(split: Mapping[str, Any] | None) -> Markup:
    if split is None:
        return Markup("")
    rows = [
        (name.removesuffix("_time"), _seconds(value), f"{100 * split['share'][name]:.1f} %")
        for name, value in split["seconds"].items()
    ]
    title = tag("h2", f"Parts of a step (medians; the whole {_seconds(split['step_time'])})")
    return Markup(title + table(("part", "time", "share"), rows, right=(1, 2)))


def _routing(routing: Mapping[str, Any] | None) -> Markup:
    if routing is None:
        return Markup("")
    names = ("max_mean", "min_mean", "cv", "entropy", "dead", "dropped", "bias_range", "confidence")
    columns = ("layer", "max/mean", "min/mean", "CV", "entropy", "dead", "dropped", "bias range", "top score")
    rows = [(str(layer["layer"]), *(_figure(layer[name]) for name in names)) for layer in routing["layers"]]
    legend = (
        "Share of the fair load, layers down, experts across: blank below 0.25, . to 0.75, : to 1.25, + to 2, # above, x dead."
    )
    return Markup(
        tag("h2", f"Experts at step {routing['step']:,}")
        + tag("p", legend, class_="dim")
        + tag("div", _map(routing["layers"]), class_="wide")
        + tag("div", table(columns, rows, right=range(len(columns))), class_="wide")
    )


def _map(layers: Sequence[Mapping[str, Any]]) -> Markup:
    """The expert map: a cell's colour is its level; its sign or figure says the same."""
    figures = max((len(layer["load"]) for layer in layers), default=0) <= _MOST_FIGURES
    rows = []
    for layer in layers:
        cells = [tag("th", f"L{layer['layer']}")]
        for expert, load in enumerate(layer["load"][:_MOST_EXPERTS]):
            share = layer["fair_share"][expert] if layer["fair_share"] else 0.0
            level = sum(share >= edge for edge in _LEVELS)
            text = "x" if not load else f"{share:.2f}" if figures else _SIGNS[level]
            cells.append(tag("td", text, class_=f"h{level}", title=f"expert {expert}: {load:,.0f} tokens, {share:.2f} of fair"))
        rest = len(layer["load"]) - _MOST_EXPERTS
        rows.append(tag("tr", *cells, *([tag("td", f"and {rest:,} more")] if rest > 0 else [])))
    return tag("table", *rows, class_="map")


def _timeline(timeline: Mapping[str, Any]) -> Markup:
    entries = timeline["entries"]
    if not entries:
        return Markup("")
    rows = []
    for entry in entries:
        step = "" if entry["step"] is None else f"{entry['step']:,}"
        text = tag("td", entry["text"], *([tag("br"), tag("span", entry["advice"], class_="dim")] if entry["advice"] else []))
        kind = tag("td", entry["kind"], class_=None if entry["severity"] == "info" else entry["severity"])
        rows.append(
            tag(
                "tr",
                tag("td", _when(entry["t"]), class_="t"),
                tag("td", step, class_="n"),
                tag("td", entry["severity"]),
                kind,
                text,
            )
        )
    head = tag(
        "tr", tag("th", "time"), tag("th", "step", class_="n"), tag("th", "severity"), tag("th", "kind"), tag("th", "what")
    )
    more = f" ({timeline['left_out']:,} in the middle are left out)" if timeline["left_out"] else ""
    return Markup(tag("h2", f"Timeline{more}") + tag("table", head, *rows))


def _checkpoints(saved: Mapping[str, Any]) -> Markup:
    if not saved["recorded"] and not saved["on_disk"]:
        return Markup("")
    rows = [
        (
            f"{c['step']:,}",
            _when(c["t"]),
            _bytes(c["bytes"]),
            _seconds(c["seconds"]),
            _seconds(c["blocking"]),
            "yes" if c["verified"] else "no",
        )
        for c in saved["recorded"]
    ]
    words = ", ".join(saved["on_disk"]) or "none"
    pointers = "".join(f"; {name}: {saved[name]}" for name in ("best", "latest") if saved[name])
    listed = (
        table(("step", "time", "size", "took", "training stood still", "verified"), rows, right=(0, 2, 3, 4))
        if rows
        else Markup("")
    )
    return Markup(tag("h2", "Checkpoints") + tag("p", f"on disk: {words}{pointers}") + listed)


def _starts(starts: Sequence[Mapping[str, Any]]) -> Markup:
    if not starts:
        return Markup("")
    rows = []
    for start in starts:
        steps = "-" if start["first_step"] is None else f"{start['first_step']:,} to {start['last_step']:,}"
        state = start["state"] + (f": {start['reason']}" if start["reason"] else "")
        rows.append(
            (str(start["number"]), _when(start["begun"]), _duration(start["ended"] - start["begun"]), steps, state or "-")
        )
    return Markup(tag("h2", "Starts") + table(("number", "begun", "lasted", "steps", "last state"), rows, right=(0,)))


def _sample_eval(graded: Mapping[str, Any] | None) -> Markup:
    if graded is None:
        return Markup("")
    skills = graded.get("skills")
    rows = []
    for name, skill in skills.items() if isinstance(skills, Mapping) else ():
        if isinstance(skill, Mapping):
            rows.append((name, str(skill.get("correct", "-")), str(skill.get("asked", "-"))))
    overall = graded.get("overall")
    share = f"{100 * overall:.1f} %" if isinstance(overall, int | float) and math.isfinite(overall) else "-"
    return Markup(
        tag("h2", f"Questions of the built-in corpus: {share} correct")
        + table(("skill", "correct", "asked"), rows, right=(1, 2))
    )


def _config(config: Mapping[str, Any]) -> Markup:
    differences = config["differences"]
    if differences is None:
        return Markup("")
    rows = [
        (d["key"], json.dumps(d["preset"], ensure_ascii=False), json.dumps(d["run"], ensure_ascii=False)) for d in differences
    ]
    title = tag("h2", f"Values in force that differ from preset {config['preset']}")
    return Markup(title + (table(("key", "preset", "run"), rows) if rows else tag("p", "none", class_="dim")))


def _environment(found: Mapping[str, Any]) -> Markup:
    environment, run = found["environment"], found["run"]
    versions = environment["versions"]
    rows = [("run", f"{run['id'] or '-'}"), ("host", environment["host"] or "-"), ("ranks", environment["world"] or "-")]
    if isinstance(run["created"], int | float):
        rows.append(("made", _when(run["created"])))
    if isinstance(versions, Mapping):
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    for device in environment.get("devices", ()):
        rows.append((f"device {device['index']}", f"{device['name']}, {_bytes(device.get('memory_total'))}"))
    if environment.get("cpu_count"):
        rows.append(("host memory", f"{environment['cpu_count']} CPUs, {_bytes(environment.get('memory_total'))}"))
    if isinstance(environment["argv"], Sequence):
        rows.append(("process", " ".join(map(str, environment["argv"]))))
    return Markup(tag("h2", "Environment") + table(("", ""), rows))


# pieces


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.4g}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"


def _bytes(value: float | None) -> str:
    if value is None:
        return "-"
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} B"


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} m" if hours else f"{minutes} m {rest:02} s" if minutes else f"{seconds:.1f} s"


def _when(t: float) -> str:
    """Local time of this machine."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t))
    except (OverflowError, ValueError, OSError):
        return "-"
