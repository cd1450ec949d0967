"""`lumina-engine bench tui` measures what it says, with tiny sizes. No figure is asserted: this is no timing."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from lumina_engine.bench.picture import Picture
from lumina_engine.bench.tui import HEADLINES, MEASUREMENTS, Figure, Sizes, crosshair, exact, measure, p95, step_of


def test_a_picture_is_what_a_terminal_would_show():
    picture = Picture(10, 3)
    for byte in "\x1b[?1049h\x1b[2J\x1b[1;1H\x1b[38;5;251mab⣿\x1b[0m\r\n世x\x1b[3;9Hzzz\x1b]0;title\x07\x1b[2;4Hy".encode():
        picture.feed(bytes([byte]))  # also in the middle of a letter or a sequence
    assert [picture.row(y).rstrip() for y in range(3)] == ["ab⣿", "世 xy", "        zz"]
    picture.feed(b"\x1b[1;2H\x1b[K")
    assert picture.row(0) == "a" + " " * 9


def test_figures_are_read_off_the_picture():
    picture = Picture(60, 4)
    picture.feed(
        "\x1b[1;1Hlumina 5 Monitor  FILE\x1b[2;1Hstep 1,234 of 5,000\x1b[3;1H⣿ EMA\x1b[4;1H└ 48,210: 1.9 (EMA 1.9)".encode()
    )
    assert step_of(picture) == 1234 and crosshair(picture) == "48,210" and exact(picture)
    picture.feed(b"\x1b[3;8Hpreview")
    assert not exact(picture)


def test_p95_is_exceeded_by_one_in_twenty_at_most():
    for count in (1, 4, 19, 20, 21, 60, 100):
        values = list(range(count))
        assert sum(value > p95(values) for value in values) <= count / 20


def test_what_cannot_be_measured_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr("lumina_engine.bench.viewer.sys.executable", "/bin/false")
    found = list(measure(tmp_path, Sizes(starts=1), ["first_paint"]))
    assert [figure.value for figure in found] == [None] and "lumina ended" in found[0].note
    assert Figure("a", "", "", 1.0, None).holds is None and Figure("a", "", "", 1.0, 2.0).holds is False


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lumina_engine.cli", "bench", "tui", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_c148_a_few_measurements_as_json():
    done = run("--quick", "--json", "--only", "first_paint,crash,form")
    assert done.returncode == 0, done.stderr
    *lines, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["figure"] for line in lines} >= {"first_paint_s", "crash_seen_s", "field_check_ms"}
    assert all(isinstance(line["value"], float | int) for line in lines), lines
    assert set(HEADLINES) <= set(last) and last["first_paint_s"] > 0 and last["open_1m_cold_s"] is None


def test_an_unknown_measurement_is_named():
    done = run("--only", "nonsense")
    assert done.returncode == 2 and "nonsense" in done.stderr and "first_paint" in done.stderr


@pytest.mark.slow
def test_c148_every_measurement_gives_a_figure():
    done = run("--quick", "--json")
    assert done.returncode == 0, done.stderr
    *lines, last = [json.loads(line) for line in done.stdout.splitlines()]
    missing = [
        line
        for line in lines
        if line["value"] is None and not re.search("preview|Doctor|before a key", line["what"] + line["note"])
    ]
    assert not missing and all(last[name] is not None for name in HEADLINES)
    assert len(lines) > len(MEASUREMENTS)
