"""Run folders: names, modes, identity, the lock, the list."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MetricLog
from lumina_engine.run import directory as module
from lumina_engine.run.directory import RunDirectory, RunError, find, list_runs, require_free_space, runs_root
from lumina_engine.run.process import Process, boot_id, myself, send_signal
from tests.waiting import until


def make(root: Path, name: str = "r", **identity: Any) -> RunDirectory:
    run = RunDirectory.create(root, name, preset="debug")
    if identity:
        run.update_identity(**identity)
    return run


def owned_elsewhere(run: RunDirectory, *more: str) -> subprocess.Popen[bytes]:
    """Another process that owns the run, and has said so in run.json."""
    script = """
import sys
from lumina_engine.run import directory
from lumina_engine.run.directory import RunDirectory
from lumina_engine.run.process import boot_id, myself
if "flock" in sys.argv:
    import fcntl, types
    directory.fcntl = types.SimpleNamespace(**{**vars(fcntl), "lockf": fcntl.flock})
run = RunDirectory(sys.argv[1])
lock = run.lock()
me = myself()
run.update_identity(pid=me.pid, start_time=me.start, boot_id=boot_id(), state="running", inc=1)
print("ready", flush=True)
if "fork" in sys.argv:
    import os, signal
    if os.fork() == 0:
        signal.pause()
    print("forked", flush=True)
