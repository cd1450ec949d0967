"""Tokenising pieces on Ray, from one machine to a cluster: the very function that local processes run, so the stores are equal.

Every node must see the data files and `data_cache_dir` under the same paths. With `RAY_ADDRESS` an existing cluster is joined,
else one is started on this machine and stopped again; it sends no usage statistics and opens no dashboard. A worker that is
killed costs its piece: Ray starts it again, and the piece is written from its beginning.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .conversation import DataError
from .pieces import Piece, build_piece
from .token_store import Progress, TokenStore
from .tokenizer import ConversationTokenizer

if TYPE_CHECKING:
    from .prepare import Job


class PieceBuilder:
    """One worker: a Ray actor, so that the vocabulary is built once for all of its pieces."""

    def __init__(self, tokenizer: str, digest: str, threshold: int | None) -> None:
        from .store import part_of

        self.tokenizer = ConversationTokenizer(tokenizer)
        self.same = self.tokenizer.digest == digest
        self.part_of = part_of(threshold)

    def build(self, piece: Mapping[str, Any], targets: Mapping[str, str]) -> dict[str, Any]:
        """`documents` and `tokens` of the piece, or `error` as `DataError.to_dict` gives it."""
        try:
            if not self.same:
                raise DataError(f"tokenizer {self.tokenizer.name} is another one on a node", fix="install the same version")
            paths = {part: Path(target) for part, target in targets.items()}
            stores = build_piece(Piece(**piece), paths, self.tokenizer, self.part_of).values()
        except DataError as error:
            return {"error": error.to_dict()}
        return {"documents": sum(map(len, stores)), "tokens": sum(store.num_tokens for store in stores)}


def tokenise_on_ray(job: Job, workers: int, tries: int, told: Mapping[int, Progress]) -> None:
    """Build the stores of all pieces with `workers` actors; `told[number]` hears of each piece when it is done.

    Raises:
        DataError: Ray is missing, the fault of the first piece that has one, or that a piece killed its worker `tries` times.
    """
    with _ray(workers) as ray:
        kind = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=tries - 1)(PieceBuilder)
        builders = [kind.remote(job.tokenizer.name, job.tokenizer.digest, job.threshold) for _ in range(workers)]
        waiting, running, faults = deque(_missing(job)), dict[Any, tuple[int, Any]](), dict[int, DataError]()

        def give(builder: Any) -> None:
            if waiting and not faults:
                number = waiting.popleft()
                targets = {part: str(target) for part, target in job.targets(number).items()}
                running[builder.build.remote(job.pieces[number].to_dict(), targets)] = number, builder

        for builder in builders:
            give(builder)
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            number, builder = running.pop(done)
            try:
                said = ray.get(done)
            except ray.exceptions.RayActorError:
                piece = job.pieces[number]
                said = {"error": _killed(piece, tries).to_dict()}
            if "error" in said:
                faults[number] = DataError(**said["error"])
                continue
            told[number](said["documents"], said["tokens"])
            give(builder)
        if faults:
            raise faults[min(faults)]


def _missing(job: Job) -> list[int]:
    """The pieces that are not there yet. A store that is there was published whole; whoever joins it checks its sizes."""
    return [n for n in range(len(job.pieces)) if not all(_is_there(target) for target in job.targets(n).values())]


def _is_there(target: Path) -> bool:
    try:
        TokenStore(target)
    except DataError:
        return False
    return True


def _killed(piece: Piece, tries: int) -> DataError:
    return DataError(
        f"the Ray worker that tokenises bytes {piece.start:,} on was killed {tries} times",
        path=piece.path,
        fix="look for out-of-memory in the logs of Ray, or give fewer workers",
    )


@contextmanager
def _ray(workers: int) -> Iterator[Any]:
    """Ray, connected; what was started here is stopped at the end."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read by the processes that Ray starts
    try:
        import ray
    except ImportError:
        raise DataError("--engine ray needs Ray", fix="pip install 'lumina[ray]'", exit_code=2) from None
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if "RAY_ADDRESS" not in os.environ:
        options |= {"num_cpus": workers, "include_dashboard": False, "object_store_memory": 80 << 20}  # results are two numbers
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError) as error:
        raise DataError(f"Ray cannot be reached ({error})", fix="check RAY_ADDRESS, or unset it", exit_code=2) from None
    try:
        yield ray
    finally:
        ray.shutdown()
