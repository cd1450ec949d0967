"""Writing a token store: encode documents one by one, publish the folder whole or not at all.

Memory stays bounded whatever the source: tokens go to disk in blocks of about a million.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..run.directory import open_lock
from ..run.process import myself
from .conversation import READING_VERSION, Conversation, DataError, Document, TextDocument
from .order import ORDER_VERSION

if TYPE_CHECKING:
    from .token_store import TokenStore

STORE_FORMAT = 1  # raise it when the files or their meaning change: older stores are then built again

# file -> array type code of its items (little endian on disk)
FILES = {"tokens.u32": "I", "mask.u8": "B", "offsets.u64": "Q", "digests.u64": "Q"}
META = "meta.json"

# values of the mask; 2 … 254 stand for the other weights, listed in meta.json
CONTEXT, TRAINED, TEXT = 0, 1, 255
_FLUSH_ITEMS = 1 << 20


def template_of(tokenizer: Any) -> dict[str, Any]:
    """What a cut needs to know of the chat template: the ids that open a turn of each role."""
    filler = tokenizer.encode("a")
    headers = {}
    for role in ("system", "user", "assistant", "tool"):
        ids = tokenizer.encode_conversation([{"role": role, "content": "a"}])
        headers[role] = ids[: ids.index(tokenizer.im_end_id) - len(filler)]
    return {"im_start_id": tokenizer.im_start_id, "im_end_id": tokenizer.im_end_id, "headers": headers}


def template_digest(tokenizer: Any) -> str:
    """SHA-256 of what the template makes of a fixed conversation: any change of ids or mask changes it."""
    turns = [{"role": role, "content": "a b"} for role in ("system", "user", "assistant", "tool", "assistant")]
    ids, mask = tokenizer.encode_with_mask(turns)
    return hashlib.sha256(json.dumps([list(ids), [int(bit) for bit in mask], tokenizer.eot_id]).encode()).hexdigest()


class StoreWriter:
    """Appends documents to a staging folder beside `target`; `publish` makes it the store `target`."""

    def __init__(self, target: Path, tokenizer: Any) -> None:
        self.target = target
        self.documents = 0
        self.tokens = 0
        self.trained = 0
        self.longest = 0
        self._tokenizer = tokenizer
        self._codes: dict[float, int] = {1.0: TRAINED}
        self._staging = staging_name(target)
        self._staging.mkdir()
        self._buffers = {name: array(code) for name, code in FILES.items()}
        self._hashes = {name: hashlib.sha256() for name in FILES}
        self._bytes = dict.fromkeys(FILES, 0)
        self._handles = {name: (self._staging / name).open("xb") for name in FILES}
        self._buffers["offsets.u64"].append(0)

    def append(self, document: Document) -> None:
        """Encode and add one document."""
        ids, mask = self._encode(document)
        self._buffers["tokens.u32"].extend(ids)
        self._buffers["mask.u8"].frombytes(mask)
        self.documents += 1
        self.tokens += len(ids)
        self.trained += len(mask) - mask.count(CONTEXT) - (mask.count(self._codes[0.0]) if 0.0 in self._codes else 0)
        self.longest = max(self.longest, len(ids))
        self._buffers["offsets.u64"].append(self.tokens)
        self._buffers["digests.u64"].append(int.from_bytes(document.digest()[:8], "big"))
        if len(self._buffers["tokens.u32"]) >= _FLUSH_ITEMS or len(self._buffers["offsets.u64"]) >= _FLUSH_ITEMS:
            self._flush()

    def extend(self, store: TokenStore) -> None:
        """Add all documents of a store that the same tokenizer made; nothing is encoded again."""
        self._flush()
        codes = np.arange(256, dtype=np.uint8)
        for code, weight in enumerate(store.meta["weights"][1:], start=1):
            codes[code] = self._code(weight)
        renamed = any(code != number for number, code in enumerate(codes))
        self._copy(store, "tokens.u32")
        self._copy(store, "mask.u8", (lambda block: codes[block]) if renamed else None)
        self._copy(store, "offsets.u64", lambda block: block + np.uint64(self.tokens), skip=1)
        self._copy(store, "digests.u64")
        self.documents += len(store)
        self.tokens += store.num_tokens
        self.trained += store.num_trained
        self.longest = max(self.longest, int(store.meta["longest"]))

    def settle(self) -> None:
        """Bring to disk what was added so far, so that `publish` has little left to wait for."""
        for handle in self._handles.values():
            handle.flush()
            os.fsync(handle.fileno())

    def _copy(
        self, store: TokenStore, name: str, change: Callable[[np.ndarray], np.ndarray] | None = None, skip: int = 0
    ) -> None:
        """Append a file of `store` without its first `skip` items. Read, not mapped, so that it leaves memory again."""
        dtype = np.dtype(FILES[name]).newbyteorder("<")
        with (store.path / name).open("rb") as file:
            file.seek(skip * dtype.itemsize)
            while data := file.read(_FLUSH_ITEMS * dtype.itemsize):
                if change is not None:
                    data = change(np.frombuffer(data, dtype)).astype(dtype, copy=False).tobytes()
                self._handles[name].write(data)
                self._hashes[name].update(data)
                self._bytes[name] += len(data)

    def _code(self, weight: float) -> int:
        """The mask value of a weight; a new one gets the next."""
        code = self._codes.get(weight)
        if code is None:
            code = len(self._codes) + 1
            if code >= TEXT:
                raise DataError("more than 253 different weights in one data set", fix="round the weights")
            self._codes[weight] = code
        return code

    def _encode(self, document: Document) -> tuple[list[int], bytes]:
        """Ids and mask values of a document."""
        if isinstance(document, TextDocument):
            ids = [*self._tokenizer.encode(document.text), self._tokenizer.eot_id]
            return ids, bytes([TEXT]) * len(ids)
        ids, bits = self._tokenizer.encode_with_mask([{"role": m.role, "content": m.content} for m in document.messages])
        mask = bytes(bits)
        if any(m.weight is not None for m in document.messages):
            mask = self._weighted(mask, document)
        return ids, mask

    def _weighted(self, mask: bytes, conversation: Conversation) -> bytes:
        """The mask with each answer's own weight: its runs of trained tokens are the assistant messages, in order."""
        out = bytearray(mask)
        end = 0
        for message in conversation.messages:
            if message.role != "assistant":
                continue
            start = mask.index(TRAINED, end)
            end = mask.find(CONTEXT, start)
            end = len(mask) if end < 0 else end
            code = self._code(1.0 if message.weight is None else message.weight)
            out[start:end] = bytes([code]) * (end - start)
        return bytes(out)

    def _flush(self) -> None:
        for name, buffer in self._buffers.items():
            if sys.byteorder == "big":
                buffer.byteswap()
            data = buffer.tobytes()
            self._handles[name].write(data)
            self._hashes[name].update(data)
            self._bytes[name] += len(data)
            del buffer[:]

    def publish(self, extra: Mapping[str, Any]) -> Path:
        """Finish the files, write meta.json (with `extra` in it) and rename the folder to its place. Returns that place."""
        self._flush()
        self.settle()
        for handle in self._handles.values():
            handle.close()
        digests = {name: state.hexdigest() for name, state in self._hashes.items()}
        weights = [0.0] * (max(self._codes.values()) + 1)
        for weight, code in self._codes.items():
            weights[code] = weight
        meta = {
            "format": STORE_FORMAT,
            "order": ORDER_VERSION,
            "reading": READING_VERSION,
            "fingerprint": fingerprint_of(digests, weights),
            "documents": self.documents,
            "tokens": self.tokens,
            "trained_tokens": self.trained,
            "longest": self.longest,
            "weights": weights,
            "files": {name: {"bytes": self._bytes[name], "sha256": digests[name]} for name in FILES},
            "tokenizer": {"name": self._tokenizer.name, "digest": self._tokenizer.digest, "pad_id": self._tokenizer.pad_id},
            "template": template_of(self._tokenizer),
            **extra,
        }
        with (self._staging / META).open("x", encoding="utf-8") as text:
            json.dump(meta, text, indent=1)
            text.flush()
            os.fsync(text.fileno())
        sync_folder(self._staging)
        try:
            self._staging.rename(self.target)
        except OSError:
            if not (self.target / META).is_file():
                raise
            self.discard()  # another process was first; equal input gives equal stores
        sync_folder(self.target.parent)
        return self.target

    def discard(self) -> None:
        """Remove what was written."""
        for handle in self._handles.values():
            with suppress(OSError):  # a full disk has no room for what is still in the buffer either
                handle.close()
        shutil.rmtree(self._staging, ignore_errors=True)


