"""What every skill of the built-in corpus makes, and which of it is kept out of training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

HELD_OUT_SHARE = 0.12  # of all contents
KNOWN = "known"  # a content that is always taught


@dataclass(frozen=True, slots=True)
class Item:
    """User and assistant texts in turn; the last is the answer that is graded.

    `contents` names what is asked, whatever the words, and each other piece of knowledge that the texts give away: an item is
    held out if any of its contents is. `core` is the heart of the answer, for system prompts that ask for another form.
    """

    contents: tuple[str, ...]
    turns: tuple[str, ...]
    core: str = ""
    system: str | None = None

    @property
    def held_out(self) -> bool:
        """True for an item that training never sees."""
        return any(map(content_held_out, self.contents))


Maker = Callable[[Random], Item]


def content_held_out(content: str) -> bool:
    """A fixed pseudo-random choice by the content alone, so that all skills and both splits agree on it."""
    if content == KNOWN:
        return False
    digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def pick(rng: Random, templates: Sequence[str]) -> tuple[int, str]:
    """A template and its number."""
    at = rng.randrange(len(templates))
    return at, templates[at]
