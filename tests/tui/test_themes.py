"""Themes: readable, told apart by every colour vision, chosen and kept."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from rich.color import Color as RichColor
from rich.color import ColorSystem
from rich.style import Style

from lumina_tui.themes import SKINS, Skin, skin_for, why_not

TEXT_ROLES = ("text", "dim", "accent", "key", "good", "warn", "bad", "title")
PAINT_ROLES = ("raw", "curve", "second", "faint")
OWN = [skin for skin in SKINS.values() if not skin.ansi]
# xterm's defaults for the 16 names
XTERM = {
    "red": "#cd0000", "green": "#00cd00", "yellow": "#cdcd00", "blue": "#0000ee", "magenta": "#cd00cd", "cyan": "#00cdcd",
    "bright_red": "#ff0000", "bright_blue": "#5c5cff",
}  # fmt: skip


def rgb(color: str) -> np.ndarray:
    """Linear RGB of a hex colour."""
    values = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio; the lower one of truecolor and of what is left of it with 256 colours."""
    quantised = [RichColor.parse(color).downgrade(ColorSystem.EIGHT_BIT).get_truecolor().hex for color in (a, b)]
    return min(_ratio(a, b), _ratio(*quantised))


def _ratio(a: str, b: str) -> float:
    one, two = (float(rgb(color) @ [0.2126, 0.7152, 0.0722]) + 0.05 for color in (a, b))
    return max(one, two) / min(one, two)


# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


def lab(color: str, vision: str) -> np.ndarray:
    """CIELAB (D65) of a colour as somebody with this colour vision sees it."""
    seen = np.clip(VISION[vision] @ rgb(color), 0, 1)
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
    ratio = (to_xyz @ seen) / np.array([0.95047, 1.0, 1.08883])
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(a: str, b: str, vision: str) -> float:
    return float(np.linalg.norm(lab(a, vision) - lab(b, vision)))


def name(style: Style) -> str:
    assert style.color is not None
    return style.color.name


@pytest.mark.parametrize("skin", OWN, ids=lambda skin: skin.name)
def test_text_of_every_role_is_readable_on_every_background(skin: Skin):
    least = 7.0 if skin.name == "high-contrast" else 4.5
    cursor = skin.palette.cursor.bgcolor
    assert cursor is not None
    for role in TEXT_ROLES:
        for ground in (skin.background, skin.surface, skin.bar):
            found = contrast(name(skin.palette.of(role)), ground)
            assert found >= least, f"{skin.name}: {role} {name(skin.palette.of(role))} on {ground} {found:.2f}"
    assert contrast(name(skin.palette.text), cursor.name) >= 4.5
    for role in PAINT_ROLES:
        least = 1.7 if role == "faint" else 3.0
        assert contrast(name(skin.palette.of(role)), skin.background) >= least, f"{skin.name}: {role}"
    for heat in skin.palette.heat:
        assert contrast(name(heat), skin.background) >= 3.0, f"{skin.name}: heat {name(heat)}"


@pytest.mark.parametrize(("skin", "ground"), [("ansi-dark", "#000000"), ("ansi-light", "#ffffff")])
def test_named_colours_are_readable_on_their_background(skin: str, ground: str):
    palette = SKINS[skin].palette
    for role in (*TEXT_ROLES, "raw", "curve", "second"):
        style = palette.of(role)
        if style.color is not None:
            least = 4.5 if role in TEXT_ROLES else 3.0
            assert _ratio(XTERM[style.color.name], ground) >= least, f"{role} {style.color.name}"


@pytest.mark.parametrize("vision", VISION)
def test_the_colour_blind_theme_keeps_roles_apart(vision: str):
    palette = SKINS["colour-blind"].palette
    groups = [
        [palette.good, palette.warn, palette.bad, palette.text],
        [palette.curve, palette.second],
        [palette.raw, palette.second],
        [palette.heat[0], palette.heat[2], palette.heat[4]],
    ]
    for group in groups:
        for one, two in itertools.combinations(group, 2):
            assert distance(name(one), name(two), vision) >= 25, f"{name(one)} {name(two)}"
    for one, two in itertools.pairwise(palette.heat):
        assert distance(name(one), name(two), vision) >= 20, f"heat {name(one)} {name(two)}"


@pytest.mark.parametrize("skin", OWN, ids=lambda skin: skin.name)
def test_own_colours_are_of_the_256_and_never_of_the_users_16(skin: Skin):
    styles = [skin.palette.of(role) for role in (*TEXT_ROLES, *PAINT_ROLES)] + list(skin.palette.heat)
    for colour in [name(style) for style in styles] + [skin.background, skin.surface, skin.bar]:
        near = RichColor.parse(colour).downgrade(ColorSystem.EIGHT_BIT)
        assert near.number is not None and near.number >= 16
        shift = np.abs(np.array(near.get_truecolor()) - np.array(RichColor.parse(colour).get_truecolor()))
        assert shift.max() <= 10, (
            f"{skin.name}: {colour} becomes {near.get_truecolor().hex}"
        )  # rich rounds greys to a neighbour


def test_the_nearest_theme_that_the_terminal_shows():
    assert skin_for(None, 256).name == "dark" and skin_for("light", 1 << 24).name == "light"
    assert skin_for(None, 16).name == "ansi-dark" and skin_for(None, 16, light=True).name == "ansi-light"
    assert skin_for("light", 16).name == "ansi-light" and skin_for("high-contrast", 0).name == "ansi-dark"
    assert skin_for("ansi-light", 256).name == "ansi-light" and skin_for("no-such", 256).name == "dark"
    assert why_not(SKINS["dark"], 16) and why_not(SKINS["dark"], 0) and not why_not(SKINS["ansi-dark"], 0)
