"""Curves outside the terminal program: `runs plot` and `report`, against plain loops over the records."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lumina_engine import cli
from lumina_engine.config.presets import ConfigPresets
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.curves import SMOOTHING, Timeline, read_history, reduced, worst
from lumina_engine.monitoring.health.timeline import HealthTimeline
from lumina_engine.monitoring.health.watch import TOLD_BY_TRAINER, HealthWatch
from lumina_engine.monitoring.html import Markup, tag
from lumina_engine.monitoring.plot import POINTS, curve, stacked, svg, text
from lumina_engine.run.directory import RunDirectory
from lumina_engine.run.process import boot_id, myself

HOSTILE = "<script>alert(1)</script>\x1b]0;x\x07\x1b[31m\u202e\"'&]]>--><img src=http://x.example/a onerror=b>\x9b"


def write(run: RunDirectory, *records: rec.Record, inc: int = 1, t: float = 1_764_000_000.0) -> None:
    """Append records with seq, t and inc."""
    known = run.metrics_path.read_bytes().count(b"\n") if run.metrics_path.exists() else 0
    with run.metrics_path.open("ab") as file:
        for number, item in enumerate(records, known + 1):
            item.seq, item.t, item.inc = number, t + number, inc
            file.write(rec.encode(item))


def story(seed: int, steps: int = 700) -> list[rec.Record]:
    """A run with evaluations, rewinds, repeated steps, gaps and values that are no numbers."""
    rng = random.Random(seed)
    records: list[rec.Record] = [rec.Run(state="running", total_steps=steps)]
    step = 0
    while step < steps:
        step += 1
        loss = rng.choice([math.nan, math.inf, None]) if rng.random() < 0.02 else 4 * math.exp(-step / 300) + rng.random()
        records.append(
            rec.Step(
                step=step, tokens=step * 1000, loss=loss, lr=3e-4 * min(1, step / 50), grad_norm=rng.random(),
                step_time=0.1 + rng.random() / 10, tokens_per_s=9000 * rng.random(), data_time=0.01, forward_time=0.03,
                backward_time=0.05, optimizer_time=0.02, skipped=loss is None,
            )
        )  # fmt: skip
        if step % 50 == 0:
            records.append(rec.Eval(step=step, loss=loss if loss is not None else 1.0, perplexity=2.0))
            records.append(rec.Checkpoint(step=step, bytes=10, seconds=1.0, verified=True))
            experts = rec.Experts(step=step, layers=[0, 2], load=[[4.0, 4.0], [8.0, 0.0]], dead=[0, 1])
            experts.imbalance, experts.entropy, experts.dropped = [1.0, 2.0], [1.0, rng.random()], [0.0, 0.1]
            records += [experts, rec.Alert(severity="warning", code="spike", message=f"at {step}", step=step)]
        if rng.random() < 0.005 and step > 20:
            back = step - rng.randint(1, 20)
            if rng.random() < 0.5:
                records.append(rec.Rewind(to_step=back))
            step = back
    return records


def plain(records: list[rec.Record]) -> dict[str, Any]:
    """The same run by the plainest loops: dictionaries by step."""
    steps: dict[int, rec.Step] = {}
    evals: dict[int, rec.Eval] = {}
    saved: list[int] = []
    experts: dict[int, rec.Experts] = {}

    def cut(to: int) -> None:
        for table in (steps, evals, experts):
            for step in [s for s in table if s > to]:
                del table[step]
        saved[:] = [s for s in saved if s <= to]

    for record in records:
        match record:
            case rec.Step():
                if steps and record.step <= max(steps):
                    cut(record.step - 1)
                steps[record.step] = record
            case rec.Eval():
                for step in [s for s in evals if s >= record.step]:
                    del evals[step]
                evals[record.step] = record
            case rec.Experts():
                for step in [s for s in experts if s >= record.step]:
                    del experts[step]
                experts[record.step] = record
            case rec.Checkpoint():
                saved.append(record.step)
            case rec.Rewind():
                cut(record.to_step)
    return {
        "steps": [steps[s] for s in sorted(steps)],
        "evals": [evals[s] for s in sorted(evals)],
        "saved": saved,
        "experts": experts,
    }


def number(value: float | None) -> float:
    return math.nan if value is None else value


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs", "demo", preset="debug")


def report(run: RunDirectory, *argv: str) -> tuple[dict[str, Any], str]:
    """The JSON document and the page."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["report", str(run.path), *argv]) == 0
    return json.loads((run.reports / "report.json").read_text()), (run.reports / "report.html").read_text()


