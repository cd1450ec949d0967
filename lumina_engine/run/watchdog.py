"""The hang watchdog: finds the rank that does not move any more, and ends its incarnation so that the run can start again.

A rank is hung when it has been in one section for longer than the larger of `hang_timeout_s` and `hang_factor` times the 99th
percentile of that section's durations, as the rank itself measured them; a save and an evaluation are thus judged by their own.
The first steps of a start, a section that was never finished before, and those that come seldom have `startup_timeout_s`.

What follows is QUIT to all ranks (they print their stacks into engine.log, also from within C), TERM to all processes, and
after a grace CONT and KILL. (Thresholds after nvidia-resiliency-ext's fault_tolerance, without its pickled channel.)
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..monitoring.say import say
from .channel import RankState, named
from .process import Process, send_all, send_signal
from .sections import FIRST_STEPS, RARE, TOKENISE, WORK, place_words

STACKS_TIME = 1.0  # s that the ranks get to print their stacks before TERM
LEAST = 1.0  # s: no section is hung before, whatever the configuration says; heartbeats are up to 0.1 s late
PAUSE = 5.0  # s between two looks after which the supervisor itself, or the whole machine, stood still
SHARE = 0.5  # of the time that it may stand still, or that another one has used up: a rank that has may be the cause
_WAITING = "paused"  # by the user's wish, for any time


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds; the first three are the config's keys."""

    timeout: float = 60.0
    factor: float = 5.0
    startup: float = 1_800.0
    grace: float = 30.0  # between TERM and KILL


@dataclass(frozen=True, slots=True)
class Hang:
    """Who does not move: rank, the section it is in (None: it never said), the step, for how many seconds.

    `host` is its machine, None for this one. `beside`: ranks that stand in the same section of the same step; one of them may
    be what the others wait for there.
    """

    rank: int
    section: str | None
    step: int | None
    seconds: float
    stopped: bool = False
    beside: tuple[str, ...] = ()
    host: str | None = None

    @property
    def at_step(self) -> int | None:
        """The step for a record; None while the data are tokenised, where `step` counts conversations."""
        return None if self.section == TOKENISE else self.step

    def __str__(self) -> str:
        who = named(self.rank, self.host)
        if self.section is None:
            return f"{who} has not said where it is for {self.seconds:.0f} s"
        place = place_words(self.section, self.step)
        others = f", so is {', '.join(self.beside)}" if self.beside else ""
        return f"{who} is {self.seconds:.0f} s in {place}{others}" + (", stopped by a signal" if self.stopped else "")


def limit(state: RankState, limits: Limits) -> float:
    """Seconds that a rank may stay where it is."""
    if state.section == _WAITING:
        return math.inf
    usual = state.p99.get(state.section) if state.section is not None else None
    if state.steps < FIRST_STEPS or state.section in RARE or usual is None:
        return max(LEAST, limits.startup)
    return max(LEAST, limits.timeout, limits.factor * usual)


def _place(state: RankState) -> tuple[str | None, int | None]:
    return state.section, state.step


def _behind(rank: int, state: RankState) -> tuple[int, bool, float, int]:
    """Orders ranks: first the one for which the others wait. Before its first step a rank counts something else."""
    return (state.step or 0) if state.steps else 0, state.section != WORK, state.at, rank


class Watchdog:
    """Watches the ranks of one supervisor; `tick` every turn while they live.

    Args:
        limits: the times.
        tree: all processes of the incarnation, the launcher's too.
    """

    def __init__(self, limits: Limits, tree: Callable[[], Iterable[Process]]) -> None:
        self.limits = limits
        self.found: Hang | None = None
        self._tree = tree
        self._started = self._looked = 0.0
        self._due: list[tuple[float, Callable[[], None]]] = []

    def renew(self, now: float) -> None:
        """A new incarnation starts at `now` (s, monotonic)."""
        self.found, self._due = None, []
        self._started = self._looked = now

    def tick(self, now: float, ranks: Mapping[int, RankState], world: int) -> Hang | None:
        """Look, and end what hangs; the hang in the turn in which it is found."""
        if self.found is not None:
            while self._due and now >= self._due[0][0]:
                self._due.pop(0)[1]()
            return None
        gap = now - self._looked
        self._looked = now
        if gap > PAUSE:  # nobody was watched meanwhile, and nobody may have run
            self._started += gap
            for state in ranks.values():
                state.at += gap
        self.found = self.look(now, ranks, world)
        if self.found is not None:
            self._begin_end(now, ranks)
        return self.found

    def look(self, now: float, ranks: Mapping[int, RankState], world: int) -> Hang | None:
        """None until a rank has stood still for too long; of all that did for half of that time the one for which others wait.

        That is one that is a step behind, or still does what it does alone, before one that only stood still first.
        """
        there = {rank: state for rank, state in ranks.items() if state.connected and state.exit_code is None}
        moved = max((state.at for state in there.values()), default=self._started)
        # while a start is being made the ranks wait for each other where they report nothing: one that moves will do
        stood = {rank: now - (moved if state.steps == 0 else state.at) for rank, state in there.items()}
        share = {rank: stood[rank] / limit(state, self.limits) for rank, state in there.items()}
        late = max(share, key=lambda rank: share[rank], default=None)
        if late is not None and share[late] > 1:
            exceeded = limit(there[late], self.limits)
            there[late].look_closer()
            # that a rank may take long where it is excuses nothing while another one has waited too long: what is known of one
            # far away may be older than its first measured step
            most = math.inf if there[late].section == WORK else exceeded
            allowed = {rank: min(limit(state, self.limits), most) for rank, state in there.items() if state.section != _WAITING}
            still = [late, *(rank for rank in allowed if stood[rank] > SHARE * allowed[rank])]
            for rank in still:
                there[rank].look_closer()
            rank = min(still, key=lambda rank: _behind(rank, there[rank]))
            state = there[rank]
            others = [other for other in sorted(there) if other != rank and _place(there[other]) == _place(state)]
            beside = tuple(named(other, there[other].host) for other in others)
            seconds = now - state.at
            return Hang(rank, state.section, state.step, seconds, state.process.stopped, beside, state.host)
        missing = next((rank for rank in range(world) if rank not in ranks), None)
        if missing is not None and now - max(moved, self._started) > max(LEAST, self.limits.startup):
            return Hang(missing, None, None, now - self._started)
        return None

    def _begin_end(self, now: float, ranks: Mapping[int, RankState]) -> None:
        say(f"lumina: {self.found}: hung; stacks of all ranks follow, then they are ended")
        for rank, state in ranks.items():
            if state.process.stopped:
                say(f"lumina: rank {rank} is stopped by a signal: it prints no stack")
            send_signal(state.process, signal.SIGQUIT)
        end = now + STACKS_TIME
        self._due = [(end, self._terminate), (end + self.limits.grace, self._kill)]

    def _terminate(self) -> None:
        send_all(self._tree(), signal.SIGTERM)

    def _kill(self) -> None:
        say("lumina: the hung ranks did not leave: they are killed")
        for number in (signal.SIGCONT, signal.SIGKILL):
            send_all(self._tree(), number)
