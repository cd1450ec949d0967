"""The controller of expert balance: when it presses harder, how far, and that its log gives its decisions again (C100, R29)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from lumina_engine.config.schema import Config, infos_of
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.balance import CAPACITY, OUTCOME, WEIGHT, BalanceController, BalanceRules, carried
from lumina_engine.monitoring.decisions import EVERY, of_controller, replay
from lumina_engine.monitoring.growth import ArchitectureEvolution

RULES = BalanceRules("act", cooldown=100, weight=0.01, capacity=1.25)
EVEN, HOT = [25.0, 25.0, 25.0, 25.0], [70.0, 10.0, 10.0, 10.0]


def experts(step: int, *loads: list[float], dropped: float = 0.0) -> rec.Experts:
    return rec.Experts(
        step=step, layers=[3 + 2 * n for n in range(len(loads))], load=list(loads), dropped=[dropped] * len(loads)
    )


def told(controller: BalanceController, records: Iterator[rec.Experts] | list[rec.Experts], spent: int = 0) -> list[Any]:
    return [decision for record in records for decision in controller.observe(record, spent)]


def run(*loads: list[float], steps: int = 400, dropped: float = 0.0) -> list[rec.Experts]:
    return [experts(step, *loads, dropped=dropped) for step in range(20, steps + 1, 20)]


def test_c100_a_hot_expert_doubles_the_weight_once_after_one_cooldown() -> None:
    controller = BalanceController(RULES)
    change, outcome = told(controller, run(EVEN, HOT, steps=1000))
    # the record of step 20 tells that those of 40 to 120 are all of one cooldown
    assert (change.what, change.step, change.before, change.after, change.by) == (WEIGHT, 121, 0.01, 0.02, "adaptive")
    assert change.evidence is not None and (change.evidence["statistic"], change.evidence["threshold"]) == (2.8, 2.0)
    assert change.reason == "expert 0 of layer 5 got 2.8 times its share of 1/4 over 100 steps"
    assert (outcome.what, outcome.step) == (OUTCOME, 220) and outcome.evidence is not None
    assert not outcome.evidence["recovered"] and outcome.reason.startswith("not recovered: 2.8 times")
    assert controller.weight == 0.02 and controller.capacity == 1.25 and controller.spent == 1


def test_c100_the_window_is_what_was_seen() -> None:
    change, *_ = told(BalanceController(RULES), [experts(step, HOT) for step in range(70, 500, 70)])
    assert change.step == 211 and change.evidence is not None and change.evidence["window"] == 140
    assert change.reason.endswith("over 140 steps")


def test_c100_the_outcome_says_when_it_helped() -> None:
    records = [experts(step, HOT if step <= 120 else EVEN) for step in range(20, 260, 20)]
    _, outcome = told(BalanceController(RULES), records)
    assert outcome.evidence is not None and outcome.evidence["recovered"] and (outcome.before, outcome.after) == (2.8, 1.0)


def test_c100_dropped_choices_double_the_room_where_no_expert_is_hot() -> None:
    controller = BalanceController(RULES)
    change, _ = told(controller, run(EVEN, dropped=0.08))
    assert (change.what, change.before, change.after) == (CAPACITY, 1.25, 2.5) and controller.capacity == 2.5
    both = BalanceController(replace(RULES, weight=0.005))
    later = [experts(step, EVEN, dropped=0.08) for step in range(260, 600, 20)]
    assert [c.what for c in told(both, run(HOT, steps=240, dropped=0.08))] == [WEIGHT, OUTCOME], "balance first"
    assert [c.what for c in told(both, later)] == [CAPACITY, OUTCOME]
    most = BalanceController(replace(RULES, capacity=40.0))
    assert told(most, run(EVEN, dropped=0.08))[0].after == 64.0 and most.capacity == 64.0
    assert told(BalanceController(replace(RULES, capacity=None)), run(EVEN, dropped=0.08)) == []


@pytest.mark.parametrize(
    "rules",
    [
        replace(RULES, mode="off"),
        replace(RULES, weight=0.02),
        replace(RULES, weight=0.0),
        replace(RULES, bias_rate=0.001),
        replace(RULES, most=0),
    ],
    ids=["off", "balanced by weight", "no weight to double", "balanced by bias", "no actions"],
)
def test_c100_where_nothing_is_to_be_done_nothing_is(rules: BalanceRules) -> None:
    for mode in (rules.mode, "off" if rules.mode == "off" else "advise"):
        controller = BalanceController(replace(rules, mode=mode))
        assert told(controller, run(HOT, dropped=0.2, steps=1000)) == [] and controller.weight == rules.weight


ADVISE = replace(RULES, mode="advise", run="first")


@pytest.mark.parametrize(
    ("loads", "dropped", "key"), [(HOT, 0.0, WEIGHT), (HOT, 0.2, WEIGHT), (EVEN, 0.08, CAPACITY)], ids=["hot", "both", "drops"]
)
def test_c100_advice_is_one_alert_with_the_command_and_the_evidence_of_the_action(
    loads: list[float], dropped: float, key: str
) -> None:
    records = run(EVEN, loads, steps=1000, dropped=dropped)
    controller = BalanceController(ADVISE)
    (alert,) = told(controller, records)
    action = told(BalanceController(RULES), records)[0]
    evidence = action.evidence
    assert (alert.severity, alert.code, alert.step) == ("info", "rebalance", evidence["step"])
    figures = f"{evidence['statistic']:.3g}, threshold {evidence['threshold']:.3g}, window 100, cooldown 100"
    assert alert.message == f"step {alert.step}: {action.reason} ({evidence['rule']} {figures})"
    stop, resume = (alert.recommendation or "").split(" && ")
    assert stop == "lumina-engine runs stop first"
    assert resume == f"lumina-engine train --run first --resume {action.what}={action.after:g}"
    assert action.what == key and infos_of(Config)[key].resume_may_change and Config(**{key: action.after})
    assert (controller.weight, controller.capacity) == (RULES.weight, RULES.capacity) and controller.spent == 0


def test_c100_advice_has_a_cooldown_a_budget_and_is_told_again_for_another_value() -> None:
    records = run(HOT, steps=240, dropped=0.08) + [experts(step, EVEN, dropped=0.08) for step in range(260, 800, 20)]
    advised = told(BalanceController(ADVISE), records)
    acted = [change for change in told(BalanceController(RULES), records) if change.what != OUTCOME]
    low = [change for change in told(BalanceController(replace(RULES, weight=0.005)), records) if change.what != OUTCOME]
    assert [change.what for change in acted] == [WEIGHT] and [change.what for change in low] == [WEIGHT, CAPACITY]
    assert [alert.step for alert in advised] == [change.step - 1 for change in low], "nothing was done about the first"
    assert told(BalanceController(ADVISE), run(HOT), spent=20) == []
    controller = BalanceController(replace(ADVISE, weight=0.004))
    assert len(told(controller, run(HOT, steps=240))) == 1
    controller.use(replace(ADVISE, weight=0.008))  # the user did as told
    later = [experts(step, HOT) for step in range(260, 1000, 20)]
    (again,) = told(controller, later)
    assert again.step == 260 and again.recommendation.endswith(f"{WEIGHT}=0.016")


def test_c100_another_mode_begins_with_nothing_done() -> None:
    later = [experts(step, HOT) for step in range(260, 800, 20)]
    controller = BalanceController(ADVISE)
    assert [decision.code for decision in told(controller, run(HOT, steps=240))] == ["rebalance"]
    controller.use(RULES)
    assert [change.what for change in told(controller, later)] == [WEIGHT, OUTCOME] and controller.weight == 0.02
    controller.use(ADVISE)
    assert controller.weight == 0.01
    assert [decision.code for decision in told(controller, [experts(step, HOT) for step in range(800, 900, 20)])] == [
        "rebalance"
    ]
    controller.use(replace(ADVISE, mode="off"))
    assert controller.state_dict() == BalanceController(ADVISE).state_dict()


def test_c100_one_odd_record_is_no_reason_and_spent_is_spent() -> None:
    assert told(BalanceController(RULES), [experts(s, HOT if s % 100 == 0 else EVEN) for s in range(20, 1000, 20)]) == []
    assert told(BalanceController(RULES), run(HOT), spent=20) == []
    assert told(BalanceController(RULES), run([0.0] * 4)) == []


@pytest.mark.parametrize("at", range(20))
@pytest.mark.parametrize("rules", [RULES, ADVISE], ids=["act", "advise"])
def test_c100_a_state_put_back_decides_as_the_unbroken_machine(at: int, rules: BalanceRules) -> None:
    records = run(HOT, steps=240, dropped=0.08) + [experts(step, EVEN, dropped=0.08) for step in range(260, 420, 20)]
    whole = BalanceController(rules)
    expected = told(whole, records)
    first, second = BalanceController(rules), BalanceController(rules)
    found = told(first, records[:at])
    second.load_state_dict(first.state_dict())
    assert found + told(second, records[at:]) == expected and second.state_dict() == whole.state_dict()


def test_c100_a_key_that_is_set_anew_is_what_the_user_says() -> None:
    controller = BalanceController(RULES)
    told(controller, run(HOT, steps=240))
    controller.use(replace(RULES, weight=0.005))
    assert controller.weight == 0.005
    back = BalanceController(replace(RULES, weight=0.005))
    first = BalanceController(RULES)
    told(first, run(HOT, steps=240))
    back.load_state_dict(first.state_dict())
    assert back.weight == 0.005 and back.state_dict() == controller.state_dict()


def test_c099_only_records_of_the_newest_number_of_experts_are_one_window() -> None:
    """What was seen of another number of experts adds up with nothing."""
    first, second, fresh = (BalanceController(RULES) for _ in range(3))
    told(first, run(EVEN))
    second.load_state_dict(first.state_dict())
    grown = [experts(step, [*HOT, 10.0]) for step in range(420, 800, 20)]
    found = told(second, grown)
    assert [change.what for change in found] == [WEIGHT, OUTCOME] and found == told(fresh, grown)
    assert second.state_dict() == fresh.state_dict()


def of(mode: str = "act") -> Config:
    return Config(adaptive=mode, adaptive_cooldown_steps=100, load_balancing_weight=0.01, router_bias_rate=0.0)


def log(*, parts: bool, resumed: dict[str, Any] | None = None, mode: str = "act") -> list[rec.Record]:
    """What a run writes: the machine's records behind those that they come from, long records in two parts."""
    controller, out = BalanceController(BalanceRules.from_config(of(mode), "first")), []
    for record in run(EVEN, HOT, steps=600):
        if resumed and record.step == 180:
            out.append(rec.Resume(step=160, changed=resumed))
            controller.use(replace(controller.rules, weight=resumed[WEIGHT][1]))
        halves = zip(record.layers, record.load, record.dropped, strict=True)
        split = [rec.Experts(step=record.step, layers=[a], load=[b], dropped=[c]) for a, b, c in halves]
        out += split if parts else [record]
        out += controller.observe(record, 0)
    return [rec.decode(rec.encode(record)) for record in out]


