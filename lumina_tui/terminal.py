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

from .colours import colours_of, light_background

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
    runs: tuple[Style, ...]  # eight lines in one chart; roles run0 to run7

    @property
    def struck(self) -> Style:
        """What cannot be read: struck out, and always with a word that says so."""
        return self.dim + Style(strike=True)

    @property
    def trained(self) -> Style:
        """Text that carries loss: underlined as well as coloured."""
        return self.good + Style(underline=True)

    def of(self, role: str) -> Style:
        """The style of a role by name (`text`, `dim`, `good` …)."""
        style = self.runs[int(role[3:])] if role.startswith("run") else getattr(self, role)
        assert isinstance(style, Style)
        return style


def style(color: str | None = None, **flags: bool) -> Style:
    """A foreground style; flags are bold, dim, reverse."""
    return Style(color=color, bold=flags.get("bold"), dim=flags.get("dim"), reverse=flags.get("reverse"))


def _styles(*colours: str) -> tuple[Style, ...]:
    return tuple(style(colour, bold=True) for colour in colours)


# Lines told apart without red against green, on a dark and on a light ground (after Okabe and Ito).
RUNS_ON_DARK = _styles("#5fafff", "#ffaf00", "#00d7af", "#ffff5f", "#ff8787", "#d787d7", "#bcbcbc", "#87afaf")
RUNS_ON_LIGHT = _styles("#005faf", "#af5f00", "#00875f", "#5f5f00", "#af0000", "#870087", "#4e4e4e", "#005f5f")
RUNS_NAMED_LIGHT = _styles("blue", "red", "magenta", "default", "bright_blue", "bright_red", "bright_magenta", "bright_black")
RUNS_NAMED = _styles("cyan", "yellow", "magenta", "green", "bright_blue", "bright_red", "bright_magenta", "bright_cyan")

# Hex values of the 256-colour cube and grey ramp: truecolor and 256 look the same.
COLOURS = Palette(
    text=style("#d0d0d0"),
    dim=style("#949494"),
    faint=style("#4e4e4e"),
    accent=style("#5fafd7"),
    key=style("#87afd7", bold=True),
    good=style("#87af5f"),
    warn=style("#d7af5f"),
    bad=style("#ff5f5f", bold=True),
    raw=style("#5f87af"),
    curve=style("#87d7ff", bold=True),
    second=style("#ffaf5f", bold=True),
    title=style("#d0d0d0", bold=True),
    cursor=Style(bgcolor="#303030", bold=True),
    heat=(style("#5f87d7"), style("#87afd7"), style("#767676"), style("#d7af5f"), style("#ff8700")),
    runs=RUNS_ON_DARK,
)
# 16 colours, or none at all: the terminal's own names, bold and reverse carry the meaning.
NAMED = Palette(
    text=style(),
    dim=style(dim=True),
    faint=style(dim=True),
    accent=style("cyan"),
    key=style("cyan", bold=True),
    good=style("green"),
    warn=style("yellow"),
    bad=style("bright_red", bold=True),
    raw=style("bright_blue"),
    curve=style("cyan", bold=True),
    second=style("magenta", bold=True),
    title=style(bold=True),
    cursor=style(reverse=True),
    heat=(style("bright_blue"), style("cyan"), style(), style("yellow"), style("bright_red", bold=True)),
    runs=RUNS_NAMED,
)


@dataclass(frozen=True)
class Look:
    """The terminal's abilities, and the user's wishes about them."""

    glyphs: Glyphs = "braille"
    palette: Palette = COLOURS
    ansi: bool = False  # the terminal's own 16 colours, or no colours
    hz: float = 10.0  # panel repaints a second
    slow: bool = False
    colours: int = 256  # that the terminal has; 0: none are wanted
    light: bool = False  # its own background is light

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
    glyphs: Glyphs | None = None,
) -> Look:
    """The look for an environment (`TERM`, `COLORTERM`, `NO_COLOR`, `SSH_CONNECTION`, the locale's encoding).

    `glyphs` and `hz` are what the user wants; a locale without Unicode and `ascii_only` still mean ASCII.
    """
    encoding = encoding or locale.getpreferredencoding(False)
    if ascii_only or "utf" not in encoding.lower():
        glyphs = "ascii"
    elif glyphs is None:
        glyphs = "block" if environ.get("TERM") == "linux" else "braille"
    colours = colours_of(environ)
    ansi = colours <= 16
    remote = "SSH_CONNECTION" in environ or "SSH_TTY" in environ
    rate = hz if hz is not None else (1.0 if slow else 4.0 if remote else 10.0)
    return Look(glyphs, NAMED if ansi else COLOURS, ansi, min(10.0, max(0.2, rate)), slow, colours, light_background(environ))


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
