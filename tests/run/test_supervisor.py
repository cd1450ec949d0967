"""The supervisor over real processes: ends, exit codes, restarts, several ranks, refused starts."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import last_records, read_records
from lumina_engine.run import launch
from lumina_engine.run.client import RunClient, send_command
from lumina_engine.run.directory import RunDirectory, RunError
from lumina_engine.run.policy import HOST_LOST
from lumina_engine.run.process import marked
from tests.waiting import until

from .conftest import Runs
from .looks import LAUNCHER_OF_TWO, gap_free, ranks_of, reasons, states, step, worker


def test_ft_a_run_from_start_to_end(runs: Runs) -> None:
    run = runs.start(runs.make(steps=20))
    assert launch.wait(run, 20) == 0
    info = run.info()
    assert (info.state, info.step, info.total_steps, info.exit_code, info.alive) == ("finished", 20, 20, 0, False)
    assert states(run) == [(1, "preparing"), (1, "running"), (1, "finished")] and gap_free(run)
    assert not Path(info.socket or "").exists() and list(Path(info.socket or "").parent.iterdir()) == []
    identity = run.identity()
    assert identity["world"] == 1 and identity["argv"][0] == sys.executable and "python" in identity["versions"]


@pytest.mark.parametrize(("code", "state"), [(65, "failed"), (93, "failed"), (2, "failed")])
def test_ft_codes_that_are_final(runs: Runs, code: int, state: str) -> None:
    run = runs.start(runs.make(steps=2, code=code))
    assert launch.wait(run, 20) == code
    assert run.info().state == state and states(run)[-1] == (1, state)


def test_ft_a_code_without_a_word_is_recorded_by_the_supervisor(runs: Runs) -> None:
    run = runs.start(runs.make(crash={"*": "65"}))
    assert launch.wait(run, 20) == 65
    assert states(run)[-1] == (1, "failed") and run.info().exit_code == 65


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("kill", "killed by SIGKILL"),
        ("abort", "killed by SIGABRT"),
        ("3", "exit code 3"),
        ("raise", "exit code 1: RuntimeError: the fake worker was told to raise"),
    ],
)
def test_ft09_the_cause_of_a_crash_is_named(runs: Runs, how: str, cause: str) -> None:
    run = runs.start(runs.make(crash={"*": how}), max_restarts=0)
    assert launch.wait(run, 20) == 1
    assert [state for _, state in states(run)] == ["preparing", "running", "crashed", "failed"]
    assert cause in reasons(run)[-2] and cause in (run.info().reason or "")


def test_ft08_a_crash_loop_without_progress_ends_with_93(runs: Runs) -> None:
    run = runs.start(runs.make(crash={"*": "1"}), restart_pause_s=0.001)
    assert launch.wait(run, 30) == 93
    assert [state for _, state in states(run)].count("crashed") == 4
    assert [inc for inc, state in states(run) if state == "preparing"] == [1, 2, 3, 4]
    assert "3 restarts without a newer checkpoint" in (run.info().reason or "") and gap_free(run)


def test_ft08_a_crash_loop_with_progress_goes_on(runs: Runs) -> None:
    run = runs.start(
        runs.make(steps=12, crash={"*": "1"}, crash_after=4, checkpoint_every=4), max_restarts=1, restart_pause_s=0.001
    )
    assert launch.wait(run, 40) == 0, "three crashes, each with progress"
    rewinds = [record.to_step for record in read_records(run.metrics_path) if isinstance(record, rec.Rewind)]
    assert rewinds == [4, 8, 12]


def test_ft08_checkpoints_that_were_never_read_back_are_no_progress(runs: Runs) -> None:
    plan = {"crash": {"*": "1"}, "crash_after": 4, "checkpoint_every": 4, "unverified": True}
    run = runs.start(runs.make(steps=12, **plan), max_restarts=1, restart_pause_s=0.001)
    assert launch.wait(run, 40) == 93
    assert [inc for inc, state in states(run) if state == "preparing"] == [1, 2]


@pytest.mark.parametrize("section", ["data", "tokenise"])
def test_ft08_out_of_memory_while_the_data_is_read_is_a_failed_restart(runs: Runs, section: str) -> None:
    """No micro batch was tried yet, so none can be lowered: it must come to an end."""
    run = runs.start(runs.make(crash={"*": "91"}, crash_early=section), max_restarts=2, restart_pause_s=0.001)
    assert launch.wait(run, 40) == 93
    assert [state for _, state in states(run)].count("crashed") == 3


def test_c099_r42_out_of_memory_while_a_checkpoint_gets_other_experts_blames_no_micro_batch(runs: Runs) -> None:
    """It is a failed restart like any other, and the one after it begins with the micro batch that there was."""
    crashes = {"1": "91", "2": "91"}
    run = runs.start(runs.make(steps=6, crash=crashes, crash_early="experts"), max_restarts=2, restart_pause_s=0.001)
    assert launch.wait(run, 40) == 0
    assert [record.reason for record in read_records(run.metrics_path) if isinstance(record, rec.Rewind)] == [None]
    assert {"restart 1 of 2", "restart 2 of 2"} <= set(reasons(run))


def test_r42_out_of_memory_is_no_failed_restart_and_the_ranks_are_told(runs: Runs) -> None:
    crashes = {str(inc): "91" for inc in range(1, 6)}
    run = runs.start(runs.make(steps=6, crash=crashes), max_restarts=1, restart_pause_s=0.001)
    assert launch.wait(run, 40) == 0, "five in a row, each with a smaller micro batch"
    said = [record.reason for record in read_records(run.metrics_path) if isinstance(record, rec.Rewind)]
    assert said == ["out_of_memory"] * 5 and "restart with a smaller micro batch" in reasons(run)


def test_ranks_that_ask_for_it_are_started_again_without_a_failure(runs: Runs) -> None:
    crashes = {str(inc): "92" for inc in range(1, 4)}
    run = runs.start(runs.make(steps=6, crash=crashes), max_restarts=0)
    assert launch.wait(run, 40) == 0
    assert [state for _, state in states(run)] == ["preparing", "running"] * 4 + ["finished"]
    assert last_records(run.metrics_path, 1, ["rewind"])[0].reason is None


def test_r42_out_of_memory_with_restarts_switched_off_ends_the_run(runs: Runs) -> None:
    run = runs.start(runs.make(crash={"*": "91"}), max_restarts=0)
    assert launch.wait(run, 20) == 1 and run.info().state == "failed"


def test_ft_a_crash_then_success(runs: Runs) -> None:
    run = runs.start(runs.make(steps=6, crash={"1": "kill"}), restart_pause_s=0.001)
    assert launch.wait(run, 20) == 0
    assert [state for _, state in states(run)] == ["preparing", "running", "crashed", "preparing", "running", "finished"]
    assert [inc for inc, _ in states(run)] == [1, 1, 1, 2, 2, 2]
    assert last_records(run.metrics_path, 1, ["rewind"])


@pytest.mark.parametrize(
    ("ranks", "code", "words"),
    [
        ([65, "polite"], 65, "rank 0 says 65"),
        (["polite", "kill"], 1, "rank 1 died without a word"),
        (["stuck", "kill"], 1, "rank 1 died without a word"),
        ([0, 0], 0, ""),
        ([HOST_LOST, "polite"], 1, "rank 0 says 94"),
    ],
)
def test_ft09_the_first_rank_to_fail_tells_why(runs: Runs, ranks: list[str | int], code: int, words: str) -> None:
    run = runs.make(ranks=ranks)
    settings = {"max_restarts": 3 if HOST_LOST in ranks else 0, "survivors_s": 0.1}
    launch.start(run, [sys.executable, LAUNCHER_OF_TWO, str(run.path)], world=2, settings=settings)
    assert launch.wait(run, 20) == code
    assert words in (run.info().reason or "") and marked(run.identity()["nonce"]) == []


def test_ft03_two_ranks_are_preempted_together(runs: Runs) -> None:
    run = runs.make(ranks=["preempt", "preempt"])
    launch.start(run, [sys.executable, LAUNCHER_OF_TWO, str(run.path)], world=2)

    until(lambda: [rank["step"] for rank in ranks_of(run)] == [1, 1], "both ranks")
    assert run.signal(signal.SIGTERM)
    assert launch.wait(run, 20) == 75
    assert run.info().state == "preempted"


def test_ck13_a_second_start_is_refused_and_harms_nothing(runs: Runs) -> None:
    run = runs.running()
    owner = run.owner()
    assert owner is not None
    before = run.identity()
    with pytest.raises(RunError, match=f"process {owner.pid}") as caught:
        runs.start(run)
    assert caught.value.exit_code == 65 and run.identity() == before
    at = step(run)
    until(lambda: step(run) > at, "the first one to go on")


@pytest.mark.parametrize("how", ["a copy", "the lock is gone"])
def test_ck13_ps15_a_start_that_finds_no_lock_ends_no_rank_of_a_living_run(runs: Runs, how: str) -> None:
    run = runs.running()
    owner, ranks = run.owner(), worker(run)
    assert owner is not None
    again = run
    if how == "a copy":
        again = RunDirectory(run.path.with_name("copy"))
        shutil.copytree(run.path, again.path)
    else:
        run.lock_path.unlink()
    with pytest.raises(RunError, match=f"process {owner.pid}, which run.json names") as caught:
        runs.start(again, resume=True)
    assert caught.value.exit_code == 65 and ranks.alive
    at = step(run)
    until(lambda: step(run) > at, "the first one to go on")


def test_a_program_that_cannot_be_started_is_a_reason(runs: Runs) -> None:
    run = runs.make()
    with pytest.raises(RunError, match=r"did not start.*No such file") as caught:
        launch.start(run, ["/nonexistent/python"])
    assert "\n" not in str(caught.value)
    assert run.info().state == "failed" and not run.alive


def test_a_supervisor_that_dies_shows_the_log(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.make()
    broken = runs.root / "python"
    broken.write_text("#!/bin/sh\necho 'ImportError: no such thing' >&2\nexit 3\n")
    broken.chmod(0o700)
    monkeypatch.setattr(launch.sys, "executable", str(broken))
    with pytest.raises(RunError, match=r"ended without a word; engine\.log says: ImportError: no such thing"):
        launch.start(run, ["true"])


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"nonsense": 1}, "unknown settings"), ({"max_restarts": "x"}, "number"), ({"restart_pause_s": -1}, "number")],
)
def test_wrong_settings_are_refused(runs: Runs, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(RunError, match=word):
        launch.start(runs.make(), ["true"], settings=settings)


def test_ps11_something_in_the_socket_s_place_refuses_the_start(runs: Runs) -> None:
    run = runs.make()
    folder = Path(os.environ["LUMINA_SOCKETS"])
    folder.mkdir(mode=0o700)
    (folder / f"{run.identity()['id']}.sock").write_text("mine")
    with pytest.raises(RunError, match="is a file, not a socket of yours") as caught:
        runs.start(run)
    assert caught.value.exit_code == 65 and not run.alive


def test_ps11_the_stale_sockets_of_a_killed_supervisor_are_replaced(runs: Runs) -> None:
    run = runs.running()
    run.signal(signal.SIGKILL)
    until(lambda: not run.alive)
    assert Path(run.info().socket or "").exists()
    runs.start(run, resume=True)
    until(lambda: run.info().state == "running")
    assert run.info().inc == 2 and RunClient(run).hello["op"] == "hello"


def test_ps10_a_run_folder_of_150_characters(runs: Runs) -> None:
    runs.root = runs.root / ("d" * 150)
    run = runs.running("n" * 64, steps=1_000_000)
    assert send_command(run, "stop")["ok"] and launch.wait(run, 20) == 0


def test_ps17_descriptors_session_and_environment_of_the_supervisor(runs: Runs) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    try:
        run = runs.running()
        owner = run.owner()
        assert owner is not None and owner.parent != os.getpid()
        for pid in (owner.pid, worker(run).pid):
            targets = {entry.name: str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}
            assert (targets["0"], targets["1"], targets["2"]) == ("/dev/null", str(run.log_path), str(run.log_path))
            allowed = ("/dev/null", str(run.path), "socket:", "anon_inode:", "/memfd:lumina-place")
            assert [target for target in targets.values() if not target.startswith(allowed)] == []
            status = Path(f"/proc/{pid}/status").read_text()
            assert re.search(r"^Umask:\s+0077$", status, re.M)
            assert os.getsid(pid) not in (os.getsid(0), owner.pid), "a session of its own, and not its leader"
            assert Path(f"/proc/{pid}/cwd").readlink() == run.path
    finally:
        os.close(reader)
        os.close(writer)


def test_the_supervisor_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "pydantic", "textual", "asyncio", "psutil")
    script = f"import sys, lumina_engine.run.supervisor; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
