"""`lumina-engine data prepare` against bare tiktoken: `python tests/bench/prepare.py FOLDER [--texts DIR] [--mb 200]`.

Writes a JSON Lines file of `--mb` MB into FOLDER, made of paragraphs of the `*.txt` and `*.jsonl` files in DIR (without it, of
the built-in corpus), no two records alike. Then, one JSON object each:

- `core`: piece by piece, in one process and on one thread, `encode_ordinary_batch` of tiktoken on the texts of a piece and the
  whole work on that piece (read, check, tokenise, write with digests) in turn; the ratio of their tokens a second.
- `workers`: the command with one and with two workers in turn, each into an empty cache: seconds and their ratio. Then each
  once more while the sum of the proportional memory of all processes is looked at ten times a second, for the largest: that
  takes a fifth of a processor, which two workers on two processors do not leave idle, so those runs are not timed.
- `kills`: the command killed with all its processes at `--kills` moments (drawn, the seed is printed), then run to its end; the
  store's fingerprint beside that of an uninterrupted one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from lumina_engine.data.ahead import PIECE_BYTES
from lumina_engine.data.pieces import build_piece, plan
from lumina_engine.data.tally import Tally
from lumina_engine.data.tokenizer import ConversationTokenizer

TOKENIZER = "gpt-4"
PARAGRAPHS = 20  # of a record


def paragraphs(folder: Path | None) -> list[str]:
    """What records are made of."""
    found: list[str] = []
    for path in sorted(folder.iterdir()) if folder is not None else []:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        if path.suffix == ".txt":
            found += [part for part in text.split("\n\n") if part.strip()]
        elif path.suffix == ".jsonl":
            found += [str(json.loads(line).get("text", "")) for line in text.split("\n") if line.strip()]
    if not found:
        from lumina_engine.data.sample import sample_conversations

        found = [turn["content"] for talk in sample_conversations("train", 0) for turn in talk["messages"]]
    return found


def generate(path: Path, size: int, texts: list[str]) -> None:
    """A file of at least `size` bytes, the same each time."""
    if path.exists() and path.stat().st_size >= size:
        return
    rng, written = random.Random(0), 0
    with path.open("w", encoding="utf-8") as out:
        while written < size:
            line = json.dumps({"text": "\n\n".join(rng.choices(texts, k=PARAGRAPHS))}, ensure_ascii=False) + "\n"
            out.write(line)
            written += len(line.encode())


def core(source: Path) -> dict[str, object]:
    """Tokens a second of one core, the whole work on a piece by bare tiktoken."""
    tokenizer = ConversationTokenizer(TOKENIZER)
    ratios, rates = [], []
    for number, piece in enumerate(plan([source], "auto", PIECE_BYTES) or []):
        texts = [document.text for document in piece.read(Tally())]

        def bare(texts: list[str] = texts) -> tuple[float, int]:
            begin = time.perf_counter()
            rows = tokenizer._encoding.encode_ordinary_batch(texts, num_threads=1)
            return time.perf_counter() - begin, sum(map(len, rows))

        def whole(piece: object = piece) -> tuple[float, int]:
            with tempfile.TemporaryDirectory(dir=source.parent) as folder:
                begin = time.perf_counter()
                built = build_piece(piece, {"all": Path(folder) / "store"}, tokenizer, lambda _: "all")
                return time.perf_counter() - begin, built["all"].num_tokens

        (bare_s, bare_tokens), (whole_s, tokens) = [bare(), whole()] if number % 2 else [whole(), bare()][::-1]
        rates.append(tokens / whole_s)
        ratios.append(rates[-1] * bare_s / bare_tokens)
    figures = {"pieces": len(ratios), "tokens_per_s": statistics.median(rates), "of_bare": statistics.median(ratios)}
    return {"part": "core", **figures, "of_bare_min": min(ratios), "of_bare_max": max(ratios)}


def command(source: Path, cache: Path, workers: int) -> subprocess.Popen[str]:
    keys = [f"train_data_path={source}", f"tokenizer={TOKENIZER}", f"data_cache_dir={cache}", "streaming_threshold_gb=100"]
    words = [sys.executable, "-m", "lumina_engine.cli", "data", "prepare", "--json", "--workers", str(workers), *keys]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)


def tree(process: subprocess.Popen[str]) -> Iterator[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        top = psutil.Process(process.pid)
        yield from [top, *top.children(recursive=True)]


def prepared(source: Path, folder: Path, count: int) -> tuple[float, str]:
    """Seconds and the fingerprint of an uninterrupted run into an empty cache."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        begin = time.perf_counter()
        process = command(source, Path(cache), count)
        told, _ = process.communicate()
        seconds = time.perf_counter() - begin
    assert process.returncode == 0
    return seconds, fingerprint(json.loads(told))


def watched(source: Path, folder: Path, count: int) -> int:
    """Largest sum of memory in bytes of such a run."""
    peak = 0
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        process = command(source, Path(cache), count)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                peak = max(peak, sum(p.memory_full_info().pss for p in tree(process)))
            time.sleep(0.1)
    assert process.returncode == 0
    return peak


def fingerprint(found: object) -> str:
    """Of the training part, wherever the command's answer has it."""
    pending = [found]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            if isinstance(item.get("fingerprint"), str):
                return str(item["fingerprint"])
            pending += item.values()
        elif isinstance(item, list):
            pending += item
    raise AssertionError(f"no fingerprint in {found}")


def workers(source: Path, rounds: int) -> dict[str, object]:
    ratios, seen, rows = [], set(), []
    for number in range(rounds):
        seconds = {}
        for count in (1, 2) if number % 2 == 0 else (2, 1):
            seconds[count], digest = prepared(source, source.parent, count)
            seen.add(digest)
        rows.append([round(seconds[1], 2), round(seconds[2], 2)])
        ratios.append(seconds[1] / seconds[2])
    figures = {"seconds": rows, "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    memory = {count: round(watched(source, source.parent, count) / 1e6) for count in (1, 2)}
    return {"part": "workers", **figures, "pss_mb": memory, "equal": len(seen) == 1}


def kills(source: Path, count: int, seed: int) -> dict[str, object]:
    rng, struck = random.Random(seed), []
    seconds, expected = prepared(source, source.parent, 2)
    with tempfile.TemporaryDirectory(dir=source.parent) as cache:
        for _ in range(count):
            wait = rng.uniform(0.1, 0.3) * seconds  # what is done is not done again, so later ones have less to do
            process = command(source, Path(cache), 2)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=wait)
            struck.append(process.returncode is None)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        told, _ = command(source, Path(cache), 2).communicate()
    digest = fingerprint(json.loads(told))
    return {"part": "kills", "seed": seed, "killed": sum(struck), "of": count, "equal": digest == expected}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--mb", type=float, default=200.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", choices=("core", "workers", "kills"), action="append")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    source = args.folder / "prepare.jsonl"
    generate(source, int(args.mb * 1e6), paragraphs(args.texts))
    for part in args.part or ("core", "workers", "kills"):
        run = {"core": lambda: core(source), "workers": lambda: workers(source, args.rounds)}
        print(json.dumps(run[part]() if part in run else kills(source, args.kills, args.seed)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
