"""What a chat server says of itself in a file beside its socket, so that a list of servers need not connect to any: a
connection counts as use, and would keep an idle server alive."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import msgspec

from ..run.process import Process, boot_id, myself, send_signal
from .client import server_sockets

SUFFIX = ".json"
_LIMIT = 1 << 16  # bytes of a card that are believed


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """One chat server. `active` is the unix time of the last request or connection, None while a reply is being written."""

    pid: int
    start: int  # start time of the process, in clock ticks since boot
    boot: str
    state: str = "loading"  # or ready
    checkpoint: str = ""  # its path
    name: str = ""  # run and step
    device: str = ""
    weights_bytes: int | None = None
    active: float | None = None
    idle_timeout_s: float = 0.0

    @property
    def process(self) -> Process:
        return Process(self.pid, self.start)


def card_path(socket: Path) -> Path:
    """Where the card of the server at `socket` lies."""
    return socket.with_name(socket.name + SUFFIX)


def own_card(**known: object) -> Card:
    """A card of the calling process."""
    me = myself()
    return msgspec.convert({"pid": me.pid, "start": me.start, "boot": boot_id(), **known}, Card)


def write_card(socket: Path, card: Card) -> None:
    """Put the card beside the socket, whole or not at all; it need not survive a power cut. A full disk costs the card only."""
    path = card_path(socket)
    temporary = path.with_name(f".{path.name}.{card.pid}")
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(card))
        temporary.replace(path)


def remove_card(socket: Path) -> None:
    """Take it away."""
    with contextlib.suppress(OSError):
        card_path(socket).unlink(missing_ok=True)


def living_cards() -> list[Card]:
    """Cards of this user's chat servers whose process lives, by checkpoint. Cards of killed servers are passed over."""
    found = []
    for socket in server_sockets():
        card = _read(card_path(socket))
        if card is not None and card.boot == boot_id() and card.process.alive:
            found.append(card)
    return sorted(found, key=lambda card: (card.checkpoint, card.device, card.pid))


def _read(path: Path) -> Card | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(descriptor).st_uid != os.geteuid():
            return None
        try:
            return msgspec.json.decode(file.read(_LIMIT), type=Card)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return None


def unload(card: Card) -> bool:
    """Ask exactly this server to leave; False if it is gone already."""
    return card.boot == boot_id() and send_signal(card.process, signal.SIGTERM)
