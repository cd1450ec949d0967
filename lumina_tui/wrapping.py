"""Text broken into lines of cells. Linear in the text, however it arrives. No widget in here."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import get_character_cell_size

Part = tuple[str, str]  # text, role of the palette
Line = list[Part]

_EMOJI = "\ufe0f"  # asks for the two-cell form of the character before it


def spans(text: str, width: int) -> list[tuple[int, int]]:
    """Where the lines of one paragraph (no newline) of at most `width` cells begin and end, broken at spaces if possible."""
    if width < 1:
        return []
    if len(text) <= width and text.isascii():
        return [(0, len(text))]
    sizes = None if text.isascii() else [1 if c < "\x7f" or c == _EMOJI else get_character_cell_size(c) for c in text]
    found: list[tuple[int, int]] = []
    start = cells = since = 0  # `since`: cells behind the last space
    space = -1  # index behind the last space of this line
    for index, letter in enumerate(text):
        size = 1 if sizes is None else sizes[index]
        if cells + size > width:
            if letter == " ":  # the space that would stand at the edge is the break
                found.append((start, index))
                start, cells, since, space = index + 1, 0, 0, -1
                continue
            if space > start:
                end = space
                while end > start and text[end - 1] == " ":
                    end -= 1
                found.append((start, end))
                start, cells = space, since
            if cells + size > width:  # no space to break at, or a wide character does not fit behind the last word either
                found.append((start, index))
                start, cells = index, 0
            space = -1
        cells += size
        since += size
        if letter == " ":
            space, since = index + 1, 0
    return [*found, (start, len(text))]


def wrap(text: str, width: int) -> list[str]:
    """The lines of one paragraph."""
    return [text[start:end] for start, end in spans(text, width)]


def wrap_parts(parts: Sequence[Part], width: int, first: Line | None = None, rest: Line | None = None) -> list[Line]:
    """Styled text, in which a newline breaks, in lines of at most `width` cells.

    Args:
        first: stands before the first line, inside `width`.
        rest: stands before every other line; as wide as `first`.
    """
    first, rest = first or [], rest or []
    room = max(1, width - sum(len(text) for text, _ in first))
    lines: list[Line] = []
    for paragraph in _paragraphs(parts):
        whole = "".join(text for text, _ in paragraph)
        for start, end in spans(whole, room):
            lines.append([*(rest if lines else first), *_cut(paragraph, start, end)])
    return lines


def _paragraphs(parts: Sequence[Part]) -> list[Line]:
    found: list[Line] = [[]]
    for text, role in parts:
        for number, piece in enumerate(text.split("\n")):
            if number:
                found.append([])
            if piece:
                found[-1].append((piece, role))
    return found


def _cut(parts: Line, start: int, end: int) -> Line:
    """Characters `start` to `end` of the parts."""
    found: Line = []
    at = 0
    for text, role in parts:
        low, high = max(start - at, 0), min(end - at, len(text))
        if low < high:
            found.append((text[low:high], role))
        at += len(text)
        if at >= end:
            break
    return found