def _mark() -> str:
    """What this process puts into the names of unfinished folders. A pid alone comes again in the next start of a container."""
    mine = myself()
    return f".tmp-{mine.pid}-{mine.start}-"


def staging_name(target: Path) -> Path:
    """A new name beside `target` for what is not finished, or no longer wanted; `locked` clears it if this process dies."""
    return target.with_name(f"{target.name}{_mark()}{secrets.token_hex(4)}")


def fingerprint_of(digests: Mapping[str, str], weights: list[float]) -> str:
    """SHA-256 over tokens, mask, offsets, the meaning of mask values, the order's version: equal fingerprint, equal rows."""
    parts = [digests[name] for name in ("tokens.u32", "mask.u8", "offsets.u64")]
    return hashlib.sha256(json.dumps([STORE_FORMAT, ORDER_VERSION, parts, weights]).encode()).hexdigest()


def sync_folder(path: Path) -> None:
    """fsync a folder, so that its entries survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(cache: Path, name: str, *others: str) -> Iterator[None]:
    """Hold the build lock of store `name`; waits for another process that builds it. Clears what dead builders left.

    `others` are stores that are built under the same lock.

    Raises `DataError` when the folder cannot be used.
    """
    try:
        (cache / "locks").mkdir(parents=True, exist_ok=True)
        handle = os.fdopen(open_lock(cache / "locks" / f"{name}.lock"), "r+b")
        fcntl.lockf(handle, fcntl.LOCK_EX)  # freed by the kernel when this process ends, however it ends
    except OSError as error:
        raise DataError(
            f"the cache folder cannot be used ({error.strerror or error})", path=cache, fix="set data_cache_dir", exit_code=2
        ) from None
    with handle:
        own = _mark()  # a second thread of this process is not kept out by a POSIX lock
        patterns = [f"{name}*.tmp-*", *(f"{other}.tmp-*" for other in others)]
        for stale in (folder for pattern in patterns for folder in cache.glob(pattern)):
            if own not in stale.name:
                shutil.rmtree(stale, ignore_errors=True)
        yield
