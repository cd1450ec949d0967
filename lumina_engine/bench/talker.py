"""A chat server without a model, for measuring what showing a reply costs: `python -m lumina_engine.bench.talker CHECKPOINT`.

It listens where the server of that checkpoint would, with the real protocol. A message that has `code` in it is answered with
400 lines of code, a line at a time; every other one with prose. All come at 50 tokens a second.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator, Sequence
from pathlib import Path

from ..chat.client import socket_path
from ..chat.events import Done, Event, Message, ModelInfo, Start, StopReason, Token
from ..chat.modes import Sampling
from ..chat.server import ChatServer
from ..checkpoint.commit import Staging, commit

TOKENS_PER_S = 50.0
CODE_LINES = 400
PROSE = "The **leaves** fall because the days grow short, and a thin layer of cork cuts each one off. " * 40
CODE = ["```python\n", *(f"    value_{n} = compute(value_{n - 1}, {n})  # line {n}\n" for n in range(CODE_LINES)), "```\n"]


def make_checkpoint(checkpoints: Path, step: int) -> Path:
    """A committed checkpoint with nothing to load in it."""
    staging = Staging(checkpoints, step)
    entries = [staging.write("model/model.safetensors", [bytes(1000)]), staging.write("state/rank-00000.json", [b"{}"])]
    return commit(staging, entries, {"metrics": {}, "created": 1.0})


class Talker:
    """A backend that speaks without thinking."""

    def __init__(self, checkpoint: Path) -> None:
        self._info = ModelInfo(path=str(checkpoint), run="bench", step=100, context_limit=1 << 20, tokenizer="none")
        self._stop = threading.Event()

    @property
    def info(self) -> ModelInfo:
        return self._info

    def generate(
        self, messages: Sequence[Message], sampling: Sampling, seed: int, *, alternatives: int = 0, trace: bool = False
    ) -> Generator[Event, None, None]:
        """The text for the last message, one piece every 1/50 s."""
        self._stop.clear()
        yield Start(prompt_tokens=10, context_limit=self._info.context_limit)
        pieces = CODE if "code" in messages[-1]["content"] else [word + " " for word in PROSE.split(" ")]
        spoken = 0
        for number, piece in enumerate(pieces):
            if self._stop.wait(1 / TOKENS_PER_S):
                break
            spoken += 1
            yield Token(text=piece, token=number)
        reason: StopReason = "cancelled" if self._stop.is_set() else "stop"
        yield Done(reason=reason, tokens=spoken, seconds=spoken / TOKENS_PER_S, first_token_s=1 / TOKENS_PER_S, seed=seed)

    def cancel(self) -> None:
        self._stop.set()

    def close(self) -> None:
        """There is nothing to close."""


def main() -> int:
    """Serve until a signal comes."""
    checkpoint = Path(sys.argv[1])
    server = ChatServer(socket_path(checkpoint), lambda say: Talker(checkpoint))
    print("playing", flush=True)
    server.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
