"""What the log of a run says for going on: a user's rates after the restored step, and rollbacks that no checkpoint knows yet.

Pure functions of the records, in the order in which they were written.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..monitoring import record as rec


def rates_after(records: Iterable[rec.Record], step: int) -> dict[int, float]:
    """Learning rates that the user set for steps after `step`, by step: each is applied again at its own one.

    A newer choice for an earlier step takes back what was set for later ones in an abandoned branch; a rollback takes back all
    that was set after the step to which it went.
    """
    rates: dict[int, float] = {}
    for item in records:
        if isinstance(item, rec.Rewind) and item.failed_step is not None:
            rates = {at: rate for at, rate in rates.items() if at <= item.to_step}
        elif isinstance(item, rec.Change) and item.what == "learning_rate" and item.by == "user" and item.step is not None:
            rates = {at: rate for at, rate in rates.items() if at < item.step}
            rates[item.step] = float(item.after)
    return {at: rate for at, rate in rates.items() if at > step}


def rollbacks_after(records: Iterable[rec.Record], seq: int | None) -> list[rec.Rewind]:
    """Rollbacks written after record `seq`, the last one before the restored checkpoint. None: unknown, so there are none."""
    if seq is None:
        return []
    return [r for r in records if isinstance(r, rec.Rewind) and r.failed_step is not None and r.seq > seq]
