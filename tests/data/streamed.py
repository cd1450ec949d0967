"""A reader of a stream that can be killed: `python -m tests.data.streamed PATH CACHE INDEX` prints a line for 16 rows each."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace

from lumina_engine.data.rows import RowOptions
from lumina_engine.data.stream_open import open_stream
from lumina_engine.data.tokenizer import ConversationTokenizer


def read(path: str, cache: str, index: int = 0, workers: int = 1) -> Iterator[str]:
    """Place behind the rows, and their digest, from row `index` of epoch 0 on."""
    config = SimpleNamespace(seq_length=64, data_cache_dir=cache, streaming_threshold_gb=0.0)
    tokenizer = ConversationTokenizer("lumina-1k")
    rows = open_stream(path, config, tokenizer, workers=workers, piece_bytes=20_000, window_pieces=2).count(RowOptions(64))
    for begin in range(index, rows.num_rows, 16):
        end = min(begin + 16, rows.num_rows)
        built = rows.build([rows.row(0, place) for place in range(begin, end)])
        yield f"{end} {hashlib.sha256(built.input_ids.tobytes() + built.labels.tobytes()).hexdigest()}"


if __name__ == "__main__":
    for line in read(sys.argv[1], sys.argv[2], int(sys.argv[3])):
        print(line, flush=True)
