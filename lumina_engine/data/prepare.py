"""Tokenising a large data set with several processes, so that nothing that is done is lost when one or all are killed."""

from __future__ import annotations

import json
import queue
import shutil
import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from .ahead import Ahead, end_worker, processors
from .conversation import DataError, Document
from .pieces import Piece, build_piece
from .store_writer import StoreWriter
from .tally import Tally
from .token_store import Progress, TokenStore

_SETTLED = 4  # pieces after which those that were joined are brought to disk
_TRIES = 3  # workers that may die over one piece


@dataclass(frozen=True)
class Job:
    """What to tokenise, and where the stores of the pieces go meanwhile.

    Args:
        pieces: in the order of the store.
        folder: of the pieces' stores; removed by `join`.
        tokenizer: built again by name in each process.
        threshold: of the split into training and evaluation; None: one part, "all".
        part_of: the part of a document, as the workers decide it from `threshold`.
        engine: "local" for processes of this machine, "ray" for workers of Ray.
        ahead: where the processes come from.
    """

    pieces: list[Piece]
    folder: Path
    tokenizer: Any
    threshold: int | None
    part_of: Callable[[Document], str]
    engine: str = "local"
    ahead: Ahead = field(default_factory=Ahead)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the stores that come out."""
        return ("all",) if self.threshold is None else ("train", "eval")

    def targets(self, number: int) -> dict[str, Path]:
        """Where the stores of a piece go."""
        return {part: self.folder / f"piece-{number:06d}-{part}" for part in self.parts}


def tokenise(job: Job, workers: int | None, progress: Progress | None = None, *, apart: bool = False) -> Generator[int]:
    """Build the stores of all pieces, those that are there excepted. Yields their numbers in order, each when it is whole.

    `workers` None is one for each processor of this machine, or of the cluster of Ray. With `apart` a single worker is a
    process, too. Closing the generator ends the workers.

    Raises:
        DataError: the fault of the first piece that has one, or that a piece killed its worker three times.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    for stale in job.folder.glob("*.tmp-*"):  # of workers that were killed; the caller holds the lock
        shutil.rmtree(stale, ignore_errors=True)
    counts = _Counts(progress)
    if job.engine == "ray":
        from .ray_engine import tokenise_on_ray  # an optional extra

        tokenise_on_ray(job, workers, _TRIES, {number: counts.of(number) for number in range(len(job.pieces))})
        yield from range(len(job.pieces))
        return
    workers = processors() if workers is None else workers
    if apart or (workers > 1 and len(job.pieces) > 1):
        yield from _by_processes(job, workers, counts)
    else:
        for number, piece in enumerate(job.pieces):
            build_piece(piece, job.targets(number), job.tokenizer, job.part_of, counts.of(number))
            yield number


def _by_processes(job: Job, workers: int, counts: _Counts) -> Generator[int]:
    """`tokenise` by processes of this machine, each driven by a thread."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(job.pieces)):
        waiting.put(number)
    done: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # None: a thread has ended
    faults: dict[int, BaseException] = {}
    args = (job, waiting, done, faults, counts)
    threads = [threading.Thread(target=_drive, args=args, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        whole: set[int] = set()
        following, working = 0, len(threads)
        while working:
            said = done.get()
            if said is None:
                working -= 1
                continue
            whole.add(said)
            while following in whole and not faults:
                yield following
                following += 1
    finally:
        if working:  # the threads see it and end their workers
            faults.setdefault(len(job.pieces), KeyboardInterrupt())
        for thread in threads:
            thread.join()
    if faults:
        raise faults[min(faults)]


def join(
    job: Job,
    finished: Generator[int],
    targets: Mapping[str, Path],
    extra: Callable[[Tally], Mapping[str, Any]],
    *,
    required: bool = True,
) -> dict[str, TokenStore] | None:
    """The stores of the pieces as one for each part, in order. `finished` is of `tokenise`: pieces are joined as they come.

    With `required` the answer is None, and nothing is left, when a part holds no document.
    """
    tally = Tally()
    writers: dict[str, StoreWriter] = {}
    try:
        for part, target in targets.items():
            writers[part] = StoreWriter(target, job.tokenizer)
        for number in finished:
            stores = {part: TokenStore(path) for part, path in job.targets(number).items()}
            tally.add(Tally.from_dict(stores[job.parts[0]].meta["tally"]))  # each part tells the counts of the whole piece
            for part, writer in writers.items():
                writer.extend(stores[part])
                if not (number + 1) % _SETTLED:
                    writer.settle()  # the disk works while other pieces are tokenised
        if required and not all(writer.documents for writer in writers.values()):
            shutil.rmtree(job.folder, ignore_errors=True)
            return None
        joined = {part: TokenStore(writer.publish(extra(tally))) for part, writer in writers.items()}
    finally:
        finished.close()
        for writer in writers.values():
            writer.discard()
    shutil.rmtree(job.folder, ignore_errors=True)
    return joined


class _Counts:
    """Documents and tokens of all pieces together, for the progress line."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self._latest: dict[int, tuple[int, int]] = {}

    def of(self, number: int) -> Progress:
        """What piece `number` reports to."""

        def told(documents: int, tokens: int) -> None:
            with self._lock:
                self._latest[number] = (documents, tokens)
                if self._progress is not None:
                    self._progress(sum(d for d, _ in self._latest.values()), sum(t for _, t in self._latest.values()))

        return told


def _drive(
    job: Job,
    waiting: queue.SimpleQueue[int],
    done: queue.SimpleQueue[int | None],
    faults: dict[int, BaseException],
    counts: _Counts,
) -> None:
    """Keep one worker busy until no piece waits, or one failed."""
    worker: _Worker | None = None
    try:
        while not faults:
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                return
            for attempt in range(_TRIES):
                if worker is None:
                    worker = _Worker(job)
                if worker.build(job.pieces[number], job.targets(number), counts.of(number), faults):
                    done.put(number)
                    break
                worker.close()
                worker = None
                if faults:
                    return
                if attempt == _TRIES - 1:
                    piece = job.pieces[number]
                    raise DataError(
                        f"the process that tokenises bytes {piece.start:,} on was killed {_TRIES} times",
                        path=piece.path,
                        fix="look for out-of-memory in the system's log, or give fewer workers",
                    )
    except BaseException as error:  # told to the thread that waits
        faults[number] = error
    finally:
        if worker is not None:
            worker.close()
        done.put(None)


class _Worker:
    """One process of `piece_worker`."""

    def __init__(self, job: Job) -> None:
        self._process = job.ahead.take()
        tokenizer = job.tokenizer
        self._tell({"tokenizer": tokenizer.name, "digest": tokenizer.digest, "threshold": job.threshold})

    def _tell(self, line: Mapping[str, Any]) -> bool:
        stdin = _there(self._process.stdin)
        try:
            stdin.write(json.dumps(line) + "\n")
            stdin.flush()
        except OSError:  # it died
            return False
        return True

    def build(self, piece: Piece, targets: Mapping[str, Path], progress: Progress, faults: Mapping[int, object]) -> bool:
        """Whether the piece is done; False when the process died, or another piece failed. Raises `DataError`."""
        named = {part: str(target) for part, target in targets.items()}
        if not self._tell({"piece": piece.to_dict(), "targets": named}):
            return False
        for line in _there(self._process.stdout):
            said = json.loads(line)
            if "error" in said:
                raise DataError(**said["error"])
            if "done" in said:
                return True
            progress(said["documents"], said["tokens"])
            if faults:
                return False
        return False

    def close(self) -> None:
        """End the process, whatever it does: its piece is written again from its start."""
        end_worker(self._process)


def _there(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
