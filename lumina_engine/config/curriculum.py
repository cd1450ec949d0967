"""The sequence-length curriculum as arithmetic: which row lengths there are, and which one an optimizer step has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MOST_LENGTHS = 8  # each is one more shape to compile and to fit into memory
MULTIPLE = 8  # rows of whole 16 bytes in every precision


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Row lengths in tokens, rising; the shorter ones share `steps` optimizer steps equally, the last one holds after them."""

    lengths: tuple[int, ...]
    steps: int

    def length(self, step: int) -> int:
        """Row length of an optimizer step, counted from 1."""
        shorter = len(self.lengths) - 1
        return self.lengths[-1] if step > self.steps else self.lengths[(step - 1) * shorter // self.steps]

    @classmethod
    def of(cls, config: Any) -> Curriculum:
        """The curriculum of a configuration; without `curriculum_learning` every row has the full length."""
        size = int(config.seq_length)
        if not getattr(config, "curriculum_learning", False):
            return cls((size,), 1)
        return cls(row_lengths(size, *bounds(config)), int(config.curriculum_steps))


def bounds(config: Any) -> tuple[int, int]:
    """`min_seq_length` and `max_seq_length` as numbers: `auto` is an eighth of `seq_length`, at least 64, and all of it."""
    size = int(config.seq_length)
    high = size if config.max_seq_length == "auto" else int(config.max_seq_length)
    low = max(64, size // 8) if config.min_seq_length == "auto" else int(config.min_seq_length)
    return min(low, high), high


def row_lengths(size: int, low: int, high: int) -> tuple[int, ...]:
    """`high`, `high`/2, `high`/4 … down to `low`, rising; at most `MOST_LENGTHS`.

    Rows of `size` tokens are cut into equal shorter ones, so each length divides `size`: `high` is rounded down to one that
    does. All are multiples of `MULTIPLE`, except `size` itself. Empty where no length up to `high` divides `size`.
    """
    longest = next((size // parts for parts in range(1, size + 1) if _is_cut(size, parts) and size // parts <= high), 0)
    lengths = [longest] if longest else []
    while lengths and len(lengths) < MOST_LENGTHS and lengths[-1] % (2 * MULTIPLE) == 0 and lengths[-1] // 2 >= low:
        lengths.append(lengths[-1] // 2)
    return tuple(reversed(lengths))


def _is_cut(size: int, parts: int) -> bool:
    return parts == 1 or (size % parts == 0 and size // parts % MULTIPLE == 0)
