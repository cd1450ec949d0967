"""Hostile text in every source, seen on every screen, in a real pseudo-terminal: nothing of it is obeyed."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import msgspec
import pytest

from lumina_engine.chat.client import socket_path
from lumina_engine.chat.server import ChatServer
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.monitoring import record as rec
from tests.chat.fakes import FakeBackend, commit_checkpoint
from tests.hostile import MARKUP, PAYLOADS, hostile_manifest, hostile_vocabulary, obeyed

from .fake_engine import FakeEngine
from .test_terminal import Terminal

ALL = [*PAYLOADS, *MARKUP]
TEXT = " ".join(ALL)


def name_of(payload: str) -> str:
    """As much of a payload as a file name can hold."""
    return payload.replace("/", "|").replace("\x00", "0")[:60]


def hostile_runs(root: Path) -> None:
    """A run whose every text is hostile, and one run for each payload with that name."""
    engine = FakeEngine(root, "demo")
    engine.emit(rec.Run(state="running", reason=TEXT, total_steps=100))
    engine.steps(40)
    engine.experts(4, 8, hot=1, dead=3)
    for text in ALL:
        engine.emit(rec.Alert(severity="warning", code=text[:40], message=text, recommendation=text, step=3))
        engine.emit(rec.Change(what=text, before=text, after=text, by="user", step=5))
        engine.emit(rec.Note(message=text, step=6))
        engine.log(text)
    engine.emit(rec.Checkpoint(step=30, path=TEXT, failed=TEXT))
    engine.emit(rec.Hardware(devices=[rec.Device(index=0, name=PAYLOADS[0]), rec.Device(index=1, name=MARKUP[1])]))
    engine.emit(rec.Run(state="failed", reason=TEXT, exit_code=1))
    saved = commit_checkpoint(root, "demo", 40, best=True, manifest=hostile_manifest())
    (saved / name_of(PAYLOADS[0])).write_text(TEXT)  # beside what it lists
    (saved / "model" / "config.json").write_text(json.dumps(dict.fromkeys(ALL, TEXT)))
    broken = commit_checkpoint(root, "demo", 41, manifest=hostile_manifest())
    (broken / "MANIFEST.json").write_text(json.dumps({"format": TEXT, "files": [{"path": TEXT}], "step": TEXT}))
    engine.run.update_identity(host=TEXT, argv=ALL, preset=PAYLOADS[3], versions={"torch": TEXT})
    (engine.run.path / "config.yaml").write_text(json.dumps({"experiment_name": TEXT, PAYLOADS[1]: MARKUP}))
    for number, payload in enumerate(ALL[:-1]):
        path = root / name_of(payload)
        path.mkdir()
        (path / "run.json").write_text(
            json.dumps(
                {"format": 1, "id": f"{number}", "name": payload, "state": payload, "preset": payload, "reason": payload}
            )
        )


def hostile_files(folder: Path) -> None:
    """Configurations, data, chats and own presets with hostile names and contents, and settings with them."""
    places = {
        folder / "configs": "learning_rate: " + json.dumps(TEXT),
        folder / "xdg_config_home" / "lumina" / "presets": "not a mapping: [" + PAYLOADS[5],
        folder / "chats": json.dumps({"format": 1, "title": TEXT, "messages": [{"role": "user", "content": TEXT}]}),
        folder / "data": json.dumps({"messages": [{"role": TEXT, "content": TEXT}]}),
    }
    for place, content in places.items():
        place.mkdir(parents=True)
        for payload in ALL[:-1]:
            suffix = {"chats": ".json", "data": ".jsonl"}.get(place.name, ".yaml")
            (place / (name_of(payload) + suffix)).write_text(content)
    (folder / "xdg_config_home" / "lumina" / "keys.yaml").write_text(f"{json.dumps(TEXT)}: x\n")
    (folder / "xdg_config_home" / "lumina" / "settings.yaml").write_text(
        f"theme: {json.dumps(TEXT)}\n{json.dumps(PAYLOADS[0])}: 1\n"
    )
    (folder / "xdg_state_home" / "lumina").mkdir(parents=True)
    sources = [str(folder / "data" / (name_of(payload) + ".jsonl")) for payload in PAYLOADS[:6]]
    (folder / "xdg_state_home" / "lumina" / "session.json").write_text(json.dumps({"data.sources": sources, PAYLOADS[2]: TEXT}))


def settle(terminal: Terminal, seconds: float = 15.0) -> None:
    """Read until nothing more has come for a while."""
    deadline = time.monotonic() + seconds
    size, since = len(terminal.raw), time.monotonic()
    while time.monotonic() - since < 0.6 and time.monotonic() < deadline:
        if not terminal.read(0.1):
            return
        if len(terminal.raw) != size:
            size, since = len(terminal.raw), time.monotonic()


@pytest.mark.parametrize(
    "size", [pytest.param((80, 24), id="80x24"), pytest.param((160, 45), id="160x45", marks=pytest.mark.slow)]
)
def test_se01_se03_no_source_reaches_the_terminal_on_any_screen(tmp_path, monkeypatch, size):
    hostile_runs(tmp_path / "runs")
    hostile_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    with Terminal("--runs", str(tmp_path / "runs"), size=size) as terminal:
        terminal.expect(b"Home")
        for keys in (
            "G",
            "k",
            "/own\r",
            "\x1b",
            "1jj\r",
            "A\x1b",
            "t",
            "C",
            "?",
            "\x1b",
            "!",
            "\x1b",
            "2G",
            "\r",
            "3d\x1b",
            "4",
            "\x1b",
        ):
            terminal.send(keys.encode())
            settle(terminal, 4)
        for screen in "6789":
            terminal.send(screen.encode())
            settle(terminal, 6)
            terminal.send(b"jj\r")
            settle(terminal, 4)
            terminal.send(b"\x1b")
        terminal.send(b":own")
        settle(terminal, 4)
        terminal.send(b"\x1b")
        settle(terminal, 1)
        terminal.send(b"1")
        settle(terminal, 2)
        terminal.send(b"q")
        assert terminal.end() == 0, terminal.raw[-4000:].decode(errors="replace")
    assert obeyed(terminal.raw) == []
    assert "␛]0;own00" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.raw.decode(errors="replace"))


def test_se01_se02_a_chat_server_that_sends_payloads(tmp_path, monkeypatch):
    """The payloads come as tokens, each whole from a vocabulary, then cut; the reply is streamed and then drawn again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUMINA_SOCKETS", str(tmp_path / "sockets"))
    checkpoint = commit_checkpoint(tmp_path / "runs", "autumn", 200, best=True, loss=1.5)
    backend = FakeBackend()
    vocabulary, ids = hostile_vocabulary(tmp_path / "v.tiktoken")
    tokenizer = ConversationTokenizer(str(vocabulary))
    tokens = [tokenizer.decode([token]) for token in ids]  # each at once, and among what was likely too
    backend.reply = (
        " ".join([*tokens, "\n"])
        + " ".join(letter for payload in PAYLOADS for letter in (payload[:2], payload[2:], "\n"))
        + " the end"
    )
    backend.info = msgspec.structs.replace(backend.info, tokenizer=PAYLOADS[0], run=MARKUP[1])
    server = ChatServer(socket_path(checkpoint), lambda say: backend)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        with Terminal("--runs", str(tmp_path / "runs"), "autumn@best", LUMINA_SOCKETS=str(tmp_path / "sockets")) as terminal:
            terminal.expect(b"READY")
            for text in (
                b"hello\r",
                b"/stats\r",
                b"/system " + MARKUP[1].encode() + b"\r",
                b"\x1b",
                b"g",
                b"G",
                b".",
                b"x",
                b"\x1b",
            ):
                terminal.send(text)
                settle(terminal, 5)
            assert b"the end" in terminal.raw
            terminal.send(b"q")
            assert terminal.end() == 0
        assert obeyed(terminal.raw) == []
    finally:
        server.stop("the test is over")
        thread.join(20)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_se01_each_payload_would_be_noticed(payload):
    assert obeyed(b"\x1b[38;5;250mtext " + payload.encode() + b" text\x1b[0m") != []
