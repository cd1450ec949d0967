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

    With `groups` only the rows of these row groups; numbers are those in the whole file. Raises `DataError` for a damaged file,
    and where pyarrow is not installed.
    """
    with _opened(path) as (file, size):
        total, number = max(file.metadata.num_rows, 1), 0
        if groups is not None:
            number = sum(file.metadata.row_group(group).num_rows for group in range(groups.start))
        for batch in file.iter_batches(_ROWS, row_groups=None if groups is None else list(groups)):
            for row in batch.to_pylist():
                number += 1
                yield number, _present(row), size * number // total


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
