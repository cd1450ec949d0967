"""Near duplicates by MinHash (Broder 1997) with banding (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4)."""

from __future__ import annotations

import zlib

import numpy as np

_PRIME = np.uint64((1 << 31) - 1)  # above every shingle, and products with it stay below 2^64
_BANDS, _ROWS = 16, 4  # two texts of Jaccard 0.8 share a band with probability 0.9998, of 0.5 with 0.64
_SIZE = 5  # words of a shingle
_LEAST = 8  # shingles; shorter texts are compared as wholes only


class NearDuplicates:
    """Texts that were seen; tells whether the next one is nearly one of them.

    Candidates share a band of hashes; whether they count is decided by the share of all 64 hashes that agree, an estimate of
    the Jaccard similarity with a standard error of at most 0.06.
    """

    def __init__(self, threshold: float = 0.8, seed: int = 0) -> None:
        self.threshold = threshold
        rng = np.random.default_rng(seed)
        self._a = rng.integers(1, 1 << 31, (_BANDS * _ROWS, 1), dtype=np.uint64)
        self._b = rng.integers(0, 1 << 31, (_BANDS * _ROWS, 1), dtype=np.uint64)
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(_BANDS)]
        self._signatures: list[np.ndarray] = []

    def seen(self, text: str) -> bool:
        """Whether a text nearly equal to `text` came before; remembers it."""
        shingles = _shingles(text)
        if len(shingles) < _LEAST:
            return False
        signature = ((shingles * self._a + self._b) % _PRIME).min(axis=1).astype(np.uint32)
        keys = [row.tobytes() for row in signature.reshape(_BANDS, _ROWS)]
        candidates = {number for band, key in zip(self._bands, keys, strict=True) for number in band.get(key, ())}
        near = any(np.mean(self._signatures[number] == signature) >= self.threshold for number in candidates)
        if not near:  # a repeat leads to the first of its kind, so one entry for each kind is enough
            for band, key in zip(self._bands, keys, strict=True):
                band.setdefault(key, []).append(len(self._signatures))
            self._signatures.append(signature)
        return near


def _shingles(text: str) -> np.ndarray:
    """Hashes below 2^30 of every run of five words, each once."""
    words = np.fromiter((zlib.crc32(word.encode("utf-8", "replace")) for word in text.casefold().split()), dtype=np.uint64)
    if len(words) < _SIZE:
        return words[:0]
    mixed = np.zeros(len(words) - _SIZE + 1, dtype=np.uint64)
    for start in range(_SIZE):  # wraps around: only equality counts
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + words[start : start + len(mixed)]
    return np.unique((mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(34))
