"""A defect of the program: what the user sees, in a real terminal."""

from __future__ import annotations

from pathlib import Path

from .test_terminal import Terminal

BROKEN = """
import sys
from lumina_tui import app
from lumina_tui.screens.home import HomeScreen
def tick(self):
    secret = "hidden-value"
    raise ValueError("a defect \\x1b]0;own\\x07 of the program")
HomeScreen.tick = tick
sys.exit(app.main(sys.argv[1:]))
"""


def test_c138_a_defect_is_a_few_lines_and_a_file(tmp_path, monkeypatch):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with Terminal("--runs", str(tmp_path), script=str(script)) as terminal:
        assert terminal.end() == 1
    text = terminal.raw.decode()
    last = text[text.rindex("lumina failed") :]
    assert "ValueError: a defect ␛]0;own␇ of the program" in last.replace("\r\n", " ").replace("\n", " ")
    assert "Traceback" not in text and "hidden-value" not in text and "\x1b]0;own" not in text
    (details,) = (tmp_path / "state" / "lumina" / "defects").iterdir()
    assert "Traceback" in details.read_text() and str(details) in last.replace("\r\n", "").replace("\n", "")
    assert Path(details).stat().st_mode & 0o777 == 0o600
