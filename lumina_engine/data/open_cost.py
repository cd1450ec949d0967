"""What mapping a token store costs: `python -m lumina_engine.data.open_cost PATH` prints one JSON object.

Not what the start of a run costs: a run reads its sources and its stores whole before, to compare their digests.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil

from .token_store import TokenStore


def main() -> int:
    """Open the store, read its first and its last token, and say what that took of time and of resident memory."""
    process = psutil.Process()
    before = process.memory_info().rss
    begin = time.perf_counter()
    store = TokenStore(Path(sys.argv[1]))
    edges = [int(store.tokens[0]), int(store.tokens[-1])]
    seconds = time.perf_counter() - begin
    grown = process.memory_info().rss - before
    size = sum(entry["bytes"] for entry in store.meta["files"].values())
    print(json.dumps({"open_s": seconds, "open_bytes": grown, "store_bytes": size, "edges": edges}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
