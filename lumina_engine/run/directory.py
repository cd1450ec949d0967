"""A run's folder: its files, its identity, whether it lives, and the list of all runs.

`run.json` says who supervises the run; the POSIX lock on `run.lock` says whether that one is alive. A POSIX lock belongs to one
process: forked children do not keep it, and closing *any* descriptor of the file in the owner drops it. So the owner opens the
file once (`RunLock`), and `RunDirectory.alive` never opens it in the process that owns it.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import json
import os
import re
import secrets
import shutil
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.keep import committed_paths
from ..checkpoint.verify import step_of
from ..monitoring import record as rec
from ..monitoring.log import last_records
from ..secrets import Scrubber
from .process import Process, boot_id, myself, process, send_signal

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FORMAT = 1  # of run.json
UNREADABLE = "unreadable"  # the state of a row whose run.json cannot be read
FOLDERS = ("checkpoints", "backups", "emergency", "reports")
_JSON_LIMIT = 4 << 20  # bytes of run.json
_NEAR_END = 1 << 20  # bytes of the log that a row reads at most
_START_TIME = 60.0  # s between making a run and starting it


class RunError(Exception):
    """Something about runs that a person can mend; one line. `exit_code` is for the command line (2 usage, 65 refused)."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a list of runs shows. `state` is a record.RunState or "unreadable"; `age_s` counts from the last record."""

    name: str
    state: str
    path: Path
    alive: bool = False
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    age_s: float | None = None
    reason: str | None = None
    exit_code: int | None = None
    inc: int = 0
    id: str | None = None
    preset: str | None = None
    pid: int | None = None
    socket: str | None = None
    created: float | None = None
    smoothed_loss: float | None = None
    left_s: float | None = None
    alerts: int | None = None  # at the end of the log; None: not looked at
    critical: int | None = None


def open_lock(path: Path) -> int:
    """A descriptor of a lock file (0600), made if it is missing; a link in its place is refused (OSError ELOOP)."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


class RunLock:
    """The lock that makes this process the run's owner. Take it after the last fork; keep it until the end.

    Raises:
        RunError: another process holds it (exit code 65, its pid is named).
    """

    def __init__(self, path: Path) -> None:
        self._fd = open_lock(path)
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = lock_owner(self._fd)
            os.close(self._fd)
            raise RunError(
                f"run {path.parent.name} is running already (process {owner}): stop it with "
                f"`lumina-engine runs stop {path.parent.name}`, or choose another --run NAME",
                65,
            ) from None

    def release(self) -> None:
        """Give the run up."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def lock_owner(descriptor: int) -> int:
    """The pid that holds a write lock on the whole file, 0 if none does; asked without taking the lock."""
    layout = "hhqqi4x"  # struct flock on 64-bit Linux: type, whence, start, length, pid
    query = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = struct.unpack(layout, fcntl.fcntl(descriptor, fcntl.F_GETLK, query))
    return 0 if kind == fcntl.F_UNLCK else (pid or -1)  # pid 0: the owner lives in another pid namespace


