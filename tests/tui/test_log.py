"""The log panel: a ring over a growing file, rotation, filter and search as numbers of lines, hostile bytes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lumina_tui import log_tail
from lumina_tui.log_tail import KEEP, LINE, Matches, TextTail, line_text
from lumina_tui.widgets.log_view import LogView

from .helpers import screen_text as shown
from .helpers import until
from .stage import Stage


def texts(tail: TextTail) -> list[str]:
    return [line_text(line) for line in tail.lines]


def test_tail_follows_truncation_and_keeps_its_limit(tmp_path):
    path = tmp_path / "engine.log"
    tail = TextTail(path)
    assert not tail.poll() and not tail.error
    path.write_bytes(b"one\ntwo\npart")
    assert tail.poll() and texts(tail) == ["one", "two"]
    with path.open("ab") as file:
        file.write(b"ial\n10 %\r20 %\r\x1b[31mred\x80\n")
    tail.poll()
    assert texts(tail) == ["one", "two", "partial", "␛[31mred\ufffd"]
    path.write_bytes(b"new\n")
    tail.poll()
    assert texts(tail)[-1] == "new"
    path.write_bytes(b"x\n" * (KEEP + 500))
    while tail.poll():
        pass
    assert len(tail.lines) == KEEP and tail.end > KEEP + 500


def test_tail_reads_a_renamed_file_to_its_end(tmp_path):
    path = tmp_path / "engine.log"
    path.write_bytes(b"one\n")
    tail = TextTail(path)
    tail.poll()
    with path.open("ab") as file:
        file.write(b"two\nno newline")
    path.rename(tmp_path / "engine.log.1")
    tail.poll()
    assert texts(tail) == ["one", "two"] and tail.dropped == 0
    path.write_bytes(b"three\n")
    tail.poll()
    assert texts(tail) == ["one", "two", "no newline", "three"]


def test_tail_begins_near_the_end_and_says_what_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr(log_tail, "FIRST", 1000)
    monkeypatch.setattr(log_tail, "SLICE", 100)
    monkeypatch.setattr(log_tail, "BEHIND", 4000)
    path = tmp_path / "engine.log"
    path.write_bytes(b"".join(b"line %04d\n" % i for i in range(1000)))
    tail = TextTail(path)
    while tail.poll():
        pass
    assert texts(tail)[-1] == "line 0999" and 90 <= len(tail.lines) <= 100 and texts(tail)[0].startswith("line ")
    with path.open("ab") as file:
        file.write(b"".join(b"more %04d\n" % i for i in range(900)))
    while tail.poll():
        pass
    got = texts(tail)
    assert got[-1] == "more 0899" and sum("kB left out" in line for line in got) == 1
    assert all(line.startswith(("line ", "more ", "...")) for line in got)


def test_memory_is_bounded_by_bytes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(log_tail, "KEEP_BYTES", 100_000)
    path = tmp_path / "engine.log"
    path.write_bytes((b"y" * 30_000 + b"\n") * 40)
    tail = TextTail(path)
    while tail.poll():
        pass
    assert sum(map(len, tail.lines)) <= 100_000 and all(len(line) == LINE for line in tail.lines)
    assert tail.end == 34  # of 40: reading began 1 MiB before the end


def test_binary_garbage_is_shown_and_harmless(tmp_path):
    path = tmp_path / "engine.log"
    path.write_bytes(random.Random(0).randbytes(300_000))
    tail = TextTail(path)
    while tail.poll():
        pass
    assert not {c for text in texts(tail) for c in text if c < " " or "\x7f" <= c < "\xa0" or "\u202a" <= c <= "\u202e"}
    found = Matches("e")
    while not found.advance(tail):
        pass
    assert all("e" in tail.text(number).lower() for number in found.numbers)


@pytest.mark.parametrize("words", ["a", "ab b", "B\u00e9", "nothing", "a 1"])
def test_matches_equal_brute_force_while_lines_come_and_go(tmp_path, monkeypatch, words):
    monkeypatch.setattr(log_tail, "KEEP", 50)
    generator = random.Random(1)
    path = tmp_path / "engine.log"
    path.touch()
    tail, found = TextTail(path), Matches(words)
    for _ in range(60):
        with path.open("ab") as file:
            for _ in range(generator.randrange(0, 40)):
                file.write("".join(generator.choices("aAbB\u00e9 1\r", k=generator.randrange(0, 8))).encode() + b"\n")
        tail.poll()
        while not found.advance(tail, generator.choice([0.0, 1.0])):
            pass
        wanted = [word.casefold() for word in words.split()]
        lines = [(tail.dropped + i, line_text(line).casefold()) for i, line in enumerate(tail.lines)]
        assert found.numbers == [number for number, text in lines if all(word in text for word in wanted)]


def test_a_missing_or_forbidden_file_is_named(tmp_path):
    tail = TextTail(tmp_path)
    tail.poll()
    assert str(tmp_path) in tail.error


def test_a_tail_keeps_one_descriptor_and_gives_it_back(tmp_path):
    path = tmp_path / "engine.log"

    def count() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    before = count()
    for n in range(20):
        path.write_text(f"{n}\n")
        tail = TextTail(path)
        for _ in range(5):
            tail.poll()
        assert count() <= before + 1
        tail.close()
    assert count() == before


async def test_c131_log_scrolls_follows_filters_and_finds(tmp_path):
    path = tmp_path / "engine.log"
    path.write_text("".join(f"line {i}\n" for i in range(100)))
    view = LogView()
    app = Stage(view)
    async with app.run_test(size=(60, 14)) as pilot:
        view.show(path)
        view.focus()
        await until(pilot, lambda: "line 99" in shown(app))
        view.action_top()
        await until(pilot, lambda: "line 0" in shown(app) and "90 lines below" in shown(app))
        with path.open("a") as file:
            file.write("line 100\n")
        view.sync()
        await until(pilot, lambda: "line 0" in shown(app) and "91 lines below" in shown(app))
        view.action_bottom()  # who reads at the bottom follows again
        await until(pilot, lambda: "line 100" in shown(app) and "lines below" not in shown(app))
        with path.open("a") as file:
            file.write("one more\n")
        view.sync()
        await until(pilot, lambda: "one more" in shown(app))
        view.set_filter("line 7")
        await until(pilot, lambda: "line 87" in shown(app) and "line 99" not in shown(app) and "19 lines" in shown(app))
        view.action_previous_match()
        await until(pilot, lambda: ">line 97" in shown(app) and "match 19 of 19" in shown(app))
        view.action_only()
        await until(pilot, lambda: ">line 97" in shown(app) and "line 96" in shown(app) and "19 lines of all" in shown(app))
        view.action_next_match()
        await until(pilot, lambda: ">line 7 " in shown(app) and "match 1 of 19" in shown(app))
        view.action_next_match()
        await until(pilot, lambda: ">line 17" in shown(app))
        view.action_only()
        await until(pilot, lambda: ">line 17" in shown(app) and "line 16" not in shown(app))
        with path.open("a") as file:
            file.write("line 777\n")
        view.sync()
        await until(pilot, lambda: "20 lines" in shown(app) and ">line 17" in shown(app))
        view.set_filter("no such line")
        await until(pilot, lambda: "no line with no such line" in shown(app))
        view.set_filter("")
        await until(pilot, lambda: "line 777" in shown(app))


async def test_long_lines_are_read_sideways(tmp_path):
    path = tmp_path / "engine.log"
    path.write_text("".join(f"<{i}>" for i in range(100)) + "\nshort\n")
    view = LogView()
    app = Stage(view)
    async with app.run_test(size=(40, 8)) as pilot:
        view.show(path)
        await until(pilot, lambda: "<0>" in shown(app) and "<30>" not in shown(app))
        for _ in range(5):
            view.action_right()
        await until(pilot, lambda: "<30>" in shown(app) and "<0>" not in shown(app) and "from column 81" in shown(app))
        for size in ((20, 6), (10, 3), (3, 3), (1, 1), (40, 8)):
            await pilot.resize_terminal(*size)
        view.action_follow()
        await until(pilot, lambda: "<0>" in shown(app))


async def test_a_thousand_lines_a_tick_keep_the_place_that_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(log_tail, "KEEP", 3000)
    path = tmp_path / "engine.log"
    path.write_text("".join(f"line {i}\n" for i in range(3000)))
    view = LogView()
    app = Stage(view)
    async with app.run_test(size=(60, 14)) as pilot:
        view.show(path)
        view.sync()
        await until(pilot, lambda: "line 2999" in shown(app))
        view.action_page_up()
        view._go(2500)
        view.refresh()
        await until(pilot, lambda: "line 2500" in shown(app))
        for start in range(3000, 5000, 1000):
            with path.open("a") as file:
                file.write("".join(f"line {i}\n" for i in range(start, start + 1000)))
            view.sync()
            await until(pilot, lambda: "line 2500" in shown(app))
        assert len(view.tail.lines) == 3000 and view.tail.dropped == 2000
