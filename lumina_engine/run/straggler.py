"""Finds a rank that holds the others up: every step takes as long as its slowest rank.

The score of a rank is a reference time over its own: once against the fastest rank, once against its own best. Compared is the
forward pass of a step, the median of 32 steps, since in it a rank waits for no other. Where it does (split experts, ZeRO stage
3) all ranks show the time of the slowest, and only the score against the own best falls. A lone rank holds nobody up: that it
has become slower is told by the throughput of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .channel import RankState, named

SCORE = 0.7  # below it a rank is a straggler
WELL = 0.8  # above it it is none any more
LEAST = 0.002  # s: shorter differences are the clock's and the scheduler's
WINDOW = 32  # steps of a median: the best of many that overlap would be lower the longer a run is, whatever its rank does
LASTING = 20  # steps for which a rank must be slow before a word is said: 37 steps after it began, where steps scatter little


@dataclass(frozen=True, slots=True)
class Straggler:
    """A slow rank: its median forward time and the reference, in seconds; whose reference that is, the step, its machine."""

    rank: int
    step: int | None
    own: float
    reference: float
    against: str
    host: str | None = None

    @property
    def score(self) -> float:
        return self.reference / self.own

    def __str__(self) -> str:
        return (
            f"{named(self.rank, self.host)} is slow: {1000 * self.own:.0f} ms for the forward pass of a step, {self.against} "
            f"{1000 * self.reference:.0f} ms (score {self.score:.2f})"
        )


@dataclass(slots=True)
class _Seen:
    best: float = float("inf")  # of medians that share no step
    best_at: int = 0  # step count of the newest of them
    steps: int = 0
    low: dict[str, int] = field(default_factory=dict)  # against whom -> step count since which it is slow
    told: set[str] = field(default_factory=set)


class Stragglers:
    """Looks at the ranks of one incarnation.

    Args:
        own_best: whether a rank is compared with its own best too; not where its rows grow (a curriculum).
    """

    def __init__(self, own_best: bool = True) -> None:
        self.own_best = own_best
        self._seen: dict[int, _Seen] = {}

    def renew(self) -> None:
        """A new incarnation starts: nothing that was measured holds."""
        self._seen.clear()

    def look(self, ranks: Mapping[int, RankState]) -> Iterator[Straggler]:
        """The ranks that have become stragglers since the last look, each told once until it has caught up."""
        work = {rank: state.work for rank, state in ranks.items() if state.work and state.connected}
        if len(ranks) < 2:
            return
        for rank, own in work.items():
            state, seen = ranks[rank], self._seen.setdefault(rank, _Seen())
            assert own is not None
            if state.steps == seen.steps:
                continue
            seen.steps = state.steps
            references = {"the fastest rank": min(v for v in work.values() if v is not None)}
            if self.own_best:
                references["its own best"] = min(seen.best, own)
            if state.steps - seen.best_at >= WINDOW:
                seen.best, seen.best_at = min(seen.best, own), state.steps
            for against, reference in references.items():
                if self._judge(seen, against, own, reference):
                    yield Straggler(rank, state.step, own, reference, against, state.host)

    def _judge(self, seen: _Seen, against: str, own: float, reference: float) -> bool:
        score = reference / own
        if score > WELL:
            seen.told.discard(against)
        if not (score < SCORE and own - reference > LEAST):
            seen.low.pop(against, None)
            return False
        if seen.steps - seen.low.setdefault(against, seen.steps) < LASTING or against in seen.told:
            return False
        seen.told.add(against)
        return True
