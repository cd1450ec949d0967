"""Commands over the viewers' socket, and where the socket lies."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MetricLog
from lumina_engine.run.directory import RunError
from lumina_engine.run.requests import check_command
from lumina_engine.run.socket import DEPTH_LIMIT, bind_socket, prepare_folder, too_deep
from lumina_engine.run.tail import command_ids
from tests.waiting import until

from .viewers import Server, Viewer, emit


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.end()


def test_ps14_the_same_id_is_applied_once(server: Server) -> None:
    one, two = Viewer(server), Viewer(server)
    for viewer in (one, two, one):
        viewer.send({"op": "cmd", "id": "c1", "cmd": "checkpoint", "args": {}})
        assert viewer.read() == {"op": "reply", "id": "c1", "ok": True}
    assert server.applied == [("c1", "checkpoint", {})]
    one.close()
    two.close()


def test_ps14_a_refusal_is_repeated_too(server: Server) -> None:
    server.refuse = "not now"
    viewer = Viewer(server)
    for _ in range(2):
        viewer.send({"op": "cmd", "id": "c1", "cmd": "pause"})
        assert viewer.read() == {"op": "reply", "id": "c1", "ok": False, "error": "not now"}
    assert len(server.applied) == 1
    viewer.close()


def test_ps14_an_id_whose_effect_is_in_the_log_is_not_applied_again(server: Server) -> None:
    server.log.emit(rec.Change(what="learning_rate", id="from-the-log"))
    until(lambda: server.tail.head_seq == 1)
    viewer = Viewer(server)
    viewer.send({"op": "cmd", "id": "from-the-log", "cmd": "set_lr", "args": {"lr": 0.1}})
    assert viewer.read()["ok"] is True
    assert server.applied == []
    viewer.close()


def test_ps14_ids_of_a_log_from_before(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with MetricLog(path, 1, sync_interval=0) as log:
        log.emit(rec.Change(what="a", id="one"))
        for _ in range(6000):
            log.emit(rec.Note(message='not an id: "id":"fake"' + "x" * 300))
        log.emit(rec.Run(state="stopping", id="two"))
    assert path.stat().st_size > 1 << 20
    assert command_ids(path) == {"one", "two"}


@pytest.mark.parametrize(
    ("cmd", "args", "word"),
    [
        ("stopp", {}, "did you mean stop"),
        ("preempt", {}, "there are stop, checkpoint"),
        (None, {}, "there are"),
        (["stop"], {}, "there are"),
        ("stop", [], "must be an object"),
        ("stop", {"save": 1}, "true or false"),
        ("stop", {"now": True}, "takes save"),
        ("pause", {"x": 1}, "takes no arguments"),
        ("set_lr", {}, "number above 0"),
        ("set_lr", {"lr": "1"}, "must be a number"),
        ("set_lr", {"lr": True}, "must be a number"),
        ("set_lr", {"lr": 0}, "number above 0"),
        ("set_lr", {"lr": -1e-4}, "number above 0"),
        ("set_lr", {"lr": float("nan")}, "number above 0"),
        ("set_lr", {"lr": float("inf")}, "number above 0"),
        ("set_lr", {"lr": 10**400}, "number above 0"),
    ],
)
def test_c134_wrong_commands_are_refused_with_the_reason(cmd: object, args: object, word: str) -> None:
    assert word in (check_command(cmd, args) or "")


@pytest.mark.parametrize(
    ("cmd", "args"), [("stop", {}), ("stop", {"save": False}), ("checkpoint", {}), ("pause", {}), ("set_lr", {"lr": 1e-9})]
)
def test_c134_right_commands(cmd: str, args: dict[str, Any]) -> None:
    assert check_command(cmd, args) is None


def test_depth_counts_brackets_outside_strings() -> None:
    assert not too_deep(b'{"a":"' + b"[{" * 500 + b'\\""}')
    assert not too_deep(b"[" * 32 + b"]" * 32)
    assert too_deep(b"[" * 33 + b"]" * 33)
    assert not too_deep(b"[" + b"[]," * 100 + b"1]")


def plainly_too_deep(line: bytes, limit: int) -> bool:
    """`too_deep`, byte by byte."""
    depth, inside, escaped = 0, False, False
    for byte in line:
        if inside:
            inside = escaped or byte != ord('"')
            escaped = not escaped and byte == ord("\\")
        elif byte == ord('"'):
            inside = True
        elif byte in b"[{":
            depth += 1
            if depth > limit:
                return True
        elif byte in b"]}":
            depth -= 1
    return False


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(list('"\\[]{}:,a\n')), max_size=60).map("".join), st.integers(0, 4))
def test_depth_of_any_line_is_that_of_a_byte_by_byte_count(line: str, limit: int) -> None:
    assert too_deep(line.encode(), limit) == plainly_too_deep(line.encode(), limit)


_JSON = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('"\\[]{}a'), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.sampled_from('"\\[{'), max_size=3), inner, max_size=3)
    ),
    max_leaves=20,
)


def nesting(value: object) -> int:
    if isinstance(value, dict | list):
        return 1 + max(map(nesting, value.values() if isinstance(value, dict) else value), default=0)
    return 0


@settings(max_examples=200, deadline=None)
@given(_JSON, st.integers(0, 4))
def test_depth_of_json_is_that_of_its_value(value: object, limit: int) -> None:
    assert too_deep(json.dumps(value).encode(), limit) == (nesting(value) > limit)


@pytest.mark.parametrize("text", [b'\\"', b'"\\'], ids=repr)
def test_depth_of_an_unclosed_string_takes_one_pass(text: bytes) -> None:
    """A pass for each of its quotes, half a million over a megabyte, would outlast the time limit of the suite."""
    line = b"[" * DEPTH_LIMIT + b'{"op":"' + text * 500_000
    assert too_deep(line) and not too_deep(line[1:] + b"[" * 40)


def test_ps10_a_deleted_socket_is_bound_again(tmp_path: Path) -> None:
    server = Server(tmp_path, rebind_time=0.05)
    first = Viewer(server)
    server.path.unlink()
    until(server.path.exists)
    second = Viewer(server)
    server.path.unlink()
    server.path.parent.rmdir()
    until(server.path.exists)
    third = Viewer(server)
    last = emit(server, 2)
    for viewer in (first, second, third):
        assert viewer.follow(last) == [1, 2]
        viewer.close()
    server.end()
    assert not server.path.exists()


def test_ps10_what_takes_the_socket_s_place_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server = Server(tmp_path, rebind_time=0.02)
    viewer = Viewer(server)
    mine = tmp_path / "mine"
    mine.write_text("mine")
    mine.replace(server.path)  # at once: an empty place would be bound again
    until(lambda: server.viewers._complaint)
    last = emit(server, 1)
    assert viewer.follow(last) == [1], "whoever is connected stays so"
    viewer.close()
    server.end()
    assert server.path.read_text() == "mine"
    assert capfd.readouterr().err.count("viewers cannot connect") == 1


@pytest.mark.parametrize("kind", ["a file", "a folder open to all", "a link to itself"])
def test_ps10_what_takes_the_folder_s_place_costs_new_viewers_only(tmp_path: Path, kind: str) -> None:
    server = Server(tmp_path, rebind_time=0.02)
    folder = server.path.parent
    viewer = Viewer(server)
    folder.rename(folder.with_name("gone"))
    if kind == "a file":
        folder.touch()
    elif kind == "a folder open to all":
        folder.mkdir()
        folder.chmod(0o755)
    else:
        folder.symlink_to(folder)
    until(lambda: server.viewers._complaint)
    last = emit(server, 1)
    assert viewer.follow(last)[-1] == last
    viewer.close()
    server.end()


def test_ps11_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s" / "a.sock"
    bind_socket(path).close()
    assert stat.S_ISSOCK(path.lstat().st_mode)
    listener = bind_socket(path)
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    with pytest.raises(RunError, match="another process answers there"):
        bind_socket(path)
    with pytest.raises(RunError, match="another process answers there"):
        bind_socket(path, socket.SOCK_SEQPACKET)
    listener.close()


@pytest.mark.parametrize("kind", ["file", "link", "folder", "dangling"])
def test_ps11_anything_else_in_its_place_is_refused_and_untouched(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s" / "a.sock"
    prepare_folder(path.parent)
    target = tmp_path / "target"
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(target)
        if kind == "link":
            target.write_text("mine")
    before = path.lstat()
    with pytest.raises(RunError, match=r"not a socket of yours: remove it") as caught:
        bind_socket(path)
    assert caught.value.exit_code == 65 and path.lstat() == before
    assert target.exists() == (kind == "link")


@pytest.mark.parametrize(
    ("kind", "word"), [("open", "chmod 700"), ("file", "is a file"), ("link", "is a link"), ("foreign", "belongs to user")]
)
def test_ps12_the_folder_must_be_ours_alone(tmp_path: Path, kind: str, word: str) -> None:
    folder = tmp_path / "sockets"
    if kind == "open":
        folder.mkdir()
        folder.chmod(0o777)
    elif kind == "file":
        folder.write_text("")
    elif kind == "link":
        (tmp_path / "real").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "real")
    else:
        folder.mkdir(mode=0o700)
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(folder, 65534, 65534)
    with pytest.raises(RunError, match=word):
        bind_socket(folder / "a.sock")
    assert not (folder / "a.sock").exists()


def test_ps10_a_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * (107 - len(str(tmp_path)) - 1 - len("/a.sock")))
    bind_socket(folder / "a.sock").close()
    with pytest.raises(RunError, match=r"longer than 107 bytes.*LUMINA_SOCKETS"):
        bind_socket(folder / "ab.sock")
