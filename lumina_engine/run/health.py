"""The health monitor beside the supervisor's loop: reads the log at its own pace, hands its alerts over, keeps the report.

It reads the file and not what the loop just read: under a flood of records it falls behind, and nobody waits for it. A look
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
LAST_TIME = 10.0  # s that the rest of the log gets when the run is over
# s between two turns while it keeps up: each of them takes a core from training, and code out of its cache
HEALTH_TIME = 1.0
TURN_TIME = 0.02  # s of one turn while it is behind
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
        self.inc = 0  # the first incarnation whose trouble is news
        self.behind = False  # whether the last look read as much as one may, so that there is likely more
        self._reader = LogReader(log)
        self._report = report
        self._tell = tell
        self._heard = heard
        self._waiting: deque[rec.Alert] = deque(maxlen=WAITING)
        self._taken: deque[rec.Alert] = deque(maxlen=WAITING)  # by a rank 0 that has not written them yet
        self._died_at: int | None = None  # bytes of log that the last ranks left behind, until they are read
        self._looked = 0.0
        self._failed = False

    def tick(self, now: float) -> None:
        """One turn of the supervisor's loop at that monotonic second."""
        if not self.behind and now - self._looked < HEALTH_TIME:
            return
        self._looked, until = now, time.monotonic() + TURN_TIME
        while self.look() and self.behind and time.monotonic() < until:
            pass

    def renew(self) -> None:
        """The ranks are others from here on: what the last ones took and did not write is told again."""
        try:
            self._died_at = self._reader.path.stat().st_size
        except OSError:
            self._died_at = 0

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
                if isinstance(record, rec.Alert) and record.inc >= self.inc:
                    self._written(record)
                self._waiting.extend(alert for alert in self.watch.observe(record) if record.inc >= self.inc)
        except Exception as error:
            self._failed, self.behind = True, False
            say(f"lumina: the health monitor is switched off: {type(error).__name__}: {error}")
            return False
        self._hand_over()
        return bool(records)

    def _written(self, record: rec.Alert) -> None:
        """An alert is in the log, whoever it came from."""
        self._taken = deque((one for one in self._taken if (one.code, one.message) != (record.code, record.message)), WAITING)
        self._heard(record)

    def _hand_over(self) -> None:
        """Tell what waits; behind a death, once it is known what the dead rank 0 has written."""
        if self._died_at is not None and self._reader.offset >= self._died_at:
            self._waiting.extendleft(reversed(self._taken))
            self._taken.clear()
            self._died_at = None
        while self._waiting and self._died_at is None and self._tell(self._waiting[0]):
            self._taken.append(self._waiting.popleft())

    def finish(self) -> list[rec.Alert]:
        """Read the rest of the log, write the report; alerts that nobody has written, for the log."""
        until = time.monotonic() + LAST_TIME
        while self.look() and time.monotonic() < until:
            pass
        if self.behind:
            say(f"lumina: {self._report}: the log is too long to be read to its end now: the health report is not written")
        else:
            self._write_report()
        left = [*([] if self.behind else self._taken), *self._waiting]
        self._taken.clear()
        self._waiting.clear()
        return left

    def _write_report(self) -> None:
        try:
            write_report(self._report, report(self.watch))
        except OSError as error:
            say(f"lumina: {self._report}: {error.strerror}: the health report is not written")
