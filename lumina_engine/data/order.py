"""The order of the data: a permutation that is computed, not stored.

`Order.document(epoch, i)` is a pure function of (fingerprint, seed, epoch, i), costs the same for any i and needs no memory,
so training resumes anywhere without reading what came before, and any rank or worker computes its own part.

A balanced Feistel network over 2h bits is a permutation of [0, 4^h); values at or above n are sent through it again until
they fall below n ("cycle walking", Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002), which makes it
a permutation of [0, n). With 4^h < 4n that takes fewer than four rounds on average. The round function is the finaliser of
splitmix64 (Steele, Lea and Flood, OOPSLA 2014); the round keys are BLAKE2b of fingerprint, seed and epoch.
"""

from __future__ import annotations

import hashlib

import numpy as np

# Part of every fingerprint. Raise it when order, packing or cutting change, so that no run is resumed on other rows.
ORDER_VERSION = 2
ROUNDS = 8
_MASK64 = (1 << 64) - 1
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Order:
    """The permutations of `num_documents` items, one per epoch."""

    def __init__(self, fingerprint: str, seed: int, num_documents: int) -> None:
        if num_documents < 0:
            raise ValueError(f"num_documents is {num_documents}, below 0")
        self.fingerprint = fingerprint
        self.seed = seed
        self.num_documents = num_documents
        self._half = max(1, (max(num_documents - 1, 1).bit_length() + 1) // 2)  # bits of each half

    def _keys(self, epoch: int) -> list[int]:
        text = f"lumina order {ORDER_VERSION}\n{self.fingerprint}\n{self.seed}\n{epoch}"
        digest = hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS).digest()
        return [int.from_bytes(digest[8 * r : 8 * r + 8], "little") for r in range(ROUNDS)]

    def document(self, epoch: int, i: int) -> int:
        """The item at place `i` of `epoch`. Raises IndexError outside 0 … num_documents − 1."""
        if not 0 <= i < self.num_documents:
            raise IndexError(f"place {i} of {self.num_documents}")
        keys, half = self._keys(epoch), self._half
        mask = (1 << half) - 1
        value = i
        while True:
            left, right = value >> half, value & mask
            for key in keys:
                z = (right + key) & _MASK64
                z = ((z ^ (z >> 30)) * _M1) & _MASK64
                z = ((z ^ (z >> 27)) * _M2) & _MASK64
                left, right = right, left ^ ((z ^ (z >> 31)) & mask)
            value = (left << half) | right
            if value < self.num_documents:
                return value

    def documents(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The items at places start … stop − 1 of `epoch`, as int64: `document` for a range."""
        if not 0 <= start <= stop <= self.num_documents:
            raise IndexError(f"places {start} to {stop} of {self.num_documents}")
        values = np.arange(start, stop, dtype=np.uint64)
        keys = [np.uint64(key) for key in self._keys(epoch)]
        limit = np.uint64(self.num_documents)
        out = np.empty(len(values), dtype=np.int64)
        places = np.arange(len(values))
        while len(values):
            values = self._permuted(values, keys)
            inside = values < limit
            out[places[inside]] = values[inside].astype(np.int64)
            values, places = values[~inside], places[~inside]
        return out

    def _permuted(self, values: np.ndarray, keys: list[np.uint64]) -> np.ndarray:
        """One pass of the network over an array of uint64 (arithmetic wraps at 2^64)."""
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = values >> half, values & mask
        for key in keys:
            z = right + key
            z = (z ^ (z >> np.uint64(30))) * np.uint64(_M1)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(_M2)
            left, right = right, left ^ ((z ^ (z >> np.uint64(31))) & mask)
        return (left << half) | right
