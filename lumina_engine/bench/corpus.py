"""The calibration corpus of the health monitor: recorded runs, healthy and with one injected fault each.

A file is xz-compressed JSON: a list of runs. Steps are stored by column, since their records are alike; other records as they
are. Numbers have four significant digits, times three.
"""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ..monitoring import record as rec

COLUMNS = {"loss": 4, "grad_norm": 4, "lr": 6, "step_time": 3, "data_time": 3}  # field -> significant digits
RARE = ("repeats", "frozen")
SAME = ("batch", "seq_length")  # the same in every step of a run


@dataclass(slots=True)
class Recorded:
    """One run. `fault` is "healthy" or what was injected in step `at`; `critical` and `warning` are the codes that tell it.

    `held` marks seeds that no threshold was chosen by.
    """

    fault: str
    seed: int
    shape: str
    held: bool
    at: int = 0
    critical: list[str] = field(default_factory=list)
    warning: list[str] = field(default_factory=list)
    generated: bool = False  # made by arithmetic, not by a run
    steps: dict[str, Any] = field(default_factory=dict)
    others: list[dict[str, Any]] = field(default_factory=list)

    def take(self, records: Iterable[rec.Record]) -> Recorded:
        """Keep what the monitor reads of these records: no alerts, no text. Times count from the first."""
        found = [
            record
            for record in records
            if isinstance(record, rec.Step | rec.Experts | rec.Eval | rec.Hardware | rec.Checkpoint)
        ]
        steps = [record for record in found if isinstance(record, rec.Step)]
        begin = found[0].t
        self.steps = {name: [_short(getattr(record, name), digits) for record in steps] for name, digits in COLUMNS.items()}
        self.steps |= {"first": steps[0].step, "skipped": [i for i, record in enumerate(steps) if record.skipped]}
        self.steps |= {name: getattr(steps[0], name) for name in SAME}
        self.steps["rare"] = {str(i): rare for i, record in enumerate(steps) if (rare := _rare(record))}
        number = 0
        for record in found:
            number += isinstance(record, rec.Step)
            if not isinstance(record, rec.Step):
                content = json.loads(rec.encode(record))
                content["t"] = round(record.t - begin, 2)
                self.others.append({"after": number, **_shorten(content)})
        return self

    def records(self) -> Iterator[rec.Record]:
        """The records in their order."""
        waiting, seq, clock = list(self.others), 0, 1e9
        columns = {name: self.steps[name] for name in COLUMNS}
        count = len(columns["loss"])
        for number in range(count + 1):
            if number:
                values: dict[str, Any] = {name: _number(column[number - 1]) for name, column in columns.items()}
                clock += values["step_time"] or 0.0
                seq += 1
                shape = {name: self.steps[name] for name in SAME}
                step = self.steps["first"] + number - 1
                skipped = number - 1 in self.steps["skipped"]
                values |= self.steps.get("rare", {}).get(str(number - 1), {})
                yield rec.Step(seq=seq, t=clock, inc=1, step=step, skipped=skipped, **shape, **values)
            while waiting and waiting[0]["after"] == number:
                content = {key: value for key, value in waiting.pop(0).items() if key != "after"}
                seq += 1
                record = rec.decode(json.dumps({**content, "seq": seq, "inc": 1}))
                record.t += 1e9
                yield record


def read(path: Path) -> list[Recorded]:
    """The runs of a corpus file, or of all `*.json.xz` in a folder.

    Raises:
        OSError, ValueError: it cannot be read, or is no corpus.
    """
    files = sorted(path.glob("*.json.xz")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(2, "no corpus (*.json.xz) in this folder", str(path))
    runs: list[Recorded] = []
    for file in files:
        try:
            runs += msgspec.json.decode(lzma.decompress(file.read_bytes()), type=list[Recorded])
        except (lzma.LZMAError, msgspec.MsgspecError) as error:
            raise ValueError(f"{file}: no corpus: {error}") from error
    return runs


def write(path: Path, runs: list[Recorded]) -> None:
    """Write a corpus file."""
    path.write_bytes(lzma.compress(msgspec.json.encode(runs), preset=9 | lzma.PRESET_EXTREME))


def _rare(record: rec.Step) -> dict[str, Any]:
    """The fields that few steps have."""
    return {name: value for name in RARE if (value := getattr(record, name))}


def _short(value: float | None, digits: int) -> Any:
    if value is None:
        return None
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return float(f"{value:.{digits}g}")


def _shorten(value: Any) -> Any:
    if isinstance(value, float):
        return _short(value, 4) if value < 1e9 else value
    if isinstance(value, dict):
        return {key: _shorten(item) for key, item in value.items()}
    return [_shorten(item) for item in value] if isinstance(value, list) else value


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
