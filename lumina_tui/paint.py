"""Text in cells: fitting, lines of styled pieces, numbers and times for people. No Textual widget in here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip

from lumina_engine.text import safe_text

Align = Literal["left", "right"]
Piece = tuple[str, Style | None]


def clean(text: object) -> str:
    """Outside text as one safe line."""
    return safe_text(str(text)).replace("\n", " ").replace("\t", " ")


def fit(text: str, width: int, align: Align = "left", ellipsis: str = "…") -> str:
    """`text` in exactly `width` cells, cut with an ellipsis if it is longer."""
    if width <= 0:
        return ""
    size = cell_len(text)
    if size > width:
        return set_cell_size(text, width) if width < 3 else set_cell_size(text, width - 1) + ellipsis
    return " " * (width - size) + text if align == "right" else text + " " * (width - size)


def fit_ends(text: str, width: int) -> str:
    """`text` in exactly `width` cells; a longer one loses its middle, since names of one family differ at their end."""
    if cell_len(text) <= width or width < 8:
        return fit(text, width)
    tail = ""
    for letter in reversed(text):
        if cell_len(letter + tail) > (width - 1) // 2:
            break
        tail = letter + tail
    return fit(fit(text, width - cell_len(tail)) + tail, width)


def line(width: int, left: Iterable[Piece], right: Iterable[Piece] = (), base: Style | None = None) -> Strip:
    """A strip of `width` cells: pieces from the left, pieces at the right edge.

    When both do not fit, the right edge wins, and an ellipsis ends the left.
    """
    if width <= 0:
        return Strip([], 0)
    tail = [Segment(text, style) for text, style in right if text]
    tail_width = sum(cell_len(segment.text) for segment in tail)
    if tail_width >= width:
        strip = Strip(tail, tail_width).crop(tail_width - width)
    else:
        head = [Segment(text, style) for text, style in left if text]
        head_width, room = sum(cell_len(segment.text) for segment in head), width - tail_width
        if head_width > room > 3:
            head = [*Strip(head, head_width).crop(0, room - 1), Segment("…", head[-1].style)]
        strip = Strip([*Strip(head).adjust_cell_length(room), *tail], width)
    return strip.apply_style(base) if base is not None else strip


_PREFIXES = ("", "k", "M", "G", "T", "P")


def number(value: float | None, digits: int = 3) -> str:
    """A bare number with about `digits` significant digits; `-` if unknown."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, _, exponent = f"{value:.{max(0, digits - 1)}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:,.{decimals}f}"


def count(value: float | None, digits: int = 3) -> str:
    """A count with a decimal prefix: 81.2 k, 1.58 G; `-` if unknown."""
    if value is None or not math.isfinite(value):
        return number(value)
    power = 0
    while abs(value) >= 999.5 and power < len(_PREFIXES) - 1:
        value /= 1000
        power += 1
    if not power and float(value).is_integer():
        return f"{int(value)}"
    value = float(f"{value:.{digits - 1}e}")  # rounded first: 0.9997 has as many decimals as 1.00
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{decimals}f} {_PREFIXES[power]}".rstrip()


def size(value: float | None) -> str:
    """Bytes with a decimal prefix: 71 GB, 1.1 TB."""
    text = count(value, 2 if value is not None and value >= 1e10 else 3)
    return text if value is None else (text + "B" if text[-1].isalpha() else text + " B")


def whole(value: int | None) -> str:
    """A whole number with separators: 48,210."""
    return "-" if value is None else f"{value:,}"


def duration(seconds: float | None) -> str:
    """A length of time in two units: 8 h 03 m, 42 s, 350 ms."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 0:
        return "-"
    if seconds == 0:
        return "0 s"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole_seconds = round(seconds)
    minutes, secs = divmod(whole_seconds, 60)
    hours, mins = divmod(minutes, 60)
    days, hrs = divmod(hours, 24)
    if days:
        return f"{days} d {hrs:02d} h"
    if hours:
        return f"{hours} h {mins:02d} m"
    if minutes:
        return f"{minutes} m {secs:02d} s"
    return f"{secs} s"


def age(seconds: float | None) -> str:
    """How old something is in one unit: now, 12 s, 5 m, 3 h, 9 d."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 2:
        return "now"
    for limit, unit, step in ((120, "s", 1), (7200, "m", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / step:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"
