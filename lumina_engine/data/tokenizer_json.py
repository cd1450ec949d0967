"""A Hugging Face `tokenizer.json` as the ids of a tokenizer, for those that give every text back: byte-level BPE.

GPT-2, Llama 3, Qwen, DeepSeek and OLMo have such ones; WordPiece, Unigram and SentencePiece's BPE lose or add white space, case
or characters, and are refused. The file's own library encodes, so ids are the published ones, but for three things: its special
tokens are text where text spells them; nothing is added around a text, cut or padded; a text is never normalised (Qwen's NFC),
since it would not come back.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Any

END_OF_TEXT = "<|endoftext|>"
TURNS = ("<|im_start|>", "<|im_end|>", "<|pad|>")
MAX_IDS = 1_000_000
_RESERVED = re.compile(r"reserved|unused", re.IGNORECASE)
# Steps that only split, unless `Removed`; UnicodeScripts loses white space at the beginning of a text.
_WHOLE = ("ByteLevel", "Split", "Punctuation", "Digits", "FixedLength")
# What a text must survive: every kind of white space, parts that compose, scripts, control characters, digits, contractions.
_PROBES = (
    " Hello  world!\n\n\tdon't we're 12345 x  \r\n \n end ",
    "e\u0301 \u00e9 \u212b \ufb01 \uac00 \u1100\u1161 Ω İı ß ŐŰ",
    "中文字 かな 한국어 العربية עברית ไทย हिन्दी 🫠👩‍👩‍👧 \u200b\u00a0\u3000\ufeff▁ Ġ Ċ",
    "\x00\x01\x1b[31m\x7f\x80\x9f",
    "<s></s> [INST] <|user|> <pad> <unk> </w> ##ing",
)


class Unusable(ValueError):
    """A file that cannot be the tokenizer: (cause, what to do)."""

    def __init__(self, cause: str, fix: str) -> None:
        super().__init__(cause)
        self.cause, self.fix = cause, fix


class JsonEncoding:
    """The vocabulary of a `tokenizer.json` with the methods of `tiktoken.Encoding` that are used here.

    `special` has the ids of the turn tokens and of the file's own special tokens; `digest` changes with any id of any text.
    """

    def __init__(self, data: bytes) -> None:
        """Raises `Unusable`; ImportError where the library is missing."""
        spec = _read(data)
        self.ranks = _ids(spec)
        self.special = _special(spec, self.ranks)
        self._bytes = {**_token_bytes(spec), **{id_: name.encode() for name, id_ in self.special.items()}}
        self._tokenizer = _loaded(spec)
        self.special_tokens_set = set(self.special)
        self.digest = _digest(spec, self.special)
        self._prove(token["content"] for token in spec["added_tokens"])

    @property
    def size(self) -> int:
        """Highest id + 1."""
        return max(self._bytes) + 1

    @property
    def unused(self) -> frozenset[int]:
        """Ids below `size` that mean nothing."""
        return frozenset(range(self.size)) - self._bytes.keys()

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text; a lone surrogate becomes U+FFFD."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            return self._tokenizer.encode(_whole(text), add_special_tokens=False).ids

    def encode_ordinary_batch(self, texts: Sequence[str], *, num_threads: int = 8) -> list[list[int]]:
        """`encode_ordinary` of each text, on the library's own threads: one for each processor, whatever `num_threads` says,
        but for 1."""
        if num_threads == 1:
            return list(map(self.encode_ordinary, texts))
        try:
            found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            found = self._tokenizer.encode_batch_fast(list(map(_whole, texts)), add_special_tokens=False)
        return [encoded.ids for encoded in found]

    def encode_single_token(self, token: str) -> int:
        """The id of a special token."""
        return self.special[token]

    def decode_single_token_bytes(self, token_id: int) -> bytes:
        """The bytes of an id. Raises KeyError for one without meaning."""
        return self._bytes[token_id]

    def decode_bytes(self, token_ids: Sequence[int]) -> bytes:
        """The bytes of ids. Raises KeyError."""
        return b"".join(map(self._bytes.__getitem__, token_ids))

    def _prove(self, added: Iterable[str]) -> None:
        """Every text comes back, and none makes a special id. Raises `Unusable`."""
        barred = frozenset(self.special.values())
        names = [*added, *self.special]
        for text in (*_PROBES, *names, *(f"a {name} b{name}\n" for name in names)):
            ids = self.encode_ordinary(text)
            if barred & set(ids):
                name = next(name for name, id_ in self.special.items() if id_ in ids)
                raise Unusable(f"a text that spells {name} becomes that token", "give another tokenizer")
            try:
                back = self.decode_bytes(ids).decode("utf-8", "replace")
            except KeyError as error:
                raise Unusable(f"it makes an id without bytes ({error})", "fetch the file again") from None
            if back != text:
                raise Unusable(f"text does not come back: {text[:32]!r} became {back[:32]!r}", _WANTED)


_WANTED = "give a byte-level BPE, such as that of Llama 3, Qwen or GPT-2"


def _read(data: bytes) -> dict[str, Any]:
    """The part of the file that decides the ids, checked. Raises `Unusable`."""
    try:
        spec = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"it is no tokenizer.json: not valid JSON ({error})", "fetch the file again") from None
    model = spec.get("model") if isinstance(spec, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise Unusable("it is no tokenizer.json: it has no model with a vocab", "give the tokenizer.json of a model")
    steps = list(_steps(spec.get("pre_tokenizer"), "pretokenizers"))
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    if model.get("type", "BPE") != "BPE" or len(levels) != 1 or not isinstance(model["vocab"], dict):
        what = "/".join([str(model.get("type")), *(str(step.get("type")) for step in steps)])
        raise Unusable(f"its tokens are not of bytes ({what}), so some text would not come back", _WANTED)
    if levels[0].get("add_prefix_space"):
        raise Unusable("it puts a space before each text (add_prefix_space)", _WANTED)
    changing = [str(step.get("type")) for step in _steps(spec.get("normalizer"), "normalizers") if step.get("type") != "NFC"]
    changing += [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if changing:
        raise Unusable(f"it changes the text ({', '.join(changing)})", _WANTED)
    added = spec.get("added_tokens")
    if added is not None and not isinstance(added, list):
        raise Unusable("its added_tokens are no list", "fetch the file again")
    kept = {key: value for key, value in model.items() if key not in ("dropout", "unk_token", "fuse_unk", "byte_fallback")}
    return {
        "version": "1.0",
        "added_tokens": [_added(token) for token in added or []],
        "pre_tokenizer": _whole_steps(spec["pre_tokenizer"]),
        "model": kept,
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder")),
    }


def _steps(part: Any, key: str) -> Iterator[dict[str, Any]]:
    """The steps of a pre-tokenizer or normaliser, of a sequence each."""
    if isinstance(part, dict):
        inner = part.get(key)
        if part.get("type") == "Sequence" and isinstance(inner, list):
            for step in inner:
                yield from _steps(step, key)
        else:
            yield part


def _whole_steps(part: Any) -> Any:
    """A pre-tokenizer with the same pieces that leaves out no text. Raises `Unusable` where its pieces would be others.

    A split that keeps only its matches (`Removed`, `invert`) keeps what is between them too: published files use it with an
    expression that matches every text from end to end.
    """
    if not isinstance(part, dict):
        raise Unusable("a step of its pre_tokenizer is no object", "fetch the file again")
    kind, inner = part.get("type"), part.get("pretokenizers")
    if kind == "Sequence" and isinstance(inner, list):
        return {**part, "pretokenizers": [_whole_steps(step) for step in inner]}
    removes = part.get("behavior") == "Removed"
    if kind == "Split" and removes and part.get("invert") is True:
        return {**part, "behavior": "Isolated"}
    if removes or kind not in _WHOLE:
        raise Unusable(f"its pre_tokenizer may leave out text ({kind}{' Removed' * removes})", _WANTED)
    return part


def _added(token: Any) -> dict[str, Any]:
    content = token.get("content") if isinstance(token, dict) else None
    if not isinstance(content, str) or not content or _whole(content) != content or not _is_id(token.get("id")):
        raise Unusable("an entry of its added_tokens has no content or no id", "fetch the file again")
    special = bool(token.get("special")) or token["content"] in (*TURNS, END_OF_TEXT)
    flags = {flag: bool(token.get(flag)) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
    return {"id": token["id"], "content": token["content"], "special": special, **flags}


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_IDS


def _ids(spec: Mapping[str, Any]) -> dict[str, int]:
    """The ids of the vocabulary and the added tokens. Raises `Unusable`."""
    vocab = spec["model"]["vocab"]
    for token, id_ in vocab.items():
        if not _is_id(id_):
            raise Unusable(f"the id of {token[:40]!r} is {id_!r}", f"ids are whole numbers from 0, below {MAX_IDS:,}")
    ids = {**vocab, **{token["content"]: token["id"] for token in spec["added_tokens"]}}
    if len(set(ids.values())) != len(ids):
        raise Unusable("two of its tokens have one id", "fetch the file again")
    missing = [sign for sign in _BYTE_OF if sign not in vocab]
    if missing:
        raise Unusable(f"{len(missing)} of the 256 single bytes are missing; some text could not be encoded", _WANTED)
    return ids


def _special(spec: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    """Special tokens with their ids. Turn tokens that the file lacks take ids that mean nothing, then reserved ones, then new
    ones behind the last."""
    special = {token["content"]: token["id"] for token in spec["added_tokens"] if token["special"]}
    last = max(ids.values())
    taken = frozenset(ids.values())
    reserved = {id_: name for name, id_ in special.items() if _RESERVED.search(name)}
    free = chain((id_ for id_ in range(last) if id_ not in taken), sorted(reserved), count(last + 1))
    for name in (END_OF_TEXT, *TURNS):
        if name not in special:
            id_ = next(free)
            special.pop(reserved.get(id_, ""), None)
            special[name] = id_
    return special


def _token_bytes(spec: Mapping[str, Any]) -> dict[int, bytes]:
    """The bytes of each id: added tokens are text, the others stand for bytes by the signs of GPT-2."""
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    found = {}
    for token, id_ in spec["model"]["vocab"].items():
        if token in added:
            continue
        try:
            found[id_] = bytes(map(_BYTE_OF.__getitem__, token))
        except KeyError:
            raise Unusable(f"its token {token[:40]!r} is not made of bytes", _WANTED) from None
    return {**found, **{id_: text.encode() for text, id_ in added.items()}}


def _signs() -> dict[str, int]:
    """The byte of each sign, as GPT-2 writes bytes: printable ones as themselves, the others from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + at): byte for at, byte in enumerate(others)}}


_BYTE_OF = _signs()


def _loaded(spec: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library has no kind of its own
        raise Unusable(f"it is no tokenizer.json that can be read ({error})", "fetch the file again") from None
    tokenizer.encode_special_tokens = True  # where text spells one, it is text
    return tokenizer


def _digest(spec: Mapping[str, Any], special: Mapping[str, int]) -> str:
    text = json.dumps({"tokenizer_json": spec, "special": special}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _whole(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
