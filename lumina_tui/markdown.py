"""A model's Markdown as lines of cells: read to the eye, nothing of it obeyed. No widget in here.

Links, images and HTML are left as they were typed: what stands there is what was written, and nothing can be followed. Every
piece of text is made safe after parsing, since Markdown can spell a control character (`&#27;`).

A reply that is being written costs what is new of it: paragraphs that a blank line has ended and lines of an open code block
are laid out once and kept; only the unfinished paragraph is laid out again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from rich.cells import cell_len

from lumina_engine.text import safe_text

from .wrapping import Line, Part, wrap, wrap_parts

if TYPE_CHECKING:
    from markdown_it.token import Token

TAIL = 4_000  # characters of an unfinished paragraph from which on it is shown as plain text until it ends
_FENCE = re.compile(r"\s{0,9}(`{3,}|~{3,})([^`]*)$")
_OFF = ["link", "image", "autolink", "reference", "html_block", "html_inline", "lheading"]


def clean(text: str) -> str:
    """Outside text with newlines, everything else that a terminal would obey made visible."""
    return safe_text(text.expandtabs(4)).replace("\r", "␍")


class Layout(Protocol):
    """Lines of a text that may still grow."""

    def lines(self, text: str, width: int, finished: bool) -> list[Line]: ...


class Plain:
    """Text as it was written; only the last, unfinished line is wrapped again when more comes."""

    def __init__(self, role: str = "text") -> None:
        self.role = role
        self._width, self._done = -1, 0
        self._lines: list[Line] = []

    def lines(self, text: str, width: int, finished: bool = False) -> list[Line]:
        """All lines of `text`, which begins with the text of the call before."""
        if width != self._width or self._done > len(text):
            self._width, self._done, self._lines = width, 0, []
        end = text.rfind("\n") + 1
        if end > self._done:
            for paragraph in text[self._done : end - 1].split("\n"):
                self._lines += self._wrapped(paragraph, width)
            self._done = end
        rest = self._wrapped(text[self._done :], width) if self._done < len(text) or not self._lines else []
        return [*self._lines, *rest]

    def _wrapped(self, paragraph: str, width: int) -> list[Line]:
        return [[(line, self.role)] for line in wrap(clean(paragraph), width)]


class Markdown:
    """Markdown that may still grow.

    Args:
        bar: the character in front of code.
        dash: the character of a rule.
    """

    def __init__(self, bar: str = "│", dash: str = "─") -> None:
        self.bar, self.dash = bar, dash
        self._width, self._done = -1, 0
        self._fence = ""  # the mark that closes the open code block
        self._lines: list[Line] = []
        self._whole: tuple[str, int] | None = None  # text and width of which _lines are the last word

    def lines(self, text: str, width: int, finished: bool = False) -> list[Line]:
        """All lines of `text`, which begins with the text of the call before. `finished`: nothing more will come."""
        if width < 1:
            return []
        if finished:
            if self._whole != (text, width):
                self._lines, self._whole, self._width = self._laid_out(text, width), (text, width), -1
            return self._lines
        if width != self._width or self._done > len(text):
            self._width, self._done, self._fence, self._lines, self._whole = width, 0, "", [], None
        self._keep(text, width)
        return [*self._lines, *self._tail(text[self._done :], width)]

    # growing

    def _keep(self, text: str, width: int) -> None:
        """Lay out for good what no later text can change."""
        at = begin = self._done
        while (end := text.find("\n", at)) >= 0:
            line = text[at:end]
            at = end + 1
            if self._fence:
                self._lines += [] if self._closes(line) else self._code_line(line, width)
                begin = at
            elif mark := _FENCE.match(line):
                self._lines += self._laid_out(text[begin : end - len(line)], width)
                self._fence = mark[1]
                self._lines += self.code_begin(mark[2], width)
                begin = at
            elif not line.strip():
                self._lines += self._laid_out(text[begin:end], width)
                self._lines.append([])
                begin = at
        self._done = begin

    def _closes(self, line: str) -> bool:
        word = line.strip()
        closes = len(word) >= len(self._fence) and set(word) == {self._fence[0]}
        if closes:
            self._fence = ""
        return closes

    def _tail(self, rest: str, width: int) -> list[Line]:
        if not rest and self._lines:
            return []
        if self._fence:
            return self._code_line(rest, width)
        if len(rest) > TAIL:
            return [[(line, "text")] for paragraph in rest.split("\n") for line in wrap(clean(paragraph), width)]
        return self._laid_out(rest, width) or [[]]

    # code

    def code_begin(self, info: str, width: int) -> list[Line]:
        info = clean(info).strip()
        return [[(f"{self.bar} {wrap(info, max(1, width - 2))[0]}", "dim")]] if info else []

    def _code_line(self, line: str, width: int) -> list[Line]:
        head: Line = [(f"{self.bar} ", "faint")]
        return wrap_parts([(clean(line), "text")], width, head, head)

    # whole blocks

    def _laid_out(self, text: str, width: int) -> list[Line]:
        if not text.strip():
            return []
        return _Painter(self, width).paint(_parse(text))


def _parse(text: str) -> list[Token]:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).disable(_OFF).parse(text)


class _Painter:
    """Lays out one list of tokens."""

    def __init__(self, style: Markdown, width: int) -> None:
        self.style, self.width = style, width
        self.lines: list[Line] = []
        self.prefix: list[Part] = []  # what stands before every line at this depth
        self.marker: Part | None = None  # what stands before the first line of a list item instead of its indent
        self.numbers: list[int | None] = []  # of the open lists; None: bullets

    def paint(self, tokens: Sequence[Token]) -> list[Line]:
        at = 0
        while at < len(tokens):
            token = tokens[at]
            if token.type == "table_open":
                at = self._table(tokens, at)
            else:
                method: Callable[[Token], None] | None = getattr(self, f"_{token.type}", None)
                if method is not None:
                    method(token)
            at += 1
        return self.lines

    def _put(self, parts: Sequence[Part]) -> None:
        rest = list(self.prefix)
        first = list(self.prefix)
        if self.marker is not None and first:
            first[-1], self.marker = self.marker, None
        self.lines += wrap_parts(parts, self.width, first, rest)

    def _gap(self, token: Token) -> None:
        """An empty line before a block that the source sets apart."""
        if self.lines and self.lines[-1] and token.level == 0:
            self.lines.append([])

    def _deeper(self, text: str, role: str) -> None:
        room = self.width // 2 - sum(len(part) for part, _ in self.prefix)  # deep nesting leaves half of the width
        self.prefix.append((text[: max(0, room)], role))

    # blocks

    def _paragraph_open(self, token: Token) -> None:
        if not token.hidden:
            self._gap(token)

    def _heading_open(self, token: Token) -> None:
        self._gap(token)
        self._head = "#" * int(token.tag[1:]) + " "

    _head = ""

    def _inline(self, token: Token) -> None:
        head, self._head = self._head, ""
        parts = _inline_parts(token, "title" if head else "text")
        self._put([(head, "dim"), *parts] if head else parts)

    def _fence(self, token: Token) -> None:
        self._gap(token)
        for head in self.style.code_begin(token.info, self.width):
            self._put(head)
        bar: Part = (f"{self.style.bar} ", "faint")
        for line in token.content.removesuffix("\n").split("\n"):
            self.prefix.append(bar)
            if self.marker is not None:  # a list item that begins with code
                self.prefix[-2:-1], self.marker = [self.marker], None
            self._put([(clean(line), "text")])
            self.prefix.pop()

    _code_block = _fence

    def _hr(self, token: Token) -> None:
        self._gap(token)
        room = self.width - sum(len(text) for text, _ in self.prefix)
        self._put([(self.style.dash * max(1, min(room, 40)), "faint")])

    def _blockquote_open(self, token: Token) -> None:
        self._gap(token)
        self._deeper("> ", "dim")

    def _blockquote_close(self, token: Token) -> None:
        self.prefix.pop()

    def _bullet_list_open(self, token: Token) -> None:
        self._gap(token)
        self.numbers.append(None)

    def _ordered_list_open(self, token: Token) -> None:
        self._gap(token)
        self.numbers.append(int(token.attrs.get("start", 1)))

    def _bullet_list_close(self, token: Token) -> None:
        self.numbers.pop()

    _ordered_list_close = _bullet_list_close

    def _list_item_open(self, token: Token) -> None:
        number = self.numbers[-1]
        mark = "- " if number is None else f"{number}. "
        if number is not None:
            self.numbers[-1] = number + 1
        before = len(self.prefix)
        self._deeper(" " * len(mark), "text")
        self.marker = (mark[: len(self.prefix[before][0])], "dim")

    def _list_item_close(self, token: Token) -> None:
        if self.marker is not None:  # an empty item
            self._put([("", "text")])
        self.prefix.pop()

    # tables

    def _table(self, tokens: Sequence[Token], at: int) -> int:
        """Columns side by side if they fit, else a line of cells per row; returns the index of the table's end."""
        self._gap(tokens[at])
        rows: list[list[list[Part]]] = []
        while tokens[at].type != "table_close":
            if tokens[at].type == "tr_open":
                rows.append([])
            elif tokens[at].type == "inline":
                rows[-1].append(_inline_parts(tokens[at], "title" if len(rows) == 1 else "text"))
            at += 1
        room = self.width - sum(len(text) for text, _ in self.prefix)
        columns = max((len(row) for row in rows), default=0)
        widths = [max((_cells(row[i]) for row in rows if i < len(row)), default=0) for i in range(columns)]
        fits = sum(widths) + 3 * (columns - 1) <= room
        for number, row in enumerate(rows):
            parts: list[Part] = []
            for i, cell in enumerate(row):
                parts += [(f" {self.style.bar} ", "faint")] if i else []
                parts += cell
                parts += [(" " * (widths[i] - _cells(cell)), "text")] if fits and i + 1 < len(row) else []
            self._put(parts)
            if number == 0 and fits:
                self._put([(self.style.dash * (sum(widths) + 3 * (columns - 1)), "faint")])
        return at


def _cells(parts: Sequence[Part]) -> int:
    return sum(cell_len(text) for text, _ in parts)


def _inline_parts(token: Token, role: str) -> list[Part]:
    """Emphasis as bold, code and deleted text between their marks, line breaks kept."""
    found: list[Part] = []
    roles = [role]
    for child in token.children or ():
        if child.type in ("softbreak", "hardbreak"):
            found.append(("\n", roles[-1]))
        elif child.type == "code_inline":
            found.append((f"`{clean(child.content)}`", "accent"))
        elif child.type in ("strong_open", "em_open"):
            roles.append("title" if child.type == "strong_open" else "key")
        elif child.type in ("strong_close", "em_close"):
            roles.pop()
        elif child.type in ("s_open", "s_close"):
            found.append(("~~", roles[-1]))
        else:
            found.append((clean(child.content).replace("\n", " "), roles[-1]))
    return found
