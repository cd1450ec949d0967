"""What reading data costs: the loader beside the training step that it feeds, and opening a large token store.

The loader reads a store on the disk whose conversations have lengths as in real sets; it and the real training loop take turns,
so that both see the same machine. A store is opened in processes of their own, by `open_cost`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..data.batch import TrainLoader
from ..data.store_writer import FILES, META, STORE_FORMAT, TEXT, fingerprint_of
from ..data.token_store import TokenStore
from .benchmark import measure as measure_training

GOALS = {"loader_ratio": 20.0, "open_s": 0.05, "open_bytes": 50e6}
OPENINGS = 5
_DOCUMENT = 250  # tokens of a document on average, where rows are twice as long or more
Tell = Callable[[dict[str, Any]], None]


def measure(config: Any, numbers: Mapping[str, int], tell: Tell) -> dict[str, Any]:
    """All figures; `tell` gets a dictionary as each part is measured.

    `numbers`: `steps` and `warmup` of training, `rounds` (passes of the loader), `loaded_tokens` in the store that it reads,
    `opened_mb` of the store that is opened.

    Returns:
        tokens_per_s (median of `rounds` passes of the loader, with _min, _max and spread), step_tokens_per_s (median of `steps`
        steps of training, with _min, _max), loader_ratio (of the medians) and loader_ratio_min (slowest pass by fastest step),
        plan_s (packing `loaded_tokens` before the first row), open_s and open_bytes (worst of 5 processes that open a store of
        `opened_bytes`: seconds, and growth of their resident memory).

    Raises:
        OSError: the temporary folder cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="lumina-bench-") as folder:
        small = generated_store(Path(folder) / "loaded", numbers["loaded_tokens"], config.seq_length, config.seed, sparse=False)
        passes, plans = [], []
        figures: dict[str, Any] = {}
        for number in range(numbers["rounds"]):
            if number == numbers["rounds"] // 2:
                figures = measure_training(
                    config, numbers["steps"], numbers["warmup"], lambda step: tell({"part": "step", **step})
                )
            plan_s, rate = loader_pass(small, config)
            plans.append(plan_s)
            passes.append(rate)
            tell({"part": "loader", "round": number + 1, "tokens_per_s": rate, "plan_s": plan_s})
        big = generated_store(
            Path(folder) / "opened", numbers["opened_mb"] * 200_000, config.seq_length, config.seed, sparse=True
        )
        costs = [opening(big) for _ in range(OPENINGS)]
    for cost in costs:
        tell({"part": "open", **cost})
    rate, step_rate = statistics.median(passes), figures["tokens_per_s"]
    return {
        "tokens_per_s": rate,
        "tokens_per_s_min": min(passes),
        "tokens_per_s_max": max(passes),
        "spread": (max(passes) - min(passes)) / rate,
        "rounds": numbers["rounds"],
        "step_tokens_per_s": step_rate,
        "step_tokens_per_s_min": figures["tokens_per_s_min"],
        "step_tokens_per_s_max": figures["tokens_per_s_max"],
        "loader_ratio": rate / step_rate,
        "loader_ratio_min": min(passes) / figures["tokens_per_s_max"],
        "loaded_tokens": small.num_tokens,
        "plan_s": statistics.median(plans),
        "opened_bytes": costs[0]["store_bytes"],
        "open_s": max(cost["open_s"] for cost in costs),
        "open_bytes": max(cost["open_bytes"] for cost in costs),
        "num_workers": config.num_workers,
        "threads": figures["threads"],
    }


def loader_pass(store: TokenStore, config: Any) -> tuple[float, float]:
    """(seconds until the rows are planned, tokens that are no padding per second over one epoch), as one rank reads them."""
    begin = time.perf_counter()
    loader = TrainLoader(store, config.model_copy(update={"num_epochs": 1, "curriculum_learning": False}))
    planned = time.perf_counter()
    tokens = sum(batch.num_tokens for step in loader for batch in step)
    return planned - begin, tokens / (time.perf_counter() - planned)


def opening(path: TokenStore) -> dict[str, Any]:
    """What `open_cost` says of a store, in a process of its own."""
    argv = [sys.executable, "-m", "lumina_engine.data.open_cost", str(path.path)]
    return json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


def generated_store(folder: Path, tokens: int, limit: int, seed: int, *, sparse: bool) -> TokenStore:
    """A store of about `tokens` tokens: plain documents, none longer than `limit`.

    A `sparse` one takes no room: tokens, mask and digests are holes in their files, which read as zeros.
    """
    folder.mkdir()
    rng = np.random.default_rng(seed)
    mean = min(_DOCUMENT, limit // 2)
    lengths = np.clip(rng.gamma(2.0, mean / 2, max(1, tokens // mean)), 8, limit).astype(np.uint64)
    offsets = np.concatenate([np.zeros(1, np.uint64), np.cumsum(lengths)])
    total = tokens if sparse else int(offsets[-1])  # the size is what matters of a sparse one
    sizes = {"tokens.u32": 4 * total, "mask.u8": total, "offsets.u64": offsets.nbytes, "digests.u64": 8 * len(lengths)}
    offsets.astype("<u8").tofile(folder / "offsets.u64")
    if not sparse:
        rng.integers(0, 256, total, dtype=np.uint32).astype("<u4").tofile(folder / "tokens.u32")
        np.full(total, TEXT, np.uint8).tofile(folder / "mask.u8")
    for name, size in sizes.items():
        (folder / name).touch()
        os.truncate(folder / name, size)
    weights = [0.0, 1.0]
    digests = dict.fromkeys(FILES, "")  # nobody asks: opening reads no token, and what nobody keeps needs no checksum
    meta = {
        "format": STORE_FORMAT,
        "fingerprint": fingerprint_of(digests | {"tokens.u32": f"{total} {seed}"}, weights),
        "documents": len(lengths),
        "tokens": total,
        "trained_tokens": total,
        "longest": int(lengths.max()),
        "weights": weights,
        "files": {name: {"bytes": size, "sha256": digests[name]} for name, size in sizes.items()},
        "tokenizer": {"name": "generated", "digest": "", "pad_id": 0},
        "template": {},
    }
    (folder / META).write_text(json.dumps(meta), encoding="utf-8")
    return TokenStore(folder)
