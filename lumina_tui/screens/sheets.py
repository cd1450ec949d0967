"""Texts to read in a layer, made of lines with roles."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content

from ..paint import clean
from ..widgets.text_panel import Line
from .dialogs import Sheet

_STYLES = {"dim": "dim", "bad": "bold", "title": "bold", "accent": "bold", "warn": "bold"}


def lines_sheet(heading: str, lines: Sequence[Line]) -> Sheet:
    """A sheet of lines; roles become bold or dim."""
    parts: list[Content | str | tuple[str, str]] = []
    for line in lines:
        for text, role in line:
            style = _STYLES.get(role)
            parts.append((clean(text), style) if style else clean(text))
        parts.append("\n")
    return Sheet(heading, Content.assemble(*parts))
