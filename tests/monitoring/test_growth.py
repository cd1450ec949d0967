"""Suggestions about the number of experts (C99): none for a balanced router, balance before growth, growth when it lasts."""

from __future__ import annotations

import argparse
import shlex
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from lumina_engine import ArchitectureEvolution, Config
from lumina_engine.commands.checkpoint import add_arguments
from lumina_engine.config.counts import parameter_counts
from lumina_engine.config.schema import DeepSeekConfig
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.adaptive import RateController, Rules
from lumina_engine.monitoring.balance import BalanceController, BalanceRules
from lumina_engine.monitoring.decisions import EVERY, replay
from lumina_engine.monitoring.growth_watch import GrowthWatch, LoadWindow, failure
from lumina_engine.monitoring.log import surviving

LONG = {"steps": 1_500, "dropped": 0.12, "eval_loss": [3.0, 2.9, 2.8]}
HOT, DEAD = [60.0, 12.0, 14.0, 14.0], [33.0, 33.0, 33.0, 1.0]
MILD = [20.0, 30.0, 26.0, 24.0]
BALANCING = Config(num_experts=4, router_bias_rate=0.001)


def told(load: Any, metrics: Any = None, config: Config | None = None) -> dict[str, Any] | None:
    return ArchitectureEvolution(config).should_add_expert(expert_utilization=load, performance_metrics=metrics)


def test_c099_balanced_is_none_in_every_form() -> None:
    even = [0.25, 0.24, 0.26, 0.25]
    forms: list[Any] = [
        even,
        [250, 240, 260, 250],
        np.array(even),
        {f"expert_{i}": share for i, share in enumerate(even)},
        {0: even, 1: even},
        [even, even],
        rec.Experts(step=5, layers=[1, 2], load=[even, even]),
        SimpleNamespace(load=[even]),
        [],
        [0.0] * 4,
        [1.0],
    ]
    for form in forms:
        for metrics in (None, {}, {"steps": 9_000, "eval_loss": [3.0, 2.0]}, SimpleNamespace(steps=9_000, dropped=0.01)):
            assert told(form, metrics) is None and told(form, metrics, BALANCING) is None, (form, metrics)
    with pytest.raises(TypeError, match="expert_utilization"):
        told("0.25 0.25")


def test_c099_layers_by_name_and_numbers_of_numpy_are_as_good_as_any() -> None:
    plain = told({1: [25.0] * 4, 3: HOT}, LONG | {"dropped": {1: 0.0, 3: 0.12}}, BALANCING)
    assert plain is not None and (plain["action"], plain["layer"]) == ("add_expert", 3)
    named = {"layer_1": [25.0] * 4, "layer_3": HOT}
    assert told(named, LONG | {"dropped": {"layer_1": 0.0, "layer_3": 0.12}}, BALANCING) == plain
    counted = {1: [np.int64(25)] * 4, 3: [np.float32(load) for load in HOT]}
    shares = {np.int64(1): np.float32(0.0), np.int64(3): np.float32(0.12)}
    found = told(counted, {"steps": np.int64(1_500), "dropped": shares, "eval_loss": LONG["eval_loss"]}, BALANCING)
    assert found is not None and (found["action"], found["layer"], found["expert"]) == ("add_expert", 3, 0)
    one = told([np.int64(1), np.int64(5)], {"dropped": np.float32(0.2)})
    assert one is not None and one["action"] == "rebalance"


@pytest.mark.parametrize("seed", range(20))
def test_c099_the_scatter_of_an_even_router_is_no_reason(seed: int) -> None:
    draw = np.random.default_rng(seed)
    experts = int(draw.integers(2, 65))
    load_LE = draw.multinomial(400 * experts, [1 / experts] * experts, size=3)
    assert told(load_LE.tolist(), LONG | {"dropped": 0.02}, BALANCING) is None


