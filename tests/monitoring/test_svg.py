"""Charts as SVG: well-formed, complete, self-contained, whatever the data."""

from __future__ import annotations

import math
import re
import time
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_engine.monitoring.svg import Series, line_svg
from lumina_engine.monitoring.ticks import clock_labels, clock_ticks, count_labels, hour_labels, short, ticks, value_labels

NS = {"s": "http://www.w3.org/2000/svg"}
HOSTILE = '<script>alert(1)</script>"&\x1b[2J\x00\ud800\uffff]]>'


def paths(svg: str) -> list[str]:
    group = ET.fromstring(svg).findall("s:g", NS)[1]
    return [node.attrib["d"] for node in group.findall("s:path", NS)]


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]


numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(numbers, max_size=40), max_size=8),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.text(max_size=20),
)
def test_any_data_and_any_text_is_well_formed(lists, log_x, log_y, clock, name):
    styles = ("line", "faint", "points", "events")
    series = [
        Series(f"{name} {i}", np.arange(len(ys)) * 7.0, np.array(ys), styles[i % 4], ["C"] * len(ys))
        for i, ys in enumerate(lists)
    ]
    svg = line_svg(series, title=name, y_label=name, log_x=log_x, log_y=log_y, x_clock=clock)
    ET.fromstring(svg)
    assert "nan" not in re.sub(r">[^<]*<", "><", re.sub(r'aria-label="[^"]*"', "", svg)).lower()


def test_hostile_names_stay_text_and_nothing_is_fetched():
    svg = line_svg([Series(HOSTILE, np.arange(3.0), np.arange(3.0))], title=HOSTILE, x_label=HOSTILE, y_label=HOSTILE)
    root = ET.fromstring(svg)
    assert not [node for node in root.iter() if node.tag.endswith("script")]
    assert "\x1b" not in svg and "\x00" not in svg and "href" not in svg and "url(http" not in svg
    assert any("<script>" in (node.text or "") for node in root.iter())


@pytest.mark.parametrize("log_x", [False, True])
def test_mx06_the_one_spike_of_a_million_is_in_the_picture(log_x):
    y = np.full(1_000_000, 2.0)
    y[654_321] = 9.0
    svg = line_svg([Series("a", np.arange(1, 1_000_001), y)], log_x=log_x)
    (path,) = paths(svg)
    heights = [at for _, at in points(path)]
    assert len(heights) < 2_000 and len(svg) < 60_000
    assert min(heights) < 80 and sum(at < 80 for at in heights) <= 2  # the top of the plot is at 40 px


def test_a_short_series_is_drawn_point_by_point_and_gaps_stay_gaps():
    y = np.array([1.0, 2.0, math.nan, 3.0, math.inf, 4.0])
    (path,) = paths(line_svg([Series("a", np.arange(6.0), y)]))
    assert len(points(path)) == 4 and path.count("M") == 3
    assert "2 not finite" in line_svg([Series("a", np.arange(6.0), y)])
    assert "3 not finite" not in line_svg([Series("a", np.arange(6.0), y, "faint"), Series("a", np.arange(6.0), y)])


def test_what_a_logarithm_cannot_show_is_left_out_and_counted():
    svg = line_svg([Series("a", np.array([0.0, 1.0, 10.0]), np.array([1.0, 0.0, 5.0]))], log_x=True, log_y=True)
    assert "2 not above 0" in svg and len(points(paths(svg)[0])) == 1


def test_a_count_that_stays_0_has_no_axis_below_0():
    picture = line_svg([Series("dead", np.arange(5), np.zeros(5))])
    assert ">0.5<" in picture and ">-0.5<" not in picture


def test_series_of_one_name_share_colour_and_legend():
    x = np.arange(5.0)
    svg = line_svg(
        [Series("run", x, x, "faint"), Series("run", x, x), Series("other", x, x + 1), Series("run", x, x, "points")]
    )
    root = ET.fromstring(svg)
    legend = [node.text for node in root.findall("s:g", NS)[-1].findall("s:text", NS)]
    assert legend.count("run") == 1 and legend.count("other") == 1
    strokes = [node.attrib["stroke"] for node in root.findall("s:g", NS)[1].findall("s:path", NS)]
    assert strokes[0] == strokes[1] != strokes[2]


def test_events_that_pile_up_are_counted():
    x = np.concatenate([[10.0], np.full(3, 500.0), np.full(12, 900.0), [1000.0]])
    svg = line_svg([Series("a", np.arange(1001.0), np.ones(1001)), Series("events", x, x, "events", ["C"] * len(x))])
    signs = [node.text for node in ET.fromstring(svg).findall("s:g", NS)[2].findall("s:text", NS)]
    assert signs == ["C", "3", "+", "C"]


def test_lengths_and_sizes_are_checked():
    with pytest.raises(ValueError, match=r"series a: x has shape \(2,\), y \(3,\)"):
        line_svg([Series("a", np.arange(2), np.arange(3))])
    with pytest.raises(ValueError, match="at least 160 x 120"):
        line_svg([], width=10)


def test_ticks_are_few_round_and_inside():
    rng = np.random.default_rng(0)
    for _ in range(300):
        low, span = rng.normal() * 10 ** rng.uniform(-3, 6), 10 ** rng.uniform(-3, 6)
        found = ticks(low, low + span, 6)
        assert len(found) <= 8 and all(low - span * 1e-6 <= value <= low + span * 1.000001 for value in found)
        for labels in (value_labels(found), count_labels(found)):
            assert len(set(labels)) == len(labels) == len(found), (found, labels)
    for hours in (0.01, 1.0, 30.0, 9_000.0):
        start = 1_764_000_123.0
        found = clock_ticks(start, start + hours * 3600, 6)
        assert 1 <= len(found) <= 8 and len(clock_labels(found)) == len(found)
        assert all(start <= value <= start + hours * 3600 for value in found)
    midnight = time.mktime((2025, 11, 25, 0, 0, 0, 0, 0, -1))
    assert clock_labels([midnight - 3600, midnight, midnight + 3600]) == ["23:00", "25 Nov", "01:00"]
    assert clock_ticks(math.nan, 1, 3) == [] and clock_labels([]) == []
    assert count_labels([123_420.0, 123_440.0]) == ["123,420", "123,440"] and hour_labels([0.5]) == ["30m"]
    assert [short(value) for value in (0, 12_000, 999_900, 2.5e6, 1e-3, 0.25)] == ["0", "12k", "1M", "2.5M", "1e-3", "0.25"]
