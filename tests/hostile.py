"""Text that a terminal or a markup parser would obey: 40 escape payloads, each with a mark of its own, and markup strings."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

_FORMS = [
    "\x1b]0;{}\x07",  # window title, all ways to end it
    "\x1b]2;{}\x1b\\",
    "\x1b]0;{}\x9c",
    "\x1b]8;;http://{}\x1b\\link\x1b]8;;\x1b\\",
    "\x1b]52;c;{}\x07",  # clipboard
    "\x1b]52;p;{}\x1b\\",
    "\x1b]1337;File=name={}\x07",
    "\x1b]9;{}\x07",
    "\x1b]777;notify;{};x\x07",
    "\x1b]10;?{}\x1b\\",
    "\x1b]4;1;?{}\x07",
    "\x1b]0;{}",  # never ended
    "\x1b[2J{}",
    "\x1b[3J{}",
    "\x1b[H{}",
    "\x1b[6n{}",
    "\x1b[c{}",
    "\x1b[>c{}",
    "\x1b[?1049h{}",
    "\x1b[?1049l{}",
    "\x1b[?25h{}",
    "\x1b[?1003h{}",
    "\x1b[31m{}",
    "\x1b[8m{}\x1b[0m",
    "\x1b[20t{}",
    "\x1b[5i{}",
    "\x1bP+q{}\x1b\\",
    "\x1bP1$r{}\x1b\\",
    "\x1b_{}\x1b\\",
    "\x1b^{}\x1b\\",
    "\x1bX{}\x1b\\",
    "\x1bc{}",
    "\x1b(0{}\x1b(B",
    "\x1b#8{}",
    "\x9b2J{}",
    "\x9d0;{}\x9c",
    "\x90q{}\x9c",
    "\x07\x08\x08{}\x7f\x0e\x0f",
    "over\rwritten {}\x0b\x0c",
    "\u202e{}\u202c\u2066x\u2069\u200e\u200f\u061c\u200b\u2028\u2029",
]
PAYLOADS = [form.format(f"own{number:02d}") for number, form in enumerate(_FORMS)]
assert len(PAYLOADS) == 40

MARKUP = ["[/x]", "[@click=app.leave]go[/]", "[link=http://x]y[/link]", "[bold", "[red]r[/red]", "$x ${y}", "[" * 10_000]

# what textual itself writes: cursor, pointer shape, colours, modes, clearing to the end of line, synchronised output, keys,
# mouse
_OURS = re.compile(
    rb"\x1b\[[0-9;]*m|\x1b\[\d+;\d+H|\x1b\[\d*[ABCDKJ]|\x1b\[\?\d+(;\d+)*[hlu]|\x1b\[[<>=][0-9;]*u|\x1b\[\?\d+\$p"
    rb"|\x1b\[\?[0-9;]*c|\x1b\[[0-9]* q|\x1b\[[0-9;]*t|\x1b[=>78]|\x1b\[H|\x1b\]22;[a-z]*\x07"
)


def obeyed(raw: bytes) -> list[str]:
    """What a terminal would obey in the bytes of a screen beyond what our own drawing needs, with its surroundings."""
    found = []
    for number, payload in enumerate(PAYLOADS):
        whole = payload.encode()
        if not payload.startswith(("over", "\x07")) and whole in raw:
            found.append(f"payload {number} as it is: {payload!r}")
    rest = _OURS.sub(b"", raw).decode("utf-8", "replace")
    for match in re.finditer("[\x00-\x06\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]", rest):
        found.append(repr(rest[max(0, match.start() - 30) : match.end() + 30]))
    return found


def hostile_manifest() -> dict[str, Any]:
    """What a foreign program may write into a checkpoint's manifest: payloads in every value and in names."""
    text = " ".join([*PAYLOADS, *MARKUP])
    # without the thousands of brackets: as often as this a manifest may not have them
    named = dict.fromkeys([*PAYLOADS, *MARKUP[:-1]], " ".join([*PAYLOADS, *MARKUP[:-1]]))
    return {
        "metrics": {"eval_loss": 1.5, **dict.fromkeys(PAYLOADS, 1.0)},
        "flags": {"suspect": True, **named},
        "versions": named,
        "layout": named,
        "created": 1.0,
        **dict.fromkeys(("run_id", "config_digest", "data_fingerprint", "tokenizer", "name"), text),
    }


def hostile_vocabulary(path: Path) -> tuple[Path, list[int]]:
    """A `.tiktoken` file in which every payload is one token; its path and their ids, in order."""
    tokens = [bytes((byte,)) for byte in range(256)] + [payload.encode() for payload in PAYLOADS]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path, list(range(256, len(tokens)))
