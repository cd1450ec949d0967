"""Stand-ins without torch: a backend that answers from a script, and a character tokenizer with the template's shape."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from lumina_engine.chat.events import Done, Event, Message, ModelInfo, Start, Token
from lumina_engine.chat.modes import ChatError, Sampling


class FakeBackend:
    """Answers with `reply(messages, seed)`, a word at a time; remembers what it was asked."""

    def __init__(self, digest: str = "aa") -> None:
        self.info = ModelInfo(path="runs/x/checkpoints/step-000100", run="x", step=100, digest=digest, context_limit=256)
        self.asked: list[tuple[list[Message], Sampling, int]] = []
        self.fail: ChatError | None = None
        self.fail_after = 0
        self.cancel_after: int | None = None
        self.cancelled = False
        self.closed = False

    def generate(
        self, messages: Sequence[Message], sampling: Sampling, seed: int, *, alternatives: int = 0
    ) -> Generator[Event, None, None]:
        self.asked.append((list(messages), sampling, seed))
        self.cancelled = False
        yield Start(prompt_tokens=10 * len(messages), context_limit=256)
        words = f"answer {len(self.asked)} to {messages[-1]['content']}".split(" ")
        for number, word in enumerate(words):
            if self.fail is not None and number >= self.fail_after:
                raise self.fail
            if self.cancelled or number == self.cancel_after:
                yield Done(reason="cancelled", tokens=number, seconds=0.5, first_token_s=0.25 if number else None, seed=seed)
                return
            yield Token(text=word + (" " if number < len(words) - 1 else ""), token=number)
        yield Done(reason="stop", tokens=len(words), seconds=0.5, first_token_s=0.25, seed=seed)

    def cancel(self) -> None:
        self.cancelled = True

    def close(self) -> None:
        self.closed = True


class LetterTokenizer:
    """One id per character; a turn costs its text + 4."""

    def encode_conversation(self, conversation: list[Message], add_generation_prompt: bool = False) -> list[int]:
        ids: list[int] = []
        for message in conversation:
            ids += [1, 2, *(ord(letter) for letter in message["content"]), 3, 4]
        return ids + ([1, 2] if add_generation_prompt else [])