@pytest.mark.parametrize("parts", [False, True])
def test_c100_the_log_alone_gives_each_decision_again(parts: bool) -> None:
    records = log(parts=parts)
    found = replay(records, of())
    assert found.agrees and [r.what for r in records if of_controller(r)] == [WEIGHT, OUTCOME] and found.spent == 1
    without = [r for r in records if not of_controller(r)]
    assert replay([*without, rec.Step(step=601, loss=1.0)], of()).differences
    wrong = rec.Change(what=WEIGHT, step=121, before=0.01, after=0.03, by="adaptive")
    other = [wrong if of_controller(r) else r for r in records]
    assert replay(other, of()).differences


@pytest.mark.parametrize("parts", [False, True])
def test_c100_the_log_alone_gives_the_advice_again(parts: bool) -> None:
    records = log(parts=parts, mode="advise")
    (at,) = (place for place, record in enumerate(records) if of_controller(record))
    found = replay(records, of("advise"))
    assert found.agrees and found.spent == 1 and [record.code for record in found.decisions] == ["rebalance"]  # type: ignore[union-attr]
    assert replay([*records[:at], *records[at + 1 :], rec.Step(step=601, loss=1.0)], of("advise")).differences
    assert replay([*records[: at + 1], *records[at:]], of("advise")).differences


