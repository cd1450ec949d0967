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

from .ahead import processors
from .conversation import DataError
from .pieces import Piece, build_piece
from .token_store import Progress, TokenStore
from .tokenizer import ConversationTokenizer

if TYPE_CHECKING:
    from .prepare import Job

_PATIENCE = 120.0  # seconds without a worker, in which a cluster may start a node


class PieceBuilder:
    """One worker: a Ray actor, so that the vocabulary is built once for all of its pieces."""

    def __init__(self, tokenizer: str, digest: str, threshold: int | None) -> None:
        from .store import part_of

        self.tokenizer = ConversationTokenizer(tokenizer)
        self.same = self.tokenizer.digest == digest
        self.part_of = part_of(threshold)

    def ready(self) -> bool:
        """Answers once the worker is up."""
        return True

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


def tokenise_on_ray(job: Job, workers: int | None, tries: int, told: Mapping[int, Progress]) -> None:
    """Build the stores of all pieces with up to `workers` actors; `told[number]` hears of each piece when it is done.

    None: an actor for each processor of the cluster. Actors that find no free processor get no piece; the others go on.

    Raises:
        DataError: Ray is missing, the fault of the first piece that has one, that a piece killed its worker `tries` times, or
            that no worker could be started.
    """
    waiting = deque(_missing(job))
    with _ray(workers) as ray:
        most = workers or max(int(ray.cluster_resources().get("CPU", 1)), 1)
        kind = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=tries - 1)(PieceBuilder)
        count = min(most, len(waiting))
        builders = [kind.remote(job.tokenizer.name, job.tokenizer.digest, job.threshold) for _ in range(count)]
        try:
            _Spread(ray, job, waiting, builders, tries, told).run()
        finally:
            for builder in builders:  # those that never found a free processor, too
                ray.kill(builder)


class _Spread:
    """Pieces given to builders, each builder from when it is up, one piece at a time."""

    def __init__(
        self, ray: Any, job: Job, waiting: deque[int], builders: list[Any], tries: int, told: Mapping[int, Progress]
    ) -> None:
        self.ray, self.job, self.waiting, self.tries, self.told = ray, job, waiting, tries, told
        self.starting = {builder.ready.remote(): builder for builder in builders}
        self.running: dict[Any, tuple[int, Any]] = {}
        self.faults: dict[int, DataError] = {}

    def run(self) -> None:
        """Until nothing waits or runs, or a piece has a fault. Raises `DataError`."""
        while self.running or (self.waiting and not self.faults):
            patience = None if self.running else _PATIENCE
            done, _ = self.ray.wait([*self.running, *self.starting], num_returns=1, timeout=patience)
            if not done:
                raise _none_up(f"no processor of the cluster came free in {_PATIENCE:g} s")
            if done[0] in self.starting:
                self._up(done[0])
            else:
                self._built(done[0])
        if self.faults:
            raise self.faults[min(self.faults)]

    def _up(self, ready: Any) -> None:
        builder = self.starting.pop(ready)
        try:
            self.ray.get(ready)
        except self.ray.exceptions.RayActorError as error:
            if not self.starting and not self.running:
                raise _none_up(str(error).strip().rpartition("\n")[2]) from None
        else:
            self._give(builder)

    def _give(self, builder: Any) -> None:
        if self.waiting and not self.faults:
            number = self.waiting.popleft()
            targets = {part: str(target) for part, target in self.job.targets(number).items()}
            self.running[builder.build.remote(self.job.pieces[number].to_dict(), targets)] = number, builder

    def _built(self, done: Any) -> None:
        number, builder = self.running.pop(done)
        try:
            said = self.ray.get(done)
        except self.ray.exceptions.RayActorError:
            said = {"error": _killed(self.job.pieces[number], self.tries).to_dict()}
        if "error" in said:
            self.faults[number] = DataError(**said["error"])
            return
        self.told[number](said["documents"], said["tokens"])
        self._give(builder)


def _none_up(cause: str) -> DataError:
    fix = "free a processor (`ray status` tells who holds them), or leave --engine ray out"
    return DataError(f"no Ray worker could be started: {cause}", fix=fix, exit_code=2)


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
def _ray(workers: int | None) -> Iterator[Any]:
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
        options |= {"num_cpus": workers or processors(), "include_dashboard": False}
        options["object_store_memory"] = 80 << 20  # results are two numbers
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError) as error:
        raise DataError(f"Ray cannot be reached ({error})", fix="check RAY_ADDRESS, or unset it", exit_code=2) from None
    try:
        yield ray
    finally:
        ray.shutdown()
