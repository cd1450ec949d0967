"""MLflow: where MLFLOW_TRACKING_URI says, else into a SQLite file in the tracker's folder, which opens no connection."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from .points import Point, Subject

_METRICS, _PARAMS, _LONGEST = 1_000, 100, 500  # of one call, and characters of a parameter, as the server accepts
_NAME, _DIGEST = 250, 8  # characters of a metric's name, as the server accepts, and of the digest in one that is changed
_STATES = {"finished": "FINISHED", "failed": "FAILED", "crashed": "FAILED", "preempted": "KILLED"}
_Item = TypeVar("_Item")


def _pieces(items: Iterable[_Item], size: int) -> Iterator[Sequence[_Item]]:
    iterator = iter(items)
    while piece := list(islice(iterator, size)):
        yield piece


def metric_name(name: str) -> str:
    """The name as MLflow takes it: letters, digits, `_-. ` and parts between slashes that could be files, 250 characters.

    One that has to be changed ends in a digest of what it was: two names never become one, and a restart gives the same.
    """
    parts = [part for part in re.sub(r"[^/\w.\- ]", "_", name).split("/") if part not in ("", ".", "..")]
    clean = "/".join(parts)
    if name and clean == name and len(name) <= _NAME:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST]
    return f"{clean[: _NAME - _DIGEST - 1]}-{digest}"


class Sink:
    """One MLflow run in the experiment `lumina` (or MLFLOW_EXPERIMENT_NAME); the mark is its id.

    A store keeps one row for each metric, step and time, so what is delivered twice stands there once.
    """

    def __init__(self, subject: Subject, mark: Any) -> None:
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)
        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{subject.folder / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        if mark:
            self._run = str(mark)
            self._client.update_run(self._run, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "lumina"
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        self._run = self._client.create_run(experiment, run_name=subject.name).info.run_id
        params = (Param(key, str(value)[:_LONGEST]) for key, value in subject.config.items())
        for piece in _pieces(params, _PARAMS):
            self._client.log_batch(self._run, params=list(piece))

    def write(self, points: Iterable[Point]) -> None:
        from mlflow.entities import RunTag

        metrics, tags = [], []
        for point in points:
            at = (int(point.t * 1e3), point.step)
            metrics += [self._metric(metric_name(name), value, *at) for name, value in point.values.items()]
            if point.text is not None:
                tags.append(RunTag(f"{point.text[0]}.{point.seq}", f"step {point.step}: {point.text[1]}"[:_LONGEST]))
            if point.rewind is not None:  # a store cannot take back: later values of a step stand beside the abandoned ones
                tags.append(RunTag(f"rewind.{point.seq}", f"to step {point.rewind}"))
        for piece in _pieces(metrics, _METRICS):
            self._client.log_batch(self._run, metrics=list(piece))
        for tag_piece in _pieces(tags, _PARAMS):
            self._client.log_batch(self._run, tags=list(tag_piece))

    def flush(self) -> Any:
        return self._run  # every call above returned when its rows were stored

    def close(self, state: str | None) -> None:
        if state is not None:
            self._client.set_terminated(self._run, _STATES.get(state, "FINISHED"))
