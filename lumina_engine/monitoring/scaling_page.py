"""The estimates of `scaling.py` in words: for the page of a report, and for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .curves import History
from .html import Markup, table, tag
from .plot import own_ids
from .scaling import fit, points
from .svg import Series, line_svg

_NUMBER = 100  # of the chart among those of a page
_PLACES = {
    "now": "now",
    "end": "at the planned end",
    "twice_the_data": "with twice the data",
    "half_the_model": "with half the model",
    "half_the_model_twice_the_data": "with half the model and twice the data",
}


def sections(found: Mapping[str, Any], history: History) -> Iterable[Markup]:
    """What more data or another size would give."""
    ratio = found["tokens_per_parameter"]
    if found["status"] == "unknown" and ratio["value"] is None:
        return
    yield tag("h2", "More data, or another size (estimates)")
    yield tag("p", _ratio(ratio))
    if found["status"] == "unknown":
        yield tag("p", f"The curve of the loss is not extrapolated: {found['reason']}.", class_="dim")
        return
    yield tag("p", _law(found), class_="dim")
    rows = [(_PLACES[name], *_cells(found[name])) for name in _PLACES if name in found]
    yield table(("", "tokens", "loss", f"{100 * found['level']:.0f} % interval"), rows, right=(1, 2, 3))
    picture = own_ids(_chart(found, history), _NUMBER)
    yield Markup(picture.replace(' xmlns="http://www.w3.org/2000/svg"', "", 1))


def lines(found: Mapping[str, Any]) -> list[str]:
    """The same for a terminal; nothing of a run without a step."""
    ratio = found["tokens_per_parameter"]
    said = [f"scale     {_ratio(ratio)}"] if ratio["value"] is not None else []
    if found["status"] == "unknown":
        return [*said, f"estimate  unknown: {found['reason']}"] if said else []
    for name in ("end", "twice_the_data", "half_the_model"):
        if name in found:
            tokens, loss, interval = _cells(found[name])
            value = f"{loss}: {interval}" if loss == "unknown" else f"loss {loss} ({interval})"
            said.append(f"estimate  {_PLACES[name]}: {value}" + (f", {tokens} tokens" if tokens != "-" else ""))
    return said


def _cells(place: Mapping[str, Any]) -> tuple[str, str, str]:
    if "unknown" in place:
        return "-", "unknown", place["unknown"]
    tokens = f"{place['tokens']:,.0f}" if "tokens" in place else "-"
    return tokens, f"{place['loss']:.4g}", f"{place['low']:.4g} to {place['high']:.4g}"


def _ratio(ratio: Mapping[str, Any]) -> str:
    if ratio["value"] is None:
        return f"Tokens per active parameter: {ratio['advice']}."
    return (
        f"{ratio['value']:.3g} tokens per active parameter ({ratio['parameters']:,}), about {ratio['optimum']:g} are the "
        f"optimum of a given compute ({ratio['source']}): {ratio['advice']}."
    )


def _law(found: Mapping[str, Any]) -> str:
    alpha, floor = found["exponent"], found["floor"]
    bounds = " to ".join("unbounded" if alpha[end] is None else f"{alpha[end]:.3g}" for end in ("low", "high"))
    return (
        f"L = E + A·D^-alpha over {found['points']} points of the {found['from']}, D in tokens: alpha {alpha['value']:.3g} "
        f"({bounds}), E {floor['loss']:.3g} ({floor['low']:.3g} to {floor['high']:.3g}). For this run and data, with the "
        "schedule stretched; the size enters by published fits."
    )


def _chart(found: Mapping[str, Any], history: History) -> str:
    """Points, curve and interval up to twice the data."""
    _, tokens_N, loss_N, weight_N = points(history, found["warmup_steps"])
    curve = fit(tokens_N, loss_N, weight_N)
    grid = np.geomspace(curve.tokens_N.min(), 2 * curve.scale, 80)
    at = [curve.at(float(tokens)) for tokens in grid]
    series = [Series(found["from"], curve.tokens_N, curve.loss_N, "points")]
    series += [
        Series(name, grid, np.array([one[key] for one in at]))
        for name, key in (("fit", "loss"), ("low", "low"), ("high", "high"))
    ]
    return line_svg(
        series, title="loss over tokens, and its extrapolation", x_label="tokens", log_x=True, width=960, height=300
    )
