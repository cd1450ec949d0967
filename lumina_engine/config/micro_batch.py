"""How the rows of one rank's step may be split into micro batches without changing the global batch."""

from __future__ import annotations

from typing import Any


def rows_of_a_rank(config: Any) -> int:
    """Rows that one rank takes in an optimizer step, whatever the split."""
    return int(config.batch_size * config.gradient_accumulation_steps)


def micro_batches(rows: int, low: int, high: int) -> list[int]:
    """The micro batches from `low` to `high` rows that make up `rows` exactly, rising."""
    return [size for size in range(low, min(high, rows) + 1) if rows % size == 0]


def split(config: Any, size: int) -> dict[str, int]:
    """The changes to `config` that give micro batches of `size` rows in the same global batch."""
    rows = rows_of_a_rank(config)
    if rows % size:
        raise ValueError(f"micro batches of {size} rows do not make up {rows}")
    return {"batch_size": size, "gradient_accumulation_steps": rows // size}


def candidates(config: Any) -> list[int]:
    """What `dynamic_batching` chooses from, rising; empty where no micro batch between its bounds divides the rows."""
    return micro_batches(rows_of_a_rank(config), config.min_batch_size, config.max_batch_size)


def smaller(config: Any) -> int | None:
    """The micro batch to go on with after running out of memory: half the rows, or the next that divides; None at the end.

    `dynamic_batching` keeps to its `min_batch_size`.
    """
    low = config.min_batch_size if config.dynamic_batching else 1
    below = micro_batches(rows_of_a_rank(config), low, config.batch_size // 2)
    return below[-1] if below else None
