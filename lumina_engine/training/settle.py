"""What a start decides by trying, before anything large is made: the micro batch, and the one after running out of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..config.micro_batch import smaller, split
from ..config.schema import Config
from ..monitoring import record as rec
from ..monitoring.say import say
from .batch_size import Tries, fit
from .comm import Comm
from .memory import WAYS_OUT
from .state import versions
from .tune_precision import in_precision
from .tune_precision import tune as tune_precision


class NoRoom(MemoryError):
    """A run ran out of memory with the smallest micro batch there is: a restart would meet the same."""

    exit_code = 93


class Settler:
    """Settles the keys of one start, the same on every rank. All methods are collectives.

    Args:
        emit: takes records (of rank 0).
        report: tells the supervisor where this rank is: (number, section).
    """

    def __init__(self, config: Config, comm: Comm, emit: Callable[[Any], None], report: Callable[[int, str], None]) -> None:
        # the file that the configuration was read from may be rewritten by rank 0 while another rank reads it
        self.config = Config(**comm.broadcast(config.to_dict(sectioned=False)))
        self.comm, self.emit, self.report = comm, emit, report

    def after_out_of_memory(self, step: int) -> Config:
        """Half the micro batch and twice the accumulation; `step` is that of the newest checkpoint.

        Raises:
            NoRoom: no smaller micro batch makes up the global batch.
        """
        config, size = self.config, smaller(self.config)
        if size is None:
            raise NoRoom(no_room(config))
        changed = split(config, size)
        if config.dynamic_batching:
            Tries(config, self.comm, versions()).ran_out(config.batch_size)
        for name, value in changed.items():
            reason = "out of memory; the global batch stays as it was"
            before = getattr(config, name)
            self.emit(rec.Change(what=name, step=step, before=before, after=value, by="recovery", reason=reason))
        self.config = config.model_copy(update=changed)
        return self.config

    def settle(self, *, tune: bool) -> Config:
        """Micro batch and, with `tune`, precision. What fits depends on the precision, so a new one is fitted again."""
        config = self.micro_batch()
        if not (tune and config.auto_tune_precision):
            return config
        found, lines = tune_precision(config, self.comm, lambda name: self.report(0, "dry run"))
        for line in lines:
            say(f"lumina: {line}")
            self.emit(rec.Note(message=line))
        if found == config.precision:
            return config
        self.config = in_precision(config, found)
        return self.micro_batch()

    def micro_batch(self) -> Config:
        """With `dynamic_batching` the largest micro batch that fits.

        Raises:
            DoesNotFit: not even the smallest one does.
        """
        if self.config.dynamic_batching:
            tries = Tries(self.config, self.comm, versions())
            self.config, line = fit(self.config, self.comm, tries, lambda rows: self.report(rows, "dry run"))
            self.emit(rec.Note(message=line))
        return self.config


def no_room(config: Config) -> str:
    """What to tell where a smaller micro batch cannot be had."""
    lower = "lower min_batch_size, " if config.dynamic_batching and config.batch_size > 1 else ""
    return f"out of memory with micro batches of {config.batch_size} rows, and smaller ones cannot be had: {lower}{WAYS_OUT}"
