"""Rows of a Parquet file, a batch in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .conversation import DataError
from .packed import unreadable

MAGIC = b"PAR1"
_ROWS = 256


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any], int]]:
    """(row number from 1, row, bytes of the file read so far, by share). Fields that are null are left out.

    Raises `DataError` for a damaged file, and where pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError("Parquet needs pyarrow", path=path, fix="pip install 'lumina[parquet]'", exit_code=2) from None
    try:
        with pq.ParquetFile(path) as file:
            size, total, number = path.stat().st_size, max(file.metadata.num_rows, 1), 0
            for batch in file.iter_batches(_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _present(row), size * number // total
    except pyarrow.ArrowException as error:
        cause = str(error).partition("\n")[0]
        raise DataError(
            f"the Parquet file is damaged ({cause})", path=path, fix="write it again", reason="damaged file"
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