class RunDirectory:
    """The folder of one run. Nothing is read until asked for."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))  # noqa: PTH100  resolve() would follow a link and change the name
        self.name = self.path.name
        self.config_path = self.path / "config.yaml"
        self.deepspeed_path = self.path / "deepspeed.json"
        self.identity_path = self.path / "run.json"
        self.lock_path = self.path / "run.lock"
        self.metrics_path = self.path / "metrics.jsonl"
        self.log_path = self.path / "engine.log"
        self.checkpoints = self.path / "checkpoints"
        self.backups = self.path / "backups"
        self.emergency = self.path / "emergency"
        self.reports = self.path / "reports"

    @classmethod
    def create(cls, root: str | os.PathLike[str], name: str, *, preset: str | None = None) -> RunDirectory:
        """Make the folder (0700) with its sub-folders and a run.json in state preparing.

        Raises:
            RunError: a name that is no name, or one that exists (exit code 2; nothing was changed).
            OSError: the file system refuses.
        """
        check_name(name)
        run = cls(Path(root) / name)
        run.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            run.path.mkdir(mode=0o700)
        except FileExistsError:
            raise RunError(
                f"run {name} exists in {run.path.parent}: choose another --run NAME, go on with --resume, "
                "or move it aside with --fresh"
            ) from None
        for folder in FOLDERS:
            (run.path / folder).mkdir(mode=0o700)
        run.write_identity(
            {
                "format": FORMAT,
                "id": secrets.token_hex(6),
                "name": name,
                "created": time.time(),
                "preset": preset,
                "state": "preparing",
                "inc": 0,
            }
        )
        return run

    def identity(self) -> dict[str, Any]:
        """The content of run.json.

        Raises:
            RunError: missing, unreadable, no JSON object, or of a newer format; the reason in one line (exit code 65).
        """
        try:
            with self.identity_path.open("rb") as file:
                data = file.read(_JSON_LIMIT + 1)
            content = json.loads(data) if len(data) <= _JSON_LIMIT else None
        except FileNotFoundError:
            raise RunError(f"{self.path} is no run: it has no run.json", 65) from None
        except OSError as error:
            raise RunError(f"{self.identity_path} cannot be read: {error.strerror}", 65) from None
        except (ValueError, RecursionError):
            raise RunError(f"{self.identity_path} is damaged: no JSON", 65) from None
        if not isinstance(content, dict) or not isinstance(content.get("id"), str):
            raise RunError(f"{self.identity_path} is damaged: no JSON object with an id", 65)
        if not isinstance(content.get("format"), int) or content["format"] > FORMAT:
            raise RunError(f"{self.identity_path} has format {content.get('format')!r}, this Lumina knows up to {FORMAT}", 65)
        return content

    def write_identity(self, content: Mapping[str, Any]) -> None:
        """Replace run.json as a whole: readers see the old or the new one."""
        write_json(self.identity_path, content)

    def update_identity(self, **changes: Any) -> dict[str, Any]:
        """Read, change, replace. Only the owner of the run may call this."""
        content = {**self.identity(), **changes}
        self.write_identity(content)
        return content

    def lock(self) -> RunLock:
        """Become the owner; see RunLock."""
        return RunLock(self.lock_path)

    @property
    def alive(self) -> bool:
        """Whether a supervisor holds the lock now."""
        try:
            return self._alive(self.identity())
        except RunError:
            return self._alive({})

    def _alive(self, content: Mapping[str, Any]) -> bool:
        if content.get("pid") == os.getpid() and _names(content, myself()):
            return True  # opening and closing the file in the process that owns it would drop the lock
        try:
            descriptor = os.open(self.lock_path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            return lock_owner(descriptor) != 0
        finally:
            os.close(descriptor)

    def owner(self) -> Process | None:
        """The supervisor that run.json names, if exactly that process (pid, start time, boot) still lives."""
        try:
            content = self.identity()
        except RunError:
            return None
        pid = content.get("pid")
        found = process(pid) if isinstance(pid, int) and pid > 0 else None
        return found if found is not None and found.alive and _names(content, found) else None

    def signal(self, number: int) -> bool:
        """Signal the supervisor, never a stranger with its pid; False if it is gone."""
        owner = self.owner()
        return owner is not None and self.alive and send_signal(owner, number)

    def newest_step(self) -> int | None:
        """The step of the newest committed checkpoint or emergency save, None without one."""
        try:
            newest = next(iter(committed_paths(self.checkpoints)), None)
        except OSError:
            return None
        return None if newest is None else step_of(newest.name)

    def head(self) -> RunInfo:
        """The row of this run without figures from its log; a run.json that cannot be read becomes the row's reason."""
        try:
            content = self.identity()
        except RunError as error:
            return RunInfo(self.name, UNREADABLE, self.path, alive=self.alive, reason=str(error))
        alive = self._alive(content)
        age = self._age(content)
        state, reason, code = self._state(content, alive, age)
        return RunInfo(
            name=self.name,
            state=state,
            path=self.path,
            alive=alive,
            total_steps=_number(content, "total_steps"),
            age_s=age,
            reason=reason,
            exit_code=code,
            inc=_number(content, "inc") or 0,
            id=content["id"],
            preset=_text(content, "preset"),
            pid=_number(content, "pid"),
            socket=_text(content, "socket"),
            created=content.get("created") if isinstance(content.get("created"), float) else None,
        )

    def info(self) -> RunInfo:
        """The row of this run with its newest step."""
        row = self.head()
        values = None if row.state == UNREADABLE else _last(self.metrics_path, "step", "rewind")
        if isinstance(values, rec.Rewind):  # the steps before it belong to an abandoned branch
            return replace(row, step=values.to_step)
        if not isinstance(values, rec.Step):
            return row
        return replace(row, step=values.step, loss=values.loss, tokens_per_s=values.tokens_per_s)

    def _age(self, content: Mapping[str, Any]) -> float | None:
        """Seconds since the log grew last, or since the run was made."""
        newest = content.get("created")
        with contextlib.suppress(OSError):
            newest = self.metrics_path.stat().st_mtime
        return max(0.0, time.time() - newest) if isinstance(newest, int | float) else None

    def _state(self, content: Mapping[str, Any], alive: bool, age: float | None) -> tuple[str, str | None, int | None]:
        """State, reason and exit code. run.json is believed while its owner lives, or once it says how the run ended."""
        state = str(content.get("state"))
        if alive or state in rec.FINAL_STATES:
            return state, _text(content, "reason"), _number(content, "exit_code")
        if content.get("pid") is None:
            return (state, None, None) if (age or 0.0) < _START_TIME else ("failed", "it never started", None)
        last = _last(self.metrics_path, "run")
        if isinstance(last, rec.Run) and last.state in rec.FINAL_STATES and last.inc >= (_number(content, "inc") or 0):
            return last.state, last.reason, last.exit_code  # run.json could not be written (full disk)
        return "crashed", "its supervisor was killed, or the machine went down", None


