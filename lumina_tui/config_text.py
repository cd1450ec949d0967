"""What the configuration screens say: findings, help of a field, differences, previews, as lines of (text, role)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lumina_engine.config.declare import show
from lumina_engine.config.finding import Finding
from lumina_engine.config.schema import ConfigError

from .field_lines import SEVERITY_MARKS
from .form import INFOS, Change, Form, same
from .widgets.text_panel import Line

_WORDS = {
    "default": "the default",
    "preset": "from the preset",
    "file": "from the file",
    "cli": "from the command line",
    "you": "set by you",
}


def count_words(findings: Iterable[Finding]) -> str:
    """`1 error, 2 warnings`, or `none`."""
    counts = dict.fromkeys(("error", "warning", "info"), 0)
    for finding in findings:
        counts[finding.severity] += 1
    parts = [f"{n} {word}" + ("s" if n > 1 and word != "info" else "") for word, n in counts.items() if n]
    return ", ".join(parts) or "none"


def finding_lines(findings: Sequence[Finding], current: int = -1) -> list[Line]:
    """One line per finding; the current one is marked."""
    lines: list[Line] = []
    for index, finding in enumerate(findings):
        mark, role = SEVERITY_MARKS[finding.severity]
        here = index == current
        lines.append(((">" if here else " ", "accent"), (f"{mark} ", role), (finding.line(), "title" if here else "text")))
    return lines


def help_title(name: str, width: int) -> str:
    """The field, and what it may be where that fits into `width` cells."""
    text = f"{name}: {requirement(name)}"
    return text if len(text) <= width else name


def help_lines(name: str, width: int) -> list[Line]:
    """What a field does; before it what it may be, where the title has no room for it."""
    does: Line = ((INFOS[name].help, "text"),)
    return [does] if help_title(name, width) != name else [((requirement(name), "accent"),), does]


def requirement(name: str) -> str:
    """What a value must be, with its unit."""
    info = INFOS[name]
    return info.requirement() + (f" ({info.unit})" if info.unit else "")


def help_foot(form: Form, name: str) -> str:
    """Where the value comes from, what the preset has, whether a resumed run may change it."""
    base = f"preset {show(form.reference(name))}" if form.preset else f"default {show(form.reference(name))}"
    resume = "may change on resume" if INFOS[name].resume_may_change else "fixed once started"
    return f"{_WORDS[form.origin(name)]}, {base}, {resume}"


def document_name(form: Form) -> str:
    """What is edited: the file's name, or what it is a copy of."""
    return form.path.name if form.path else f"copy of {form.preset}" if form.preset else "new"


def badge(form: Form) -> str:
    """Preset, changes and whether they are written, for the first line."""
    count = len(form.changes())
    state = "not written" if form.dirty else "written" if form.path else "as it is"
    return f"{base_name(form)} | {count} change{'s' if count != 1 else ''} | {state}"


def diff_lines(changes: Sequence[Change], base: str) -> list[Line]:
    """Every change as `name  before → after`."""
    if not changes:
        return [((f"nothing differs from {base}", "dim"),)]
    width = max(len(c.name) for c in changes)
    return [((f"{c.name:<{width}}  ", "text"), (c.before, "dim"), (" → ", "dim"), (c.after, "accent")) for c in changes]


def base_name(form: Form) -> str:
    """What changes are counted against."""
    return f"preset {form.preset}" if form.preset else "the defaults"


def disk_lines(form: Form, path: Path) -> list[Line]:
    """How the file differs from what is edited. Reads the file."""
    head: Line = (("here → on disk", "title"),)
    try:
        other = Form.from_file(path)
    except ConfigError as error:
        return [head, ((str(error), "bad"),)]
    if other.text is not None:
        return [head, *finding_lines(other.text_findings)]
    names = [n for n in INFOS if not same(form.value(n), other.value(n))]
    return [head, *diff_lines([Change(n, form.shown(n), other.shown(n)) for n in names], "what is edited here")]
