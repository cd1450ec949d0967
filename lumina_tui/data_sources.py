"""What the Data screen lists: sources of conversations, what is known of each and how it is known. Plain Python."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lumina_engine.config.schema import Config
from lumina_engine.config.task_checks import train_paths
from lumina_engine.data.conversation import DataError
from lumina_engine.data.files import expand
from lumina_engine.data.formats import detect_format
from lumina_engine.data.size import BYTES_PER_TOKEN

from .form import Form
from .jobs import Job, JobState

BUILT_IN = ""  # key of the built-in corpus
SAMPLE_ABOVE = 200_000_000  # bytes above which only a sample is tokenised …
SAMPLE = 20_000  # … of this many conversations
PREVIEW_TOKENS = 32_768  # tokens of the rows that one preview fetches, at least one row
_DETECTED = 20  # files of a source whose format is looked at
_ENTRIES = 50_000  # entries of a folder that are looked at

Use = Literal["train", "eval", "added", "built-in"]
Stamp = tuple[tuple[str, int, int], ...]  # path, bytes, mtime_ns of each file


@dataclass(frozen=True)
class Look:
    """A source as it lies on the disk. `problem` says why it cannot be used."""

    stamp: Stamp = ()
    format: str = ""
    problem: str = ""

    @property
    def bytes(self) -> int:
        return sum(size for _, size, _ in self.stamp)


@dataclass
class Source:
    """One row. `check`, `prepared` and `preview` are answers of the engine; `checked_at` is unix seconds."""

    key: str
    use: Use
    look: Look | None = None
    check: dict[str, Any] | None = None
    checked_at: float = 0.0
    checked_with: tuple[str, int] = ("", 0)  # tokenizer, seq_length
    prepared: dict[str, Any] | None = None
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)  # previewed rows by number
    total_rows: int | None = None
    at_row: int = 0
    jobs: dict[str, Job] = field(default_factory=dict)  # by verb, the newest of each

    @property
    def name(self) -> str:
        """Its path as the user knows it."""
        return self.key or "built-in corpus"

    @property
    def stale(self) -> bool:
        """Whether a file has changed, come or gone since the check."""
        if self.check is None or self.look is None or self.key == BUILT_IN:
            return False
        seen = {(f["path"], f.get("bytes"), f.get("mtime_ns")) for f in self.check["files"]}
        return seen != set(self.look.stamp)

    @property
    def conversations(self) -> int | None:
        """As counted by the last check."""
        return None if self.check is None else int(self.check["total_conversations"])

    @property
    def tokens(self) -> tuple[int | None, str]:
        """Tokens and how they are known: measured, guessed, or "" when nothing is known."""
        if self.check is not None and "tokens" in self.check:
            return int(self.check["tokens"]), str(self.check["tokens_basis"])
        if self.look is not None and self.look.bytes:
            return int(self.look.bytes / BYTES_PER_TOKEN), "guessed"
        return None, ""

    @property
    def problems(self) -> int:
        """Problems found by the last check."""
        return 0 if self.check is None else sum(self.check["problem_counts"].values())

    def forget_rows(self) -> None:
        """Fetch rows anew: what they are made from has changed."""
        self.rows, self.total_rows, self.at_row = {}, None, 0
        self.jobs.pop("preview", None)

    @property
    def running(self) -> list[Job]:
        """Jobs that have not ended."""
        return [job for job in self.jobs.values() if not job.over]


def look_at(key: str, before: Look | None = None) -> Look:
    """Files, sizes and format of a source; `before` if nothing has changed since. Reads the disk; never raises."""
    if key == BUILT_IN:
        return Look((), "messages")
    try:
        files = expand(key, "data path", _ENTRIES)
        stamp = tuple((str(path), (found := path.stat()).st_size, found.st_mtime_ns) for path in files)
    except DataError as error:
        return Look(problem=f"{error.message}" + (f"; {error.fix}" if error.fix else ""))
    except OSError as error:
        return Look(problem=f"cannot be read ({error.strerror or error})")
    if before is not None and before.stamp == stamp:
        return before
    return Look(stamp, *_formats([path for path, _, _ in stamp[:_DETECTED]]))


def _formats(paths: Iterable[str]) -> tuple[str, str]:
    """(format, problem): of several formats "mixed"; a problem only when no file can be read."""
    formats: set[str] = set()
    problem = ""
    for path in paths:
        try:
            formats.add(detect_format(path))
        except DataError as error:
            problem = problem or str(error)
    return ("mixed" if len(formats) > 1 else next(iter(formats), "")), ("" if formats else problem)


@dataclass(frozen=True)
class Settings:
    """What decides how data become rows: the configuration at hand, and where it comes from."""

    config: Config
    origin: str
    arguments: tuple[str, ...] = ()

    @classmethod
    def of(cls, form: Form | None) -> Settings:
        """From the editor's form; without one from the preset `debug`, which a plain `lumina-engine train` uses."""
        if form is None:
            return cls.of(Form.from_preset("debug"))
        origin = form.path.name if form.path is not None else f"preset {form.preset}" if form.preset else "own values"
        return cls(form.config(), origin, tuple(form.arguments()))

    @property
    def train(self) -> list[str]:
        """Of a mixed run the paths of all tasks."""
        return [path for value in train_paths(self.config).values() for path in _entries(value)]

    @property
    def eval(self) -> list[str]:
        return _entries(self.config.eval_data_path)

    def words(self) -> list[str]:
        """The keys that decide what a row holds, as `key=value`."""
        names = ("tokenizer", "seq_length", "packing", "train_on", "assistant_loss_weight", "seed")
        return [f"{name}={_yaml(getattr(self.config, name))}" for name in names]


