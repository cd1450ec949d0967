"""From the settings of a mixed run to the token stores of its tasks.

With `task_data_paths` each task has its files. Without, `train_data_path` is read once for each task, and a record belongs to
the task in its field `task`; records of other tasks, or of none, are left out and counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from .ahead import label_of
from .conversation import READING_VERSION, DataError, Document, nearest
from .files import Paths, expand
from .formats import read_conversations
from .mixed import Mixture, Store, mixture_of
from .order import ORDER_VERSION
from .rows import RowOptions
from .store import Cache, Data, Source, file_source, sample_source
from .stream_open import UNREAD, is_streamed, notes_of, unread_sources
from .tally import Tally
from .token_store import TokenStore


def open_tasks(config: Any, cache: Cache) -> Data:
    """The stores of all tasks, built where the cache has none, and what to evaluate each on.

    Raises:
        DataError: as `open_data`, and a task without a conversation.
    """
    notes: list[str] = []
    opened = {name: _open_task(name, config, cache, notes) for name in task_names(config)}
    train = mixture_of(config, {name: store for name, (store, _, _) in opened.items()})
    held_out: TokenStore | Mixture | None
    if config.task_data_paths and config.eval_data_path is not None:
        held_out = cache.store(file_source(config.eval_data_path, config, "eval_data_path"), notes)
        notes.append(
            "eval_data_path is evaluated as a whole: eval_data_path=null holds back some of each task, for a loss of each"
        )
    else:
        stores = {name: store for name, (_, store, _) in opened.items() if store is not None}
        held_out = Mixture(stores, {}) if stores else None
    sources = {path: digest for _, _, own in opened.values() for path, digest in own.items()}
    is_sample = not config.task_data_paths and config.train_data_path is None
    return Data(train, held_out, notes, is_sample, sources)


def task_names(config: Any) -> list[str]:
    """The tasks of a mixed run, in order."""
    return sorted(config.task_data_paths or config.task_weights)


def _open_task(name: str, config: Any, cache: Cache, notes: list[str]) -> tuple[Store, TokenStore | None, dict[str, str]]:
    """What a task is trained on, what it is evaluated on, and its files as `Data.sources` has them."""
    mine: list[str] = []
    split, apart = float(config.eval_split), config.eval_data_path is not None
    train: Store
    held_out: TokenStore | None = None
    key = f"task_data_paths.{name}"
    if config.task_data_paths and is_streamed(config.task_data_paths[name], config, key):
        share = 0.0 if apart else split
        stream = cache.stream(config.task_data_paths[name], config, key, share)
        notes += [f"task {name}: {line}" for line in notes_of(stream, RowOptions.from_config(config), key, share)]
        files = expand(config.task_data_paths[name], key)
        return stream, stream.eval, {f"{name}: {path}": version for path, version in unread_sources(files).items()}
    source = _source(name, config)
    apart = apart or (not config.task_data_paths and config.train_data_path is None)
    if apart or not split:
        train = cache.store(source, mine)
    else:
        train, held_out = cache.split(source, split, mine)
    if apart and not config.task_data_paths:
        held_out = _held_out(name, config, cache, mine)
    notes += [f"task {name}: {line}" for line in mine]
    sources = {f"{name}: {path}" if config.task_data_paths else path: digest for path, digest in source.digests}
    return train, held_out, sources


def train_sources(config: Any, without: Collection[str] = ()) -> dict[str, Source]:
    """What a run trains on, by task, but for the keys in `without`; a run without tasks has one source, of no name.

    Raises `DataError`.
    """
    if config.multi_task and config.task_data_paths:
        return {name: _source(name, config) for name in task_names(config) if f"task_data_paths.{name}" not in without}
    if "train_data_path" in without:
        return {}
    return {name: _source(name, config) for name in task_names(config)} if config.multi_task else {"": _whole(config, "train")}


def train_documents(config: Any) -> dict[str, tuple[str, Iterator[Document]]]:
    """What a mixed run trains on, by task: what to call it, and its conversations. Reads no more of them than is taken.

    Raises `DataError` for paths that name nothing, and where something is read, as training does.
    """
    found = {}
    for name in task_names(config):
        path, key = config.train_data_path, "train_data_path"
        if config.task_data_paths:
            path, key = config.task_data_paths[name], f"task_data_paths.{name}"
        label, documents = documents_at(path, config.data_format, key)
        if not config.task_data_paths:
            documents = filter(partial(_is_of, name), documents)
        found[name] = label, documents
    return found


def documents_at(path: Paths | None, layout: str, key: str) -> tuple[str, Iterator[Document]]:
    """What to call a path (None: the built-in corpus), and its conversations. Reads no more of them than is taken."""
    if path is None:
        from .sample import conversations

        return "built-in corpus (train)", iter(conversations("train"))
    files = expand(path, key)
    return label_of(files), read_conversations(list(files), layout, key=key)


def _is_of(name: str, document: Document) -> bool:
    return document.task == name


def _source(name: str, config: Any) -> Source:
    """What a task is trained on."""
    if config.task_data_paths:
        return file_source(config.task_data_paths[name], config, f"task_data_paths.{name}")
    if is_streamed(config.train_data_path, config):
        raise DataError(
            "tasks by the field `task` of records cannot be streamed",
            path=config.train_data_path,
            fix="give task_data_paths, or raise streaming_threshold_gb",
            exit_code=2,
        )
    return _of_records(_whole(config, "train"), config, name)


def _held_out(name: str, config: Any, cache: Cache, notes: list[str]) -> TokenStore | None:
    """What the evaluation data holds of a task: it may hold nothing."""
    source = _of_records(_whole(config, "eval"), config, name)
    try:
        return cache.store(source, notes)
    except TaskMissing:
        notes.append(f"nothing of it in {source.label}: the task is not evaluated")
        return None


def _whole(config: Any, split: str) -> Source:
    """All training or evaluation data."""
    key = "train_data_path" if split == "train" else "eval_data_path"
    path = getattr(config, key)
    return sample_source(split) if path is None else file_source(path, config, key)


class TaskMissing(DataError):
    """No record carries the task."""


def _of_records(source: Source, config: Any, task: str) -> Source:
    """The records of one task. Raises `TaskMissing` when they are read and there are none."""
    named = frozenset(config.task_weights)

    def read(tally: Tally) -> Iterator[Document]:
        found: Counter[str | None] = Counter()
        for document in source.read(tally):
            found[document.task] += 1
            if document.task == task:
                yield document
        if not found[task]:
            raise _missing(task, source.label, found)
        for other in found.keys() - {task}:
            if other in named:
                tally.read -= found[other]  # another task's, read there
            else:
                tally.dropped["without a task" if other is None else f"task {other!r} has no weight"] += found[other]

    digest = hashlib.sha256(f"{source.digest}\n{sorted(named)}\ntask {task}".encode()).hexdigest()
    return replace(source, digest=digest, read=read, files=())


def _missing(task: str, label: str, found: Counter[str | None]) -> TaskMissing:
    names = sorted(name for name in found if name is not None)
    if not names:
        cause, fix = (
            f"no record of it carries a task, and task_weights has {task!r}",
            "give task_data_paths, or records a `task`",
        )
    else:
        near = nearest(task, names)
        cause = f"no record of it carries the task {task!r}; tasks there: {', '.join(names[:20])}"
        fix = f"did you mean {near}?" if near else "correct task_weights"
    return TaskMissing(cause, path=label, fix=fix, exit_code=2)


def data_rules() -> dict[str, int]:
    """The versions of what makes rows of files, for a checkpoint: with others equal files give other rows."""
    return {"order": ORDER_VERSION, "reading": READING_VERSION}


def why_other_rows(saved: Mapping[str, Any], sources: dict[str, str]) -> tuple[str, str]:
    """Why a checkpoint (its global state) was trained on other rows than `sources` give now, and what to do, in words."""
    then = saved.get("data_sources") or {}
    files = changed_sources(then, sources)
    if then and not files and saved.get("data_rules") != data_rules():
        why = "its rows were made by a version of Lumina that reads, orders or packs data otherwise (no file changed)"
        return why, "go on with that version"
    return f"the training data changed since it was saved{': ' + files if files else ''}", "restore the data"


def changed_sources(then: dict[str, str], now: dict[str, str]) -> str:
    """Which files differ between two `sources`, in words; empty where none does or nothing is known of then."""
    if not then:
        return ""
    lost = [f"{name} is gone" for name in then if name not in now]
    new = [f"{name} is new" for name in now if name not in then]
    other = [f"{name} changed" for name, version in then.items() if _other(version, now.get(name, version))]
    found = other + lost + new
    more = f" and {len(found) - 8:,} more" if len(found) > 8 else ""
    return ", ".join(found[:8]) + more


def _other(one: str, two: str) -> bool:
    """Whether two versions of a file differ. That of a stream and the digest of a content cannot be compared."""
    return one != two and one.startswith(UNREAD) == two.startswith(UNREAD)
