"""Rows of a Parquet file, a batch in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .conversation import DataError
from .packed import unreadable

MAGIC = b"PAR1"
_ROWS = 256


def parquet_rows(path: Path, groups: range | None = None) -> Iterator[tuple[int, dict[str, Any], int]]:
    """(row number from 1, row, bytes of the file read so far, by share). Fields that are null are left out.

    With `groups` only the rows of these row groups; numbers are those in the whole file. A value that Python cannot hold, such
    as a date beyond the year 9999, is an error of its row, where it is read. Raises `DataError` for a damaged file, and where
    pyarrow is not installed.
    """
    with _opened(path) as (file, size):
        total, number = max(file.metadata.num_rows, 1), 0
        if groups is not None:
            number = sum(file.metadata.row_group(group).num_rows for group in range(groups.start))
        for batch in file.iter_batches(_ROWS, row_groups=None if groups is None else list(groups)):
            for row in _rows(batch, path, number):
                number += 1
                yield number, row, size * number // total


class _Row(dict[str, Any]):
    """A row some of whose columns Python cannot hold. Reading one of them raises its `DataError`; the others are as ever."""

    def __init__(self, fields: dict[str, Any], faults: dict[str, DataError]) -> None:
        super().__init__(fields | dict.fromkeys(faults))
        self._faults = faults

    def __getitem__(self, key: str) -> Any:
        if key in self._faults:
            raise self._faults[key]
        return super().__getitem__(key)

    def __or__(self, other: dict[str, Any]) -> _Row:  # type: ignore[override]
        """With other fields in place of some, and the faults of the rest."""
        return _Row(dict(self) | other, {name: fault for name, fault in self._faults.items() if name not in other})

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict. Raises `DataError`."""
        try:
            return self[key]
        except KeyError:
            return default


def _rows(batch: Any, path: Path, before: int) -> Iterator[dict[str, Any]]:
    """The rows of a batch that begins after row `before`."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # one value is enough: look at each
        for at in range(batch.num_rows):
            yield _row_at(batch, at, path, before + at + 1)
        return
    yield from map(_present, rows)


def _row_at(batch: Any, at: int, path: Path, number: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    faults: dict[str, DataError] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            fields[name] = column[at].as_py()
        except (ValueError, OverflowError) as error:
            cause = f"column {name!r} ({column.type}) holds a value that cannot be read: {str(error).partition(chr(10))[0]}"
            fix = "correct the value, or write the column as text"
            faults[name] = DataError(cause, path=path, line=number, fix=fix, reason="unreadable value")
    return _Row(_present(fields), faults)


def row_groups(path: Path) -> list[int]:
    """Bytes of each row group, packed as they are. Raises `DataError`."""
    with _opened(path) as (file, _):
        groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
        return [sum(group.column(c).total_compressed_size for c in range(group.num_columns)) for group in groups]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, int]]:
    """(the Parquet file, its bytes)."""
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError("Parquet needs pyarrow", path=path, fix="pip install 'lumina[parquet]'", exit_code=2) from None
    try:
        with path.open("rb") as raw, pq.ParquetFile(raw) as file:
            yield file, path.stat().st_size
    except pyarrow.ArrowException as error:
        cause = str(error).partition("\n")[0]
        raise DataError(
            f"the Parquet file is damaged ({cause})", path=path, fix="fetch or write it again", reason="damaged file"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None


def _present(value: Any) -> Any:
    """Without null fields: columns exist in every row, keys of a JSON object only where they mean something."""
    if isinstance(value, dict):
        return {key: _present(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_present(entry) for entry in value]
    return value
