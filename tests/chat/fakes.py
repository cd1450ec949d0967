"""Stand-ins without torch: a backend that answers from a script, a character tokenizer, server and terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from lumina_engine.chat.console import Console, Show
from lumina_engine.chat.events import Alternative, Done, Event, Message, ModelInfo, Route, Routed, Start, Token
from lumina_engine.chat.modes import Sampling
from lumina_engine.chat.server import ChatServer
from lumina_engine.chat.session import ChatSession
from lumina_engine.checkpoint.commit import Staging, commit, set_pointer


class FakeBackend:
    """Answers a word at a time; remembers what it was asked. `gate` holds every word back until it is set."""

    def __init__(self, digest: str = "aa", step: int = 100) -> None:
        self.info = ModelInfo(
            path=f"runs/x/checkpoints/step-{step:06d}",
            run="x",
            step=step,
            loss=1.5,
            loss_name="eval_loss",
            parameters=3_377_792,
            digest=digest,
            context_limit=256,
            tokenizer="lumina-1k",
        )
        self.asked: list[tuple[list[Message], Sampling, int]] = []
        self.fail: Exception | None = None
        self.fail_after = 0
        self.cancelled = False
        self.closed = False
        self.gate = threading.Event()
        self.gate.set()
        self.endless = False
        self.reply: str | None = None

    def generate(
        self, messages: Sequence[Message], sampling: Sampling, seed: int, *, alternatives: int = 0, trace: bool = False
    ) -> Generator[Event, None, None]:
        self.asked.append((list(messages), sampling, seed))
        self.cancelled = False
        yield Start(prompt_tokens=10 * len(messages), context_limit=256)
        last = messages[-1]["content"]
        words = (self.reply or f"answer {len(self.asked)} to {last}").split(" ")
        endless = self.endless or last.startswith("endless")
        number = 0
        while number < len(words) or endless:
            if self.fail is not None and number >= self.fail_after:
                raise self.fail
            while not self.gate.wait(0.01) and not self.cancelled:
                pass
            if self.cancelled:
                yield Done(reason="cancelled", tokens=number, seconds=0.5, first_token_s=0.25 if number else None, seed=seed)
                return
            word = words[number % len(words)]
            text = word if number == len(words) - 1 and not endless else word + " "
            if trace:
                others = [Alternative(f"{word}?", 1000 + rank, 0.5 / (rank + 2)) for rank in range(5)]
                yield Token(text=text, token=number, probability=1 / (number + 1), chance=0.5, alternatives=others)
                yield Routed(index=number, experts=8, routes=[Route(layer, [number % 8], [0.75]) for layer in (1, 2)])
            else:
                yield Token(text=text, token=number)
            number += 1
            if endless:
                threading.Event().wait(0.01)
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


def commit_checkpoint(
    runs: Path,
    run: str,
    step: int,
    *,
    best: bool = False,
    loss: float | None = None,
    manifest: dict[str, Any] | None = None,
    weights: bytes = bytes(1000),
    folder: str = "checkpoints",
) -> Path:
    """A committed checkpoint with a real manifest (and what `manifest` adds); nothing to load in it unless `weights` has it."""
    checkpoints = runs / run / folder
    staging = Staging(checkpoints, step)
    entries = [staging.write("model/model.safetensors", [weights]), staging.write("state/rank-00000.json", [b"{}"])]
    metrics = {} if loss is None else {"eval_loss": loss}
    path = commit(staging, entries, {"metrics": metrics, "created": 1.0, **(manifest or {})})
    if best:
        set_pointer(checkpoints, "best", path.name)
    return path


def serve(path: str) -> None:
    """A server process with the fake backend."""
    ChatServer(Path(path), lambda say: FakeBackend()).serve()


def talk() -> None:
    """`lumina-engine chat` on this terminal with the fake backend."""
    raise SystemExit(Console(ChatSession(FakeBackend()), Show()).loop())


if __name__ == "__main__":
    serve(sys.argv[1]) if len(sys.argv) > 1 else talk()
