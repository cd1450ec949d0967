"""`lumina-engine doctor`: rows as they come, limits of time, filters, exit codes; and `validate_environment`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lumina_engine.cli import main
from lumina_engine.doctor import run as runner
from lumina_engine.doctor.checks import CHECKS, Check
from lumina_engine.doctor.row import Row, matches, ok, warn
from lumina_engine.doctor.run import run_checks, validate_environment
from lumina_engine.doctor.system import System

KEYS = {"id", "group", "status", "value", "fix"}


def checks(*functions, limit_s: float = 5.0) -> tuple[Check, ...]:
    return tuple(Check(function.__name__, "disk", function, limit_s=limit_s) for function in functions)


def good(system):
    """Is good."""
    yield ok("fine")


def broken(system):
    """Is broken."""
    yield warn("first row", "mend it", "a")
    raise ValueError("a bug\nin two lines")


def test_a_check_that_fails_itself_is_a_row():
    rows = {row.id: row for row in run_checks(System.here(), checks(good, broken))}
    assert rows["good"] == Row("good", "disk", "ok", "fine")
    assert rows["broken.a"].status == "warn"
    assert rows["broken"].status == "fail" and "ValueError: a bug in two lines" in rows["broken"].value


def test_a_check_that_hangs_is_given_up_and_hides_no_other():
    release = threading.Event()

    def hangs(system):
        """Hangs."""
        release.wait(60)
        yield ok("too late")

    both = (Check("hangs", "disk", hangs, limit_s=0.05), Check("good", "disk", good))
    rows = list(run_checks(System.here(), both, workers=1))
    release.set()
    assert [(row.id, row.status) for row in rows] == [("hangs", "fail"), ("good", "ok")]
    assert "no answer within" in rows[0].value and "--skip hangs" in rows[0].fix


def test_the_answer_of_a_check_that_was_given_up_is_not_told():
    release = threading.Event()

    def hangs(system):
        """Hangs."""
        release.wait(60)
        yield ok("too late")

    def waits(system):
        """Ends after the other."""
        thread = next(thread for thread in threading.enumerate() if thread.name == "check-hangs")
        assert given_up.wait(60)
        release.set()
        thread.join(60)
        yield ok("done")

    given_up = threading.Event()
    rows = []
    for row in run_checks(System.here(), (Check("hangs", "disk", hangs, limit_s=0.05), Check("waits", "disk", waits))):
        rows.append((row.id, row.status))
        given_up.set()
    assert rows == [("hangs", "fail"), ("waits", "ok")]


def test_rows_come_before_the_last_check_ends():
    release = threading.Event()

    def slow(system):
        """Waits."""
        assert release.wait(60)
        yield ok("done")

    rows = run_checks(System.here(), (Check("slow", "disk", slow, True, 60.0), Check("good", "disk", good)))
    assert next(rows).id == "good"
    release.set()
    assert [row.id for row in rows] == ["slow"]


def test_what_is_skipped_is_not_run():
    rows = list(run_checks(System.here(), checks(good, broken), skip={"broken"}))
    assert {row.id: row.status for row in rows} == {"broken": "skipped", "good": "ok"}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("", True),
        ("warn", True),
        ("fail", False),
        ("status:warn", True),
        ("group:disk", True),
        ("group:python", False),
        ("root free", True),
        ("EXT4", True),
        ("ext4 fail", False),
        ("http://x", False),
    ],
)
def test_filter_words(words, found):
    assert matches(Row("runs", "disk", "warn", "5 GB, ext4", "free space, or fail later"), words) is found


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """No import of torch: the command's other checks only, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return ["doctor", "--quick"]


