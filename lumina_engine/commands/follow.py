"""The foreground side of `train`: a progress line from the metric log, signals passed on, the supervisor's exit code."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType
from typing import Any

from ..monitoring import record as rec
from ..monitoring.log import LogReader
from ..monitoring.resume_words import resume_words
from ..monitoring.task_words import task_losses
from ..run.client import RunClient
from ..run.directory import RunError
from ..run.sections import TOKENISE, place_words
from .common import safe

LOOK_TIME = 0.5  # s between two looks at where the ranks of a start are; elsewhere than in a terminal LINE_TIME
LINE_TIME = 10.0  # s between two lines of progress elsewhere than in a terminal
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


def follow(directory: Any, *, quiet: bool, tty: bool) -> int:
    """Show the run until it ends. The run does not notice if this process dies."""
    started = directory.info().inc

    def forward(number: int, frame: FrameType | None) -> None:
        directory.signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        return _Follower(directory, started, quiet, tty).run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Follower:
    def __init__(self, directory: Any, inc: int, quiet: bool, tty: bool) -> None:
        self.directory, self.quiet, self.tty = directory, quiet, tty
        self.reader = LogReader(directory.metrics_path)
        self.inc = inc
        self.total: int | None = None
        self.average: float | None = None  # of tokens/s
        self.step_time: float | None = None
        self.last_line = 0.0
        self.preparing = False  # the log says nothing until the data are tokenised: the supervisor is asked
        self.looked = 0.0
        self.shown = ""

    def run(self) -> int:
        final: rec.Run | None = None
        while True:
            alive = self.directory.alive
            read = self.reader.read_new()
            for item in read:
                if item.inc < self.inc:
                    continue
                final = (
                    item
                    if isinstance(item, rec.Run) and item.state in rec.FINAL_STATES
                    else final
                    if not isinstance(item, rec.Run)
                    else None
                )
                self.show(item)
            if read:
                continue
            if not alive:  # looked at before the log was read, so nothing can have been written since
                break
            self.look(time.monotonic())
            time.sleep(0.1)
        self.clear()
        return self.exit_code(final)

    def exit_code(self, final: rec.Run | None) -> int:
        """The code that the run ended with, from its log; a full disk may have kept the last record from it, not run.json."""
        if final is not None and final.exit_code is not None:
            return final.exit_code
        info = self.directory.info()
        if info.state in rec.FINAL_STATES and info.exit_code is not None:
            self.say(info.state + (f": {info.reason}" if info.reason else ""))
            return int(info.exit_code)
        self.say("the supervisor of this run died; its checkpoints are intact: --resume goes on")
        return 1

    def show(self, item: Any) -> None:
        if isinstance(item, rec.Run):
            self.preparing, self.looked = item.state == "preparing", time.monotonic()
            self.total = item.total_steps or self.total
            self.say(item.state + (f": {item.reason}" if item.reason else ""))
        elif isinstance(item, rec.Step):
            self.progress(item)
        elif isinstance(item, rec.Eval):
            by_task = f"  ({task_losses(item.tasks)})" if item.tasks else ""
            self.say(f"step {item.step:,}  eval loss {_number(item.loss)}  perplexity {_number(item.perplexity)}{by_task}")
        elif isinstance(item, rec.Checkpoint):
            text = f"failed: {item.failed}" if item.failed else f"{item.path}, {(item.bytes or 0) / 1e6:.1f} MB"
            self.say(f"step {item.step:,}  checkpoint {text}")
        elif isinstance(item, rec.Alert):
            self.say(f"{item.severity}: {item.message}" + (f" - {item.recommendation}" if item.recommendation else ""))
        elif isinstance(item, rec.Change):
            why = f" ({item.reason})" if item.reason else ""
            self.say(f"{item.what}: {item.before} -> {item.after} at step {item.step}{why}")
        elif isinstance(item, rec.Resume):
            for line in resume_words(item):
                self.say(line)
        elif isinstance(item, rec.Rewind) and (item.failed_step is not None or item.to_step == 0):
            self.say(f"back to step {item.to_step:,}: {item.reason}")
        elif isinstance(item, rec.Note):
            self.say(item.message)

    def progress(self, item: rec.Step) -> None:
        if item.step_time:
            self.step_time = item.step_time if self.step_time is None else 0.95 * self.step_time + 0.05 * item.step_time
        if item.tokens_per_s:
            self.average = item.tokens_per_s if self.average is None else 0.95 * self.average + 0.05 * item.tokens_per_s
        now = time.monotonic()
        if now - self.last_line < (0.2 if self.tty else LINE_TIME):
            return
        self.last_line = now
        parts = [f"step {item.step:,}" + (f"/{self.total:,}" if self.total else ""), f"loss {_number(item.loss)}"]
        parts += [f"lr {item.lr:.3g}" if item.lr is not None else "", f"{self.average:,.0f} tokens/s" if self.average else ""]
        if self.total and self.step_time:
            parts.append(f"{_duration((self.total - item.step) * self.step_time)} left")
        self.rewrite("  ".join(part for part in parts if part))

    def look(self, now: float) -> None:
        """Show how far the tokenising of a start is at `now` (s, monotonic), by the supervisor's word."""
        if not self.preparing or self.quiet or now - self.looked < (LOOK_TIME if self.tty else LINE_TIME):
            return
        self.looked = now
        try:
            with RunClient(self.directory, timeout=1.0) as client:
                ranks = client.hello.get("ranks", [])
        except RunError:
            return  # not there yet, or just ended: the log and run.json say which
        counts = [rank["step"] for rank in ranks if rank["section"] == TOKENISE and rank["connected"]]
        if counts:
            self.rewrite(place_words(TOKENISE, max(counts)))
        else:
            self.clear()

    def rewrite(self, line: str) -> None:
        """Show a line of progress: in a terminal in the place of the one before it."""
        if self.quiet:
            return
        if self.tty:
            sys.stderr.write("\r\x1b[2K" + line[:110])
            sys.stderr.flush()
            self.shown = line
        else:
            print(line, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if self.quiet:
            return
        self.clear()
        print(safe(text), file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.shown:
            sys.stderr.write("\r\x1b[2K")
            self.shown = ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} m" if hours else f"{minutes} m {rest:02d} s"
