"""The card beside a chat server's socket: who is loaded, and since when it is idle, without connecting to it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading

import pytest

from lumina_engine.chat.card import card_path, living_cards, own_card, remove_card, unload, write_card
from lumina_engine.chat.client import SUFFIX, ServerBackend, socket_path
from lumina_engine.chat.modes import sampling_for
from lumina_engine.chat.server import ChatServer
from lumina_engine.run.process import process
from tests.waiting import until

from .fakes import FakeBackend


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LUMINA_SOCKETS", str(tmp_path / "s"))
    (tmp_path / "s").mkdir(mode=0o700)
    return tmp_path / "s"


def test_c127_a_server_tells_its_checkpoint_and_its_idle_time(folder):
    place = socket_path("x")
    server = ChatServer(place, lambda say: FakeBackend(), idle_timeout_s=600)
    assert [card.state for card in living_cards()] == ["loading"]
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        until(lambda: [card.state for card in living_cards()] == ["ready"])
        (card,) = living_cards()
        assert card.pid == os.getpid() and card.checkpoint == FakeBackend().info.path and card.idle_timeout_s == 600
        assert stat.S_IMODE(card_path(place).stat().st_mode) == 0o600
        first = card.active
        backend = ServerBackend(place)
        list(backend.generate([{"role": "user", "content": "hi"}], sampling_for("standard"), 1))
        until(lambda: (living_cards()[0].active or 0) > first)
        backend.close()
    finally:
        server.stop("done")
        thread.join(20)
    assert living_cards() == [] and not card_path(place).exists()


def test_cards_of_the_dead_and_nonsense_are_passed_over(folder):
    def card_file(name: str):
        path = folder / f"{name}{SUFFIX}"
        path.touch()
        return path

    write_card(card_file("alive"), own_card(checkpoint="b"))
    write_card(card_file("dead"), own_card(checkpoint="a", pid=2**22 + 1))
    write_card(card_file("boot"), own_card(checkpoint="c", boot="another"))
    card_path(card_file("broken")).write_text("{")
    card_path(card_file("types")).write_text('{"pid": "x"}')
    card_path(card_file("link")).symlink_to(card_path(folder / f"alive{SUFFIX}"))
    assert [card.checkpoint for card in living_cards()] == ["b"]
    remove_card(folder / f"alive{SUFFIX}")
    assert living_cards() == []


def test_unload_ends_exactly_that_process(folder):
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        found = process(child.pid)
        assert found is not None
        assert not unload(own_card(pid=child.pid, start=found.start + 1)), "another process with this pid"
        assert child.poll() is None
        assert unload(own_card(pid=child.pid, start=found.start))
        assert child.wait(20) == -signal.SIGTERM
        assert not unload(own_card(pid=child.pid, start=found.start))
    finally:
        child.kill()
        child.wait()
