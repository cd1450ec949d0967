"""What the tests of the Chat screen share: servers in threads, the app on its chat screen, a turn of talk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.screen import Screen

import lumina_tui.application
from lumina_engine.chat.client import socket_path
from lumina_engine.chat.events import Backend, Loading
from lumina_engine.chat.modes import ChatError
from lumina_engine.chat.server import ChatServer
from lumina_tui.application import LuminaApp
from lumina_tui.chatting import Phase
from lumina_tui.screens.chat import ChatScreen
from tests.chat.fakes import FakeBackend, commit_checkpoint
from tests.tui.helpers import screen_text, until


class Servers:
    """Starts chat servers in threads, as `lumina-engine serve --detach` would start processes."""

    def __init__(self) -> None:
        self.backend = FakeBackend()
        self.others: dict[str, Backend] = {}  # by the checkpoint's name; `backend` answers for all the rest
        self.refuse: str | None = None
        self.load = threading.Event()
        self.load.set()
        self.started: list[Path] = []
        self.running: list[tuple[ChatServer, threading.Thread]] = []

    def __call__(self, path: Path, given_up: Callable[[], bool]) -> int:
        if self.refuse is not None:
            raise ChatError(self.refuse)
        self.started.append(path)

        def load(say: Callable[[Loading], None]) -> Backend:
            say(Loading("checking and reading step-000200", 0.0, 5_000_000, 8_000_000))
            while not self.load.wait(0.01):
                pass
            return self.others.get(path.name, self.backend)

        server = ChatServer(socket_path(path), load)
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        self.running.append((server, thread))
        return 0

    def stop(self, reason: str = "the test is over") -> None:
        self.load.set()
        for backend in (self.backend, *self.others.values()):
            if isinstance(backend, FakeBackend):
                backend.gate.set()
        for server, thread in self.running:
            server.stop(reason)
            thread.join(20)
        self.running.clear()


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUMINA_SOCKETS", str(tmp_path / "sockets"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("TEXTUAL_ANIMATIONS", "none")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def servers() -> Iterator[Servers]:
    found = Servers()
    yield found
    found.stop()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    commit_checkpoint(root, "autumn", 100, loss=2.5)
    commit_checkpoint(root, "autumn", 200, best=True, loss=1.5)
    return root


class App(LuminaApp):
    """Opens the Chat screen at once."""

    CSS_PATH = str(Path(lumina_tui.application.__file__).with_name("app.tcss"))

    def __init__(self, runs: Path, **arguments: Any) -> None:
        super().__init__(runs, readonly=arguments.pop("readonly", False), look=arguments.pop("look", None))
        self.arguments = arguments

    def get_default_screen(self) -> Screen[Any]:
        return self._make(7, **self.arguments)

    @property
    def chat(self) -> ChatScreen:
        screen = self._screens[7]
        assert isinstance(screen, ChatScreen)
        return screen

    @property
    def shown(self) -> str:
        return screen_text(self)


@asynccontextmanager
async def opened(
    runs: Path, servers: Servers, checkpoint: str | None = "autumn", size: tuple[int, int] = (80, 24), **more: Any
) -> Any:
    app = App(runs, checkpoint=checkpoint, starter=servers, chats_dir=runs.parent / "chats", **more)
    async with app.run_test(size=size) as pilot:
        if checkpoint is not None:
            await until(pilot, lambda: app.chat.left.link.phase in (Phase.READY, Phase.GONE), what="connected")
        yield app, pilot


def shows(app: App, text: str) -> bool:
    return text in " ".join(app.shown.split())


async def say(app: App, pilot: Any, text: str) -> None:
    """Type a line and wait until its reply has ended."""
    app.chat.field.put(text)
    await pilot.press("enter")
    await until(pilot, lambda: app.chat.left.link.phase is Phase.READY and not app.chat.left.link._updates, what="the reply")
