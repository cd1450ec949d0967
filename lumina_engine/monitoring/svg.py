"""Line and bar charts as SVG, drawn from the data: what the terminal exports and reports embed. numpy and strings, no more.

The picture is a function of its arguments (no clock, no random ids), carries no script and refers to nothing outside itself, so
it can stand in a self-contained page. Long series are reduced to their minimum and maximum per pixel column: no spike is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from xml.sax.saxutils import escape

import numpy as np

from ..text import safe_text
from .reduce import Pyramid
from .ticks import clock_labels, clock_ticks, count_labels, ticks, value_labels

Kind = Literal["line", "faint", "points", "events"]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#a09000")  # after Okabe and Ito
DASHES = ("", "7 3", "2 3", "9 3 2 3")  # the second tell-tale besides colour, every second series
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 40, 48  # px around the plot
_SIGN = 10  # px that the sign of an event takes
_FONT = "font-family:ui-sans-serif,system-ui,sans-serif"


@dataclass(frozen=True)
class Series:
    """One series of N points. Series with the same name share a colour and a legend entry.

    `style`: `line`; `faint` (the raw values behind a smoothed line); `points` (sparse values, such as evaluations); `events`
    (marks on the X axis: `y` is not looked at, `labels` are the signs). X must not fall; NaN and infinite Y leave gaps.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    style: Kind = "line"
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class _Axis:
    """Values to pixels: `low` at `start`, `high` at `stop`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool

    def at(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            if self.log:
                share = (np.log10(np.where(values > 0, values, np.nan)) - math.log10(self.low)) / (
                    math.log10(self.high) - math.log10(self.low)
                )
            else:
                share = (values - self.low) / (self.high - self.low)
            return np.clip(self.start + share * (self.stop - self.start), -1e5, 1e5)


@dataclass
class _Picture:
    parts: list[str] = field(default_factory=list)

    def add(self, tag: str, text: str | None = None, /, **attributes: object) -> None:
        """One element; attribute values and text are escaped here and nowhere else."""
        written = " ".join(f'{name.rstrip("_").replace("_", "-")}="{_safe(value)}"' for name, value in attributes.items())
        self.parts.append(f"<{tag} {written}/>" if text is None else f"<{tag} {written}>{_safe(text)}</{tag}>")


def line_svg(
    series: Sequence[Series],
    *,
    title: str = "",
    x_label: str = "step",
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
    x_clock: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    width: int = 960,
    height: int = 480,
) -> str:
    """One chart as an SVG document of `width` x `height` px.

    Args:
        series: drawn in this order, the last on top; empty ones are named in the legend all the same.
        x_clock: X values are unix seconds and labelled as local time (`log_x` is not for them).
        x_range, y_range: what is shown; by default everything.

    Values that an axis cannot show (not finite; not above 0 on a logarithmic one) are left out and counted under the title.

    Raises:
        ValueError: x and y of a series differ in length, or the picture is too small for its axes.
    """
    if width < 160 or height < 120:
        raise ValueError(f"an SVG chart needs at least 160 x 120 px, not {width} x {height}")
    shown, missing, outside = _usable(series, log_x, log_y)
    log_x = log_x and not x_clock
    x_low, x_high = x_range or _range(shown, "x", log_x)
    y_low, y_high = y_range or _padded(*_range([s for s in shown if s.style != "events"], "y", log_y), log_y)
    x = _Axis(*_apart(x_low, x_high, log_x), _LEFT, width - _RIGHT, log_x)
    y = _Axis(*_apart(y_low, y_high, log_y), height - _BOTTOM, _TOP, log_y)
    picture = _Picture()
    notes = [f"{missing:,} not finite"] * bool(missing) + [f"{outside:,} not above 0"] * bool(outside)
    _axes(picture, x, y, x_label, y_label, x_clock, width, height)
    names = list(dict.fromkeys(s.name for s in series if s.style != "events"))
    picture.parts.append(f'<clipPath id="plot"><rect x="{_LEFT}" y="{_TOP}" width="{width - _LEFT - _RIGHT}" '
                         f'height="{height - _TOP - _BOTTOM}"/></clipPath><g clip-path="url(#plot)">')  # fmt: skip
    for one in shown:
        if one.style != "events":
            _curve(picture, one, names.index(one.name), x, y)
    picture.parts.append("</g>")
    for one in shown:
        if one.style == "events":
            _events(picture, one, x, height)
    _heading(picture, title, notes, names, width)
    return _document(picture, title or y_label, width, height)


def bars_svg(
    names: Sequence[str], values: Sequence[float], *, title: str = "", x_label: str = "", width: int = 960, height: int = 300
) -> str:
    """A bar of its value for each name, from left to right, as an SVG document of `width` x `height` px.

    Raises:
        ValueError: names and values differ in number, there are none, or a value is negative or not finite.
    """
    if len(names) != len(values) or not values or not all(math.isfinite(value) and value >= 0 for value in values):
        raise ValueError(f"bars need a value from 0 on for each name: {len(names)} names, values {list(values)!r:.80}")
    most = max(values) or 1.0
    bottom, room, picture = height - _BOTTOM, (width - _LEFT - _RIGHT) / len(values), _Picture()
    y = _Axis(0.0, most, bottom, _TOP, False)
    marks = ticks(0.0, most, max(2, (height - 88) // 50), False)
    picture.parts.append(f'<g stroke="#dddddd" stroke-width="1" style="{_FONT};font-size:12px">')
    for at, label in zip(y.at(np.array(marks)).tolist(), value_labels(marks, False), strict=True):
        picture.add("line", x1=_LEFT, y1=_px(at), x2=width - _RIGHT, y2=_px(at))
        picture.add("text", label, x=_LEFT - 6, y=_px(at + 4), text_anchor="end", fill="#555555", stroke="none")
    for index, (name, top) in enumerate(zip(names, y.at(np.array(values, float)).tolist(), strict=True)):
        left = _LEFT + index * room
        bar = {"x": _px(left + 0.1 * room), "y": _px(top), "width": _px(0.8 * room), "height": _px(bottom - top)}
        picture.add("rect", **bar, fill=COLOURS[0], stroke="none")
        middle = _px(left + room / 2)
        picture.add("text", name, x=middle, y=bottom + 18, text_anchor="middle", fill="#555555", stroke="none")
    picture.add("text", x_label, x=width - _RIGHT, y=height - 8, text_anchor="end", fill="#222222", stroke="none")
    picture.parts.append("</g>")
    _heading(picture, title, (), (), width)
    return _document(picture, title, width, height)


def _document(picture: _Picture, label: str, width: int, height: int) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{_safe(label)}">'
    )
    back = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, back, *picture.parts, "</svg>"]) + "\n"


def _safe(value: object) -> str:
    """Escaped, without characters that XML forbids."""
    text = safe_text(str(value)).replace("\ufffe", "\ufffd").replace("\uffff", "\ufffd")
    return escape(text, {'"': "&quot;"})


def _usable(series: Sequence[Series], log_x: bool, log_y: bool) -> tuple[list[Series], int, int]:
    """The series as float arrays with NaN where an axis has no place, and how many values that concerns."""
    found = []
    missing: dict[str, int] = {}  # by name: raw and smoothed values of one series lack the same ones
    outside: dict[str, int] = {}
    for one in series:
        x, y = np.asarray(one.x, np.float64), np.asarray(one.y, np.float64)
        if one.style == "events":
            y = np.zeros(len(x))
        if x.shape != y.shape or x.ndim != 1:
            raise ValueError(f"series {one.name}: x has shape {x.shape}, y {y.shape}; both must be (N,)")
        placed = np.isfinite(x) & ((x > 0) | (not log_x))
        left_out = int((np.isfinite(x) & ~placed).sum())
        x, y = x[placed], y[placed]
        missing[one.name] = max(missing.get(one.name, 0), int((~np.isfinite(y)).sum()))
        if log_y and one.style != "events":
            with np.errstate(invalid="ignore"):
                below = y <= 0
            left_out += int(below.sum())
            y = np.where(below, np.nan, y)
        outside[one.name] = max(outside.get(one.name, 0), left_out)
        labels = [label for label, ok in zip(one.labels, placed, strict=False) if ok]
        found.append(Series(one.name, x, np.where(np.isfinite(y), y, np.nan), one.style, labels))
    return found, sum(missing.values()), sum(outside.values())


def _range(series: Sequence[Series], axis: Literal["x", "y"], log: bool) -> tuple[float, float]:
    values = [getattr(one, axis) for one in series]
    values = [v[np.isfinite(v)] for v in values]
    values = [v for v in values if len(v)]
    if not values:
        return (0.1, 1.0) if log else (0.0, 1.0)
    return float(min(v.min() for v in values)), float(max(v.max() for v in values))


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        share = (high / low) ** 0.04 if low > 0 else 1.0
        return low / share, high * share
    room = 0.04 * (high - low)
    return low - room, high + room


def _apart(low: float, high: float, log: bool) -> tuple[float, float]:
    """Limits that differ, so that a single point has a place."""
    if log:
        low = max(low, 1e-300)
        return (low / 2, max(high, low) * 2) if high <= low * (1 + 1e-9) else (low, high)
    if low == high == 0:
        return 0.0, 1.0  # counts and times are never below 0
    if high - low <= abs(high) * 1e-9:
        room = abs(high) * 0.1 or 1.0
        return low - room, high + room
    return low, high


def _axes(picture: _Picture, x: _Axis, y: _Axis, x_label: str, y_label: str, x_clock: bool, width: int, height: int) -> None:
    bottom = height - _BOTTOM
    x_values = clock_ticks(x.low, x.high, 8) if x_clock else ticks(x.low, x.high, max(2, (width - 80) // 100), x.log)
    x_names = clock_labels(x_values) if x_clock else count_labels(x_values)
    y_values = ticks(y.low, y.high, max(2, (height - 88) // 50), y.log)
    picture.parts.append(f'<g stroke="#dddddd" stroke-width="1" style="{_FONT};font-size:12px">')
    for at, label in zip(x.at(np.array(x_values)).tolist(), x_names, strict=True):
        picture.add("line", x1=_px(at), y1=_TOP, x2=_px(at), y2=bottom)
        picture.add("text", label, x=_px(at), y=bottom + 18, text_anchor="middle", fill="#555555", stroke="none")
    for at, label in zip(y.at(np.array(y_values)).tolist(), value_labels(y_values, y.log), strict=True):
        picture.add("line", x1=_LEFT, y1=_px(at), x2=width - _RIGHT, y2=_px(at))
        picture.add("text", label, x=_LEFT - 6, y=_px(at + 4), text_anchor="end", fill="#555555", stroke="none")
    picture.add("path", d=f"M{_LEFT} {_TOP}V{bottom}H{width - _RIGHT}", fill="none", stroke="#555555")
    words = x_label + (" (log)" if x.log else "")
    picture.add("text", words, x=width - _RIGHT, y=height - 8, text_anchor="end", fill="#222222", stroke="none")
    if y_label:
        picture.add("text", y_label + (" (log)" if y.log else ""), x=8, y=_TOP - 8, fill="#222222", stroke="none")
    picture.parts.append("</g>")


def _curve(picture: _Picture, one: Series, index: int, x: _Axis, y: _Axis) -> None:
    colour = COLOURS[index % len(COLOURS)]
    if one.style == "points":
        good = np.isfinite(one.y)
        for a, b in zip(x.at(one.x[good]).tolist(), y.at(one.y[good]).tolist(), strict=True):
            picture.add("circle", cx=_px(a), cy=_px(b), r=3.5, fill="#ffffff", stroke=colour, stroke_width=1.5)
        return
    path = _path(one, x, y)
    if not path:
        return
    thin = one.style == "faint"
    extra: dict[str, object] = {"stroke_opacity": 0.35} if thin else {}
    if DASHES[index % len(DASHES)] and not thin:
        extra["stroke_dasharray"] = DASHES[index % len(DASHES)]
    picture.add("path", d=path, fill="none", stroke=colour, stroke_width=1 if thin else 1.8, stroke_linejoin="round", **extra)


def _path(one: Series, x: _Axis, y: _Axis) -> str:
    """The line of a series: through every point, or through minimum and maximum of each pixel column of a long one."""
    xs, ys = one.x, one.y
    if len(xs) > 2 * (x.stop - x.start):
        xs, ys = _envelope(xs, ys, x)
    px, py = x.at(xs).tolist(), y.at(ys).tolist()
    parts, pen = [], False
    for i, (a, b) in enumerate(zip(px, py, strict=True)):
        if b != b:
            pen = False
            continue
        lonely = not pen and (i + 1 == len(py) or py[i + 1] != py[i + 1])
        parts.append(f"{'L' if pen else 'M'}{_px(a)} {_px(b)}" + ("h0.1" if lonely else ""))
        pen = True
    return "".join(parts)


def _envelope(xs: np.ndarray, ys: np.ndarray, x: _Axis) -> tuple[np.ndarray, np.ndarray]:
    """Two points for each pixel column (C): its minimum and its maximum; NaN where it holds only values without a place."""
    columns = int(x.stop - x.start)
    bounds = np.geomspace(x.low, x.high, columns + 1) if x.log else np.linspace(x.low, x.high, columns + 1)
    edges = np.searchsorted(xs, bounds, side="left")
    edges[-1] = np.searchsorted(xs, x.high, side="right")
    pyramid = Pyramid()
    pyramid.extend(ys)
    reduced = pyramid.columns(np.maximum.accumulate(edges))
    held = (reduced.count_C + reduced.missing_C) > 0  # a column without samples is passed over by the line
    middle = ((bounds[:-1] + bounds[1:]) / 2)[held]
    low, high = reduced.low_C[held], reduced.high_C[held]
    rising = np.concatenate([[True], np.diff(low + high) >= 0]) if len(low) else np.zeros(0, bool)
    first, second = np.where(rising, low, high), np.where(rising, high, low)
    return np.repeat(middle, 2), np.stack([first, second], axis=1).reshape(-1)


def _events(picture: _Picture, one: Series, x: _Axis, height: int) -> None:
    bottom = height - _BOTTOM
    picture.parts.append(f'<g style="{_FONT};font-size:11px" fill="#555555">')
    piled: dict[int, list[tuple[float, str]]] = {}
    for at, label in zip(x.at(one.x).tolist(), one.labels, strict=False):
        if _LEFT <= at <= x.stop:
            piled.setdefault(int(at // _SIGN), []).append((at, label))
    for group in piled.values():  # a digit where they pile up
        at, sign = group[0][0], group[0][1] if len(group) == 1 else str(len(group)) if len(group) < 10 else "+"
        picture.add("path", d="".join(f"M{_px(place)} {bottom}v6" for place, _ in group), stroke="#555555")
        picture.add("text", sign, x=_px(at), y=bottom + 32, text_anchor="middle")
    picture.parts.append("</g>")


def _heading(picture: _Picture, title: str, notes: Sequence[str], names: Sequence[str], width: int) -> None:
    """Title, what was left out, legend."""
    picture.parts.append(f'<g style="{_FONT};font-size:12px" fill="#222222">')
    picture.add("text", title, x=_LEFT, y=18, font_size=14, font_weight="bold")
    if notes:
        picture.add("text", ", ".join(notes), x=width - _RIGHT, y=18, text_anchor="end", fill="#b03030")
    at = float(_LEFT) + 40
    for index, name in enumerate(names):
        shown = name if len(name) <= 28 else name[:27] + "…"
        colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
        picture.add("path", d=f"M{_px(at)} 30h18", stroke=colour, stroke_width=3, stroke_dasharray=dash or "none")
        picture.add("text", shown, x=_px(at + 23), y=34)
        at += 36 + 7 * len(shown)
    picture.parts.append("</g>")


def _px(value: float) -> str:
    """A pixel position with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")
