"""Where the ranks of a run are: the supervisor's answer to `ranks`, and what in it is worth a word. No widget in here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lumina_engine.run.sections import RARE, TOKENISE, place_words

from .paint import clean, duration, whole

LATE_S = 20.0  # at least, before a rank that does not move is called late
# where a rank may stay for long without being late: the save, the evaluation and the start take their time
PATIENT = RARE | {"paused", "save", "eval", "data", TOKENISE}
_NAMES = {"step": "optimizer"}  # of sections, where the program calls them otherwise
LIMIT = 4096  # ranks that are taken from one answer


@dataclass(frozen=True)
class Beat:
    """One rank. `age` is how long it has been at this place, in seconds, when the answer was given."""

    rank: int
    step: int | None = None
    section: str = ""
    age: float = 0.0
    pid: int | None = None
    connected: bool = True
    exit_code: int | None = None


def beats(content: object) -> list[Beat]:
    """The ranks of an answer, lowest first; what is malformed is left out."""
    found: dict[int, Beat] = {}
    for item in content[:LIMIT] if isinstance(content, list) else ():
        if isinstance(item, dict) and _whole(item.get("rank")) is not None:
            beat = Beat(
                rank=item["rank"],
                step=_whole(item.get("step")),
                section=_section(item.get("section")),
                age=max(0.0, float(item["age_s"])) if isinstance(item.get("age_s"), int | float) else 0.0,
                pid=_whole(item.get("pid")),
                connected=item.get("connected") is not False,
                exit_code=_whole(item.get("exit_code")),
            )
            found[beat.rank] = beat
    return [found[rank] for rank in sorted(found)]


def _section(value: object) -> str:
    return _NAMES.get(value, clean(value)[:32]) if isinstance(value, str) else ""


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Ranks:
    """All ranks at a moment. `since` is how old the answer is; `usual` how long a step takes, None if unknown."""

    beats: Sequence[Beat]
    world: int | None = None
    since: float = 0.0
    usual: float | None = None

    def age(self, beat: Beat) -> float:
        """Seconds that a rank has been where it is."""
        return beat.age + self.since

    def trouble(self, beat: Beat) -> str:
        """`DEAD`, `LATE`, or nothing. A rank is late when it has not moved for 20 s and five usual steps."""
        if not beat.connected or beat.exit_code is not None:
            return "left" if beat.exit_code == 0 else "DEAD"
        patient = not beat.section or beat.section in PATIENT
        return "LATE" if not patient and self.age(beat) > max(LATE_S, 5 * (self.usual or 0.0)) else ""

    def words(self, beat: Beat) -> str:
        """Where a rank is, in words: `backward of step 812, 90 s`."""
        if not beat.connected or beat.exit_code is not None:
            how = "without a word" if beat.exit_code is None else f"with code {beat.exit_code}"
            if beat.section == TOKENISE:
                return f"has ended {how}, {place_words(TOKENISE, beat.step)}"
            return f"has ended {how}" + (f" at step {whole(beat.step)}" if beat.step is not None else "")
        if not beat.section:
            return "has not said where it is"
        age = self.age(beat)
        place = f"{beat.section} of step {whole(beat.step)}" if beat.step is not None else beat.section
        if beat.section == TOKENISE:
            place = place_words(TOKENISE, beat.step)
        return place + (f", {duration(age)}" if age >= 2 else "")

    def worst(self) -> Beat | None:
        """The rank that deserves a look: a dead one, else the latest one, else None."""
        found = [(self.trouble(beat), self.age(beat), beat) for beat in self.beats]
        bad = [item for item in found if item[0] in ("DEAD", "LATE")]
        return max(bad, key=lambda item: (item[0] == "DEAD", item[1]))[2] if bad else None

    def missing(self) -> int:
        """Ranks that have not come to the supervisor yet."""
        return max(0, (self.world or 0) - len(self.beats))

    def summary(self) -> str:
        """All ranks in a line: how many, the steps that they are at, who is furthest behind.

        While one tokenises the data the others wait for it, so what it says is all that there is to say.
        """
        counts = [beat.step or 0 for beat in self.beats if beat.section == TOKENISE and beat.connected]
        steps = [beat.step for beat in self.beats if beat.step is not None and beat.connected]
        text = f"{len(self.beats)} rank{'s' if len(self.beats) != 1 else ''}"
        if self.missing():
            text += f", {self.missing()} not there yet"
        if counts:
            return f"{text}, {place_words(TOKENISE, max(counts))}"
        if steps:
            text += f", step {whole(min(steps))}" + (f" to {whole(max(steps))}" if min(steps) != max(steps) else "")
        places = _counted(beat.section for beat in self.beats if beat.connected and beat.section)
        return text + (f": {places}" if places else "")


def _counted(names: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(name if len(counts) == 1 else f"{count} {name}" for name, count in ordered)
