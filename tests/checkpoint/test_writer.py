"""The thread that writes checkpoints beside training, and what goes wrong in it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.checkpoint import saving

from .helpers import manager, names_in, payload


def recorded(function: Any, calls: list[int]) -> Any:
    def called(*arguments: Any) -> Any:
        calls.append(len(calls))
        return function(*arguments)

    return called


def test_c079_a_system_without_a_thread_more_fails_the_save_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    made, begun = manager(tmp_path), list[int]()
    monkeypatch.setattr(saving, "write_files", recorded(saving.write_files, begun))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        (result,) = made.save(payload(1), blocking=False) or made.poll()
    assert result.failed == "RuntimeError: can't start new thread" and names_in(tmp_path / "checkpoints") == []
    (result,) = made.save(payload(2), blocking=False) or made.wait()
    assert result.failed is None and len(begun) == 1  # not what has failed, too


def test_c079_what_fails_after_a_commit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no such name")

    monkeypatch.setattr(saving, "retain", broken)
    (result,) = manager(tmp_path).save(payload(1))
    assert result.failed is None and result.notes == ("after the commit: ValueError: no such name",)
