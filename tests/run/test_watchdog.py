"""Who hangs and who is slow, decided on what the ranks have said; no process, no clock."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lumina_engine.run.channel import RankState
from lumina_engine.run.process import Process
from lumina_engine.run.sections import FIRST_STEPS, SectionTimes
from lumina_engine.run.straggler import Stragglers
from lumina_engine.run.watchdog import PAUSE, Hang, Limits, Watchdog, limit

NOBODY = Process(2**22 + 1, 0)  # above the largest pid there is
LIMITS = Limits(timeout=60, factor=5, startup=1800, grace=30)


def state(section: str | None = "backward", at: float = 0.0, steps: int = 100, **more: Any) -> RankState:
    found = RankState(NOBODY, section=section, step=812, at=at, steps=steps, **more)
    found.p99 = more.get("p99", {"forward": 1.0, "backward": 30.0, "save": 100.0})
    return found


@pytest.mark.parametrize(
    ("what", "seconds"),
    [
        (state("forward"), 60.0),  # 5 x 1 s is less than the least
        (state("backward"), 150.0),
        (state("save"), 500.0),
        (state("eval"), 1800.0),  # never finished one yet
        (state("forward", steps=4), 1800.0),
        (state("compile"), 1800.0),
        (state("window", p99={"window": 0.1}), 1800.0),  # of a stream: seldom, and then long
        (state("rollback"), 1800.0),  # reads a whole checkpoint
        (state("backup", p99={"backup": 0.1}), 1800.0),  # on a disk that nobody knows
        (state("waited save", p99={"save": 0.3, "waited save": 0.3}), 1800.0),  # not judged by copies to memory
        (state(None), 1800.0),
        (state("paused"), float("inf")),
    ],
)
def test_ft07_the_limit_of_each_section_is_its_own(what: RankState, seconds: float) -> None:
    assert limit(what, LIMITS) == seconds
    assert limit(state("forward", p99={"forward": 0.001}), Limits(0, 0, 0)) == 1.0, "heartbeats have gaps of 0.1 s"


def watching() -> Watchdog:
    dog = Watchdog(LIMITS, list)
    dog.renew(0.0)
    return dog


def test_ft07_the_rank_that_stood_still_first_is_named_with_place_and_time() -> None:
    ranks = {0: state("step", at=1000.5), 1: state("backward", at=1000.0, p99={"backward": 2.0, "step": 1.0})}
    ranks[0].p99 = {"step": 1.0}
    dog = watching()
    assert dog.look(1059.9, ranks, 2) is None
    found = dog.look(1090.4, ranks, 2)
    assert found is not None and str(found) == "rank 1 is 90 s in backward of step 812"


def test_ft07_the_rank_for_which_the_others_wait_is_named_whoever_was_seen_there_first() -> None:
    """Heartbeats are merged and late: which of two ranks stood still first, within a tenth of a second, nobody knows."""
    p99 = {"forward": 1.0, "backward": 1.0, "data": 1.0}
    alone = {0: state("backward", at=1000.0, p99=p99), 1: state("forward", at=1000.1, p99=p99)}
    for now in (1060.05, 1060.2):
        found = watching().look(now, alone, 2)
        assert found is not None and (found.rank, found.section, found.beside) == (1, "forward", ())
    ahead = {
        0: state("data", at=1000.0, p99=p99),
        1: state("backward", at=1000.1, p99=p99),
        2: state("backward", at=1000.1, p99=p99),
    }
    ahead[0].step = 813
    found = watching().look(1060.05, ahead, 3)
    assert found is not None and (found.rank, found.step, found.beside) == (1, 812, ("rank 2",))
    late = {0: state("backward", at=1000.0, p99=p99), 1: state("forward", at=1050.0, p99=p99)}
    found = watching().look(1060.05, late, 2)
    assert found is not None and found.rank == 0, "rank 1 has only just come to where it is"


@pytest.mark.parametrize(
    ("section", "step", "more"),
    [
        ("forward", 812, {"steps": 3}),  # frozen in its first steps, by what is known of it
        ("forward", 812, {"p99": {}}),  # or before it told how long they take
        ("step", 811, {"p99": {}}),
        ("compile", 812, {}),
    ],
)
def test_ft07_a_rank_that_may_take_longer_is_named_where_the_others_wait_for_it(
    section: str, step: int, more: dict[str, Any]
) -> None:
    p99 = {"forward": 1.0, "backward": 1.0}
    frozen = state(section, at=1000.1, host="node-7", **{"p99": p99, **more})
    frozen.step = step
    ranks = {0: state("backward", at=1000.0, p99=p99), 1: frozen, 2: state("backward", at=1000.0, p99=p99)}
    ranks[0].step = ranks[2].step = 813
    assert watching().look(1059.9, ranks, 3) is None
    found = watching().look(1060.2, ranks, 3)
    assert found is not None and str(found) == f"rank 1 on node-7 is 60 s in {section} of step {step}"
    frozen.at = 1030.5
    found = watching().look(1060.2, ranks, 3)
    assert found is not None and found.rank == 0, "rank 1 has stood there for less than half of that time"


def test_ft07_a_rank_that_works_alone_waits_for_nobody() -> None:
    p99 = {"forward": 1.0, "save": 100.0}
    ranks = {0: state("forward", at=1000.0, p99=p99), 1: state("save", at=1025.0, p99=p99)}
    ranks[0].step = 813
    found = watching().look(1060.2, ranks, 2)
    assert found is not None and found.rank == 0


def test_ft07_a_rank_that_the_user_has_paused_is_not_to_blame() -> None:
    p99 = {"backward": 1.0}
    ranks = {0: state("paused", at=900.0), 1: state("backward", at=1000.0, p99=p99)}
    found = watching().look(1060.2, ranks, 2)
    assert found is not None and found.rank == 1


def test_ft07_ft11_a_rank_on_another_machine_is_named_with_it() -> None:
    ranks = {0: state("step", at=1000.5, p99={"step": 1.0}), 1: state("backward", at=1000.0, host="node-7")}
    found = watching().look(1160.0, ranks, 2)
    assert found is not None and str(found) == "rank 1 on node-7 is 160 s in backward of step 812"
    slow = Stragglers()
    told = []
    for steps in (100, 132, 164):
        for rank, work in ((0, 0.1), (1, 0.2)):
            ranks[rank].work, ranks[rank].steps = work, steps
        told += [str(item) for item in slow.look(ranks)]
    assert [text[:26] for text in told] == ["rank 1 on node-7 is slow: "]


def test_ft07_ranks_that_have_left_or_wait_for_one_that_works_do_not_hang() -> None:
    gone, ended = state(connected=False), state(exit_code=0)
    assert watching().look(10_000, {0: gone, 1: ended}, 2) is None
    reading, waiting = state("data", at=5000, steps=0), state("data", at=10, steps=0)
    assert watching().look(5001, {0: reading, 1: waiting}, 2) is None, "one reads the data, the other waits for it"


def test_ft07_c36_a_rank_that_stands_still_while_it_tokenises_says_how_many_conversations_it_has() -> None:
    """It may stand as long as any rank of a start, and the number is no step: not in the record either."""
    frozen = state("tokenise", steps=0, p99={"data": 1.0})
    frozen.step = 1_248_000
    assert limit(frozen, LIMITS) == 1800.0
    assert watching().look(1799, {0: frozen}, 1) is None
    found = watching().look(1900, {0: frozen}, 1)
    assert found is not None and found.at_step is None
    assert str(found) == "rank 0 is 1900 s in tokenising: 1,248,000 conversations so far"
    assert Hang(0, "forward", 12, 90.0).at_step == 12


def test_ft07_a_rank_that_never_comes() -> None:
    dog = watching()
    assert dog.look(1700, {0: state(steps=0, at=0)}, 2) is None
    found = dog.look(1900, {}, 1)
    assert found is not None and str(found) == "rank 0 has not said where it is for 1900 s"


def test_ft02_a_supervisor_that_was_stopped_itself_blames_nobody() -> None:
    dog = watching()
    ranks = {0: state("forward", at=10.0)}
    assert dog.tick(11.0 - PAUSE, ranks, 1) is None
    for number in range(30):
        assert dog.tick(10.0 + number, ranks, 1) is None
    assert dog.tick(500.0, ranks, 1) is None, "nobody ran for 461 s"
    assert dog.tick(501.0, ranks, 1) is None
    waited = 501.0
    while dog.found is None:
        waited += 1.0
        dog.tick(waited, ranks, 1)
    assert isinstance(dog.found, Hang) and 60 < dog.found.seconds < 63


def ran(steps: int, forward: float, backward: float = 0.2) -> tuple[SectionTimes, float]:
    times, now = SectionTimes(), 0.0
    for _ in range(steps):
        for section, span in (("data", 0.01), ("forward", forward), ("backward", backward), ("step", 0.05)):
            times.enter(section, now)
            now += span
    times.enter("data", now)
    return times, now


def test_ft07_a_rank_measures_its_sections_itself() -> None:
    times, now = ran(100, 0.1)
    stats = times.stats(now)
    assert stats is not None and times.steps == 100
    assert {name: round(span, 6) for name, span in stats["p99"].items()} == {
        "data": 0.01,
        "forward": 0.1,
        "backward": 0.2,
        "step": 0.05,
    }
    assert stats["work"] == pytest.approx(0.1) and times.stats(now + 0.5) is None
    assert times.stats(now + 1.0) is not None


def test_ft07_the_first_steps_do_not_count_and_the_sixth_tells_at_once() -> None:
    times, now = ran(FIRST_STEPS, 100.0)
    assert times.stats(now) == {"p99": {"data": 0.01}, "work": None} or "forward" not in (times.stats(now + 2) or {})["p99"]
    for section, span in (("forward", 0.1), ("backward", 0.1), ("step", 0.1), ("data", 0.0)):
        times.enter(section, now)
        now += span
    stats = times.stats(now)
    assert stats is not None and stats["p99"]["forward"] == pytest.approx(0.1)


def told(stragglers: Stragglers, work: list[float], steps: int) -> list[str]:
    ranks = {rank: state(steps=steps, work=own) for rank, own in enumerate(work)}
    return [str(found) for found in stragglers.look(ranks)]


def test_ft11_a_slow_rank_is_told_once_and_again_when_it_has_caught_up() -> None:
    stragglers = Stragglers()
    assert told(stragglers, [0.02, 0.021], 40) == []
    assert [told(stragglers, [0.02, 0.07], steps) for steps in (48, 60, 67)] == [[], [], []], "it does not last yet"
    first = told(stragglers, [0.02, 0.07], 68)
    assert [line.split(" (")[0] for line in first] == [
        "rank 1 is slow: 70 ms for the forward pass of a step, the fastest rank 20 ms",
        "rank 1 is slow: 70 ms for the forward pass of a step, its own best 21 ms",
    ]
    assert told(stragglers, [0.02, 0.07], 70) == []
    assert told(stragglers, [0.02, 0.02], 72) == []
    assert told(stragglers, [0.02, 0.07], 80) == [] and len(told(stragglers, [0.02, 0.07], 100)) == 2
    assert told(stragglers, [0.02, 0.02], 101) == [] and told(stragglers, [0.02, 0.07], 110) == []
    assert told(stragglers, [0.02, 0.02], 120) == [] and told(stragglers, [0.02, 0.07], 131) == [], "not for 20 steps in a row"


def test_ft11_a_lone_rank_holds_nobody_up() -> None:
    """On a busy machine its own best would be an alarm for every pause of the others."""
    stragglers = Stragglers()
    assert [told(stragglers, [0.02 if n < 4 else 0.09], 40 + n) for n in range(1, 20)] == [[]] * 19


def test_ft11_with_a_curriculum_only_the_others_are_a_reference() -> None:
    stragglers = Stragglers(own_best=False)
    assert [told(stragglers, [0.02 * n, 0.02 * n], 40 + n) for n in range(1, 9)] == [[]] * 8


def test_ft11_no_false_alarm_in_1000_clean_steps(fault_random: random.Random) -> None:
    """Two ranks whose steps scatter by a quarter, with a pause of the machine in every fiftieth."""
    ranks = {rank: (SectionTimes(), state()) for rank in range(2)}
    stragglers, now = Stragglers(), {0: 0.0, 1: 0.0}
    for step in range(1, 1001):
        for rank, (times, seen) in ranks.items():
            for section in ("data", "forward", "backward", "step"):
                times.enter(section, now[rank])
                now[rank] += 0.02 * fault_random.lognormvariate(0, 0.25) * (8 if fault_random.random() < 0.02 else 1)
            seen.steps, stats = times.steps, times.stats(float(step))
            assert stats is not None
            seen.work = stats["work"]
        assert list(stragglers.look({rank: seen for rank, (_, seen) in ranks.items()})) == []