sys.stdin.read()
"""
    return subprocess.Popen(
        [sys.executable, "-c", script, str(run.path), *(["fork"] if run.name == "forks" else []), *more],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def say(child: subprocess.Popen[bytes]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().decode().strip()


def test_ck17_modes_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run = make(tmp_path)
        run.lock().release()
    finally:
        os.umask(before)
    for path in [run.path, *run.path.iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("name", ["", ".x", "-x", "a/b", "../x", "a b", "a\n", "ä", "x" * 65, "$(touch x)", "a\0b"])
def test_c052_bad_names_make_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="cannot be the name of a run") as caught:
        RunDirectory.create(tmp_path / "runs", name)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_c052_good_names(tmp_path: Path) -> None:
    for name in ("a", "A.b-c_9", "x" * 64):
        assert RunDirectory.create(tmp_path, name).identity()["name"] == name


def test_an_existing_name_is_refused_with_the_ways_on(tmp_path: Path) -> None:
    run = make(tmp_path)
    before = run.identity()
    with pytest.raises(RunError, match=r"exists.*--resume.*--fresh") as caught:
        make(tmp_path)
    assert caught.value.exit_code == 2 and run.identity() == before


def test_run_json_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path)
    monkeypatch.setattr(module.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        run.update_identity(state="running")
    assert run.identity()["state"] == "preparing"
    assert sorted(path.name for path in run.path.iterdir() if path.is_file()) == ["run.json"], "no rest of the attempt"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[1]", "no JSON object"),
        (b"{}", "no JSON object with an id"),
        (b'{"id": 5, "format": 1}', "no JSON object with an id"),
        (b'{"id": "a", "format": 99}', "has format 99"),
        (b'{"id": "a"}', "has format None"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"id": "a", "format": 1, "x": "' + b"a" * (5 << 20) + b'"}', "damaged"),
    ],
)
def test_c127_an_unreadable_run_json_is_a_row_with_its_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    make(tmp_path, "good")
    bad = make(tmp_path, "bad")
    bad.identity_path.write_bytes(content)
    rows = {row.name: row for row in list_runs(tmp_path)}
    assert rows["good"].state == "preparing"
    assert rows["bad"].state == "unreadable" and reason in (rows["bad"].reason or "")


def test_list_survives_wrong_values_and_strange_folders(tmp_path: Path) -> None:
    make(tmp_path, "odd", state=5, total_steps="x", exit_code=[], inc=None, created="now", pid=True, preset=3, socket=9)
    (tmp_path / "plain").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "\x1b[2J").mkdir()
    (tmp_path / "\x1b[2J" / "run.json").write_text("{")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    rows = {row.name: row for row in list_runs(tmp_path)}
    assert set(rows) == {"odd", "\x1b[2J"}
    assert rows["odd"].total_steps is None and rows["odd"].preset is None
    assert list_runs(tmp_path / "missing") == []


def test_the_row_shows_the_last_values(tmp_path: Path) -> None:
    run = make(tmp_path, total_steps=50)
    with MetricLog(run.metrics_path, 1, sync_interval=0) as log:
        for step in range(1, 8):
            log.emit(rec.Step(step=step, loss=1.0 / step, tokens_per_s=100.0 * step))
            log.emit(rec.Hardware(cpu=1.0))
    info = run.info()
    assert (info.step, info.total_steps, info.loss, info.tokens_per_s) == (7, 50, 1.0 / 7, 700.0)
    assert info.age_s is not None and info.age_s < 60 and info.preset == "debug"
    with MetricLog(run.metrics_path, 2, sync_interval=0) as log:
        log.emit(rec.Rewind(to_step=4))
    assert (run.info().step, run.info().loss) == (4, None), "what was abandoned is not shown"


def test_runs_are_sorted_by_activity(tmp_path: Path) -> None:
    for index, name in enumerate(["old", "new", "middle"]):
        run = make(tmp_path, name)
        run.metrics_path.touch()
        age = [3000, 10, 2000][index]
        now = run.metrics_path.stat().st_mtime
        os.utime(run.metrics_path, (now - age, now - age))
    assert [row.name for row in list_runs(tmp_path)] == ["new", "middle", "old"]


def test_states_of_runs_without_owner(tmp_path: Path) -> None:
    fresh = make(tmp_path, "fresh")
    assert fresh.info().state == "preparing"
    never = make(tmp_path, "never", created=1.0)
    assert (never.info().state, never.info().reason) == ("failed", "it never started")
    gone = make(tmp_path, "gone", state="running", pid=1, inc=2)
    assert gone.info().state == "crashed", "free lock and no final state"
    done = make(tmp_path, "done", state="finished", pid=1, exit_code=0)
    assert (done.info().state, done.info().exit_code) == ("finished", 0)


def test_ck07_the_log_knows_the_end_that_run_json_missed(tmp_path: Path) -> None:
    run = make(tmp_path, state="running", pid=1, inc=2)
    with MetricLog(run.metrics_path, 1, sync_interval=0) as log:
        log.emit(rec.Run(state="crashed"))
        log.inc = 2
        log.emit(rec.Run(state="running"))
    assert run.info().state == "crashed"
    with MetricLog(run.metrics_path, 2, sync_interval=0) as log:
        log.emit(rec.Run(state="finished", exit_code=0))
    assert (run.info().state, run.info().exit_code) == ("finished", 0)


def test_ck13_a_second_owner_is_refused_with_the_pid(tmp_path: Path) -> None:
    run = make(tmp_path)
    child = owned_elsewhere(run)
    try:
        assert say(child) == "ready"
        assert run.alive and run.owner() is not None
        with pytest.raises(RunError, match=f"process {child.pid}") as caught:
            run.lock()
        assert caught.value.exit_code == 65
    finally:
        child.communicate()
    assert not run.alive
    run.lock().release()


def test_ps09_owner_dead_and_its_forked_child_alive_is_dead(tmp_path: Path) -> None:
    run = make(tmp_path, "forks")
    child = owned_elsewhere(run)
    assert (say(child), say(child)) == ("ready", "forked")
    forked = [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
    child.kill()
    child.wait()
    try:
        assert len(forked) == 1 and Path(f"/proc/{forked[0]}").exists()
        assert not run.alive and run.info().state == "crashed"
        run.lock().release()
    finally:
        os.kill(forked[0], signal.SIGKILL)
        assert child.stdin is not None and child.stdout is not None
        child.stdin.close()
        child.stdout.close()


def test_ps09_flock_would_take_the_forked_child_for_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation that the row names: with it the check above is red."""

    def held(descriptor: int) -> int:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return -1
        return 0

    monkeypatch.setattr(module, "lock_owner", held)
    run = make(tmp_path, "forks")
    child = owned_elsewhere(run, "flock")
    assert (say(child), say(child)) == ("ready", "forked")
    forked = [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
    child.kill()
    child.wait()
    try:
        assert run.alive, "flock is kept by the child: the dead run seems alive"
    finally:
        os.kill(forked[0], signal.SIGKILL)
        assert child.stdin is not None and child.stdout is not None
        child.stdin.close()
        child.stdout.close()
    until(lambda: not run.alive, "the child's end")


def test_probing_in_the_owner_does_not_drop_its_lock(tmp_path: Path) -> None:
    run = make(tmp_path)
    lock = run.lock()
    me = myself()
    run.update_identity(pid=me.pid, start_time=me.start, boot_id=boot_id(), state="running")
    assert run.alive and RunDirectory(run.path).info().alive
    asks = "import sys; from lumina_engine.run.directory import RunDirectory as R; print(R(sys.argv[1]).alive)"

    def seen_outside() -> str:
        return subprocess.run([sys.executable, "-c", asks, str(run.path)], capture_output=True, text=True).stdout.strip()

    assert seen_outside() == "True"
    lock.release()
    assert seen_outside() == "False"


@pytest.mark.parametrize("foreign", ["start_time", "boot_id"])
def test_ps08_a_live_stranger_with_the_pid_is_never_signalled(tmp_path: Path, foreign: str) -> None:
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        found = Process(stranger.pid, int(Path(f"/proc/{stranger.pid}/stat").read_text().rsplit(")")[1].split()[19]))
        true: dict[str, Any] = {"pid": found.pid, "start_time": found.start, "boot_id": boot_id()}
        wrong: dict[str, Any] = {**true, foreign: 12345 if foreign == "start_time" else "another boot"}
        run = make(tmp_path, state="running", **wrong)
        assert run.owner() is None and not run.alive and run.info().state == "crashed"
        assert run.signal(signal.SIGKILL) is False
        run.update_identity(**true)
        assert run.owner() is not None
        assert run.signal(signal.SIGKILL) is False, "right process, but the lock is free: it is not the run's"
        assert send_signal(Process(found.pid, found.start + 1), signal.SIGKILL) is False
        assert stranger.poll() is None
        assert send_signal(found, signal.SIGTERM) is True
    finally:
        stranger.terminate()
        stranger.wait()
    assert send_signal(found, signal.SIGTERM) is False


def test_find_by_name_by_path_and_nearest_name(tmp_path: Path) -> None:
    run = make(tmp_path, "debug-20260101")
    assert find("debug-20260101", tmp_path).path == run.path
    assert find(str(run.path), "/nowhere").path == run.path
    with pytest.raises(RunError, match="did you mean debug-20260101"):
        find("debug-2026010", tmp_path)
    with pytest.raises(RunError, match="runs there: debug-20260101"):
        find("zzz", tmp_path)
    with pytest.raises(RunError, match="there are no runs there"):
        find("zzz", tmp_path / "empty")


def test_runs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUMINA_RUNS", raising=False)
    assert runs_root() == Path("runs")
    monkeypatch.setenv("LUMINA_RUNS", "/x/y")
    assert runs_root() == Path("/x/y")


def test_full_disk_before_the_start_is_one_line_with_the_fix(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(RunError, match=r"GB free, .* GB needed: free space there, or set LUMINA_RUNS") as caught:
        require_free_space(tmp_path / "not" / "yet", 1 << 60)
    assert "\n" not in str(caught.value) and not (tmp_path / "not").exists()


def test_newest_step_knows_committed_names_only(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert run.newest_step() is None
    for name in ("step-000010", "step-000200", "step-000300.corrupt", ".tmp-step-000400-ab", "step-5", "step-0005000000000"):
        (run.checkpoints / name).mkdir()
    assert run.newest_step() == 200
    (run.path / "emergency" / "step-000201").mkdir()
    assert run.newest_step() == 201, "a start goes on from there"


def test_a_long_path_works(tmp_path: Path) -> None:
    run = make(tmp_path / ("x" * 150), "y" * 64)
    assert json.loads(run.identity_path.read_text())["name"] == "y" * 64


def test_waiting_helper_has_a_deadline() -> None:
    with pytest.raises(AssertionError, match="in vain"):
        until(lambda: False, "nothing", deadline=0.01)


def test_ck07_the_end_of_a_later_start_counts_although_run_json_knows_only_the_first(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.update_identity(pid=2**22 + 1, start_time=1, boot_id=boot_id(), state="running", inc=1)
    with MetricLog(run.metrics_path, 2, sync_interval=0) as log:
        log.emit(rec.Run(state="finished", exit_code=0))
    assert (run.info().state, run.info().exit_code) == ("finished", 0), "a full disk kept run.json as it was"