def _names(content: Mapping[str, Any], candidate: Process) -> bool:
    """Whether a run.json names exactly this process."""
    return (
        content.get("pid") == candidate.pid
        and content.get("start_time") == candidate.start
        and content.get("boot_id") == boot_id()
    )


def _last(path: Path, *kinds: str) -> rec.Record | None:
    """The last record of these types, if it is near enough to the end to be worth reading for a row in a list."""
    try:
        found = last_records(path, 1, kinds, within=_NEAR_END)
    except OSError:
        return None
    return found[0] if found else None


def _number(content: Mapping[str, Any], key: str) -> int | None:
    value = content.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(content: Mapping[str, Any], key: str) -> str | None:
    value = content.get(key)
    return value if isinstance(value, str) else None


def check_name(name: str) -> None:
    """
    Raises:
        RunError: `name` cannot be the name of a run.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise RunError(
            f"{name!r} cannot be the name of a run: use up to 64 letters, digits, '.', '_' and '-', "
            "the first one a letter or digit"
        )


def auto_name(stem: str, now: float | None = None) -> str:
    """The name of a run whose experiment_name is auto: the preset or file it comes from, and the time (local)."""
    kept = re.sub(r"[^A-Za-z0-9._-]", "-", stem)[:40].lstrip("._-") or "run"
    return f"{kept}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}"


def runs_root() -> Path:
    """Where runs are: $LUMINA_RUNS, else ./runs."""
    return Path(os.environ.get("LUMINA_RUNS") or "runs")


def list_runs(root: str | os.PathLike[str]) -> list[RunInfo]:
    """Every folder with a run.json under `root`, the most recently active first. An unreadable one is a row too."""
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except FileNotFoundError:
        return []
    rows = [RunDirectory(Path(root) / name).info() for name in names if os.path.lexists(Path(root) / name / "run.json")]
    return sorted(rows, key=lambda row: (row.age_s is None, row.age_s or 0.0, row.name))


def find(reference: str, root: str | os.PathLike[str]) -> RunDirectory:
    """The run that a name under `root`, or a path, stands for.

    Raises:
        RunError: there is none; the nearest name is suggested (exit code 2).
    """
    if os.sep in reference and (Path(reference) / "run.json").exists():
        return RunDirectory(reference)
    if NAME_PATTERN.fullmatch(reference) and (Path(root) / reference / "run.json").exists():
        return RunDirectory(Path(root) / reference)
    names = [row.name for row in list_runs(root)]
    near = difflib.get_close_matches(reference, names, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean {near[0]}?"
    else:
        hint = (
            "runs there: " + ", ".join(names[:8]) if names else "there are no runs there; start one with `lumina-engine train`"
        )
    raise RunError(f"no run {reference!r} in {root}: {hint}")


RUNS_FIX = "free space there, or set LUMINA_RUNS (or --runs) to a folder on another disk"


def require_free_space(path: str | os.PathLike[str], needed: int, fix: str = RUNS_FIX) -> None:
    """Refuse before anything is made.

    Args:
        path: a folder, or one to be made: the nearest existing parent counts.
        needed: bytes.
        fix: what to do where there is less.

    Raises:
        RunError: less is free (exit code 2).
    """
    place, free = free_space(path)
    if free < needed:
        raise RunError(f"{place}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed: {fix}")


def free_space(path: str | os.PathLike[str]) -> tuple[Path, int]:
    """The nearest existing folder at or above a path, and the bytes that are free there."""
    place = Path(os.path.abspath(path))  # noqa: PTH100
    while not place.exists():
        place = place.parent
    return place, shutil.disk_usage(place).free


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file (0600) so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    data = Scrubber().line(json.dumps(content, indent=1).encode()) + b"\n"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
