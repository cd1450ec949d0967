"""Text to ids and back, and the one chat template: `<|im_start|>` role newline content `<|im_end|>` newline.

Text from outside is always encoded as ordinary text: only the template puts special ids in, so a message that spells
`<|im_end|>` stays a message. Each part is encoded by itself, since merges would cross the borders of a rendered string.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lumina_engine.data.vocabulary import NAMES, TokenizerError, load_vocabulary

__all__ = ["CHAT_TEMPLATE", "NAMES", "TEMPLATE_VERSION", "ConversationTokenizer", "StreamDecoder", "TokenizerError"]

TEMPLATE_VERSION = 1  # part of every token store's key: raise it when the ids or the mask of a conversation change
# The same in Jinja, as Hugging Face writes chat templates: for exported models; nothing here renders it.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_WHITESPACE_RUN = 100_000  # characters; tiktoken panics near a million
VOCAB_MULTIPLE = 128  # embedding rows are padded to this
_REPLACEMENT = "\ufffd".encode()
_WHITESPACE = re.compile(r"\s*")


class ConversationTokenizer:
    """Encodes text and conversations with a vocabulary: one of `NAMES`, or the path of a `.tiktoken` file or `tokenizer.json`.

    `name` is the name, or the absolute path; `digest` (64 hex digits) changes with any id of any text.
    `max_context_length` (tokens) is used only by `truncate=True`. Raises `TokenizerError` for an unknown or damaged vocabulary.
    """

    def __init__(self, model_name: str = "gpt-4", max_context_length: int = 8192) -> None:
        if max_context_length < 16:
            raise TokenizerError(f"max_context_length is {max_context_length}; give at least 16 tokens")
        vocabulary = load_vocabulary(str(model_name))
        self.name = vocabulary.name
        self.max_context_length = max_context_length
        self.digest = vocabulary.digest
        self.im_start_id = vocabulary.im_start_id
        self.im_end_id = vocabulary.im_end_id
        self.pad_id = vocabulary.pad_id
        self.eot_id = vocabulary.eot_id
        self._vocabulary = vocabulary
        self._encoding = vocabulary.encoding
        self._newline = self._encoding.encode_ordinary("\n")

    def __reduce__(self) -> tuple[type[ConversationTokenizer], tuple[str, int]]:
        # a worker process builds its own vocabulary instead of receiving megabytes of ranks
        return ConversationTokenizer, (self.name, self.max_context_length)

    def __repr__(self) -> str:
        return f"ConversationTokenizer({self.name!r}, vocab_size={self.get_vocab_size()})"

    # sizes and ids

    def get_vocab_size(self) -> int:
        """Highest id + 1."""
        return self._vocabulary.size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of an embedding: the vocabulary size rounded up to a multiple of 128."""
        return -(-self._vocabulary.size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def unused_ids(self) -> frozenset[int]:
        """Ids below `padded_vocab_size` that mean nothing: never sampled, never in labels."""
        return self._vocabulary.unused | frozenset(range(self._vocabulary.size, self.padded_vocab_size))

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that no text can produce: turn borders, padding and those of the published vocabulary."""
        return frozenset(self._encoding.encode_single_token(token) for token in self._encoding.special_tokens_set)

    # text

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; special tokens written in it are text. A lone surrogate becomes U+FFFD."""
        if len(text) <= MAX_WHITESPACE_RUN:
            return self._encoding.encode_ordinary(text)
        return [token for part in split_whitespace_runs(text) for token in self._encoding.encode_ordinary(part)]

    def encode_batch(self, texts: Sequence[str], num_threads: int | None = None) -> list[list[int]]:
        """`encode` of each text on `num_threads` threads (default: the processors this process may use).

        A `tokenizer.json` is encoded on its library's own threads, one for each processor, unless `num_threads` is 1.
        """
        parts = [split_whitespace_runs(text) for text in texts]
        flat = [part for split in parts for part in split]
        found = iter(self._encoding.encode_ordinary_batch(flat, num_threads=num_threads or _cpu_count()))
        return [[token for _ in split for token in next(found)] if len(split) > 1 else next(found) for split in parts]

    def encode_iter(self, texts: Iterable[str], batch: int = 1024, num_threads: int | None = None) -> Iterator[list[int]]:
        """`encode` of a stream of texts (lines of a file, say), with `batch` texts in memory at a time."""
        waiting: list[str] = []
        for text in texts:
            waiting.append(text)
            if len(waiting) == batch:
                yield from self.encode_batch(waiting, num_threads)
                waiting = []
        yield from self.encode_batch(waiting, num_threads)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one id; those of U+FFFD for an id that means nothing."""
        try:
            return self._encoding.decode_single_token_bytes(token_id)
        except (KeyError, OverflowError):
            return _REPLACEMENT

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of ids; U+FFFD for ids without meaning and for bytes that are no character. Never raises for integers."""
        ids = [int(token_id) for token_id in token_ids]
        try:
            data = self._encoding.decode_bytes(ids)
        except (KeyError, OverflowError):
            data = b"".join(map(self.token_bytes, ids))
        return data.decode("utf-8", errors="replace")

    # conversations

    def encode_conversation(self, conversation: Any, add_generation_prompt: bool = False, truncate: bool = False) -> list[int]:
        """Ids of a conversation: a list of `{"role", "content"}`, `{"messages": […]}` or a `Conversation`.

        `add_generation_prompt` opens the assistant's turn, as chat does. Nothing is cut unless `truncate`: then the oldest
        turns go (the system prompt last) until the ids fit `max_context_length`.
        """
        messages = _messages(conversation)
        turns = [(self._header(role), self._body(content)) for role, content, _weight in messages]
        prompt = self._header("assistant") if add_generation_prompt else []
        if truncate:
            system_first = bool(messages) and messages[0][0] == "system"
            turns = _fit(turns, self.max_context_length - len(prompt), system_first)
        return [token for header, body in turns for token in header + body] + prompt

    def encode_with_mask(self, conversation: Any) -> tuple[list[int], list[bool]]:
        """Ids and loss mask (as long as the ids) of a conversation.

        The mask holds for the content of an assistant's turn and the `<|im_end|>` that closes it, not for its header or the
        newline behind it; not for an empty answer or one of weight 0.
        """
        ids: list[int] = []
        mask: list[bool] = []
        for role, content, weight in _messages(conversation):
            header, body = self._header(role), self._body(content)
            trained = role == "assistant" and content != "" and weight != 0
            ids += header + body
            mask += [False] * len(header) + [trained] * (len(body) - len(self._newline)) + [False] * len(self._newline)
        return ids, mask

    def _header(self, role: str) -> list[int]:
        return [self.im_start_id, *self._encoding.encode_ordinary(role), *self._newline]

    def _body(self, content: str) -> list[int]:
        return [*self.encode(content), self.im_end_id, *self._newline]


class StreamDecoder:
    """Text of ids that come one at a time: a character appears when its last byte is there."""

    def __init__(self, tokenizer: ConversationTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes (maybe none)."""
        return self._decoder.decode(self._tokenizer.token_bytes(int(token_id)))

    def flush(self) -> str:
        """What is left: U+FFFD for a character that never became whole. The decoder is then as new."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def split_whitespace_runs(text: str) -> list[str]:
    """`text` cut inside runs of more than `MAX_WHITESPACE_RUN` white-space characters; the parts join to `text`.

    Looks at one character in `MAX_WHITESPACE_RUN`, which a longer run cannot miss, so ordinary text costs nothing.
    """
    parts: list[str] = []
    start = 0
    at = MAX_WHITESPACE_RUN - 1
    while at < len(text):
        if text[at].isspace():
            before = text[start:at]
            run_start = start + len(before.rstrip())
            run_end = _WHITESPACE.match(text, at).end()  # type: ignore[union-attr]
            for cut in range(run_start + MAX_WHITESPACE_RUN, run_end, MAX_WHITESPACE_RUN):
                parts.append(text[start:cut])
                start = cut
            at = max(at, run_end - 1)
        at += MAX_WHITESPACE_RUN
    parts.append(text[start:])
    return parts


def _messages(conversation: Any) -> list[tuple[str, str, float | None]]:
    """(role, content, weight) of each message. Raises TypeError or ValueError that names the message."""
    if isinstance(conversation, Mapping):
        messages = conversation.get("messages")
    else:
        messages = getattr(conversation, "messages", conversation)
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise TypeError("a conversation is a list of messages, {'messages': […]} or a Conversation")
    found: list[tuple[str, str, float | None]] = []
    for number, message in enumerate(messages, start=1):
        if isinstance(message, Mapping):
            role, content, weight = message.get("role"), message.get("content"), message.get("weight")
        else:
            role, content, weight = (getattr(message, name, None) for name in ("role", "content", "weight"))
        if not isinstance(role, str) or not role or "\n" in role:
            raise ValueError(f"message {number}: role {role!r} is not a name such as 'user' or 'assistant'")
        if not isinstance(content, str):
            raise ValueError(f"message {number}: content is {type(content).__name__}, not text")
        found.append((role, content, weight))
    return found


def _fit(turns: list[tuple[list[int], list[int]]], limit: int, system_first: bool) -> list[tuple[list[int], list[int]]]:
    """(header, body) turns without the oldest, at most `limit` ids; the last loses the start of its body if it must."""
    kept = list(turns)
    while len(kept) > 1 and sum(len(header) + len(body) for header, body in kept) > limit:
        del kept[1 if system_first and len(kept) > 2 else 0]
    if kept:
        header, body = kept[-1]
        room = limit - sum(len(h) + len(b) for h, b in kept[:-1]) - len(header)
        kept[-1] = (header, body[max(0, len(body) - max(room, 0)) :])
    return kept


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