def spelled(values: list[Any]) -> list[float]:
    return [float(value) for value in values]


@pytest.mark.parametrize("seed", range(6))
def test_c031_report_equals_plain_loops_over_the_records(run, seed):
    records = story(seed)
    write(run, *records)
    found, _ = report(run)
    want = plain(records)
    steps, evals = want["steps"], want["evals"]
    loss = [number(s.loss) for s in steps]
    finite = [value for value in loss if math.isfinite(value)]
    m = n = 0.0
    ema = []
    for value in loss:
        if math.isfinite(value):
            m, n = SMOOTHING * m + (1 - SMOOTHING) * value, n + 1
            ema.append(m / (1 - SMOOTHING**n))
        else:
            ema.append(math.nan)
    summary = found["summary"]
    assert summary["step"] == steps[-1].step and summary["tokens"] == steps[-1].tokens
    assert summary["loss"] == finite[-1] and summary["lowest_loss"] == min(finite)
    assert summary["loss_ema"] == pytest.approx([e for e in ema if e == e][-1], rel=1e-9)
    assert summary["training_seconds"] == pytest.approx(sum(s.step_time for s in steps))
    assert summary["tokens_per_s_median"] == pytest.approx(float(np.median([s.tokens_per_s for s in steps])))
    assert summary["skipped_steps"] == sum(s.skipped for s in steps)
    assert summary["steps_without_finite_loss"] == len(loss) - len(finite)
    known = [e for e in evals if math.isfinite(number(e.loss))]
    best = min(known, key=lambda e: e.loss)
    assert (summary["best_eval"]["step"], summary["best_eval"]["loss"]) == (best.step, best.loss)
    assert summary["last_eval"]["step"] == evals[-1].step and found["evals"]["step"] == [e.step for e in evals]
    assert summary["alerts"] == {"warning": sum(isinstance(r, rec.Alert) for r in records)}
    assert [c["step"] for c in found["checkpoints"]["recorded"]] == want["saved"]
    for name in ("loss", "lr", "grad_norm", "tokens_per_s", "step_time"):
        drawn = found["curves"][name]
        values = [number(getattr(s, name)) for s in steps]
        begin = 0
        for step, low, high, mean, missing in zip(*(drawn[k] for k in ("step", "min", "max", "mean", "missing")), strict=True):
            stop = next(i for i, s in enumerate(steps) if s.step == step) + 1
            part = [v for v in values[begin:stop] if math.isfinite(v)]
            assert missing == stop - begin - len(part)
            if part:
                assert (low, high) == (min(part), max(part)) and mean == pytest.approx(sum(part) / len(part))
            begin = stop
        assert begin == len(steps)
    at = [next(i for i, s in enumerate(steps) if s.step == step) for step in found["curves"]["loss"]["step"]]
    assert spelled(found["curves"]["loss"]["ema"]) == pytest.approx([ema[i] for i in at], nan_ok=True, rel=1e-9)
    assert "ema" not in found["curves"]["lr"]
    last = want["experts"][max(want["experts"])]
    assert found["routing"]["step"] == last.step
    rows = {row["layer"]: row for row in found["routing"]["layers"]}
    assert rows[2]["max_mean"] == 2.0 and rows[2]["min_mean"] == 0.0 and rows[2]["cv"] == 1.0 and rows[2]["dead"] == 1
    assert rows[2]["fair_share"] == [2.0, 0.0] and rows[0]["entropy"] == 1.0
    assert found["curves"]["entropy"]["min"] == [min(want["experts"][s].entropy) for s in sorted(want["experts"])]
    split = found["step_split"]
    assert split["seconds"]["forward_time"] == pytest.approx(0.03)
    rest = np.median([s.step_time - s.data_time - s.forward_time - s.backward_time - s.optimizer_time for s in steps])
    assert split["seconds"]["rest"] == pytest.approx(rest)


def known(value: Any) -> Any:
    return "unknown" if value is None or value != value else value


def judged(summary: dict[str, Any]) -> dict[str, Any]:
    """Status and scores of a summary of the monitor, as a report has them."""
    scores = {name: known(score["value"]) for name, score in summary["scores"].items()}
    return {"status": summary["health_status"], "overall": known(summary["overall_health_score"]), **scores}