def _yaml(value: Any) -> str:
    """A scalar as flow YAML."""
    return json.dumps(value, ensure_ascii=False)


def _entries(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


class Sources:
    """All sources: those of the configuration, the built-in corpus, and paths that the user added, in this order."""

    def __init__(self, settings: Settings, added: Iterable[str] = ()) -> None:
        self.settings = settings
        self.added = list(dict.fromkeys(added))
        self.rows: dict[str, Source] = {}
        self.arrange()

    def configure(self, settings: Settings) -> bool:
        """Take another configuration; whether it is another one. What was counted stays, with what it was counted for."""
        if settings == self.settings:
            return False
        if settings.words() != self.settings.words():
            for source in self.rows.values():
                source.forget_rows()
        self.settings = settings
        self.arrange()
        return True

    def arrange(self) -> None:
        """Bring the rows in line with the configuration and the added paths."""
        uses: dict[str, Use] = {}
        for key in self.settings.train or [BUILT_IN]:
            uses.setdefault(key, "train")
        for key in self.settings.eval:
            uses.setdefault(key, "eval")
        uses.setdefault(BUILT_IN, "built-in")
        for key in self.added:
            uses.setdefault(key, "added")
        known = self.rows
        self.rows = {key: known.get(key) or Source(key, use) for key, use in uses.items()}
        for key, use in uses.items():
            self.rows[key].use = use

    def add(self, key: str) -> Source:
        """Keep a path of the user's."""
        if key not in self.added and key not in self.rows:
            self.added.append(key)
            self.arrange()
        return self.rows[key]

    def forget(self, key: str) -> None:
        """Drop an added path."""
        self.added.remove(key)
        self.arrange()

    def took(self, looks: dict[str, Look]) -> bool:
        """Take what a look at the disk gave; whether anything is new. Rows from older files are fetched again."""
        new = False
        for key, look in looks.items():
            source = self.rows.get(key)
            if source is not None and source.look != look:
                if source.look is not None:
                    source.forget_rows()
                source.look, new = look, True
        return new

    def share(self, source: Source) -> tuple[float | None, str]:
        """The share of the training tokens that a source brings, and how it is known.

        None if it is not trained on, and in a mixed run, whose tasks have shares, not its files.
        """
        if source.use != "train" or self.settings.config.multi_task:
            return None, ""
        counts = [row.tokens for row in self.rows.values() if row.use == "train"]
        own, total = source.tokens[0], sum(count or 0 for count, _ in counts)
        if len(counts) == 1:
            return 1.0, "computed"
        if own is None or not total or any(count is None for count, _ in counts):
            return None, ""
        return own / total, "measured" if all(basis == "measured" for _, basis in counts) else "guessed"

    # commands

    def validate(self, source: Source) -> list[str]:
        """The command that checks a source."""
        config, words = self.settings.config, ["data", "validate"]
        if source.use != "added" and source.key != BUILT_IN:
            words += ["--format", config.data_format]
        words += ["--tokenizer", config.tokenizer, "--seq-length", str(config.seq_length)]
        if source.look is not None and source.look.bytes > SAMPLE_ABOVE:
            words += ["--sample", str(SAMPLE)]
        if source.use != "eval":
            words += [f"--against={path}" for path in self.settings.eval if path != source.key]
        return [*words, "--", *([source.key] if source.key != BUILT_IN else [])]

    def preview(self, source: Source, first: int) -> list[str]:
        """The command that shows rows of a source from `first` on."""
        count = max(1, min(16, PREVIEW_TOKENS // self.settings.config.seq_length))
        words = ["data", "preview", *self.settings.words(), "--first", str(first), "--rows", str(count)]
        if source.key == BUILT_IN:
            return [*words, "train_data_path=null"]
        if source.use != "added":
            words.append(f"data_format={self.settings.config.data_format}")
        return [*words, f"train_data_path={_yaml(source.key)}"]

    def prepare(self, source: Source) -> list[str]:
        """The command that tokenises a source: the whole configuration for its own, else this path with the same settings."""
        if source.use in ("train", "eval"):
            return ["data", "prepare", *self.settings.arguments]
        path = "null" if source.key == BUILT_IN else _yaml(source.key)
        config = self.settings.config
        more = [f"eval_split={config.eval_split}", f"data_cache_dir={_yaml(config.data_cache_dir)}", "vocab_size=auto"]
        return ["data", "prepare", *self.settings.words(), *more, f"train_data_path={path}"]

    @staticmethod
    def convert(source: Source, out: str) -> list[str]:
        """The command that writes a source as conversation JSON Lines."""
        return ["data", "convert", "--", source.key, out]


def took_check(source: Source, job: Job, settings: Settings, now: float | None = None) -> None:
    """Keep the answer of a check that has ended."""
    if job.state is JobState.DONE:
        source.check, source.checked_at = job.result, time.time() if now is None else now
        source.checked_with = (settings.config.tokenizer, settings.config.seq_length)


def took_rows(source: Source, job: Job) -> None:
    """Keep previewed rows."""
    if job.state is JobState.DONE:
        source.total_rows = int(job.result["total_rows"])
        source.rows |= dict(enumerate(job.result["rows"], int(job.result["first"])))


def output_name(source: Source) -> str:
    """A name for the converted file, beside nothing: in the folder that lumina was started in."""
    stem = Path(source.key.rstrip("/*")).name.split(".")[0] or "data"
    return f"{stem}.messages.jsonl"