def test_c099_balance_comes_first() -> None:
    for load in (HOT, [share / 100 for share in HOT], {"a": 60, "b": 12, "c": 14, "d": 14}):
        found = told(load, LONG)
        assert found is not None and (found["action"], found["layer"], found["expert"]) == ("rebalance", 0, 0)
        assert found["setting"] == {"load_balancing_weight": 0.02} and found["statistic"]["value"] == pytest.approx(2.4)
    drops = told([25.0] * 4, {"dropped": 0.2})
    assert drops is not None and drops["action"] == "rebalance" and drops["setting"] == {"capacity_factor": 2.5}
    for setting in (found["setting"], drops["setting"]):
        Config(**setting)


def test_c099_a_dead_expert_is_revived_before_it_is_removed() -> None:
    found = [told([[25.0] * 4, DEAD], {"steps": steps}, BALANCING) for steps in (999, 1_000, 1_999, 2_000)]
    assert [None if item is None else (item["action"], item["layer"], item["expert"]) for item in found] == [
        None,
        ("revive_expert", 1, 3),
        ("revive_expert", 1, 3),
        ("remove_expert", 1, 3),
    ]
    last = found[-1]
    assert last is not None and last["parameters_added"] < 0 and last["memory_added"] == 16 * last["parameters_added"]


def test_c099_growth_needs_balancing_time_drops_and_a_falling_loss() -> None:
    found = told({3: HOT, 4: [25.0] * 4}, LONG, BALANCING)
    assert found is not None and (found["action"], found["layer"], found["expert"]) == ("add_expert", 3, 0)
    shape = BALANCING.model_copy(update={"vocab_size": 512})
    more = [parameter_counts(DeepSeekConfig.from_config(shape.model_copy(update={"num_experts": n}))).total for n in (4, 5)]
    assert found["parameters_added"] == more[1] - more[0]
    for change in ({"steps": 999}, {"dropped": 0.04}, {"eval_loss": [2.8, 2.9]}, {"eval_loss": 2.8}):
        assert told(HOT, LONG | change, BALANCING) is None, change
    for keys in ({"max_num_experts": 4}, {"moe_top_k": 2}, {"expert_parallel_size": 2}):
        assert told(HOT, LONG, BALANCING.model_copy(update=keys)) is None, keys


def watched(watch: GrowthWatch, load: list[float], first: int, last: int, dropped: float = 0.12) -> list[rec.Alert]:
    found = []
    for step in range(first, last + 1, 50):
        records = [rec.Experts(step=step, layers=[2], load=[load], dropped=[dropped])]
        found += [watch.observe(record) for record in [*records, rec.Eval(step=step, loss=4 - step / 1e4)]]
    return [alert for alert in found if alert is not None]


def test_c099_a_run_is_told_once_with_a_command_that_exists() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for load, action, verb in ((HOT, "add_expert", "grow"), (DEAD, "remove_expert", "shrink")):
        watch = GrowthWatch(BALANCING, "mine")
        alerts = watched(watch, load, 50, 5_000)
        assert [alert.code for alert in alerts][-1] == action and [alert.code for alert in alerts].count(action) == 1
        command = shlex.split((alerts[-1].recommendation or "").partition(": ")[2])
        assert command[:5] == ["lumina-engine", "checkpoint", verb, "mine@latest", "--run"]
        assert parser.parse_args(command[2:]).action == verb
    again = GrowthWatch(BALANCING, "mine")
    again.replay(rec.Experts(step=step, layers=[2], load=[DEAD], dropped=[0.0]) for step in range(50, 3_000, 50))
    assert watched(again, DEAD, 3_000, 3_500) == []


def held(watch: GrowthWatch) -> tuple[Any, ...]:
    """What a watch has of the experts: its rows, and what it has summed of them."""
    window = watch._window
    rows = {step: {layer: row.tolist() for layer, row in rows.items()} for step, rows in window.steps}
    return rows, window.loads(), window.dropped()