@pytest.mark.parametrize("seed", range(3))
def test_c115_the_health_timeline_is_what_the_monitor_said_at_its_steps(run, seed):
    records = story(seed)
    write(run, *records)
    found, page = report(run)
    watch, told = HealthWatch(TOLD_BY_TRAINER), {}
    for record in records:
        watch.observe(record)
        if isinstance(record, rec.Step):
            told[record.step] = judged(watch.summary())
    health = found["health"]
    steps, columns = health["step"], {"overall": health["overall_health_score"], **health["scores"]}
    shown = [
        {"status": status, **{name: values[place] for name, values in columns.items()}}
        for place, status in enumerate(health["health_status"])
    ]
    last = health["last"]
    assert steps[-1] == last["step"] == 700 and {**last, "overall_health_score": 0, "scores": 0} == {
        **watch.summary(), "overall_health_score": 0, "scores": 0
    }  # fmt: skip
    assert judged(last) == judged(watch.summary())
    assert shown[:-1] == [told[step] for step in steps[:-1]] and shown[-1] in (told[700], judged(last))
    assert 125 <= len(steps) <= 251 and steps == sorted(set(steps)) and max(b - a for a, b in pairwise(steps)) <= 30
    assert shown[0]["convergence"] == shown[0]["routing"] == "unknown" != shown[-1]["convergence"] != shown[-1]["routing"]
    words = check_page(page).words
    assert f"overall {last['overall_health_score']:.2f} at step 700" in words and last["scores"]["stability"]["from"] in words
    assert 'id="plot101"' in page and "health scores" in page


def test_c115_health_of_a_short_run_is_unknown_and_of_no_run_not_shown(run):
    found, page = report(run)
    assert (
        found["health"]["step"] == [] and found["health"]["last"]["health_status"] == "no_data" and "health scores" not in page
    )
    write(run, *[rec.Step(step=n, loss=2.0, grad_norm=1.0, step_time=0.1) for n in range(1, 11)])
    found, page = report(run)
    assert (
        found["health"]["health_status"] == ["warming_up"] * 10 and found["health"]["scores"]["stability"] == ["unknown"] * 10
    )
    assert found["health"]["scores"]["numerics"] == [1.0] * 10 and "unknown" in check_page(page).words


def test_c115_a_health_timeline_is_bounded_however_long_the_run(monkeypatch):
    timeline, asked = HealthTimeline(most=32), []
    real = HealthWatch.summary
    monkeypatch.setattr(HealthWatch, "summary", lambda self: (asked.append(1), real(self))[1])
    sizes = []
    for n in range(1, 5001):
        timeline.take([rec.Step(step=n, loss=2.0 + n % 3 / 100, grad_norm=1.0, t=float(n))])
        sizes.append(len(timeline._points))
    assert max(sizes) <= 32 and min(sizes[32:]) >= 16 and len(asked) <= 32 + 16 * 8
    assert timeline.document()["step"] == [*range(256, 5000, 256), 5000]


def test_c115_a_monitor_that_fails_is_named_and_costs_only_its_part(run, monkeypatch):
    write(run, rec.Step(step=1, loss=1.0))
    monkeypatch.setattr(HealthWatch, "observe", lambda self, record: 1 / 0)
    found, page = report(run)
    assert found["health"] is None and any("health: the monitor failed" in text for text in found["missing"])
    assert found["summary"]["step"] == 1 and "health scores" not in page


def test_a_rewind_takes_values_back_before_anything_is_written_again(run):
    experts = [rec.Experts(step=n, layers=[0], load=[[float(n), 1.0]], imbalance=[float(n)]) for n in (10, 20)]
    steps = [rec.Step(step=n, loss=float(n)) for n in range(1, 21)]
    saved = [rec.Checkpoint(step=10, bytes=1), rec.Checkpoint(step=20, bytes=1)]
    write(run, *steps, rec.Eval(step=10, loss=1.0), rec.Eval(step=20, loss=0.5), *experts, *saved, rec.Rewind(to_step=12))
    found, _ = report(run)
    assert found["summary"]["step"] == 12 and found["summary"]["best_eval"]["step"] == 10 and found["routing"]["step"] == 10
    assert [c["step"] for c in found["checkpoints"]["recorded"]] == [10] and found["curves"]["imbalance"]["max"] == [10.0]
    assert [entry["kind"] for entry in found["timeline"]["entries"]] == ["rewind"]