def test_c100_the_log_of_a_run_whose_key_was_changed_agrees() -> None:
    records = log(parts=False, resumed={WEIGHT: [0.01, 0.012]})
    assert next(r.after for r in records if of_controller(r)) == 0.02  # type: ignore[union-attr]
    assert replay(records, Config(**{**of().to_dict(sectioned=False), WEIGHT: 0.012})).agrees


def test_c099_advice_and_action_have_the_same_bounds() -> None:
    found = ArchitectureEvolution(of()).should_add_expert(expert_utilization=HOT)
    assert found is not None and found["setting"] == {WEIGHT: told(BalanceController(RULES), run(HOT))[0].after}


class Run:
    """A run of even experts that drop some of their choices, as its log has it: each record stands behind a checkpoint."""

    def __init__(self) -> None:
        self.room, self.step = of().capacity_factor, 0
        self.controller = BalanceController(BalanceRules.from_config(self.config))
        self.saved: dict[int, dict[str, Any]] = {}
        self.log: list[rec.Record] = []

    @property
    def config(self) -> Config:
        return of().model_copy(update={CAPACITY: self.room})

    def until(self, step: int, number: int = 4, dropped: float = 0.2) -> None:
        for at in range(self.step + 20, step + 1, 20):
            record = experts(at, [20.0] * number, dropped=dropped)
            self.log += [record, *self.controller.observe(record, 0), rec.Step(step=at + 1, loss=1.0)]
            self.saved[at] = self.controller.state_dict()
        self.step = step

    def start(self, step: int, room: float | None = None) -> None:
        """Another start from the checkpoint of a step, where the room of the experts is another one."""
        if room is not None:
            self.log.append(rec.Change(what=CAPACITY, step=step, before=self.room, after=room, by="recovery"))
            self.room = room
        self.log += [rec.Rewind(to_step=step), rec.Resume(step=step)]
        self.controller, self.step = BalanceController(BalanceRules.from_config(self.config)), step
        self.controller.load_state_dict(self.saved[step])

    def decided(self) -> list[tuple[int | None, str, float]]:
        """The changes of the room, which the log alone must give again."""
        for every in (1, EVERY):
            found = replay(self.log, self.config, every)
            assert found.differences == [] and found.decisions == [r for r in self.log if of_controller(r)]
        return [(r.step, r.what, r.after) for r in self.log if isinstance(r, rec.Change) and r.what == CAPACITY]


