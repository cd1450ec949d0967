"""A small deterministic byte-pair trainer: it made `vocab/lumina-1k.tiktoken` and makes the same file again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from lumina_engine.data.vocabulary import LUMINA_1K_MERGES, LUMINA_PATTERN, tiktoken_file


def train_bpe(texts: Iterable[str], pattern: str, merges: int) -> list[bytes]:
    """Tokens in rank order: the 256 bytes, then `merges` merges of adjacent tokens inside the pieces of `pattern`.

    Byte-pair encoding (Sennrich et al. 2016) as tiktoken applies it: a pair is known by its joined bytes. The most frequent
    pair is merged first; among equals the one whose bytes come first. Raises ValueError if the texts give fewer merges.
    """
    import regex  # a requirement of tiktoken; knows \p{…} as tiktoken does

    split = regex.compile(pattern)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split.findall(text))
    pieces = [([bytes((byte,)) for byte in piece.encode("utf-8")], count) for piece, count in sorted(counts.items())]
    tokens = [bytes((byte,)) for byte in range(256)]
    known = set(tokens)
    # joined bytes -> [count, pieces that may hold the pair]
    pairs: Counter[bytes] = Counter()
    holders: dict[bytes, set[int]] = {}
    for at, (piece_tokens, count) in enumerate(pieces):
        for pair in _joined(piece_tokens):
            pairs[pair] += count
            holders.setdefault(pair, set()).add(at)
    while len(tokens) < 256 + merges:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None:
            raise ValueError(f"the texts give {len(tokens) - 256} merges, {merges} are asked for")
        if best not in known:
            known.add(best)
            tokens.append(best)
        for at in sorted(holders.pop(best)):
            old, count = pieces[at]
            new = _merged(old, best)
            for pair in _joined(old):
                pairs[pair] -= count
            for pair in _joined(new):
                pairs[pair] += count
                holders.setdefault(pair, set()).add(at)
            pieces[at] = (new, count)
        pairs = +pairs
    return tokens


def _joined(tokens: list[bytes]) -> list[bytes]:
    return [left + right for left, right in pairwise(tokens)]


def _merged(tokens: list[bytes], pair: bytes) -> list[bytes]:
    """`tokens` with each adjacent two that give `pair` joined, from the left."""
    out: list[bytes] = []
    at = 0
    while at < len(tokens):
        if at + 1 < len(tokens) and tokens[at] + tokens[at + 1] == pair:
            out.append(pair)
            at += 2
        else:
            out.append(tokens[at])
            at += 1
    return out


def lumina_1k_file() -> bytes:
    """The bytes of `vocab/lumina-1k.tiktoken`, trained on the training half of the built-in corpus."""
    from lumina_engine.data.sample import conversations

    def texts() -> Iterable[str]:
        for conversation in conversations("train"):
            for message in conversation.messages:
                yield f"{message.role}\n"
                yield message.content
                yield "\n"

    return tiktoken_file(train_bpe(texts(), LUMINA_PATTERN, LUMINA_1K_MERGES))


def write_lumina_1k(path: Path | None = None) -> Path:
    """Write the vocabulary where the package reads it (or to `path`)."""
    target = path or Path(__file__).parent / "vocab" / "lumina-1k.tiktoken"
    target.write_bytes(lumina_1k_file())
    return target