def routed(steps: range, experts: int = 8) -> list[rec.Experts]:
    """Records of three layers with whole loads, the later ones in two parts as long records come."""
    draw, found = np.random.default_rng(3), []
    for step in steps:
        loads = draw.integers(0, 10**9, (3, experts)).astype(float).tolist()
        parts = [slice(0, 3)] if step < steps[len(steps) // 2] else [slice(0, 2), slice(2, 3)]
        layers, dropped = [1, 2, 5], draw.random(3).tolist()
        found += [rec.Experts(step=step, layers=layers[p], load=loads[p], dropped=dropped[p]) for p in parts]
    return found


def test_c099_a_load_is_added_once_and_a_log_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many records a window holds: a run with many layers and a short interval pays for each record what it holds."""
    counts = dict.fromkeys(("_add", "_subtract", "judged"), 0)

    def counted(owner: Any, name: str, key: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **keys: Any) -> Any:
            counts[key] += 1
            return inner(*args, **keys)

        monkeypatch.setattr(owner, name, call)

    counted(LoadWindow, "_add", "_add")
    counted(LoadWindow, "_subtract", "_subtract")
    counted(ArchitectureEvolution, "should_add_expert", "judged")
    records = routed(range(1, 4_001))
    watch = GrowthWatch(BALANCING, "mine")
    watch.replay(records)
    assert counts == {"_add": 3 * 4_000, "_subtract": 3 * 2_000, "judged": 1}
    for record in routed(range(4_001, 4_101)):
        watch.observe(record)
    assert counts == {"_add": 3 * 4_100, "_subtract": 3 * 2_100, "judged": 101}, "once a step, whatever its parts"


def test_c099_sums_that_go_along_are_those_of_the_rows_in_the_window() -> None:
    watch = GrowthWatch(BALANCING, "mine")
    records: list[rec.Record] = [*routed(range(3, 9_000, 3)), rec.Rewind(to_step=8_100), *routed(range(8_103, 9_500, 3))]
    watch.replay(records)
    rows, loads, dropped = held(watch)
    for layer in (1, 2, 5):
        total = np.sum([found[layer] for found in rows.values()], axis=0)
        assert loads[layer] == total[:-1].tolist(), "counts add up exactly"
        assert dropped[layer] == pytest.approx(total[-1] / len(rows), abs=1e-12)


def test_c099_a_rewind_takes_back_what_followed_in_the_branch_that_is_left() -> None:
    """In a living run and from the log alike: as if the branch had never been."""

    def branch(first: int, last: int, load: list[float]) -> list[rec.Record]:
        found: list[rec.Record] = []
        for step in range(first, last, 50):
            found += [rec.Experts(step=step, layers=[2], load=[load], dropped=[0.2]), rec.Eval(step=step, loss=4 - step / 1e4)]
        return found

    log = [*branch(50, 900, HOT), *branch(900, 2_000, DEAD), rec.Rewind(to_step=880), *branch(900, 1_100, HOT)]
    watch, straight = GrowthWatch(BALANCING, "mine"), GrowthWatch(BALANCING, "mine")
    watch.replay(log)
    straight.replay(surviving(log))
    assert (held(watch), list(watch._evals)[-4:]) == (held(straight), list(straight._evals)[-4:])
    assert all(step < 1_100 for step, _ in watch._evals)


WEAK = BALANCING.model_copy(update={"router_bias_rate": 0.0, "load_balancing_weight": 0.01, "adaptive": "act"})


def doubled(step: int, before: float = 0.01) -> rec.Change:
    """What the controller of balance writes at the end of a step."""
    return rec.Change(what="load_balancing_weight", step=step + 1, before=before, after=2 * before, by="adaptive")


def hot_log(first: int, last: int, *changes: rec.Change) -> list[rec.Record]:
    """A hot expert that drops tokens, and an evaluation loss that falls; each change behind the records of its step."""
    found: list[rec.Record] = []
    for step in range(first, last + 1, 50):
        found += [
            rec.Experts(step=step, layers=[2], load=[HOT], dropped=[0.12]),
            *(change for change in changes if change.step == step + 1),
            rec.Eval(step=step, loss=4 - step / 1e4),
        ]
    return found


def growth_told(config: Config, log: list[rec.Record], replayed: int = 0) -> list[int | None]:
    """Steps in which growth is told, when the first records come from the log of an earlier start."""
    watch = GrowthWatch(config, "mine")
    if replayed:
        watch.replay(log[:replayed])
    alerts = [watch.observe(record) for record in log[replayed:]]
    return [alert.step for alert in alerts if alert is not None and alert.code == "add_expert"]


@pytest.mark.parametrize("replayed", [0, 1, 7, 8, 20])
def test_c099_a_balance_weight_that_was_doubled_is_balance_enough_for_growth(replayed: int) -> None:
    assert growth_told(WEAK, hot_log(50, 3_000), replayed) == [], "balance comes first"
    log = hot_log(50, 3_000, doubled(200))
    assert growth_told(WEAK, log, replayed) == growth_told(BALANCING, hot_log(50, 3_000)) == [1_050]


@pytest.mark.parametrize("replayed", [False, True])
def test_c099_a_doubling_of_an_abandoned_branch_or_of_another_value_is_none(replayed: bool) -> None:
    log = hot_log(50, 300, doubled(200))
    for to_step, told in ((150, []), (200, [1_050])):  # the checkpoint of step 200 has what was decided in it
        whole = [*log, rec.Rewind(to_step=to_step), *hot_log(to_step + 50, 3_000)]
        assert growth_told(WEAK, whole, len(log) + 1 if replayed else 0) == told
    again = [*log, rec.Rewind(to_step=150), *hot_log(200, 3_000, doubled(1_500))]
    assert growth_told(WEAK, again, len(log) + 1 if replayed else 0) == [1_550]
    whole = hot_log(50, 3_000, doubled(200))
    for keys in ({"load_balancing_weight": 0.005}, {"adaptive": "advise"}):  # set by a resume
        assert growth_told(WEAK.model_copy(update=keys), whole, 30 if replayed else 0) == []


def test_c099_a_step_that_a_resumed_run_evaluates_again_counts_once() -> None:
    watch = GrowthWatch(BALANCING, "mine")
    watch.replay([rec.Eval(step=4, loss=3.0), rec.Eval(step=8, loss=2.0), rec.Rewind(to_step=8), rec.Eval(step=8, loss=2.0)])
    assert list(watch._evals) == [(4, 3.0), (8, 2.0)]


@pytest.mark.parametrize("interval", [1, 7, 30, 50, 70, 300, 1_999, 2_000, 3_000])
def test_c099_a_dead_expert_is_removed_whatever_the_interval_of_the_log(interval: int) -> None:
    watch = GrowthWatch(BALANCING, "mine")
    alerts, most = [], 0
    for step in range(interval, 10_001, interval):
        alerts.append(watch.observe(rec.Experts(step=step, layers=[2], load=[DEAD], dropped=[0.0])))
        most = max(most, len(watch._window.steps))
    told = [(alert.code, alert.step or 0) for alert in alerts if alert is not None]
    assert [code for code, _ in told][-1:] == ["remove_expert"] and 2_000 <= told[-1][1] < 2_000 + 2 * interval
    assert most <= 2_000 // interval + 2, "what lies further back is forgotten"


@pytest.mark.parametrize("keys", [{"expert_growth": "off"}, {"adaptive": "off"}, {"use_moe": False}])
def test_c099_switched_off_says_nothing(keys: dict[str, Any]) -> None:
    assert watched(GrowthWatch(BALANCING.model_copy(update=keys), "mine"), HOT, 50, 5_000) == []


def test_c099_a_watch_that_fails_says_so_and_ends_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    watch = GrowthWatch(BALANCING, "mine")
    assert watched(watch, HOT, 50, 200) == []
    assert watched(watch, ["no", "numbers"], 250, 400) == []  # type: ignore[list-item]
    assert capsys.readouterr().err.count("no more advice") == 1


def test_c099_another_number_of_experts_begins_the_window_anew() -> None:
    watch = GrowthWatch(BALANCING, "mine")
    assert [alert.code for alert in watched(watch, HOT, 50, 1_500)] == ["add_expert"]
    five = [*HOT, 15.0]
    assert watched(watch, five, 1_550, 1_600) == []
    assert watch.loads() == {2: [2 * load for load in five]} and watch._window.span == 51
    assert "removed" not in [alert.code for alert in watched(watch, five, 1_650, 2_500)]


# ---- expert_growth=act ------------------------------------------------------------------------------------------------------

ACT = BALANCING.model_copy(update={"adaptive": "act", "expert_growth": "act", "max_adaptive_actions": 3})


class Log:
    """A run of hot experts as its log has it: a record of three layers each 50 steps, an evaluation, and a save each 500."""

    def __init__(self, config: Config = ACT, load: list[float] = HOT, grows: bool = True) -> None:
        self.config, self.load, self.grows = config, load, grows
        self.records: list[rec.Record] = []
        self.watch = GrowthWatch(config, "mine", by_itself=True)
        self.rate, self.balance = RateController(Rules.from_config(config)), BalanceController(BalanceRules.from_config(config))
        self.step, self.experts, self.loss = 0, len(load), 1.0
        self.saved: dict[int, list[dict[str, Any]]] = {}  # state of the controllers in each checkpoint

    def emit(self, record: rec.Record) -> None:
        record.seq = len(self.records) + 1
        self.records.append(rec.decode(rec.encode(record)))
        found = self.watch.observe(record)
        if found is not None:
            self.emit(found)

    def until(self, step: int) -> Log:
        while self.step < step:
            self.step += 50
            load, mild = [([*load, *[12.0] * self.experts])[: self.experts] for load in (self.load, MILD)]
            whole = rec.Experts(step=self.step, layers=[1, 2, 5], load=[mild, load, mild[::-1]], dropped=[0.01, 0.12, 0.0])
            for part in (slice(0, 2), slice(2, 3)):  # a long record comes in parts
                layers, loads, dropped = (values[part] for values in (whole.layers, whole.load, whole.dropped))
                self.emit(rec.Experts(step=self.step, layers=layers, load=loads, dropped=dropped))
            for decision in self.balance.observe(whole, self.rate.spent):
                self.rate.observe(decision)
                self.emit(decision)
            self.emit(rec.Eval(step=self.step, loss=4 - self.step / 1e4))
            if self.step % 500 == 0:
                self.save()
            self.emit(done := rec.Step(step=self.step + 1, loss=self.loss))
            for answer in self.rate.observe(done):
                self.emit(answer.record)
        return self

    def save(self) -> None:
        change = self.watch.wanted(self.step, self.rate.spent)
        if change is not None:
            self.rate.observe(change)
            self.emit(change)
        self.saved[self.step] = [self.rate.state_dict(), self.balance.state_dict()]
        if change is not None:
            if not self.grows:
                self.emit(failure(change, "it does not fit"))
            self.start(self.step, change.after if self.grows else change.before)

    def start(self, step: int, experts: int, **keys: Any) -> None:
        """Another start, from the checkpoint of a step, with other values of keys."""
        changed = {name: [getattr(self.config, name), value] for name, value in keys.items()}
        self.config = self.config.model_copy(update=keys)
        self.watch = GrowthWatch(self.config, "mine", by_itself=True)
        self.watch.replay(self.records)
        if experts != self.experts:
            self.emit(rec.Change(what="num_experts", step=step, before=self.experts, after=experts, by="recovery"))
        self.step, self.experts = step, experts
        self.rate.load_state_dict(self.saved[step][0])
        self.balance.load_state_dict(self.saved[step][1])
        self.emit(rec.Rewind(to_step=step))
        self.emit(rec.Resume(step=step, changed=changed))

    def changes(self) -> list[rec.Change]:
        return [r for r in self.records if isinstance(r, rec.Change) and r.by == "adaptive"]

    def decisions(self) -> list[rec.Change]:
        return [change for change in self.changes() if change.what == "num_experts"]


def test_c099_act_wants_an_expert_of_every_layer_at_a_save() -> None:
    log = Log().until(1_500)
    [change] = log.changes()
    assert (change.what, change.step, change.before, change.after, change.by) == ("num_experts", 1_500, 4, 5, "adaptive")
    assert change.reason is not None and change.reason.startswith("an expert of layer 2 gets 2.4 times its share")
    assert change.evidence == {
        "action": "add_expert",
        "rule": "hot_and_dropped",
        "statistic": 2.4,
        "threshold": 2.0,
        "window": 1_451,
        "cooldown": 1_000,
        "step": 1_500,
        "layer": 2,
        "layers": {"1": 1, "2": 0, "5": 2},
        "dropped": pytest.approx(0.12),
        "eval_loss": 3.85,
    }
    dead = Log(load=DEAD).until(2_500)
    [change] = dead.changes()
    assert (change.step, change.before, change.after) == (2_500, 4, 3) and change.evidence is not None
    assert (change.evidence["rule"], change.evidence["layers"]) == ("dead_expert", {"1": 0, "2": 3, "5": 3})


@pytest.mark.parametrize(
    "keys",
    [
        {"adaptive": "advise"},
        {"expert_growth": "advise"},
        {"max_adaptive_actions": 0},
        {"moe_top_k": 2},
        {"max_num_experts": 4},
        {"expert_parallel_size": 2},
        {"router_bias_rate": 0.0, "load_balancing_weight": 0.005},  # balance comes first, and is weak when doubled too
    ],
)
def test_c099_act_changes_nothing_where_it_may_not(keys: dict[str, Any]) -> None:
    assert Log(ACT.model_copy(update=keys)).until(2_000).decisions() == []
    assert keys != {"expert_parallel_size": 2} or Log(ACT.model_copy(update=keys), DEAD).until(3_000).decisions() == []


def test_c099_without_a_supervisor_nothing_is_done_and_the_command_is_told() -> None:
    watch = GrowthWatch(ACT, "mine")
    [alert] = watched(watch, HOT, 50, 1_500)
    assert watch.wanted(1_500, 0) is None and "checkpoint grow mine@latest" in (alert.recommendation or "")
    watch = GrowthWatch(ACT, "mine", by_itself=True)
    [alert] = watched(watch, HOT, 50, 1_500)
    assert "checkpoint grow" not in (alert.recommendation or "") and "expert_growth=act" in (alert.recommendation or "")


def test_c099_the_outcome_comes_once_when_the_new_load_has_lasted() -> None:
    log = Log().until(2_400)
    assert [change.what for change in log.changes()] == ["num_experts"]
    outcome = log.until(3_000).changes()[1]
    assert (outcome.what, outcome.step, outcome.before, outcome.after) == ("expert_growth_outcome", 2_550, 4, 5)
    assert outcome.evidence is not None and (outcome.evidence["of"], outcome.evidence["recovered"]) == (1_500, False)
    assert outcome.evidence["dropped"] == pytest.approx([0.12, 0.12]) and outcome.evidence["eval_loss"] == [3.85, 3.75]
    assert outcome.reason == (
        "not recovered: layer 2 drops 12.0 % of its choices, before 12.0 %; the evaluation loss is 3.75, before 3.85"
    )
    assert [change.what for change in log.until(6_500).changes()].count("expert_growth_outcome") == 3, "one for each change"


def test_c099_a_budget_bounds_what_act_does() -> None:
    assert [(change.step, change.before, change.after) for change in Log().until(9_000).decisions()] == [
        (1_500, 4, 5),
        (3_000, 5, 6),
        (4_500, 6, 7),
    ]


def test_c099_what_was_refused_is_not_tried_again_before_the_load_has_lasted_once_more() -> None:
    log = Log(grows=False).until(4_000)
    assert [(change.what, change.step) for change in log.changes()] == [("num_experts", 1_500), ("num_experts", 3_000)]


def test_c099_what_was_refused_twice_is_given_up_and_leaves_actions_for_a_spike() -> None:
    log = Log(grows=False).until(4_000)
    log.start(3_500, 4)
    assert [change.step for change in log.until(9_000).decisions()] == [1_500, 3_000] and log.rate.spent == 2
    advised = [r.recommendation or "" for r in log.records if isinstance(r, rec.Alert) and r.code == "add_expert"]
    assert "expert_growth=act" in advised[0] and "checkpoint grow mine@latest" in advised[-1]
    log.loss = 3.0
    [cut] = [change for change in log.until(9_800).changes() if change.what == "learning_rate_factor"]
    assert (cut.before, cut.after) == (1.0, 0.5) and log.config.max_adaptive_actions == log.rate.spent == 3
    found = replay(log.records, log.config)
    assert found.differences == [] and found.decisions == log.changes() and found.spent == 3


def test_c099_a_refusal_to_add_is_none_to_remove() -> None:
    watch = GrowthWatch(ACT, "mine", by_itself=True)
    for step in (1, 2):
        change = rec.Change(what="num_experts", step=step, before=4, after=5, by="adaptive", evidence={"action": "add_expert"})
        for record in (change, failure(change, "no room"), failure(change, "no room")):
            watch.observe(record)
        assert watch._may("remove_expert") and watch._may("add_expert") == (step == 1)


def test_c099_a_decision_behind_the_step_gone_back_to_was_never_made() -> None:
    """Killed before its checkpoint was there: the window that led to it is back, and the same is decided again."""
    log = Log(grows=False).until(1_500)
    log.start(1_000, 4)
    log.until(1_500)
    one, other = log.changes()
    assert (one.step, one.evidence) == (other.step, other.evidence)


@pytest.mark.parametrize("every", [1, 7, EVERY])
def test_c099_the_log_alone_gives_every_decision_about_experts_again(every: int) -> None:
    grown = Log().until(1_500)
    grown.start(1_000, 4)  # the checkpoint of the change and what was made of it were damaged
    grown.until(2_600).start(2_500, 5)  # killed behind the outcome
    grown.until(7_000)
    assert [change.what for change in grown.changes()].count("num_experts") == 4
    for log in (grown, Log(grows=False).until(5_000), Log(load=DEAD).until(6_000)):
        found = replay(log.records, log.config, every)
        assert found.differences == [] and found.decisions == log.changes() and found.spent == log.rate.spent
    for name, value in (("after", 6), ("evidence", {**grown.changes()[0].evidence, "window": 1}), ("step", 1_501)):  # type: ignore[dict-item]
        other = [msgspec.structs.replace(r, **{name: value}) if r is first(grown) else r for r in grown.records]
        assert any("num_experts add_expert is another" in line for line in replay(other, grown.config).differences), name
    without = [r for r in grown.records if not (isinstance(r, rec.Change) and r.what == "expert_growth_outcome")]
    assert any("expert_growth_outcome" in line and "is not in the log" in line for line in replay(without, ACT).differences)


def test_c099_the_log_alone_gives_growth_again_that_waited_for_a_doubled_balance_weight() -> None:
    """Balance comes first, by the same run: growth is decided by the weight in force then, also after a kill behind it."""
    log = Log(WEAK.model_copy(update={"expert_growth": "act"})).until(1_500)
    log.start(1_000, 4)
    log.until(1_700)
    assert [(change.what, change.step) for change in log.changes()] == [
        ("load_balancing_weight", 251),
        ("expert_balance_outcome", 450),
        ("num_experts", 1_500),
        ("num_experts", 1_500),
    ]
    found = replay(log.records, log.config, 7)
    assert found.differences == [] and found.decisions == log.changes() and found.spent == log.rate.spent == 2


def test_c099_the_log_alone_gives_growth_again_that_a_resume_has_allowed() -> None:
    log = Log(ACT.model_copy(update={"expert_growth": "advise"})).until(1_500)
    log.start(1_500, 4, expert_growth="act")
    log.until(2_000)
    assert [change.step for change in log.decisions()] == [2_000]
    log.start(2_000, 5, max_num_experts=5)
    assert [change.step for change in log.until(6_000).decisions()] == [2_000]
    found = replay(log.records, log.config)
    assert found.differences == [] and found.decisions == log.changes()


def first(log: Log) -> rec.Change:
    return next(r for r in log.records if isinstance(r, rec.Change))


def test_c099_killed_before_its_record_an_outcome_comes_again() -> None:
    log = Log().until(2_500)
    log.emit = lambda record, inner=log.emit: None if isinstance(record, rec.Change) else inner(record)  # type: ignore[method-assign]
    log.until(2_550)
    del log.emit
    log.records = log.records[: next(i for i, r in enumerate(log.records) if getattr(r, "step", 0) == 2_550) + 2]
    log.start(2_500, 5)
    log.until(3_000)
    found = replay(log.records, log.config)
    assert [change.what for change in found.decisions].count("expert_growth_outcome") == 1
    assert (found.differences, found.unwritten) == ([], 1)
