"""How many colours the terminal has. Decided from the environment alone: Textual reads the answer on import."""

from __future__ import annotations

from collections.abc import Mapping


def colours_of(environ: Mapping[str, str]) -> int:
    """How many colours to send: 2 ** 24, 256, 16, or 0 with `NO_COLOR`.

    Inside tmux and screen `COLORTERM` is that of the terminal outside, and the Linux console has 16 whatever it says.
    """
    if environ.get("NO_COLOR"):
        return 0
    term = environ.get("TERM", "")
    if term.startswith(("screen", "tmux", "linux", "vt")):
        return 256 if "256color" in term else 16
    if environ.get("COLORTERM", "").lower() in ("truecolor", "24bit"):
        return 1 << 24
    return 256 if "256color" in term or "kitty" in term else 16


def color_system(environ: Mapping[str, str]) -> str:
    """The same as the name that Textual's console takes."""
    return {1 << 24: "truecolor", 256: "256"}.get(colours_of(environ), "standard")


def light_background(environ: Mapping[str, str]) -> bool:
    """Whether the terminal says that its background is light (`COLORFGBG`, as rxvt, Konsole and others set it)."""
    background = environ.get("COLORFGBG", "").rpartition(";")[2]
    return background.isdecimal() and int(background) in (7, *range(9, 16))
