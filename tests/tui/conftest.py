from __future__ import annotations

import shutil
import tempfile

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_sockets():
    """No test sees the chat servers of whoever runs the tests; a short path, since a socket's may have 107 bytes."""
    folder = tempfile.mkdtemp(prefix="lumina-tests-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUMINA_SOCKETS", folder)
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """No test sees the user's files, colours or terminal."""
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    for name in ("NO_COLOR", "COLORTERM", "SSH_CONNECTION", "SSH_TTY", "LUMINA_RUNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("TEXTUAL_ANIMATIONS", "none")
