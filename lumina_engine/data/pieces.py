"""A data set in pieces that are tokenised by themselves, so that many can work and a killed one costs its piece only.

The pieces depend on the files and a size alone: a JSON Lines file falls into ranges of that size (a line belongs to the piece
in which it begins), a Parquet file into runs of row groups of about that size, any other file is one piece. Their stores,
joined in order, are the store that one pass over the files would give.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .conversation import DataError, Document
from .files import lines_before, located
from .formats import layout_at, read_conversations, read_groups, read_lines
from .packed import is_packed
from .parquet import row_groups
from .tally import Tally
from .token_store import Progress, TokenStore, build_parts, open_verified

Part = Callable[[Document], str]


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `start` to `stop` of a JSON Lines file, row groups of a Parquet file; with `stop` None a whole file of any kind."""

    path: str
    layout: str
    start: int = 0
    stop: int | None = None
    kind: str = "jsonl"  # "jsonl" or "parquet"; of a whole file it says nothing

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `Piece(**entry)`."""
        return asdict(self)

    def read(self, tally: Tally) -> Iterator[Document]:
        """Its conversations. Raises `DataError` with the line in the file."""
        if self.stop is None:
            yield from read_conversations(self.path, self.layout, tally=tally)
            return
        path = located(self.path)
        if self.kind == "parquet":
            yield from read_groups(path, self.layout, range(self.start, self.stop), tally)
            return
        try:
            yield from read_lines(path, self.layout, self.start, self.stop, tally)
        except DataError as error:
            if error.line is None or not self.start:
                raise
            raise error.at_line(error.line + lines_before(path, self.start)) from None


def plan(files: list[Path], format: str, size: int) -> list[Piece] | None:
    """The pieces of `files` in order, or None where they cannot be read apart: trees may come again in another file.

    Raises `DataError`.
    """
    pieces = []
    for path in files:
        kind, layout = layout_at(path, format)
        if layout == "oasst":
            return None
        length = path.stat().st_size
        if kind == "jsonl" and not is_packed(path) and length > size:
            starts = range(0, length, size)
            pieces += [Piece(str(path), layout, start, min(start + size, length)) for start in starts]
        elif kind == "parquet" and length > size:
            pieces += [Piece(str(path), layout, begin, end, kind) for begin, end in _runs(row_groups(path), size)]
        else:
            pieces.append(Piece(str(path), layout))
    return pieces


def _runs(sizes: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Runs [begin, end) of neighbours, each of at most `most` in sum or of one alone."""
    begin, total = 0, 0
    for at, size in enumerate(sizes):
        if at > begin and total + size > most:
            yield begin, at
            begin, total = at, 0
        total += size
    if begin < len(sizes):
        yield begin, len(sizes)


def build_piece(
    piece: Piece,
    targets: Mapping[str, Path],
    tokenizer: Any,
    part_of: Callable[[Document], str],
    progress: Progress | None = None,
) -> dict[str, TokenStore]:
    """The stores of a piece, one for each part; those that are there and whole are kept. Raises `DataError`."""
    there = {part: open_verified(target) for part, target in targets.items()}
    if all(store is not None for store in there.values()):
        return {part: store for part, store in there.items() if store is not None}
    for target in targets.values():
        shutil.rmtree(target, ignore_errors=True)
    tally = Tally()
    pairs = ((part_of(document), document) for document in piece.read(tally))
    built = build_parts(pairs, targets, tokenizer, lambda: {"tally": tally.to_dict()}, progress=progress)
    assert built is not None  # nothing is required
    return built
