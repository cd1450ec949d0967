"""What is remembered between sessions, and files that are written for the user."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_tui.application import LuminaApp
from lumina_tui.files import write_atomic, write_new
from lumina_tui.memory import Memory, _fits
from lumina_tui.places import state_dir
from lumina_tui.terminal import Look

from .helpers import until

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@settings(deadline=None)
@given(value=JSON, default=JSON)
def test_restores_a_value_gives_back_what_was_kept_or_the_default(tmp_path_factory, value, default):
    path = tmp_path_factory.mktemp("m") / "session.json"
    memory = Memory(path)
    memory.set("a.b", value)
    memory.flush()
    found = Memory(path).get("a.b", default)
    if value is not None and _fits(value, default):
        assert found == value and (default is None or isinstance(default, type(found)))
    else:
        assert found == default
    assert Memory(path).get("a.b", None) == value


@pytest.mark.parametrize(
    ("kept", "default", "found"),
    [
        (3, 1.0, 3.0),
        ("3", 1.0, 1.0),
        (True, 1, 1),
        (1, True, True),
        ([1, 2], (0,), (1, 2)),
        (["a"], (0,), (0,)),
        ([1, "a"], [0], [0]),
        ({"a": "b"}, {"x": 1}, {"x": 1}),
        (10**400, 1.0, 1.0),
        (None, "x", "x"),
    ],
)
def test_a_value_of_another_kind_gives_the_default(tmp_path, kept, default, found):
    path = tmp_path / "session.json"
    path.write_text(json.dumps({"k": kept}))
    got = Memory(path).get("k", default)
    assert got == found and type(got) is type(found)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": 1}' + " " * (1 << 20), "[" * 100_000, b"\xff\xfe\x00"])
def test_broken_memory_is_kept_aside_and_said(tmp_path, text):
    path = tmp_path / "session.json"
    raw = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(raw)
    memory = Memory(path)
    assert str(path) in memory.problem and memory.get("a", 7) == 7
    (aside,) = tmp_path.glob("session.json.broken-*")
    assert aside.read_bytes() == raw and aside.name in memory.problem
    memory.set("a", 1)
    memory.flush()
    assert Memory(path).get("a", 0) == 1


def test_two_sessions_do_not_wipe_out_each_other(tmp_path):
    path = tmp_path / "deep" / "session.json"
    one, two = Memory(path), Memory(path)
    one.set("a.x", 1)
    two.set("b.y", 2)
    one.flush()
    two.flush()
    both = Memory(path)
    assert (both.get("a.x", 0), both.get("b.y", 0)) == (1, 2)
    assert mode(path) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["session.json"]


def test_wakes_once_until_written_and_not_for_the_same_value(tmp_path):
    calls: list[int] = []
    memory = Memory(tmp_path / "s.json", wake=lambda: calls.append(1))
    memory.set("a", [1])
    memory.set("a", [2])
    memory.set("b", 1)
    assert calls == [1]
    memory.flush()
    memory.set("a", [2])
    assert calls == [1]
    memory.set("a", None)
    memory.flush()
    assert json.loads((tmp_path / "s.json").read_text()) == {"b": 1}
    with pytest.raises(ValueError):
        memory.set("a", float("nan"))
    with pytest.raises(TypeError):
        memory.set("a", {1, 2})


def test_what_cannot_be_written_stays_in_memory(tmp_path):
    (tmp_path / "file").write_text("")
    memory = Memory(tmp_path / "file" / "s.json")
    memory.set("a", 1)
    with pytest.raises(OSError):
        memory.flush()
    assert memory.get("a", 0) == 1


def test_readonly_writes_and_moves_nothing(tmp_path):
    path = tmp_path / "s.json"
    path.write_text("{")
    memory = Memory(path, readonly=True)
    memory.set("a", 1)
    memory.flush()
    assert memory.get("a", 0) == 1 and path.read_text() == "{" and [p.name for p in tmp_path.iterdir()] == ["s.json"]


def test_files_are_private_whole_and_never_overwritten(tmp_path):
    paths = [write_new(tmp_path / "exports", "../a b\x1b[2J", ".csv", f"{i}", now=0.0) for i in range(3)]
    assert len(set(paths)) == 3 and all(path.parent == tmp_path / "exports" for path in paths)
    assert [path.read_text() for path in paths] == ["0", "1", "2"]
    assert all(mode(path) == 0o600 and path.name.startswith("a_b_2J-") and path.suffix == ".csv" for path in paths)
    target = tmp_path / "t"
    write_atomic(target, "old")
    with pytest.raises(AttributeError):
        write_atomic(target, None)  # type: ignore[arg-type]
    assert target.read_text() == "old" and mode(target) == 0o600
    assert {p.name for p in tmp_path.iterdir()} == {"exports", "t"}


async def test_the_app_keeps_its_memory_and_exports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = LuminaApp(tmp_path / "runs", look=Look())
    async with app.run_test(size=(80, 24)):
        app.memory.set("test.value", 3)
        path = app.save_export("loss", "csv", "a,b\n")
        assert path.read_text() == "a,b\n" and path.parent == Path("exports")
        assert str(path) in app.notices[-1].text
    assert Memory(state_dir() / "session.json").get("test.value", 0) == 3
    app = LuminaApp(tmp_path / "runs", look=Look(), readonly=True)
    async with app.run_test(size=(80, 24)):
        with pytest.raises(PermissionError, match="readonly"):
            app.save_export("loss", "csv", "")


async def test_the_memory_reaches_the_disk_while_the_app_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("lumina_tui.application.DELAY_S", 0.01)
    app = LuminaApp(tmp_path, look=Look())
    async with app.run_test(size=(80, 24)) as pilot:
        app.memory.set("test.value", 3)
        await until(pilot, lambda: (state_dir() / "session.json").exists())


async def test_broken_memory_is_a_notice(tmp_path):
    state_dir().mkdir(parents=True)
    (state_dir() / "session.json").write_text("{{")
    app = LuminaApp(tmp_path, look=Look())
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: any("session.json" in notice.text for notice in app.notices))