def test_a_record_of_experts_that_was_split_is_one_row(run):
    write(
        run,
        rec.Experts(step=5, layers=[0], load=[[1.0, 3.0]], imbalance=[1.5], entropy=[0.8], dead=[0], dropped=[0.2]),
        rec.Experts(step=5, layers=[1], load=[[0.0, 4.0]], imbalance=[2.0], entropy=[0.1], dead=[1], dropped=[0.4]),
    )
    history = read_history(run.metrics_path)
    assert history.routing.step.tolist() == [5] and sorted(history.layers) == [0, 1]
    row = {name: history.routing[name][0] for name in ("imbalance", "entropy", "dead", "dropped")}
    assert row == {"imbalance": 2.0, "entropy": 0.1, "dead": 1.0, "dropped": pytest.approx(0.3)}
    assert worst([])["imbalance"] is None
    write(run, rec.Experts(step=6, layers=[0], load=[[2.0, 2.0]], imbalance=[1.0]))
    history = read_history(run.metrics_path)
    assert history.routing["imbalance"].tolist() == [2.0, 1.0]  # the other layer was not looked at in step 6
    assert {index: layer.step for index, layer in history.layers.items()} == {0: 6, 1: 5}


def test_starts_tell_their_steps_times_and_last_state(run):
    write(run, rec.Run(state="running"), rec.Step(step=1, loss=1.0), rec.Step(step=2, loss=1.0), t=100.0)
    write(run, rec.Run(state="crashed", reason="killed"), t=200.0)
    write(run, rec.Run(state="running"), rec.Step(step=2, loss=3.0), rec.Step(step=3, loss=2.0), inc=2, t=300.0)
    found, page = report(run)
    assert found["starts"] == [
        {"number": 1, "begun": 101.0, "ended": 204.0, "first_step": 1, "last_step": 2, "state": "crashed", "reason": "killed"},
        {"number": 2, "begun": 305.0, "ended": 307.0, "first_step": 2, "last_step": 3, "state": "running", "reason": None},
    ]
    assert found["curves"]["loss"]["mean"] == [1.0, 3.0, 2.0] and found["summary"]["wall_seconds"] == 206.0
    assert "crashed: killed" in check_page(page).words


