"""Which part of a conversation is sent to the model: the last messages, and only what fits its context. No torch here."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .events import Message
from .modes import ChatError

REPLY_SHARE = 4  # at least a quarter of the context is kept for the reply, unless `max_new_tokens` is smaller


class PromptEncoder(Protocol):
    """The part of ConversationTokenizer that a prompt needs."""

    def encode_conversation(self, conversation: list[Message], add_generation_prompt: bool = False) -> list[int]: ...


@dataclass(frozen=True)
class Prompt:
    """Token ids ready for the model, with an open assistant header. `room` is how many tokens the reply may have."""

    ids: list[int]
    dropped: int
    room: int


def recent(history: Sequence[Message], max_history: int) -> list[Message]:
    """The last `max_history` messages, from a user's message on: an answer without its question is no context."""
    kept = list(history[-max_history:]) if max_history > 0 else list(history[-1:])
    while len(kept) > 1 and kept[0]["role"] != "user":
        kept.pop(0)
    return kept


def _suffixes(messages: list[Message], head: int) -> list[int]:
    """Where the rest may begin after 0, 1, 2 … of the oldest pairs are gone: always at a user's message."""
    return [head] + [index for index in range(head + 1, len(messages)) if messages[index]["role"] == "user"]


def fit_prompt(tokenizer: PromptEncoder, messages: Sequence[Message], limit: int, max_new_tokens: int) -> Prompt:
    """The prompt that fits: the oldest pairs go, the system prompt and the last message stay.

    Args:
        limit: tokens that prompt and reply may have together.
        max_new_tokens: longest reply wanted; kept free as far as it is at most a quarter of the context.

    Raises:
        ChatError: the last message does not fit even alone.
    """
    kept = list(messages)
    if not kept:
        raise ChatError("nothing to answer: the conversation is empty", 2)
    head = 1 if kept[0]["role"] == "system" else 0
    reserve = max(1, min(max_new_tokens, limit // REPLY_SHARE))
    starts = _suffixes(kept, head)
    encoded: dict[int, list[int]] = {}

    def encode(index: int) -> list[int]:
        if index not in encoded:
            encoded[index] = tokenizer.encode_conversation(kept[:head] + kept[starts[index] :], add_generation_prompt=True)
        return encoded[index]

    last = len(starts) - 1
    first = 0
    if len(encode(0)) + reserve > limit:  # fewer messages never need more tokens, so halving finds the first that fit
        first = bisect_left(range(last), True, lo=1, key=lambda index: len(encode(index)) + reserve <= limit) if last else 0
    ids = encode(first)
    room = limit - len(ids)
    if room < 1:
        what = "the system prompt and the last message need" if head else "the last message needs"
        raise ChatError(f"{what} {len(ids):,} tokens, but the model's context holds {limit:,}: shorten it", 2)
    return Prompt(ids=ids, dropped=starts[first] - head, room=min(room, max_new_tokens))
