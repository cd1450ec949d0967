"""How long a rank usually spends in each section of its work, measured in the rank: heartbeats are too few to tell.

Standard library only; `enter` runs several times a step.
"""

from __future__ import annotations

from collections import deque
from typing import Any

SPANS = 512  # durations kept of each section: of them the 99th percentile is taken
STEPS = 32  # steps whose forward time is kept
FIRST_STEPS = 5  # of a start: they compile, fill caches and allocate, so they tell nothing of later ones
STATS_TIME = 1.0  # s between two times that the statistics go out
STEP = "step"  # the section that ends a step: the update
WINDOW = "window"  # the wait for a part of a stream to be tokenised
ROLLBACK = "rollback"  # back to a checkpoint that is read and checked first
WAITED = "waited save"  # a save whose end is waited for: the last one, or one behind another
BACKUP = "backup"  # the end of a copy to another disk is waited for
TOKENISE = "tokenise"  # of a start, before any step: what is reported with it counts conversations, not steps
EXPERTS = "experts"  # a checkpoint is rewritten with another number of experts, before a model is made
# so seldom that nothing tells how long they take
RARE = frozenset({"compile", "dry run", "examination", WINDOW, ROLLBACK, WAITED, BACKUP, EXPERTS})
WORK = "forward"  # the part of a step in which a rank waits for no other (but for split experts and ZeRO stage 3)


def place_words(section: str, step: int | None) -> str:
    """Where a rank is, for a person: `backward of step 812`. In `TOKENISE` the step is a number of conversations."""
    if section == TOKENISE:
        return f"tokenising: {step or 0:,} conversations so far"
    return f"{section} of step {step}" if step is not None else section


class SectionTimes:
    """Durations by section, and the forward time of each step. One thread enters, another may read."""

    def __init__(self) -> None:
        self.steps = 0  # finished since this start
        self._section: str | None = None
        self._since = 0.0
        self._spans: dict[str, deque[float]] = {}
        self._step_work = 0.0
        self._work: deque[float] = deque(maxlen=STEPS)
        self._told = -STATS_TIME
        self._told_steps = 0

    def enter(self, section: str, now: float) -> None:
        """The rank leaves its section for this one at `now` (s, monotonic)."""
        left, span = self._section, now - self._since
        self._section, self._since = section, now
        if left is None:
            return
        if left == WORK:
            self._step_work += span
        elif left == STEP:
            self.steps += 1
            if self.steps > FIRST_STEPS:
                self._work.append(self._step_work)
            self._step_work = 0.0
        if self.steps >= FIRST_STEPS or left not in (WORK, "backward", STEP):
            self._spans.setdefault(left, deque(maxlen=SPANS)).append(span)

    def stats(self, now: float) -> dict[str, Any] | None:
        """The 99th percentile of each section (s) and the median forward time of a step (s), when it is time to tell them."""
        ready = self._told_steps <= FIRST_STEPS < self.steps
        if now - self._told < STATS_TIME and not ready:
            return None
        self._told, self._told_steps = now, self.steps
        work = sorted(list(self._work))  # noqa: C414  the copy is one step of the interpreter, sorted() is not
        spans = {section: sorted(list(found)) for section, found in list(self._spans.items())}  # noqa: C414
        return {
            "p99": {section: found[(99 * (len(found) - 1) + 99) // 100] for section, found in spans.items()},
            "work": work[len(work) // 2] if len(work) == STEPS else None,
        }
