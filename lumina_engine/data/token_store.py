"""The token store: all documents of a data set as memory-mapped arrays, built once and kept under `data_cache_dir`.

A store is a folder: `tokens.u32`, `mask.u8` (0 context, 1 trained, 2-254 trained with another weight, 255 plain text),
`offsets.u64` (documents + 1), `digests.u64` (of the contents, for overlap) and `meta.json` with counts, SHA-256 of each file
and the fingerprint. Documents are stored whole; `cut.py` fits them to a row. The folder's name is a digest of the source, the
tokenizer, the template and the options, so changed input never meets an old store.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .conversation import READING_VERSION, DataError, Document
from .store_writer import FILES, META, STORE_FORMAT, StoreWriter, fingerprint_of, locked, template_digest

Progress = Callable[[int, int], None]  # (documents, tokens) so far
_REPORT_EVERY = 500


class TokenStore:
    """A store opened for reading. Opening maps the files and reads only `meta.json`; `open_verified` reads all of it first."""

    def __init__(self, path: Path) -> None:
        """Raises `DataError` when the folder is no store of this format or a file has the wrong size."""
        self.path = path
        try:
            meta = json.loads((path / META).read_text(encoding="utf-8"))
            known = meta["format"] == STORE_FORMAT
            sizes = {name: (path / name).stat().st_size for name in FILES}
            whole = known and all(sizes[name] == meta["files"][name]["bytes"] for name in FILES)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"not a token store ({error.__class__.__name__})", path=path, fix="remove the folder") from None
        if not whole:
            cause = "a file of the token store is cut off" if known else f"token store of another format ({meta['format']})"
            raise DataError(cause, path=path, fix="remove the folder; it is built again")
        self.meta: dict[str, Any] = meta
        self.fingerprint: str = meta["fingerprint"]
        self.tokens = self._map("tokens.u32", "<u4")
        self.mask = self._map("mask.u8", "u1")
        self.offsets = self._map("offsets.u64", "<u8")
        self.digests = self._map("digests.u64", "<u8")

    def _map(self, name: str, dtype: str) -> np.ndarray:
        if not self.meta["files"][name]["bytes"]:
            return np.empty(0, dtype=dtype)  # an empty file cannot be mapped
        return np.memmap(self.path / name, dtype=dtype, mode="r")

    def __len__(self) -> int:
        return int(self.meta["documents"])

    def __repr__(self) -> str:
        return f"TokenStore({str(self.path)!r}, documents={len(self)}, tokens={self.num_tokens})"

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.meta["tokens"])

    @property
    def num_trained(self) -> int:
        """Tokens that carry loss."""
        return int(self.meta["trained_tokens"])

    @property
    def pad_id(self) -> int:
        """The tokenizer's padding id."""
        return int(self.meta["tokenizer"]["pad_id"])

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask values of one whole document (views)."""
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.tokens[start:stop], self.mask[start:stop]

    def verify(self) -> None:
        """Read everything and compare the digests. Raises `DataError` naming the damaged file."""
        digests = {}
        for name in FILES:
            state = hashlib.sha256()
            with (self.path / name).open("rb") as handle:
                while block := handle.read(1 << 20):
                    state.update(block)
            digests[name] = state.hexdigest()
            if digests[name] != self.meta["files"][name]["sha256"]:
                raise DataError("the token store is damaged", path=self.path / name, fix="remove the folder; it is built again")
        if fingerprint_of(digests, self.meta["weights"]) != self.fingerprint:
            raise DataError("the fingerprint of the token store is wrong", path=self.path / META, fix="remove the folder")


def store_name(tokenizer: Any, **parts: Any) -> str:
    """The folder name of a store: a digest of tokenizer, template and `parts` (source digest, options)."""
    key = {
        "format": STORE_FORMAT,
        "reading": READING_VERSION,
        "tokenizer": tokenizer.digest,
        "template": template_digest(tokenizer),
        **parts,
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def open_verified(path: Path) -> TokenStore | None:
    """The store at `path` after a full check, or None when there is none. A damaged one is removed: it can be built again."""
    if not path.exists():
        return None
    try:
        store = TokenStore(path)
        store.verify()
    except DataError:
        shutil.rmtree(path)
        return None
    return store


def build_parts(
    documents: Iterable[tuple[str, Document]],
    targets: Mapping[str, Path],
    tokenizer: Any,
    extra: Callable[[], Mapping[str, Any]],
    *,
    progress: Progress | None = None,
    required: Iterable[str] = (),
) -> dict[str, TokenStore] | None:
    """Write one store per part from (part, document) pairs in a single pass, and publish them.

    `extra()` is asked after the pass for what meta.json shall also hold. When a part in `required` stays empty nothing is
    published and None is returned.
    """
    writers: dict[str, StoreWriter] = {}
    try:
        for part, target in targets.items():
            writers[part] = StoreWriter(target, tokenizer)
        for number, (part, document) in enumerate(documents, 1):
            writers[part].append(document)
            if progress and number % _REPORT_EVERY == 0:
                progress(number, sum(writer.tokens for writer in writers.values()))
        if progress:
            progress(sum(w.documents for w in writers.values()), sum(w.tokens for w in writers.values()))
        if any(not writers[part].documents for part in required):
            return None
        return {part: TokenStore(writer.publish(extra())) for part, writer in writers.items()}
    except OSError as error:
        where = next(iter(targets.values())).parent
        raise DataError(
            f"the token store cannot be written ({error.strerror or error})",
            path=where,
            fix="free some space or set data_cache_dir",
            exit_code=2,
        ) from None
    finally:
        for writer in writers.values():
            writer.discard()


def build_store(
    conversations: Iterable[Document],
    tokenizer: Any,
    cache_dir: str | Path,
    *,
    source_digest: str,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """The store of `conversations`: the cached one if `source_digest`, tokenizer, template and `options` are the same.

    `source_digest` must change with the conversations, since a cached store is returned without reading them. Several
    processes may call this at once: one builds, the others wait. Raises `DataError`.
    """
    cache = Path(cache_dir)
    name = store_name(tokenizer, source=source_digest, options=dict(options or {}))
    with locked(cache, name):
        store = open_verified(cache / name)
        if store is None:
            pairs = (("all", document) for document in conversations)
            built = build_parts(pairs, {"all": cache / name}, tokenizer, lambda: {"source": source_digest}, progress=progress)
            assert built is not None  # nothing is required
            store = built["all"]
    return store
