"""From the command to the first step: the four stages of a start, read from the run's own files."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from lumina_engine.monitoring.log import LogReader
from lumina_engine.monitoring.record import Run, Step
from lumina_engine.text import safe_text

STAGES = ("run directory", "supervisor", "ranks", "first step")
_ENDED = ("failed", "crashed", "preempted")
_TAIL_BYTES = 64 << 10


@dataclass
class Progress:
    """When each stage was reached (seconds after the start), what the run says now, and why it failed."""

    begun: float = field(default_factory=time.monotonic)
    reached: dict[str, float] = field(default_factory=dict)
    now: str = "checking the configuration"
    failed: str = ""

    def reach(self, stage: str) -> None:
        """Note a stage, and those before it, at this moment."""
        for earlier in STAGES[: STAGES.index(stage) + 1]:
            self.reached.setdefault(earlier, time.monotonic() - self.begun)

    @property
    def done(self) -> bool:
        return STAGES[-1] in self.reached or bool(self.failed)

    @property
    def waiting_for(self) -> str:
        """The stage that comes next."""
        return next((stage for stage in STAGES if stage not in self.reached), STAGES[-1])


class Watch:
    """Follows a run that was just started by its metric log."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path, self.progress = path, progress
        self._reader = LogReader(path / "metrics.jsonl")

    def look(self) -> None:
        """Read what is new. Never blocks for long; a log that is not there yet is no error."""
        try:
            records = self._reader.read_new()
        except OSError:
            return
        for record in records:
            if isinstance(record, Step):
                self.progress.reach("first step")
            elif isinstance(record, Run):
                self.progress.now = record.state + (f": {record.reason}" if record.reason else "")
                if record.state in ("compiling", "running"):
                    self.progress.reach("ranks")
                elif record.state == "finished":
                    self.progress.reach("first step")
                elif record.state in _ENDED and "first step" not in self.progress.reached:
                    self.progress.failed = self.progress.now


def last_lines(path: Path, count: int = 20) -> list[str]:
    """The last lines of a log, safe to show; nothing if it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [safe_text(line) for line in text.splitlines()[-count:]]
