"""Keys and tokens stay out of what a run writes: logs, records, dumps, configuration. Standard library only.

Lumina needs no secret itself. Those of the user's environment, and texts in the shape of well-known keys, may still end up in
an error message or a print; they are replaced by `HIDDEN` where such text is written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, TextIO

HIDDEN = "[secret]"
LEAST = 8  # characters: shorter values of the environment are no secrets, and too common to be replaced
_NAMES = re.compile(
    r"(?!.*(?:FILE|PATH|DIR)$).*(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)", re.IGNORECASE
)
_PREFIXED = r"\bhf_[A-Za-z0-9]{16,}|\bAKIA[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_-]{20,}|\bgh[oprsu]_[A-Za-z0-9]{20,}"
_BEARER = r"(?<=Bearer )[A-Za-z0-9._~+/=-]{8,}"
_HEX = r"(?<![\w/.-])[0-9a-f]{40}(?![\w/.-])"  # a bare key of 40 digits; in a path it is the name of a snapshot
_SHAPES = re.compile(f"{_PREFIXED}|{_BEARER}|{_HEX}")
_CERTAIN = re.compile(f"{_PREFIXED}|{_BEARER}")


class Secret:
    """A value of the environment that must not be shown. It prints as `HIDDEN`, and nothing can write it but by `reveal`."""

    __slots__ = ("_value", "name")

    def __init__(self, name: str, value: str) -> None:
        self.name, self._value = name, value

    def reveal(self) -> str:
        """The value itself."""
        return self._value

    def __repr__(self) -> str:
        return f"Secret({self.name}={HIDDEN})"

    def __str__(self) -> str:
        return HIDDEN

    def __reduce__(self) -> Any:
        raise TypeError(f"the secret {self.name} is not stored anywhere")


def secrets_of(environment: Mapping[str, str]) -> list[Secret]:
    """The variables whose names say that they hold a secret."""
    return [Secret(name, value) for name, value in environment.items() if _NAMES.match(name) and len(value) >= LEAST]


def looks_secret(text: str) -> bool:
    """Whether a text holds a key of a shape that nothing else has."""
    return _CERTAIN.search(text) is not None


class Scrubber:
    """Replaces secrets in text: those of an environment (default: this process's), and whatever has the shape of a key."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        values = {secret.reveal() for secret in secrets_of(os.environ if environment is None else environment)}
        spelled = values | {json.dumps(value)[1:-1] for value in values}
        known = [re.escape(value) for value in sorted(spelled, key=len, reverse=True)]
        self._known = re.compile("|".join(known)) if known else None
        self._known_bytes = re.compile(self._known.pattern.encode()) if self._known is not None else None
        self._shape_bytes = re.compile(_SHAPES.pattern.encode())

    def text(self, text: str) -> str:
        """The text without its secrets."""
        text = self._known.sub(HIDDEN, text) if self._known is not None else text
        return _SHAPES.sub(HIDDEN, text)

    def line(self, line: bytes) -> bytes:
        """The same for a line of UTF-8, such as a record: it stays JSON."""
        hidden = HIDDEN.encode()
        line = self._known_bytes.sub(hidden, line) if self._known_bytes is not None else line
        return self._shape_bytes.sub(hidden, line)


class ScrubbedStream:
    """A text stream (stdout, stderr of a run's process) that writes no secret. Everything but `write` is the stream's own."""

    def __init__(self, stream: TextIO, scrubber: Scrubber) -> None:
        self._stream, self._scrubber = stream, scrubber

    def write(self, text: str) -> int:
        self._stream.write(self._scrubber.text(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
