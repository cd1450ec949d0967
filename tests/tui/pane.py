"""`lumina` in a detached tmux pane: keys in, screen text out. For journeys through the real program."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.waiting import until


class Pane:
    """One tmux server of its own; `start()` runs a command in it, which leaves its exit status in `status`."""

    def __init__(self, folder: Path, size: tuple[int, int] = (80, 24), **environ: str) -> None:
        self.folder, self.size = folder, size
        self.environ = {"LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", **environ}
        self.status = folder / "status"
        self._starts = 0

    @property
    def _socket(self) -> str:
        return str(self.folder / f"tmux-{self._starts}")  # a server of its own each time: an old one takes a while to die

    def tmux(self, *arguments: str) -> str:
        return subprocess.run(
            ["tmux", "-S", self._socket, "-f", "/dev/null", *arguments], capture_output=True, text=True, check=False
        ).stdout

    def __enter__(self) -> Pane:
        return self

    def __exit__(self, *_: object) -> None:
        self.tmux("kill-server")

    def start(self, *arguments: str) -> None:
        """Run `lumina` with these arguments. The pane stays when it has ended, for what it printed last."""
        self.status.unlink(missing_ok=True)
        self.tmux("kill-server")
        self._starts += 1
        settings = [f"{name}={value}" for name, value in self.environ.items()]
        words = ["env", "-u", "COLORTERM", *settings, sys.executable, "-m", "lumina_tui.app", *arguments]
        command = f"{shlex.join(words)}; echo $? >{shlex.quote(str(self.status))}; cat"
        width, height = map(str, self.size)
        self.tmux("new-session", "-d", "-s", "a", "-x", width, "-y", height, "-c", str(self.folder), command)

    def text(self) -> str:
        return self.tmux("capture-pane", "-p", "-t", "a")

    def see(self, *texts: str, seconds: float = 60.0) -> str:
        """Wait until all texts stand on the screen at once, and return the screen."""
        return self.settle(lambda pane: all(text in pane for text in texts), str(texts), seconds)

    def lose(self, text: str, seconds: float = 60.0) -> str:
        """Wait until a text is gone."""
        return self.settle(lambda pane: text not in pane, f"{text} to go", seconds)

    def settle(self, condition: Callable[[str], bool], what: str, seconds: float = 120.0) -> str:
        """Wait until the screen's text fulfils a condition, and return it."""
        pane = ""

        def holds() -> bool:
            nonlocal pane
            pane = self.text()
            return condition(pane)

        until(holds, lambda: f"{what} on:\n{pane}", seconds)
        return pane

    def press(self, *keys: str) -> None:
        """Keys by tmux name (`Enter`, `Escape`, `C-u`, `a`)."""
        self.tmux("send-keys", "-t", "a", "--", *keys)

    def type(self, text: str) -> None:
        self.tmux("send-keys", "-t", "a", "-l", "--", text)

    def pid(self) -> int:
        """The process of `lumina` in the pane."""
        shell = int(self.tmux("display-message", "-p", "-t", "a", "#{pane_pid}"))
        import psutil

        deadline = time.monotonic() + 30
        while True:
            for child in psutil.Process(shell).children(recursive=True):
                if "lumina_tui.app" in " ".join(child.cmdline()):
                    return child.pid
            assert time.monotonic() < deadline, "lumina has not started"

    def ended(self, seconds: float = 30.0) -> int:
        """The exit status of `lumina`, once it has left."""
        deadline = time.monotonic() + seconds
        while not (self.status.exists() and self.status.read_text().strip()):
            assert time.monotonic() < deadline, f"it did not end:\n{self.text()}"
        return int(self.status.read_text())
