"""Byte-pair vocabularies: what defines the ids of a tokenizer, read from package data or from a user's file.

`cl100k_base` and `o200k_base` are OpenAI's vocabularies, re-packed: an xz stream of one length byte and the token's bytes for
each rank from 0. They are accepted only if they rebuild OpenAI's file bit for bit (SHA-256 constants of tiktoken 0.14.0,
`tiktoken_ext/openai_public.py`; the split patterns come from there, too). `lumina-1k` is a `.tiktoken` text file (base64 of the
token, a space, its rank), trained by `bpe.py` on the built-in corpus. A user's file is such a text file or the `tokenizer.json`
of a model. Nothing here needs the network or a cache folder.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING

from ..config.tokenizers import TOKENIZER_FILES

if TYPE_CHECKING:
    import tiktoken

    from .tokenizer_json import JsonEncoding

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
PAD = "<|pad|>"
END_OF_TEXT = "<|endoftext|>"

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Digits and the letters of words in capitals stand alone, so that a small model sees what it must add up or spell.
LUMINA_PATTERN = r" ?\p{Lu}?\p{Ll}+(?:'\p{Ll}{1,2}(?!\p{L}))?|\p{L}|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]|\s+(?!\S)|\s"


class TokenizerError(ValueError):
    """A tokenizer that cannot be had: unknown name, missing or damaged vocabulary. The message is one line with the fix."""


@dataclass(frozen=True, slots=True)
class Official:
    """A published vocabulary: SHA-256 of its `.tiktoken` file, its pattern, its special tokens and ours (in unused ids).

    `packed` is the SHA-256 of its tokens as the package has them: the text of the file would take longer than all the rest.
    """

    encoding: str
    sha256: str
    pattern: str
    special: dict[str, int]
    turns: tuple[int, int, int] | None  # ids of IM_START, IM_END, PAD; None = behind the last id
    packed: str = ""


_OFFICIAL = (
    Official(
        "cl100k_base",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        CL100K_PATTERN,
        {
            END_OF_TEXT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
        (100264, 100265, 100266),
        "6bfd43f7b31b50b645b3228413547e662af1ae4801e9b192b9791680a71d650c",
    ),
    Official(
        "o200k_base",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        O200K_PATTERN,
        {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
        # tiktoken's o200k_harmony gives 199998 and 200000-200012 other meanings
        (200013, 200014, 200015),
        "bac143fe7fe950090c6e4ed9a2f80de5412a92495758b52becbbe5a7eea25ecb",
    ),
    Official(
        "r50k_base",
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        GPT2_PATTERN,
        {END_OF_TEXT: 50256},
        None,
    ),
)
_PACKED = {"gpt-4": "cl100k_base", "gpt-4o": "o200k_base"}
LUMINA_1K = "lumina-1k"
LUMINA_1K_MERGES = 764
NAMES = (*_PACKED, LUMINA_1K)
MAX_FILE = 1 << 28  # bytes of a vocabulary file


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """An encoding with the turn tokens in it, its digest and the ids that mean nothing below `size`.

    `name` is one of `NAMES`, or the absolute path of the file.
    """

    name: str
    encoding: tiktoken.Encoding | JsonEncoding
    digest: str
    size: int  # highest id + 1
    unused: frozenset[int]
    im_start_id: int
    im_end_id: int
    pad_id: int
    eot_id: int


def load_vocabulary(name: str) -> Vocabulary:
    """The vocabulary called `name` (one of `NAMES`), or read from a `.tiktoken` file or `tokenizer.json` at that path.

    Built at the first use and kept for the life of the process. Raises `TokenizerError`; no tokenizer stands in for another.
    """
    if name in NAMES:
        return _named(name)
    if name in TOKENIZER_FILES and not Path(name).exists():
        raise TokenizerError(f"tokenizer {name}: its vocabulary is not part of Lumina; {TOKENIZER_FILES[name]}")
    path = file_path(name)
    try:
        stat = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if os.sep not in name and not path.suffix:
            raise TokenizerError(
                f"tokenizer {name!r} is unknown; choose one of {', '.join(NAMES)} or give the path of a .tiktoken vocabulary "
                "file or a tokenizer.json"
            ) from None
        raise TokenizerError(
            f"tokenizer {name}: the file cannot be read ({getattr(error, 'strerror', error)}); correct the path, or choose one "
            f"of {', '.join(NAMES)}"
        ) from None
    if path.is_dir():
        raise TokenizerError(f"tokenizer {name}: a folder; give the tokenizer.json or .tiktoken file in it")
    if not S_ISREG(stat.st_mode):
        raise TokenizerError(f"tokenizer {name}: no regular file, so no vocabulary; give a .tiktoken file or tokenizer.json")
    if stat.st_size > MAX_FILE:
        raise TokenizerError(
            f"tokenizer {name}: {stat.st_size:,} bytes are no vocabulary; give a .tiktoken file or tokenizer.json"
        )
    return _from_file(str(path), stat.st_mtime_ns, stat.st_size)


def full_name(name: str) -> str:
    """The name of a tokenizer wherever the process works: of a file its absolute path. Looks only at whether the file is there.

    Raises `TokenizerError` for the home folder of nobody.
    """
    known = name in NAMES or (name in TOKENIZER_FILES and not Path(name).exists())
    return name if known or _is_word(name) else str(file_path(name))


def _is_word(name: str) -> bool:
    """Whether a name is of no file: neither is one there nor does it look like one."""
    try:
        return os.sep not in name and not Path(name).suffix and not file_path(name).exists()
    except ValueError:  # a NUL
        return True


def file_path(name: str) -> Path:
    """The absolute path of a vocabulary file."""
    try:
        return Path(os.path.abspath(Path(name).expanduser()))  # noqa: PTH100 -- a link is kept: what it points to may change
    except RuntimeError:  # ~name of nobody
        raise TokenizerError(f"tokenizer {name}: there is no such home folder; write the whole path") from None


@lru_cache(maxsize=len(NAMES))
def _named(name: str) -> Vocabulary:
    if name == LUMINA_1K:
        file = "lumina-1k.tiktoken"
        return _build(name, _parse(_package_data(file), file), LUMINA_PATTERN, {}, None)
    official = next(o for o in _OFFICIAL if o.encoding == _PACKED[name])
    file = f"{official.encoding}.bpe.xz"
    data = _unpack(_package_data(file), file)
    if hashlib.sha256(data).hexdigest() != official.packed:
        raise TokenizerError(f"vocabulary {file} is damaged (its SHA-256 differs); install Lumina again")
    return _build(name, _tokens(data), official.pattern, official.special, official.turns, official.sha256)


@lru_cache(maxsize=4)
def _from_file(path: str, _mtime_ns: int, _size: int) -> Vocabulary:
    """A vocabulary file: published ones are known by their SHA-256; any other is split as cl100k_base splits."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise TokenizerError(f"tokenizer {path}: the file cannot be read ({error.strerror}); check its rights") from None
    if len(data) > MAX_FILE:
        raise TokenizerError(
            f"tokenizer {path}: more than {MAX_FILE:,} bytes are no vocabulary; give a .tiktoken file or tokenizer.json"
        )
    if data.lstrip()[:1] == b"{":
        return _from_json(data, path)
    digest = hashlib.sha256(data).hexdigest()
    tokens = _parse(data, path)
    if digest == hashlib.sha256(_package_data("lumina-1k.tiktoken")).hexdigest():
        return _build(path, tokens, LUMINA_PATTERN, {}, None)
    for official in _OFFICIAL:
        if digest == official.sha256:
            return _build(path, tokens, official.pattern, official.special, official.turns)
    return _build(path, tokens, CL100K_PATTERN, {}, None)


