"""What the tests of presets, editor and launch share: a fixed machine, and the program with its engine replaced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.config.machine import GB, Machine
from lumina_engine.monitoring import hardware
from lumina_engine.run.directory import RunDirectory
from lumina_tui.application import LuminaApp
from lumina_tui.launching import Launched, LaunchError
from lumina_tui.screens.config import ConfigScreen
from lumina_tui.terminal import COLOURS, NAMED, Look

from .helpers import until

LOOK = Look("braille", COLOURS, False, 10.0)
ASCII = Look(glyphs="ascii", palette=NAMED, ansi=True, hz=10)
LAPTOP = Machine([], 16 * GB, 4, 500 * GB)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder to work in, a fixed machine, sockets of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("LUMINA_SOCKETS", str(tmp_path / "sockets"))
    monkeypatch.setattr(hardware, "detect", lambda *_: LAPTOP)


class Holder:
    """Another process that holds a run's lock, as a supervisor does, until `release()`."""

    CODE = (
        "import sys\nfrom lumina_engine.run.directory import RunDirectory\n"
        "lock = RunDirectory(sys.argv[1]).lock()\nprint('held', flush=True)\nsys.stdin.read()"
    )

    def __init__(self, run: RunDirectory) -> None:
        argv = [sys.executable, "-c", self.CODE, str(run.path)]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None and self._process.stdout.readline() == b"held\n"

    def release(self) -> None:
        """Let the lock go."""
        self._process.communicate()


class App(LuminaApp):
    """The program with its engine replaced: a start makes a run folder and holds its lock, nothing runs."""

    CSS_PATH = Path(__file__).resolve().parents[2] / "lumina_tui" / "app.tcss"

    def __init__(self, look: Look = LOOK, **arguments: Any) -> None:
        super().__init__("runs", look=look, **arguments)
        self.starts: list[list[str]] = []
        self.watched: list[Path] = []
        self.fails: LaunchError | None = None
        self.lock: Holder | None = None

    async def start_run(self, arguments: Any) -> Launched:
        words = list(arguments)
        self.starts.append(words)
        if self.fails is not None:
            raise self.fails
        run = RunDirectory.create("runs", words[words.index("--run") + 1])
        self.lock = Holder(run)
        return Launched(run.name, run.path)

    def open_monitor(self, run: Any) -> None:
        self.watched.append(Path(run))


async def ready(pilot: Any, kind: type) -> Any:
    """The screen of this kind on top, once it knows the machine."""
    await until(pilot, lambda: isinstance(pilot.app.screen, kind) and pilot.app.screen.machine is not None, what=kind.__name__)
    await pilot.pause()
    return pilot.app.screen


async def config_of(pilot: Any, **arguments: Any) -> ConfigScreen:
    """The editor with what is given."""
    pilot.app.open_config(**arguments)
    return await ready(pilot, ConfigScreen)


_NAMES = {",": "comma", "-": "minus", ".": "full_stop", "_": "underscore", "/": "slash"}


async def enter(pilot: Any, screen: ConfigScreen, name: str, text: str) -> None:
    """Type a value into a field by keys."""
    screen.go_to_field(name)
    await pilot.press("enter")
    field = screen.fields
    assert field.editing == name
    await pilot.press(*[_NAMES.get(c, c) for c in text], "enter")
    await until(pilot, lambda: field.editing is None)