def test_c137_one_json_document(quick, capsys):
    code = main([*quick, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert all(set(row) == KEYS for row in rows)
    assert code == (1 if any(row["status"] == "fail" for row in rows) else 0)
    heads = [row["id"].partition(".")[0] for row in rows]
    assert list(dict.fromkeys(heads)) == [check.id for check in CHECKS]  # every check, in the table's order
    assert {row["id"]: row["status"] for row in rows}["torch"] == "skipped"


def test_c137_rows_as_lines_while_they_come(quick, capsys):
    main([*quick, "--json", "--progress", "json", "--only", "disk,sockets"])
    out, err = capsys.readouterr()
    first, *lines = [json.loads(line) for line in err.splitlines()]
    assert first["progress"] == "checks"
    assert [check["id"] for check in first["checks"]] == ["runs", "cache", "tmp", "socket_path", "socket"]
    assert all(line["progress"] == "row" and set(line["row"]) == KEYS for line in lines)
    assert sorted(line["row"]["id"] for line in lines) == sorted(row["id"] for row in json.loads(out))


def test_exit_codes(quick, capsys, monkeypatch, tmp_path):
    arguments = [*quick, "--only", "disk"]
    assert main([*arguments, "--runs", str(tmp_path)]) == 0
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert main([*arguments, "--runs", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "fail    runs" in out and "fsync: Input/output error" in out and "3 failed" in out
    assert main([*arguments, "--filter", "nothing-has-this"]) == 1  # what is shown changes no verdict
    assert capsys.readouterr().out.startswith("3 failed")


@pytest.mark.parametrize(("option", "near"), [("--only", "disks"), ("--skip", "deepsped")])
def test_unknown_names_are_usage_errors(option, near, capsys):
    assert main(["doctor", option, near]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_se01_no_control_character_leaves(quick, capsys, tmp_path):
    main([*quick, "--only", "disk", "--runs", str(tmp_path / "\x1b[2Jx\n[/x]")])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[/x]" in out


def blocked(tmp_path: Path, *modules: str) -> dict[str, str]:
    """An environment in which importing these modules fails."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {modules!r}:\n"
        "            raise ImportError('No module named ' + repr(name) + ' (blocked)')\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_c111_torch_is_absent(tmp_path):
    argv = [sys.executable, "-m", "lumina_engine.cli", "doctor", "--json", "--only", "python,deepspeed,disk"]
    environment = blocked(tmp_path, "torch", "deepspeed")
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    rows = {row["id"]: row for row in json.loads(done.stdout)}
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert rows["torch"]["status"] == rows["deepspeed"]["status"] == "fail"
    assert "No module named 'torch' (blocked)" in rows["torch"]["value"] and rows["torch"]["fix"].startswith("pip install")
    assert rows["runs"]["status"] != "fail" and rows["python"]["status"] == "ok"


def test_c111_the_real_imports_work():
    rows = {row.id: row for row in run_checks(System.here(), [c for c in CHECKS if c.id in ("torch", "deepspeed")])}
    assert {row.status for row in rows.values()} <= {"ok", "warn"}, rows
    assert "imports in" in rows["torch"].value and "accelerator" in rows["deepspeed"].value


def test_c111_validate_environment_gives_a_line_an_issue(monkeypatch):
    import lumina_engine

    rows = [
        Row("a", "disk", "warn", "5 GB", "free space"),
        Row("b", "disk", "ok", "fine", "may be ignored"),
        Row("c.part", "disk", "fail", "gone", "bring it back"),
        Row("d", "disk", "skipped", "no GPU"),
    ]
    monkeypatch.setattr(runner, "run_checks", lambda system: iter(rows))
    assert lumina_engine.validate_environment is validate_environment
    assert validate_environment() == ["c.part: gone: bring it back", "a: 5 GB: free space"]
    monkeypatch.setattr(runner, "run_checks", lambda system: iter(rows[1:2]))
    assert validate_environment() == []


def test_the_engine_checks_without_heavy_imports():
    script = (
        "import sys\nfrom lumina_engine.cli import main\nmain(['doctor', '--quick', '--json'])\n"
        "print([n for n in ('torch', 'deepspeed', 'textual') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stderr.strip().endswith("[]"), done.stderr
