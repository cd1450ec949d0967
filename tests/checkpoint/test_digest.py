"""Digests of chunks do not depend on how the bytes come (C78)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina_engine.checkpoint.digest import ALGORITHMS, ChunkDigests

# of the empty text and of "abc": FIPS 180-4, and the test vectors of BLAKE3's authors
KNOWN = {
    "sha256": (
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    ),
    "blake3": (
        "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
        "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85",
    ),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_c078_algorithms_are_those_of_their_names(name: str) -> None:
    assert tuple(ALGORITHMS[name](text).hexdigest() for text in (b"", b"abc")) == KNOWN[name]


@given(
    name=st.sampled_from(sorted(ALGORITHMS)),
    pieces=st.lists(st.binary(max_size=40), max_size=12),
    chunk_bytes=st.integers(1, 50),
)
def test_c078_each_chunk_has_the_digest_of_its_own_bytes(name: str, pieces: list[bytes], chunk_bytes: int) -> None:
    ended: list[int] = []
    digests = ChunkDigests(name, chunk_bytes, ended.append)
    for piece in pieces:
        digests.update(memoryview(piece))
    digests.finish()
    whole = b"".join(pieces)
    chunks = [whole[begin : begin + chunk_bytes] for begin in range(0, len(whole), chunk_bytes)]
    assert digests.found == [ALGORITHMS[name](chunk).hexdigest() for chunk in chunks]
    assert ended == [len(chunk) for chunk in chunks] and digests.bytes == len(whole)
