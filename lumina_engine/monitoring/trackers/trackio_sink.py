"""trackio: its local SQLite store, in TRACKIO_DIR or the tracker's folder. No connection; `trackio sync` is the user's own."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any

from .points import Point, Subject

_LEVELS = {"info": "info", "warning": "warn", "critical": "error"}


class Sink:
    """One trackio run in the project `lumina` (or TRACKIO_PROJECT).

    Rows carry the number of their record in the log, and the store keeps one row a number: what is delivered twice stands there
    once. trackio's own `Run` would send from a thread that drops what fails.
    """

    def __init__(self, subject: Subject, mark: Any) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(subject.folder))  # read when the package is imported
        from trackio.sqlite_storage import SQLiteStorage

        self._store: Any = SQLiteStorage
        self._project = os.environ.get("TRACKIO_PROJECT") or "lumina"
        self._subject = subject

    def write(self, points: Iterable[Point]) -> None:
        taken = list(points)
        subject, numbers = self._subject, [point for point in taken if point.values]
        if numbers:
            self._store.bulk_log(
                self._project,
                subject.name,
                [dict(point.values) for point in numbers],
                steps=[point.step for point in numbers],
                timestamps=[_time(point) for point in numbers],
                config={key: str(value) for key, value in subject.config.items()},
                log_ids=[f"{subject.id}-{point.seq}" for point in numbers],
                run_id=subject.id,
            )
        texts = [(point, *point.text) for point in taken if point.text is not None]
        if texts:
            self._store.bulk_alert(
                self._project,
                subject.name,
                titles=[tag for _, tag, _ in texts],
                texts=[text for _, _, text in texts],
                levels=[_LEVELS.get(text.split(" ", 1)[0], "info") for _, _, text in texts],
                steps=[point.step for point, _, _ in texts],
                timestamps=[_time(point) for point, _, _ in texts],
                alert_ids=[f"{subject.id}-{point.seq}" for point, _, _ in texts],
                run_id=subject.id,
            )

    def flush(self) -> Any:
        return None  # every call above has committed

    def close(self, state: str | None) -> None:
        pass


def _time(point: Point) -> str:
    return datetime.fromtimestamp(point.t, timezone.utc).isoformat()