def _from_json(data: bytes, path: str) -> Vocabulary:
    from .tokenizer_json import JsonEncoding, Unusable

    try:
        found = JsonEncoding(data)
    except Unusable as error:
        raise TokenizerError(f"tokenizer {path}: {error.cause}; {error.fix}") from None
    except ImportError:
        raise TokenizerError(f"tokenizer {path}: a tokenizer.json needs tokenizers; pip install 'lumina[tokenizers]'") from None
    turns = (found.special[name] for name in (IM_START, IM_END, PAD, END_OF_TEXT))
    return Vocabulary(path, found, found.digest, found.size, found.unused, *turns)


def _package_data(file: str) -> bytes:
    try:
        return resources.files("lumina_engine.data").joinpath("vocab", file).read_bytes()
    except OSError as error:
        raise TokenizerError(f"vocabulary {file} cannot be read ({error.strerror}); install Lumina again") from error


def _unpack(packed: bytes, file: str) -> bytes:
    """What an xz stream holds: (length byte, token) pairs in rank order."""
    try:
        import lzma
    except ImportError as error:
        raise TokenizerError(f"vocabulary {file} needs the lzma module; install Python with xz support (liblzma)") from error
    try:
        return lzma.decompress(packed, format=lzma.FORMAT_XZ)
    except lzma.LZMAError as error:
        raise TokenizerError(f"vocabulary {file} is damaged ({error}); install Lumina again") from error


