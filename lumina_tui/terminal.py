"""What the terminal can show: colours, glyphs, repaint rate. Decided once at start, asked by every widget."""

from __future__ import annotations

import locale
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rich.segment import Segment
from rich.style import Style
from textual.color import Color
from textual.filter import LineFilter

from lumina_engine.text import safe_text

Glyphs = Literal["braille", "block", "ascii"]


@dataclass(frozen=True)
class Palette:
    """Styles by role. Foreground only, so that they lie on any background; never colours 0-15 where 256 exist."""

    text: Style
    dim: Style
    faint: Style  # frames, grid
    accent: Style
    key: Style
    good: Style
    warn: Style
    bad: Style
    raw: Style  # a noisy series
    curve: Style  # the same, smoothed
    second: Style  # a second series: evaluation
    title: Style
    cursor: Style  # the chosen row
    heat: tuple[Style, Style, Style, Style, Style]  # share of the fair load: far below, below, fair, above, far above

    def of(self, role: str) -> Style:
        """The style of a role by name (`text`, `dim`, `good` …)."""
        style = getattr(self, role)
        assert isinstance(style, Style)
        return style


def _style(color: str | None = None, **flags: bool) -> Style:
    return Style(color=color, bold=flags.get("bold"), dim=flags.get("dim"), reverse=flags.get("reverse"))


# Hex values of the 256-colour cube and grey ramp: truecolor and 256 look the same.
COLOURS = Palette(
    text=_style("#d0d0d0"),
    dim=_style("#8a8a8a"),
    faint=_style("#4e4e4e"),
    accent=_style("#5fafd7"),
    key=_style("#87afd7", bold=True),
    good=_style("#87af5f"),
    warn=_style("#d7af5f"),
    bad=_style("#d75f5f", bold=True),
    raw=_style("#5f87af"),
    curve=_style("#87d7ff", bold=True),
    second=_style("#ffaf5f", bold=True),
    title=_style("#d0d0d0", bold=True),
    cursor=Style(bgcolor="#303030", bold=True),
    heat=(_style("#5f87d7"), _style("#87afd7"), _style("#767676"), _style("#d7af5f"), _style("#ff8700")),
)
# 16 colours, or none at all: the terminal's own names, bold and reverse carry the meaning.
NAMED = Palette(
    text=_style(),
    dim=_style(dim=True),
    faint=_style(dim=True),
    accent=_style("cyan"),
    key=_style("cyan", bold=True),
    good=_style("green"),
    warn=_style("yellow"),
    bad=_style("red", bold=True),
    raw=_style("blue"),
    curve=_style("cyan", bold=True),
    second=_style("magenta", bold=True),
    title=_style(bold=True),
    cursor=_style(reverse=True),
    heat=(_style("blue"), _style("cyan"), _style(), _style("yellow"), _style("red", bold=True)),
)


@dataclass(frozen=True)
class Look:
    """The terminal's abilities, and the user's wishes about them."""

    glyphs: Glyphs = "braille"
    palette: Palette = COLOURS
    ansi: bool = False  # the terminal's own 16 colours, or no colours
    hz: float = 10.0  # panel repaints a second
    slow: bool = False

    @property
    def ascii(self) -> bool:
        return self.glyphs == "ascii"

    @property
    def box(self) -> tuple[str, str, str, str, str, str]:
        """Frame characters: top left, top right, bottom left, bottom right, horizontal, vertical."""
        return ("+", "+", "+", "+", "-", "|") if self.ascii else ("┌", "┐", "└", "┘", "─", "│")


def detect(
    environ: Mapping[str, str],
    *,
    ascii_only: bool = False,
    slow: bool = False,
    hz: float | None = None,
    encoding: str | None = None,
) -> Look:
    """The look for an environment (`TERM`, `COLORTERM`, `NO_COLOR`, `SSH_CONNECTION`, the locale's encoding)."""
    term = environ.get("TERM", "")
    encoding = encoding or locale.getpreferredencoding(False)
    glyphs: Glyphs = "braille"
    if ascii_only or "utf" not in encoding.lower():
        glyphs = "ascii"
    elif term == "linux":
        glyphs = "block"
    many = environ.get("COLORTERM", "").lower() in ("truecolor", "24bit") or "256color" in term or "kitty" in term
    ansi = "NO_COLOR" in environ or not many
    remote = "SSH_CONNECTION" in environ or "SSH_TTY" in environ
    rate = hz if hz is not None else (1.0 if slow else 4.0 if remote else 10.0)
    return Look(glyphs, NAMED if ansi else COLOURS, ansi, min(10.0, max(0.2, rate)), slow)


class ControlFilter(LineFilter):
    """Makes control and direction characters visible in every segment: the last line of defence of the terminal."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        for text, _, control in segments:
            if not control and not text.isprintable():
                break
        else:
            return segments
        return [
            segment if segment.control or segment.text.isprintable() else Segment(_no_controls(segment.text), segment.style)
            for segment in segments
        ]


def _no_controls(text: str) -> str:
    return safe_text(text).replace("\n", "␊").replace("\t", "␉")


# Glyphs of our own screens that have a good ASCII twin; whatever else is above 127 becomes "?".
_TWINS = str.maketrans(
    {
        **dict.fromkeys("─━╌┄═▔▁▂", "-"),
        **dict.fromkeys("│┃║▌▐▏▎▍▊▉", "|"),
        **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╰╯╔╗╚╝╠╣╦╩╬", "+"),
        **dict.fromkeys("█▓▆▇", "#"),
        **dict.fromkeys("▒▄▅▀", "="),
        **dict.fromkeys("░▃", "-"),
        **dict.fromkeys("·•∙", "."),
        "×": "x",
        "…": ".",
        "–": "-",
        "—": "-",
        "→": ">",
        "←": "<",
        "↑": "^",
        "↓": "v",
        "▶": ">",
        "◀": "<",
        "▲": "^",
        "▼": "v",
        "●": "*",
        "○": "o",
        "°": "'",
        "σ": "s",
        "µ": "u",
        "√": "v",
        "✓": "v",
        "✗": "x",
    }
)


class AsciiFilter(LineFilter):
    """Lets only bytes below 128 out, one character for each cell."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        return [
            segment if segment.control or segment.text.isascii() else Segment(to_ascii(segment.text), segment.style)
            for segment in segments
        ]


def to_ascii(text: str) -> str:
    """`text` in ASCII with the same cell width."""
    text = text.translate(_TWINS)
    if text.isascii():
        return text
    from rich.cells import get_character_cell_size

    return "".join(c if c < "\x80" else "?" * get_character_cell_size(c) for c in text)
