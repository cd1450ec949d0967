"""The work behind the Data screen: which job may begin, what its answer changes, how its end is told. Plain Python."""

from __future__ import annotations

import glob
import json
import shlex
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from . import data_text as say
from .data_sources import BUILT_IN, Source, Sources, took_check, took_rows
from .jobs import Job, JobState
from .talking import Severity


class Work:
    """Begins jobs for sources and takes their answers.

    Args:
        sources: what the screen lists.
        spawn: runs a coroutine beside the screens.
        tell: says something to the user; True with what the list shows anyway.
        changed: called after each change.
        made: called with the path of each file that a conversion wrote.
    """

    def __init__(
        self,
        sources: Sources,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        tell: Callable[[str, Severity, bool], None],
        changed: Callable[[], None],
        made: Callable[[str], None],
    ) -> None:
        self.sources, self._spawn, self._tell, self._change, self._made = sources, spawn, tell, changed, made

    def begin(self, source: Source, arguments: list[str], *, keep: bool = False) -> Job:
        """Start a job; `keep`: it goes on when the program ends."""
        job = Job(arguments, keep=keep, changed=lambda job: self._moved(source, job))
        source.jobs[say.verb(job)] = job
        self._spawn(job.run())
        self._change()
        return job

    def fetch(self, source: Source) -> None:
        """Fetch the rows around the source's sample, unless they are there, on their way, or could not be made."""
        job = source.jobs.get("preview")
        idle = job is None or job.state in (JobState.DONE, JobState.CANCELLED)
        usable = source.look is not None and not source.look.problem
        if usable and source.at_row not in source.rows and idle:
            self.begin(source, self.sources.preview(source, source.at_row))

    def cancel(self, source: Source) -> None:
        """End everything that runs for a source."""
        for job in source.running:
            self._spawn(job.cancel())

    def _moved(self, source: Source, job: Job) -> None:
        """A job moved: take its answer, say how it ended."""
        verb = say.verb(job)
        if source.jobs.get(verb) is not job:  # another one has taken its place
            return
        done = job.state is JobState.DONE
        if verb == "validate":
            took_check(source, job, self.sources.settings)
        elif verb == "preview":
            took_rows(source, job)
        elif done and verb == "prepare":
            source.prepared = job.result
        elif done:
            self._made(job.arguments[-1])
        if job.over and verb != "preview":
            self._tell(*say.ended(source, job), verb == "validate")
        self._change()

    def refusal(self, action: str, source: Source | None) -> str | None:
        """Why an action of the screen cannot be done for a source; None if it can."""
        if action in ("add", "reload", "find"):
            return None
        if source is None:
            return "no source is chosen"
        if action == "cancel":
            return None if source.running else "nothing runs for this source"
        if action == "forget":
            return None if source.use == "added" else "only paths that were added with a can be removed"
        if action == "report":
            return None if source.check or source.prepared else "nothing is known yet: v validates"
        if action == "copy":
            return None if source.key != BUILT_IN else "the built-in corpus is no file"
        if action in ("validate", "convert", "prepare"):
            return self._why_no_job(source, action)
        return None

    @staticmethod
    def _why_no_job(source: Source, verb: str) -> str | None:
        job = source.jobs.get(verb)
        if job is not None and not job.over:
            return f"{say.sofar_text(job)} already; X cancels it"
        if source.look is not None and source.look.problem:
            return source.look.problem
        if verb == "convert" and source.key == BUILT_IN:
            return "it has this layout already; lumina-engine data sample writes it to a file"
        return None


def command(arguments: Sequence[str]) -> str:
    """A job's command for use without lumina, as one pastes it into a shell."""
    return shlex.join(["lumina-engine", *arguments])


def export_text(source: Source) -> str:
    """What is known of a source, as JSON."""
    return json.dumps({"source": source.name, "check": source.check, "prepared": source.prepared}, indent=2) + "\n"


def wrong_path(text: str) -> str | None:
    """What is wrong with a path as a source at first sight; what lies behind it is looked at once it stands in the list."""
    text = text.strip()
    if not text or "\0" in text:
        return "name a file, a folder or a pattern"
    there = Path(text).expanduser()
    try:
        return None if there.exists() or glob.has_magic(text) else "there is no such file or folder"
    except OSError as error:  # a name that is too long
        return error.strerror or str(error)


def wrong_output(text: str) -> str | None:
    """What is wrong with a path to write to; None if it is free."""
    if not text.strip() or "\0" in text:
        return "name a file to write"
    return "it exists already: name another" if Path(text.strip()).expanduser().exists() else None
