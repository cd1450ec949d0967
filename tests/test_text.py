"""safe_text: nothing that a terminal obeys passes, whatever way it is cut."""

from __future__ import annotations

import sys

import pytest

from lumina_engine.text import safe_text

PAYLOADS = [
    "\x1b]0;title\x07",
    "\x1b]52;c;ZXZpbA==\x1b\\",
    "\x1b]8;;http://x\x1b\\link",
    "\x1b[2J",
    "\x1b[6n",
    "\x1b[?1049h",
    "\x1bP+q\x1b\\",
    "\x1b_apc\x1b\\",
    "\x1b^pm\x1b\\",
    "\x1bXsos\x1b\\",
    "\x1bc",
    "\x9b2J",
    "\x9d0;t\x9c",
    "\x90q\x9c",
    "bell\x07 back\x08 return\r del\x7f nul\x00",
    "\u202eevil\u202c \u2066x\u2069 \u200e\u200f\u061c",
    "日本\x1b[31m語",
    "line\u2028paragraph\u2029",
]


def obeyed(text: str) -> list[str]:
    """Characters that a terminal acts upon."""
    return [
        char
        for char in text
        if (ord(char) < 0x20 and char not in "\n\t")
        or 0x7F <= ord(char) < 0xA0
        or char in "\u061c\u200e\u200f\u2028\u2029"
        or 0x202A <= ord(char) <= 0x202E
        or 0x2066 <= ord(char) <= 0x2069
        or 0xD800 <= ord(char) < 0xE000
    ]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_s6_payloads_are_dead_and_visible(payload: str) -> None:
    shown = safe_text(payload)
    assert obeyed(shown) == []
    assert len(shown) == len(payload), "a neutralised character stays visible in its place"


@pytest.mark.parametrize("payload", PAYLOADS)
def test_se02_every_cut_is_dead(payload: str) -> None:
    for cut in range(len(payload) + 1):
        assert safe_text(payload[:cut]) + safe_text(payload[cut:]) == safe_text(payload)


def test_s6_exact_set() -> None:
    for code in (*range(0x3000), *range(0xD7F0, 0xE010), *range(0x3000, sys.maxunicode + 1, 97)):
        char = chr(code)
        bad = bool(obeyed(char))
        shown = safe_text(char)
        assert (shown != char) == bad, hex(code)
        assert safe_text("é" + char) == "é" + shown, "the fast path agrees"


def test_s6_pictures() -> None:
    assert safe_text("\x1b[0m\x7f\x00") == "␛[0m␡␀"
    assert safe_text("a\tb\nc") == "a\tb\nc"
    assert safe_text("\x9b") == "\ufffd"


def test_s6_everything_can_be_encoded() -> None:
    assert safe_text("\ud800x").encode() == "\ufffdx".encode()
