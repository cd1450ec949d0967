"""The one way for text from outside (data, model output, names, logs) onto a terminal. Standard library only."""

from __future__ import annotations

_TABLE: dict[int, int] = {
    **{code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)},  # C0: control pictures
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),  # C1: terminals obey these as if ESC came before them
    **dict.fromkeys((0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),  # direction
    **dict.fromkeys((0x2028, 0x2029), 0xFFFD),  # line breaks that are not \n
    **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD),  # lone surrogates: cannot be encoded
}


def safe_text(text: str) -> str:
    """`text` with every control and direction character made visible; newline and tab stay.

    Works per character, so a sequence that arrives in pieces is dead in each piece. The length does not change.
    """
    if text.isascii():
        return text.translate(_TABLE)  # ASCII has a fast path in translate, other text has none
    if text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return text.translate(_TABLE)
