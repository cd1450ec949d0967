"""Where the ranks are: malformed answers, who is late or dead, what is said about them."""

from __future__ import annotations

import pytest

from lumina_tui.ranks import Beat, Ranks, beats


def test_c131_answers_are_taken_as_far_as_they_make_sense():
    content = [
        {"rank": 1, "pid": 11, "step": 812, "section": "backward", "age_s": 90.5, "connected": True, "exit_code": None},
        {"rank": 0, "pid": 10, "step": 813, "section": "\x1b[2Jdata", "age_s": 1},
        {"rank": "2"},
        {"rank": 4, "step": 7, "section": "step", "age_s": 0},
        {"rank": True},
        7,
        {"rank": 3, "step": "x", "section": 5, "age_s": "long", "pid": None, "exit_code": "9"},
    ]
    assert beats(content) == [
        Beat(0, 813, "␛[2Jdata", 1.0, 10),
        Beat(1, 812, "backward", 90.5, 11),
        Beat(3),
        Beat(4, 7, "optimizer"),
    ]
    for nothing in (None, {}, "x", 3):
        assert beats(nothing) == []


def test_c131_a_rank_that_does_not_move_is_late_and_says_where():
    ranks = Ranks([Beat(0, 813, "forward", 1.0), Beat(1, 812, "backward", 86.0)], 2, since=4.0, usual=2.0)
    assert ranks.trouble(ranks.beats[0]) == "" and ranks.trouble(ranks.beats[1]) == "LATE"
    assert ranks.worst() is ranks.beats[1]
    assert ranks.words(ranks.beats[1]) == "backward of step 812, 1 m 30 s"
    assert ranks.words(ranks.beats[0]) == "forward of step 813, 5.0 s"
    assert ranks.summary() == "2 ranks, step 812 to 813: 1 forward, 1 backward"


@pytest.mark.parametrize("section", ["save", "eval", "paused", "compile", "data", "tokenise", ""])
def test_c131_where_waiting_is_usual_nobody_is_late(section):
    assert Ranks([Beat(0, 5, section, 3600.0)]).worst() is None


def test_c131_c36_conversations_that_are_tokenised_are_no_steps():
    reading, waiting = Beat(0, 1_248_000, "tokenise", 0.1), Beat(1, 0, "data", 40.0)
    ranks = Ranks([reading, waiting], 2)
    assert ranks.words(reading) == "tokenising: 1,248,000 conversations so far"
    assert ranks.summary() == "2 ranks, tokenising: 1,248,000 conversations so far"
    assert Ranks([waiting, reading], 3).summary() == "2 ranks, 1 not there yet, tokenising: 1,248,000 conversations so far"
    dead = Beat(0, 500, "tokenise", connected=False)
    assert ranks.words(dead) == "has ended without a word, tokenising: 500 conversations so far"
    assert Ranks([dead, waiting]).summary() == "2 ranks, step 0: data"


def test_c131_slow_steps_are_not_late():
    beat = Beat(0, 5, "backward", 90.0)
    assert Ranks([beat], usual=30.0).worst() is None and Ranks([beat], usual=10.0).worst() is beat


def test_c131_a_dead_rank_comes_before_a_late_one():
    late, dead, left = Beat(0, 5, "forward", 500.0), Beat(1, 4, "backward", 1.0, connected=False), Beat(2, 6, exit_code=0)
    ranks = Ranks([late, dead, left], 4)
    assert ranks.worst() is dead and ranks.trouble(dead) == "DEAD" and ranks.trouble(left) == "left"
    assert ranks.words(dead) == "has ended without a word at step 4"
    assert ranks.words(Beat(1, 4, "step", exit_code=93)) == "has ended with code 93 at step 4"
    assert "1 not there yet" in ranks.summary()
    assert Ranks([]).summary() == "0 ranks" and Ranks([]).worst() is None