class Strict(HTMLParser):
    """Notes elements and attributes; complains about unbalanced ones."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.handle_startendtag(tag, attrs)
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def check_page(page: str) -> Strict:
    """Well-formed, by itself, without script."""
    ET.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == [] and not parser.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"}
    for name, value in parser.attributes:
        assert not name.startswith("on") and name not in ("href", "src", "xlink:href", "action", "xmlns"), name
        assert "url(" not in (value or "").replace("url(#plot", ""), value
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    assert style and "url(" not in style[1] and "@import" not in style[1] and "<" not in style[1]
    assert "Content-Security-Policy" in page and "default-src 'none'" in page and "prefers-color-scheme:dark" in page
    assert not set(page) & {"\x1b", "\x07", "\x9b", "\u202e"}
    return parser


def test_c031_the_page_is_well_formed_and_holds_what_the_document_holds(run):
    write(run, *story(0))
    write(run, rec.Run(state="finished", reason="all steps done", exit_code=0))
    found, page = report(run)
    words = check_page(page).words
    for part in ("Curves", "Parts of a step", "Experts at step 700", "Timeline", "Checkpoints", "Starts", "Environment"):
        assert part in words
    assert f"{found['summary']['best_eval']['step']:,}" in words and page.count("<svg") >= 7
    assert re.findall(r'id="(\w+)"', page) == list(dict.fromkeys(re.findall(r'id="(\w+)"', page)))
    for name in ("report.html", "report.json"):
        assert (run.reports / name).stat().st_mode & 0o777 == 0o600


def test_se04_hostile_text_everywhere_in_a_run_is_only_text(tmp_path):
    run = RunDirectory.create(tmp_path / "runs", "demo")
    run.update_identity(
        state="failed", reason=HOSTILE, preset=HOSTILE, host=HOSTILE, argv=[HOSTILE], versions={HOSTILE: HOSTILE}, exit_code=1
    )
    write(
        run,
        rec.Run(state="failed", reason=HOSTILE),
        rec.Step(step=1, loss=1.0),
        rec.Alert(severity="critical", code=HOSTILE, message=HOSTILE, recommendation=HOSTILE, step=1),
        rec.Change(what=HOSTILE, before=HOSTILE, after=[HOSTILE], by=HOSTILE, reason=HOSTILE),
        rec.Note(message=HOSTILE),
        rec.Rewind(to_step=1, reason=HOSTILE),
        rec.Checkpoint(step=1, failed=HOSTILE),
        rec.Hardware(devices=[rec.Device(index=0, name=HOSTILE)]),
        rec.Eval(step=1, loss=1.0, tasks={HOSTILE: 1.0}),
    )
    (run.reports / "sample_eval.json").write_text(
        json.dumps({"overall": 0.5, "skills": {HOSTILE: {"asked": HOSTILE, "correct": HOSTILE}}})
    )
    (run.config_path).write_text(f"experiment_name: {json.dumps(HOSTILE)}\n")
    (run.checkpoints / "step-<b>").mkdir()
    moved = tmp_path / "runs" / "<script>x&\x1b"
    run.path.rename(moved)
    found, page = report(RunDirectory(moved))
    parser = check_page(page)
    assert parser.words.count("alert(1)") > 12 and "step-<b>" in parser.words
    assert found["timeline"]["entries"][1]["text"] == HOSTILE  # the data is kept as it is, escaped as JSON
    assert "\x1b" not in (moved / "reports" / "report.json").read_text()
    assert cli.main(["runs", "plot", str(moved), "--metrics", "loss", "--svg", str(tmp_path / "x.svg")]) == 0
    ET.fromstring((tmp_path / "x.svg").read_text())


def test_tag_escapes_everything_but_markup():
    assert tag("p", "<b>", tag("i", "&"), class_='"x', id=None) == '<p class="&quot;x">&lt;b&gt;<i>&amp;</i></p>'
    assert isinstance(tag("p"), Markup)


def test_a_run_without_anything_says_what_is_missing(run):
    found, page = report(run)
    check_page(page)
    assert found["summary"]["step"] is None and found["summary"]["loss"] is None and found["curves"] == {}
    told = " ".join(found["missing"])
    assert "metrics.jsonl: no records" in told and "config.yaml" in told
    assert "Not in this report" in page


def test_a_damaged_run_gives_the_rest(run):
    write(run, *story(1, steps=60))
    with run.metrics_path.open("ab") as file:
        file.write(b'\x00\xff garbage\n{"type":"step"\n')
    write(run, rec.Step(step=61, loss=0.5))
    with run.metrics_path.open("ab") as file:
        file.write(b'{"type":"step","seq":99')  # torn
    run.identity_path.write_text("{")
    (run.reports / "sample_eval.json").write_text("[")
    run.config_path.write_bytes(b"\xff\x00")
    found, page = report(run)
    check_page(page)
    told = " ".join(found["missing"])
    for part in ("run.json", "are no records", "sample_eval.json", "config.yaml"):
        assert part in told
    assert found["summary"]["step"] == 61 and found["run"]["state"] == "unreadable"


def test_a_log_that_cannot_be_read_is_named_and_the_rest_is_there(run):
    run.metrics_path.unlink(missing_ok=True)
    run.metrics_path.mkdir()
    ConfigPresets.debug().save(run.config_path)
    found, page = report(run)
    check_page(page)
    assert any("metrics.jsonl: cannot be read" in text for text in found["missing"]) and found["config"]["differences"] == []


def test_a_living_run_is_reported_as_of_now(run):
    me = myself()
    run.update_identity(state="running", pid=me.pid, start_time=me.start, boot_id=boot_id(), inc=1)
    write(run, rec.Run(state="running"), rec.Step(step=3, loss=2.0))
    found, page = report(run)
    assert found["run"]["alive"] and found["run"]["state"] == "running" and found["summary"]["step"] == 3
    assert "still running" in check_page(page).words


def test_differences_from_the_preset_and_the_graded_questions_are_there(run):
    config = ConfigPresets.debug()
    config.learning_rate = 0.123
    config.save(run.config_path)
    (run.reports / "sample_eval.json").write_text(
        json.dumps({"overall": 0.75, "skills": {"sorting": {"asked": 4, "correct": 3}}})
    )
    write(run, rec.Step(step=1, loss=1.0))
    found, page = report(run)
    assert {"key": "learning_rate", "preset": ConfigPresets.debug().learning_rate, "run": 0.123} in found["config"][
        "differences"
    ]
    assert len(found["config"]["differences"]) == 1
    assert "75.0 % correct" in page and "sorting" in page


def test_out_names_both_files_and_json_says_where(run, tmp_path, capsys):
    write(run, rec.Step(step=1, loss=1.0))
    assert cli.main(["report", str(run.path), "--out", str(tmp_path / "deep" / "r.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["html"] == str(tmp_path / "deep" / "r.html") and Path(told["json"]).exists()
    assert json.loads(Path(told["json"]).read_text())["summary"] == told["summary"]
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["r.html", "r.json"] and not list(run.reports.iterdir())
    assert cli.main(["report", "nowhere", "--runs", str(tmp_path)]) == 2


def test_c116_out_takes_a_dot_in_a_name_for_part_of_it(run, tmp_path, capsys):
    write(run, rec.Step(step=1, loss=1.0))
    out = tmp_path / "out"
    for name in ("run-1.5", "run-1.6", "a.html", "b.htm", "c.JSON"):
        assert cli.main(["report", str(run.path), "--out", str(out / name)]) == 0
    stems = ("a", "b", "c", "run-1.5", "run-1.6")
    assert sorted(path.name for path in out.iterdir()) == [f"{stem}.{kind}" for stem in stems for kind in ("html", "json")]
    assert f"{out / 'run-1.5.html'} and run-1.5.json" in capsys.readouterr().out
    for name in ("s3://b/r.html", ".", f"{out}/", str(out)):
        assert cli.main(["report", str(run.path), "--out", name]) == 2
        assert "name a" in capsys.readouterr().err
    assert len(list(out.iterdir())) == 10 and not Path("s3:").exists()


def test_timelines_keep_both_ends_and_count_the_rest(run):
    timeline = Timeline()
    for n in range(5000):
        timeline.add(n)
    assert list(timeline) == [*range(1000), *range(4000, 5000)] and timeline.left_out == 3000 and timeline.count == 5000


def test_reduced_keeps_every_spike_at_any_width():
    rng = np.random.default_rng(0)
    for size in (0, 1, 2, 63, 500, 1003):
        values, steps = rng.normal(size=size), np.arange(size) * 3 + 1
        values[rng.random(size) < 0.1] = np.nan
        for columns in (1, 2, 7, 500):
            found = reduced(steps, values, columns)
            assert len(found["step"]) == min(size, columns)
            if size:
                assert np.nanmax(found["max"], initial=-9) == np.nanmax(values, initial=-9)
                assert np.nanmin(found["min"], initial=9) == np.nanmin(values, initial=9)
                assert found["step"][-1] == steps[-1] and found["missing"].sum() == np.isnan(values).sum()


# runs plot


def plot(run: RunDirectory, *argv: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "lumina_engine.cli", "runs", "plot", str(run.path), *argv]
    base = {"PATH": "/usr/bin", "LC_ALL": "C.UTF-8"}
    return subprocess.run(command, capture_output=True, env={**base, **environment}, cwd=Path(__file__).resolve().parents[2])


def test_plot_prints_in_a_pipe_without_colours_and_within_its_width(run):
    write(run, *story(2, steps=900))
    done = plot(run, "--metrics", "loss,lr,imbalance", "--width", "120", "--height", "12")
    out = done.stdout.decode()
    assert done.returncode == 0 and done.stderr == b"" and "\x1b" not in out
    assert [line for line in out.split("\n") if ": " in line] and out.count("step\n") == 3
    below = [out.split("\n")[at - 1].split() for at, line in enumerate(out.split("\n")) if line.strip() == "step"]
    assert below[:2] == [["200", "400", "600", "800"]] * 2  # whole, round steps
    assert max(len(line) for line in out.split("\n")) == 120 and len(out.rstrip("\n").split("\n")) == 36
    for part in ("demo: loss (nats per token)", ". raw", "EMA 0.98", "o evaluation", "values left out", "demo: learning rate"):
        assert part in out


@pytest.mark.parametrize("environment", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {}])
def test_c138_plot_is_ascii_where_the_locale_or_the_user_says_so(run, environment):
    write(run, *story(3, steps=80))
    done = plot(run, "--metrics", "loss", *([] if environment else ["--ascii"]), **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and b"*" in done.stdout and b"+" in done.stdout and b"?" not in done.stdout


def test_c138_colours_only_on_a_terminal_that_has_them_and_never_needed(run):
    write(run, *story(4, steps=80))
    found = curve(read_history(run.metrics_path), "loss")
    plain_text = text(found, "t", width=60, height=10)
    coloured = text(found, "t", width=60, height=10, colour=True)
    assert "\x1b[" in coloured and re.sub(r"\x1b\[[0-9;]*m", "", coloured).split() == plain_text.split()


@pytest.mark.parametrize("log_y", [False, True])
def test_plot_hands_plotext_at_most_500_points_and_keeps_the_spike(run, log_y, monkeypatch):
    import plotext._figure

    seen: list[int] = []
    real = plotext._figure._figure_class.plot
    monkeypatch.setattr(
        plotext._figure._figure_class, "plot", lambda self, x, y, **k: (seen.append(len(x)), real(self, x, y, **k))[1]
    )
    write(run, *[rec.Step(step=n, lr=99.0 if n == 4321 else 1.0) for n in range(1, 9000)])
    drawn = text(curve(read_history(run.metrics_path), "lr"), "t", width=80, height=12, log_y=log_y)
    assert seen and max(seen) <= POINTS and "99.0" in drawn


def test_plot_of_nothing_of_one_point_and_of_gaps(run):
    history = read_history(run.metrics_path)
    assert "(no values)" in text(curve(history, "loss"), "t", width=60, height=10)
    write(run, rec.Step(step=1, loss=-1.0))
    history = read_history(run.metrics_path)
    assert "1 values left out" in text(curve(history, "loss"), "t", width=60, height=10, log_y=True)
    assert "step" in text(curve(history, "loss"), "t", width=60, height=10)
    write(run, *[rec.Step(step=n, loss=math.nan if n % 2 else 1.0) for n in range(2, 20)])
    assert "step" in text(curve(read_history(run.metrics_path), "loss"), "t", width=60, height=10)


def test_plot_last_json_and_refusals(run, capsys):
    records = [rec.Step(step=n, loss=float(n)) for n in range(1, 101)]
    write(run, *records, rec.Eval(step=50, loss=1.0), rec.Eval(step=100, loss=2.0))
    assert cli.main(["runs", "plot", str(run.path), "--metrics", "loss", "--last", "10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]["loss"]
    assert found["step"] == list(range(91, 101)) and found["mean"] == [float(n) for n in range(91, 101)]
    assert found["eval"] == {"step": [100], "value": [2.0]}
    for argv, says in (
        (["--metrics", "los"], "did you mean loss"),
        (["--metrics", ","], "is empty"),
        (["--last", "0"], "at least 1"),
        (["--width", "3"], "30 to 1000"),
        (["--svg", "x.svg", "--height", "5"], "120 to"),
    ):
        assert cli.main(["runs", "plot", str(run.path), *argv]) == 2
        assert says in capsys.readouterr().err


def test_svg_of_several_metrics_stands_below_each_other(run):
    write(run, *story(5, steps=90))
    history = read_history(run.metrics_path)
    whole = ET.fromstring(stacked([svg(curve(history, n), n) for n in ("loss", "lr")], 960, 320))
    inner = whole.findall("{http://www.w3.org/2000/svg}svg")
    assert whole.get("viewBox") == "0 0 960 640" and [item.get("y") for item in inner] == ["0", "320"]


@pytest.mark.slow
@pytest.mark.row("MX04")
def test_a_million_steps_in_bounded_memory(run):
    line = '{{"type":"step","seq":{0},"inc":1,"step":{0},"tokens":{0},"loss":1.5,"lr":0.1,"step_time":0.1,"grad_norm":0.5}}\n'
    with run.metrics_path.open("w") as file:
        file.writelines(line.format(n) for n in range(1, 1_000_001))
    code = (
        "import resource, sys; from lumina_engine import cli; code = cli.main(['report', sys.argv[1]]);"
        "print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True)
    code_, peak = done.stdout.split()[-2:]
    assert code_ == "0" and int(peak) < 600_000, done.stdout  # KiB
    assert json.loads((run.reports / "report.json").read_text())["summary"]["step"] == 1_000_000
