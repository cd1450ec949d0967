"""Pages of reports: no script, nothing from outside, readable in light and dark and on paper.

All text is escaped in one place (`tag`); only `Markup` made there passes as it is.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from ..text import safe_text

_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c1c1c;--dim:#666;--line:#d8d8d8;--box:#f6f6f6;--bad:#b3261e;--warn:#8a5a00;
--h0:#8ab4e8;--h1:#c6dcf4;--h2:#ececec;--h3:#f7cf9a;--h4:#ef9a3d}
@media (prefers-color-scheme:dark){:root{--bg:#16181a;--fg:#dcdcdc;--dim:#9a9a9a;--line:#3a3d40;--box:#1f2225;--bad:#ff8a80;
--warn:#ffc46b;--h0:#24588f;--h1:#35516e;--h2:#3a3d40;--h3:#7a5523;--h4:#b8690a}
svg{filter:invert(1) hue-rotate(180deg)}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1040px;padding:24px;background:var(--bg);color:var(--fg);
font:15px/1.45 ui-sans-serif,system-ui,sans-serif}
h1{font-size:1.5em;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.1em;margin:32px 0 8px;border-bottom:1px solid var(--line)}
p{margin:4px 0 12px}.dim{color:var(--dim)}.critical,.bad{color:var(--bad);font-weight:600}.warning{color:var(--warn)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:8px}
.cards div{background:var(--box);border:1px solid var(--line);padding:8px 10px}.cards b{display:block;font-size:1.15em}
.cards span{color:var(--dim);font-size:.85em}.box{background:var(--box);border:1px solid var(--line);padding:8px 14px}
svg{display:block;width:100%;height:auto;margin:8px 0 16px}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:2px 10px 2px 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}td:last-child{overflow-wrap:anywhere}
th{color:var(--dim);font-weight:500}td.n,th.n{text-align:right;
white-space:nowrap}td.t{white-space:nowrap}
table.map td{padding:2px 4px;border:1px solid var(--bg);text-align:center;min-width:14px;font-size:.85em}
.h0{background:var(--h0)}.h1{background:var(--h1)}.h2{background:var(--h2)}.h3{background:var(--h3)}.h4{background:var(--h4)}
code{overflow-wrap:anywhere}
@media print{body{max-width:none;padding:0}h2,svg,tr{break-inside:avoid}svg{filter:none}}
"""


class Markup(str):
    """HTML that is finished."""


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. Children and attribute values are escaped unless they are `Markup`; an attribute of None is left out."""
    written = "".join(f' {key.rstrip("_")}="{_text(value)}"' for key, value in attributes.items() if value is not None)
    inner = "".join(child if isinstance(child, Markup) else _text(child) for child in children)
    return Markup(f"<{name}{written}/>" if name in ("meta", "br") else f"<{name}{written}>{inner}</{name}>")


def _text(value: object) -> str:
    text = safe_text(str(value)).replace("\ufffe", "\ufffd").replace("\uffff", "\ufffd")
    return html.escape(text, quote=True)


def document(title: str, parts: Iterable[Markup | str]) -> str:
    """A whole page; empty parts are left out. It may load nothing: its own policy forbids that."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(_STYLE)),
    )
    body = tag("body", *[part for part in parts if part])
    return "<!DOCTYPE html>\n" + tag("html", head, "\n", body, lang="en") + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[int] = ()) -> Markup:
    """A table; columns in `right` hold numbers."""
    numbers = set(right)

    def kind(index: int) -> str | None:
        return "n" if index in numbers else None

    head = [tag("tr", *[tag("th", name, class_=kind(i)) for i, name in enumerate(columns)])] if any(columns) else []
    body = [tag("tr", *[tag("td", cell, class_=kind(i)) for i, cell in enumerate(row)]) for row in rows]
    return tag("table", *head, *body)
