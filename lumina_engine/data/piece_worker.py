"""A process that tokenises pieces: `python -m lumina_engine.data.piece_worker`.

Standard input: first what all pieces share (`tokenizer`, `digest`, `threshold`), then one piece a line. Standard output: a line
of figures now and then, one when a piece is done, one when it failed. It ends with its input, so it never outlives its parent.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from .conversation import DataError
from .pieces import Piece, build_piece
from .store import part_of
from .tokenizer import ConversationTokenizer


def main() -> int:
    """Work until the input ends."""
    first = sys.stdin.readline()
    if not first:  # started ahead, and not needed
        return 0
    shared = json.loads(first)
    tokenizer = ConversationTokenizer(shared["tokenizer"])
    if tokenizer.digest != shared["digest"]:
        _say(error=DataError(f"tokenizer {tokenizer.name} changed", fix="start again").to_dict())
        return 1
    side = part_of(shared["threshold"])
    for line in sys.stdin:
        task = json.loads(line)
        piece, targets = Piece(**task["piece"]), {part: Path(target) for part, target in task["targets"].items()}
        try:
            build_piece(piece, targets, tokenizer, side, lambda d, t: _say(documents=d, tokens=t))
        except DataError as error:
            _say(error=error.to_dict())
        except Exception as error:  # a fault of the program: another process would meet it, too
            traceback.print_exc()
            _say(error=_unexpected(error, piece).to_dict())
        else:
            _say(done=True)
    return 0


def _unexpected(error: Exception, piece: Piece) -> DataError:
    cause = f"{type(error).__name__} while bytes {piece.start:,} on were tokenised: {error}"
    return DataError(cause, path=piece.path, fix="please report it with what is above", exit_code=1)


def _say(**line: Any) -> None:
    try:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the parent was killed: nobody is left to hear of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


if __name__ == "__main__":
    sys.exit(main())
