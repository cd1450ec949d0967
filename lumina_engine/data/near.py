"""Near duplicates by MinHash (Broder 1997) with banding (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4)."""

from __future__ import annotations

import re
import zlib

import numpy as np

_PRIME = np.uint64((1 << 31) - 1)  # above every shingle, and products with it stay below 2^64
_BANDS, _ROWS = 16, 4  # two texts of Jaccard 0.8 share a band with probability 0.9998, of 0.5 with 0.64
_HASHES = _BANDS * _ROWS
_SIZE = 5  # words of a shingle
_LEAST = 8  # shingles; shorter texts are compared as wholes only
_BLOCK = 1024  # shingles that are hashed together: half a megabyte, which stays in the processor's cache
_CROWD = 64  # texts of one key of a band
_WORD = re.compile(r"\S+")


class NearDuplicates:
    """Texts that were seen; tells whether the next one is nearly one of them.

    Candidates share a band of hashes; whether they count is decided by the share of all 64 hashes that agree, an estimate of
    the Jaccard similarity with a standard error of at most 0.06. A key of a band that 64 texts have stands for a passage that
    many texts share and takes no more of them: they are found by their other bands. So a text is compared with 1,024 others at
    most, however many there are. `compared` counts these comparisons.
    """

    def __init__(self, threshold: float = 0.8, seed: int = 0) -> None:
        self.threshold = threshold
        self.compared = 0
        rng = np.random.default_rng(seed)
        self._a = rng.integers(1, 1 << 31, (_HASHES, 1), dtype=np.uint64)
        self._b = rng.integers(0, 1 << 31, (_HASHES, 1), dtype=np.uint64)
        self._bands: list[dict[bytes, tuple[int, ...]]] = [{} for _ in range(_BANDS)]
        self._signatures = np.empty((256, _HASHES), dtype=np.uint32)  # grows by doubling
        self._count = 0

    def seen(self, text: str) -> bool:
        """Whether a text nearly equal to `text` came before; remembers it."""
        shingles = _shingles(text)
        if len(shingles) < _LEAST:
            return False
        signature = self._signature(shingles)
        keys = [row.tobytes() for row in signature.reshape(_BANDS, _ROWS)]
        candidates = {number for band, key in zip(self._bands, keys, strict=True) for number in band.get(key, ())}
        self.compared += len(candidates)
        agreeing = np.mean(self._signatures[list(candidates)] == signature, axis=1) if candidates else np.zeros(1)
        near = bool(agreeing.max() >= self.threshold)
        if not near:  # a repeat leads to the first of its kind, so one entry for each kind is enough
            self._remember(signature, keys)
        return near

    def _signature(self, shingles: np.ndarray) -> np.ndarray:
        """[64] u32, the least value of each hash over the shingles; a block at a time, so a long text takes no more room."""
        least = np.full(_HASHES, _PRIME)
        for begin in range(0, len(shingles), _BLOCK):
            hashes = shingles[begin : begin + _BLOCK] * self._a
            hashes += self._b
            hashes %= _PRIME
            np.minimum(least, hashes.min(axis=1), out=least)
        return least.astype(np.uint32)

    def _remember(self, signature: np.ndarray, keys: list[bytes]) -> None:
        if self._count == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[self._count] = signature
        alone = (self._count,)  # one object for the bands in which nothing else has the key, as nearly all are
        for band, key in zip(self._bands, keys, strict=True):
            others = band.get(key)
            if others is None:
                band[key] = alone
            elif len(others) < _CROWD:
                band[key] = others + alone
        self._count += 1


def _shingles(text: str) -> np.ndarray:
    """Hashes below 2^30 of every run of five words, each once."""
    found = (zlib.crc32(word[0].encode("utf-8", "replace")) for word in _WORD.finditer(text.casefold()))
    words = np.fromiter(found, dtype=np.uint64)
    if len(words) < _SIZE:
        return words[:0]
    mixed = np.zeros(len(words) - _SIZE + 1, dtype=np.uint64)
    for start in range(_SIZE):  # wraps around: only equality counts
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + words[start : start + len(mixed)]
    return np.unique((mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(34))
