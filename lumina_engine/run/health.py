"""The health monitor beside the supervisor's loop: reads the log at its own pace, hands its alerts over, keeps the report.

It reads the file and not what the loop just read: under a flood of records it falls behind, and nobody waits for it. A turn
costs at most `TURN_BYTES` of log, a few milliseconds.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ..monitoring import record as rec
from ..monitoring.health.monitor import report, write_report
from ..monitoring.health.watch import TOLD_BY_TRAINER, HealthWatch
from ..monitoring.log import MAX_LINE, LogReader
from ..monitoring.say import say

TURN_BYTES = MAX_LINE  # of log that one look reads
LAST_TIME = 1.0  # s that the rest of the log gets when the run, or a start of it, is over
WAITING = 64  # alerts kept for a rank 0 that is not there


class RunHealth:
    """Health of one run, over all its incarnations.

    Args:
        log: the run's metrics.jsonl.
        report: where its health is written as JSON at its end.
        tell: gives an alert to whoever writes the log; False if nobody took it.
        heard: told of every alert that this start of the run has put into the log, whoever it comes from.
        run: the name by which commands know the run, for advice.

    What an earlier incarnation left in the log fills the windows and is not told again.
    """

    def __init__(
        self,
        log: Path,
        report: Path,
        tell: Callable[[rec.Alert], bool],
        heard: Callable[[rec.Alert], None] = lambda alert: None,
        run: str | None = None,
    ) -> None:
        self.watch = HealthWatch(TOLD_BY_TRAINER, run)
        self.inc = 0  # the incarnation whose trouble is news
        self._reader = LogReader(log)
        self._report = report
        self._tell = tell
        self._heard = heard
        self._waiting: deque[rec.Alert] = deque(maxlen=WAITING)
        self._failed = False
        self.behind = False  # whether the last look read as much as one may, so that there is likely more

    def look(self) -> bool:
        """Read on and tell what is new; whether there was anything to read.

        A monitor that fails ends itself, with a word in engine.log, and never the run.
        """
        if self._failed:
            return False
        try:
            before = self._reader.offset
            records = self._reader.read_new(TURN_BYTES)
            self.behind = self._reader.offset - before > TURN_BYTES // 2
            for record in records:
                if isinstance(record, rec.Alert) and record.inc == self.inc:
                    self._heard(record)
                self._waiting.extend(alert for alert in self.watch.observe(record) if record.inc == self.inc)
        except Exception as error:
            self._failed, self.behind = True, False
            say(f"lumina: the health monitor is switched off: {type(error).__name__}: {error}")
            return False
        while self._waiting and self._tell(self._waiting[0]):
            self._waiting.popleft()
        return bool(records)

    def catch_up(self) -> None:
        """Read the rest of the log, for `LAST_TIME` at most: whoever wrote it is gone."""
        until = time.monotonic() + LAST_TIME
        while self.look() and time.monotonic() < until:
            pass

    def finish(self) -> list[rec.Alert]:
        """Read the rest of the log, write the report; alerts that nobody took, for the log."""
        self.catch_up()
        try:
            write_report(self._report, report(self.watch))
        except OSError as error:
            say(f"lumina: {self._report}: {error.strerror}: the health report is not written")
        left = list(self._waiting)
        self._waiting.clear()
        return left
