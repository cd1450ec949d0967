"""What is wrong with a configuration, and how to say it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of a configuration. An error blocks a launch, a warning asks once, an info only tells.

    `code` is stable (for scripts and tests); `keys` are the configuration keys concerned, most important first; `message` names
    the key, its value and the cause; `fix` says what to set; `where` is `file:line` or the command line word it came from.
    """

    code: str
    severity: Severity
    keys: tuple[str, ...]
    message: str
    fix: str = ""
    where: str = ""

    def line(self) -> str:
        """The finding as one line of text, without the severity."""
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}; {self.fix}" if self.fix else text

    def to_dict(self) -> dict[str, object]:
        """For JSON output."""
        return {
            "code": self.code,
            "severity": self.severity,
            "keys": list(self.keys),
            "message": self.message,
            "fix": self.fix,
            "where": self.where,
        }


def finding(severity: Severity, code: str, keys: str, message: str, fix: str) -> Finding:
    """A finding about `keys`, given in one string."""
    return Finding(code, severity, tuple(keys.split()), message, fix)


def error(code: str, keys: str, message: str, fix: str) -> Finding:
    """A finding that blocks a launch."""
    return finding("error", code, keys, message, fix)


class ConfigError(Exception):
    """A configuration that cannot be used. `findings` holds every problem found, not only the errors."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = list(findings)
        super().__init__(self.findings)

    def __str__(self) -> str:
        errors = [f for f in self.findings if f.severity == "error"] or self.findings
        if len(errors) == 1:
            return errors[0].line()
        return f"{len(errors)} problems in the configuration:\n" + "\n".join(f"  {f.line()}" for f in errors)


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most like `word`, or None when nothing is near."""
    pool = list(choices)
    lowered = {c.lower(): c for c in pool}
    plain = word.lower().replace("-", "_")
    if plain in lowered:
        return lowered[plain]
    found = difflib.get_close_matches(plain, list(lowered), n=1, cutoff=0.6)
    return lowered[found[0]] if found else None


def unknown_key(name: str, choices: Sequence[str], where: str = "") -> Finding:
    """The finding for a key that no declaration knows."""
    near = nearest(name, choices)
    fix = f"did you mean {near}?" if near else "'lumina-engine config schema' lists all keys"
    return Finding("unknown_key", "error", (name,), f"{name}: unknown key", fix, where)


def has_errors(findings: Iterable[Finding]) -> bool:
    """Whether any finding blocks a launch."""
    return any(f.severity == "error" for f in findings)