def test_c099_room_that_was_doubled_follows_the_number_of_experts_in_the_log_too() -> None:
    """Nobody chose another room: it is not doubled a second time, whether the run goes on, again, or back behind the change."""
    mine, four, five = Run(), 1.25, 1.25 * 5 / 4
    mine.until(300)
    mine.saved[300] = carried(mine.saved[300], four, five)  # as the checkpoint is rewritten
    mine.start(300, five)
    mine.until(460, 5)
    mine.start(300)
    mine.until(700, 5)
    changes = [(121, CAPACITY, 2 * four), (300, CAPACITY, five)]
    assert mine.decided() == changes and mine.controller.capacity == 2 * five
    mine.start(200, four)
    mine.until(500)
    assert mine.decided() == [*changes, (200, CAPACITY, four)] and mine.controller.capacity == 2 * four


def test_c099_room_that_went_with_the_number_of_experts_is_what_is_doubled_in_the_log_too() -> None:
    mine, five = Run(), 1.25 * 5 / 4
    mine.until(300, dropped=0.0)
    mine.start(300, five)
    mine.until(400, 5, dropped=0.0)
    mine.start(300)
    mine.until(700, 5)
    assert mine.decided() == [(300, CAPACITY, five), (421, CAPACITY, 2 * five)]
