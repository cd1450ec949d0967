"""Themes: a palette of roles for what we paint, and a Textual theme for everything else. Chosen in the palette or in settings.

Values of themes with colours of their own come from the 256-colour cube and grey ramp, so that truecolor and 256 look the same
and the user's colours 0-15 are never used. The two `ansi` themes use nothing else than those: they follow the terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.style import Style
from textual.theme import Theme

from .terminal import COLOURS, NAMED, RUNS_NAMED_LIGHT, RUNS_ON_DARK, RUNS_ON_LIGHT, Palette, style

DEFAULT, DEFAULT_ANSI = "dark", "ansi-dark"


@dataclass(frozen=True)
class Skin:
    """A theme as the user sees it. `background`, `surface` and `bar` (first and last line) are what text lies on."""

    name: str
    title: str
    palette: Palette
    background: str = "ansi_default"
    surface: str = "ansi_default"
    bar: str = "ansi_default"
    dark: bool = True
    ansi: bool = False

    @property
    def textual(self) -> str:
        """The name of the Textual theme."""
        return self.name if self.ansi else f"lumina-{self.name}"

    def variables(self) -> dict[str, str]:
        """Colours that our style sheets use beyond Textual's."""
        if self.ansi:
            focus = "ansi_cyan" if self.dark else "ansi_blue"
            return {"line": "ansi_default", "focus": focus, "bar": "ansi_default", "text-dim": "ansi_default"}
        return {
            "line": _hex(self.palette.faint),
            "focus": _hex(self.palette.accent),
            "bar": self.bar,
            "text-dim": _hex(self.palette.dim),
        }

    def theme(self) -> Theme | None:
        """The Textual theme; None where Textual brings it."""
        if self.ansi:
            return None
        p = self.palette
        cursor = p.cursor.bgcolor.name if p.cursor.bgcolor is not None else self.bar
        return Theme(
            name=self.textual,
            primary=_hex(p.accent),
            secondary=_hex(p.key),
            accent=_hex(p.accent),
            warning=_hex(p.warn),
            error=_hex(p.bad),
            success=_hex(p.good),
            foreground=_hex(p.text),
            background=self.background,
            surface=self.surface,
            panel=self.bar,
            dark=self.dark,
            variables={
                "block-cursor-background": cursor,
                "block-cursor-foreground": _hex(p.text),
                "input-selection-background": "#005f87" if self.dark else "#afd7ff",
                "scrollbar": _hex(p.faint),
                "scrollbar-background": self.surface,
            },
        )


def _hex(value: Style) -> str:
    assert value.color is not None
    return value.color.name


LIGHT = Palette(
    text=style("#262626"),
    dim=style("#585858"),
    faint=style("#9e9e9e"),
    accent=style("#005f87"),
    key=style("#005faf", bold=True),
    good=style("#005f00"),
    warn=style("#875f00"),
    bad=style("#af0000", bold=True),
    raw=style("#5f87af"),
    curve=style("#005faf", bold=True),
    second=style("#af5f00", bold=True),
    title=style("#262626", bold=True),
    cursor=Style(bgcolor="#d0d0d0", bold=True),
    heat=(style("#005faf"), style("#5f87d7"), style("#767676"), style("#af5f00"), style("#af0000")),
    runs=RUNS_ON_LIGHT,
)
BLIND = Palette(  # blue against orange, and lightness: good, warning and error differ without red and green
    text=style("#d0d0d0"),
    dim=style("#949494"),
    faint=style("#4e4e4e"),
    accent=style("#87d7ff"),
    key=style("#87afff", bold=True),
    good=style("#5fafff"),
    warn=style("#ffffaf"),
    bad=style("#ff8700", bold=True),
    raw=style("#5f87af"),
    curve=style("#87d7ff", bold=True),
    second=style("#ffaf00", bold=True),
    title=style("#d0d0d0", bold=True),
    cursor=Style(bgcolor="#303030", bold=True),
    heat=(style("#0087ff"), style("#87afff"), style("#767676"), style("#ffaf00"), style("#ffff87")),
    runs=RUNS_ON_DARK,
)
CONTRAST = Palette(
    text=style("#ffffff"),
    dim=style("#d0d0d0"),
    faint=style("#9e9e9e"),
    accent=style("#5fffff"),
    key=style("#ffffff", bold=True),
    good=style("#5fff5f"),
    warn=style("#ffff00"),
    bad=style("#ff8787", bold=True),
    raw=style("#87afd7"),
    curve=style("#5fffff", bold=True),
    second=style("#ffaf00", bold=True),
    title=style("#ffffff", bold=True),
    cursor=Style(bgcolor="#005f87", bold=True),
    heat=(style("#5f87ff"), style("#87d7ff"), style("#9e9e9e"), style("#ffaf00"), style("#ff5f5f")),
    runs=RUNS_ON_DARK,
)
NAMED_LIGHT = Palette(  # green, yellow and cyan of most terminals cannot be read on white
    text=style(),
    dim=style(dim=True),
    faint=style(dim=True),
    accent=style("blue"),
    key=style("blue", bold=True),
    good=style(),
    warn=style("red"),
    bad=style("red", bold=True),
    raw=style(dim=True),
    curve=style("blue", bold=True),
    second=style("magenta", bold=True),
    title=style(bold=True),
    cursor=style(reverse=True),
    heat=(style("blue"), style("blue", dim=True), style(), style("magenta"), style("red", bold=True)),
    runs=RUNS_NAMED_LIGHT,
)

SKINS: Mapping[str, Skin] = {
    skin.name: skin
    for skin in (
        Skin("dark", "Dark", COLOURS, "#121212", "#1c1c1c", "#262626"),
        Skin("light", "Light", LIGHT, "#ffffff", "#eeeeee", "#eeeeee", dark=False),
        Skin("colour-blind", "Blue and orange, for every colour vision", BLIND, "#121212", "#1c1c1c", "#262626"),
        Skin("high-contrast", "Black and bright", CONTRAST, "#000000", "#121212", "#1c1c1c"),
        Skin("ansi-dark", "The terminal's own 16 colours, on dark", NAMED, ansi=True),
        Skin("ansi-light", "The terminal's own 16 colours, on light", NAMED_LIGHT, dark=False, ansi=True),
    )
}


def why_not(skin: Skin, colours: int) -> str | None:
    """Why a terminal with so many colours cannot show a theme; None if it can."""
    if skin.ansi or colours > 16:
        return None
    return "this terminal has 16 colours" if colours else "NO_COLOR is set"


def skin_for(wanted: str | None, colours: int, light: bool = False) -> Skin:
    """The theme that is wanted, or the nearest one that a terminal with so many colours shows. `light`: its background is."""
    skin = SKINS.get(wanted or "")
    if skin is None:
        return SKINS[DEFAULT if colours > 16 else "ansi-light" if light else DEFAULT_ANSI]
    if why_not(skin, colours) is None:
        return skin
    return SKINS[DEFAULT_ANSI if skin.dark else "ansi-light"]