def _tokens(data: bytes) -> list[bytes]:
    """Tokens in rank order of such pairs."""
    tokens: list[bytes] = []
    at = 0
    while at < len(data):
        end = at + 1 + data[at]
        tokens.append(data[at + 1 : end])
        at = end
    return tokens


def _parse(data: bytes, file: str) -> list[bytes]:
    """Tokens in rank order of a `.tiktoken` file; ranks must be 0, 1, 2, … and hold every single byte."""
    tokens: list[bytes] = []
    for line_number, line in enumerate(data.splitlines(), start=1):
        try:
            encoded, rank = _two_words(line)
            token = base64.b64decode(encoded, validate=True)
            if int(rank) != len(tokens):
                raise ValueError(f"rank {int(rank)} where {len(tokens)} must stand")
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(
                f"{file}:{line_number}: not a line of a .tiktoken vocabulary ({error}); each line is base64, a space, the rank "
                "(or give a tokenizer.json)"
            ) from error
        tokens.append(token)
    known = set(tokens)
    if len(known) != len(tokens):
        raise TokenizerError(f"{file}: a token stands there twice; each token has one rank")
    missing = [byte for byte in range(256) if bytes((byte,)) not in known]
    if missing:
        raise TokenizerError(f"{file}: {len(missing)} of the 256 single bytes are missing; some text could not be encoded")
    return tokens


def _two_words(line: bytes) -> list[bytes]:
    words = line.split()
    if len(words) != 2:
        raise ValueError(f"{len(words)} words")
    return words


def tiktoken_file(tokens: list[bytes]) -> bytes:
    """The `.tiktoken` text of tokens in rank order."""
    return b"".join(b"%b %d\n" % (binascii.b2a_base64(token, newline=False), rank) for rank, token in enumerate(tokens))


def _build(
    name: str,
    tokens: list[bytes],
    pattern: str,
    special: dict[str, int],
    turns: tuple[int, int, int] | None,
    sha256: str | None = None,
) -> Vocabulary:
    """The vocabulary of `tokens`; `sha256` is that of their `.tiktoken` file, if it is known."""
    import tiktoken

    ids = dict(special)
    next_id = max([len(tokens) - 1, *ids.values()]) + 1
    if END_OF_TEXT not in ids:
        ids[END_OF_TEXT] = next_id
        next_id += 1
    start, end, pad = turns or (next_id, next_id + 1, next_id + 2)
    ids.update({IM_START: start, IM_END: end, PAD: pad})
    size = max(ids.values()) + 1
    definition = {
        "ranks": sha256 or hashlib.sha256(tiktoken_file(tokens)).hexdigest(),
        "pattern": pattern,
        "special": ids,
    }
    digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()
    encoding = tiktoken.Encoding(
        f"lumina_{name}",
        pat_str=pattern,
        mergeable_ranks=dict(zip(tokens, range(len(tokens)), strict=True)),
        special_tokens=ids,
    )
    unused = frozenset(range(len(tokens), size)) - frozenset(ids.values())
    return Vocabulary(name, encoding, digest, size, unused, start, end, pad, ids[END_OF_TEXT])
