"""`lumina-engine checkpoint list` and `verify`: rows, problems, exit codes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.checkpoint import keep
from lumina_engine.checkpoint import verify as verify_module
from lumina_engine.checkpoint.files import CheckpointError
from lumina_engine.checkpoint.manager import CheckpointManager
from lumina_engine.checkpoint.resolve import explain_checkpoint
from lumina_engine.cli import main
from tests.checkpoint.helpers import in_child, manager, names_in, payload, saved

ROW = {"name", "step", "bytes", "verified", "best", "suspect", "created"}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUMINA_RUNS", str(tmp_path / "runs"))
    made = manager(tmp_path / "runs" / "mine", keep_checkpoints=5)
    for step in (1, 2, 3):
        made.save(payload(step, flags={"suspect": step == 3}), best=step == 2)
    return tmp_path / "runs"


def test_c084_c086_an_emergency_save_is_listed_and_verified_with_its_run(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = manager(runs / "mine").emergency(payload(4))
    assert main(["checkpoint", "list", "mine"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split()[:2] == ["step-000004", "4"] and f"step-000004 is an emergency save: {path}" in out
    assert main(["checkpoint", "verify", "mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["path"] == str(path)


@pytest.mark.parametrize("by_path", [False, True])
def test_c084_a_run_with_nothing_but_an_emergency_save_is_one(
    runs: Path, capsys: pytest.CaptureFixture[str], by_path: bool
) -> None:
    path = manager(runs / "script").emergency(payload(4))
    assert not (runs / "script" / "checkpoints").exists()
    named = str(runs / "script") if by_path else "script"
    for action in ("list", "verify"):
        assert main(["checkpoint", action, named]) == 0
        assert "step-000004" in capsys.readouterr().out
    why = "latest of run script, an emergency save (no best one is known yet)"
    assert explain_checkpoint(named, runs) == (path, why)
    with pytest.raises(CheckpointError, match=r"no run 'scrip'.*; did you mean script\?"):
        explain_checkpoint("scrip", runs)


def damage(runs: Path) -> None:
    path = runs / "mine" / "checkpoints" / "step-000002" / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (path.parent / "\x1b[2Jx").write_text("")


def test_c086_list_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", "mine", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["step-000003", "step-000002", "step-000001"]
    assert all(set(row) == ROW and row["verified"] is True and row["bytes"] > 1000 for row in rows)
    assert [row["best"] for row in rows] == [False, True, False] and [row["suspect"] for row in rows] == [True, False, False]
    assert main(["checkpoint", "list", "mine", "--json", "--quick"]) == 0
    assert [row["verified"] for row in json.loads(capsys.readouterr().out)] == [None] * 3


def test_c086_list_for_people_names_damage_without_obeying_it(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(runs)
    assert main(["checkpoint", "list", str(runs / "mine")]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["name", "step", "bytes", "verified", "best", "suspect", "created"]
    assert "step-000002: model/model.safetensors: bytes 0 to" in out and "(tensor layer." in out and "\x1b" not in out


@pytest.mark.parametrize("target", ["mine", "mine@best", "mine@step-000002", "path"])
def test_c086_verify(runs: Path, capsys: pytest.CaptureFixture[str], target: str) -> None:
    path = runs / "mine" / "checkpoints" / "step-000002"
    argv = ["checkpoint", "verify", str(path) if target == "path" else target]
    assert main(argv) == 0
    assert "step-000002: ok" in capsys.readouterr().out
    damage(runs)
    assert main([*argv, "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    (row,) = [row for row in rows if not row["verified"]]
    assert row["path"] == str(path) and row["problems"][0]["file"] == "model/model.safetensors" and "\x1b" in row["strays"][0]
    assert main(["checkpoint", "verify", "mine@latest"]) == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["list", "mien"], "did you mean mine"),
        (["verify", "mine@step-000009"], "has no step-000009"),
        (["list", "empty"], "no committed checkpoint"),
        (["verify", "x.pt"], "checkpoint import"),
        (["consolidate", "mine"], "required: OUT"),
        (["export", "mine"], "required: OUT"),
        ([], "required"),
    ],
)
def test_usage_errors_are_one_line(runs: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    (runs / "empty" / "checkpoints").mkdir(parents=True)
    assert main(["checkpoint", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and error.splitlines()[-1].startswith("lumina-engine: ")


def save_two_more(made: CheckpointManager) -> None:
    for step in (3, 4):
        made.save(payload(step))


@pytest.mark.parametrize("action", [["list"], ["list", "--quick"], ["verify"]])
def test_ck15_a_run_that_goes_on_saving_has_no_damaged_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, action: list[str]
) -> None:
    """While the newest is read the run commits two more and keeps two: what is read stays, the older one is left out."""
    made = saved(tmp_path / "run", 1, 2)
    real, calls = verify_module._size_of, [0]

    def size(folder: int, relpath: str) -> int:
        calls[0] += 1
        if calls[0] == 1:
            assert in_child(lambda: save_two_more(made)) == 0
        return real(folder, relpath)

    monkeypatch.setattr(verify_module, "_size_of", size)
    assert main(["checkpoint", *action, str(tmp_path / "run"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert [row["name"] for row in json.loads(out)] == ["step-000002"]
    assert err == "step-000001 is left out: its run has removed it meanwhile\n"
    assert names_in(tmp_path / "run" / "checkpoints") == ["latest", "step-000002", "step-000003", "step-000004"]


def test_ck15_a_checkpoint_named_that_retention_removes_first_is_no_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = saved(tmp_path / "run", 1, 2)
    real = keep.open_beneath

    def opened(folder: int, relpath: str, flags: int) -> int:
        if relpath == "LEASE" and flags == os.O_RDONLY:
            assert in_child(lambda: save_two_more(made)) == 0
        return real(folder, relpath, flags)

    monkeypatch.setattr(keep, "open_beneath", opened)
    assert main(["checkpoint", "verify", str(tmp_path / "run" / "checkpoints" / "step-000002")]) == 2
    assert "its run has removed it meanwhile" in capsys.readouterr().err


@pytest.mark.parametrize("action", [["list"], ["list", "--quick"], ["verify"]])
def test_ck15_a_file_system_without_locks_is_read_without_a_lease(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, action: list[str]
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(keep.fcntl, "lockf", refused)
    assert main(["checkpoint", *action, "mine"]) == 0
    assert "step-000002" in capsys.readouterr().out


def test_c086_a_lease_that_is_no_file_is_damage(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lease = runs / "mine" / "checkpoints" / "step-000002" / "LEASE"
    lease.unlink()
    lease.symlink_to("elsewhere")
    assert main(["checkpoint", "verify", "mine@best"]) == 1
    assert "step-000002: LEASE: " in capsys.readouterr().out


@pytest.mark.parametrize("named", ["mine", "mine/", "mine/checkpoints", "mine@best"])
def test_se05_a_run_with_a_linked_folder_of_checkpoints_is_refused_by_its_name(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], named: str
) -> None:
    manager(runs / "mine").emergency(payload(4))
    (runs / "mine" / "checkpoints").rename(tmp_path / "disk")
    (runs / "mine" / "checkpoints").symlink_to(tmp_path / "disk")
    assert main(["checkpoint", "list", str(runs / named) if "/" in named else named]) != 0
    shown = capsys.readouterr()
    assert f"mine/checkpoints is a symbolic link to {tmp_path / 'disk'}" in shown.err and not shown.out


def test_list_and_verify_need_no_torch(runs: Path) -> None:
    code = (
        "import sys\nfrom lumina_engine.cli import main\n"
        "code = main(['checkpoint', 'verify', 'mine']) or main(['checkpoint', 'list', 'mine'])\n"
        "sys.exit(code or ('torch' in sys.modules) * 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
