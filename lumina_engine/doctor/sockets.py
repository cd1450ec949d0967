"""Checks of the Unix sockets between viewers, supervisors and chat servers."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
from collections.abc import Iterator

from .row import Result, fail, ok, warn
from .system import System

_NAME_LENGTH = 23  # of the longest socket name: twelve hex digits and .chat.sock, with the slash
_OWN = "set LUMINA_SOCKETS to a short path in a folder of your own"


def socket_path(system: System) -> Iterator[Result]:
    """The length of a socket's path, and the rights of the folder that holds them."""
    from ..run.socket import PATH_LIMIT

    length = len(os.fsencode(system.sockets)) + _NAME_LENGTH
    if length > PATH_LIMIT:
        yield fail(f"{system.sockets}: {length} bytes with a name, {PATH_LIMIT} is the limit", _OWN)
        return
    parent = system.sockets.parent
    try:
        found = parent.stat()
    except OSError as error:
        yield fail(f"{parent}: {error.strerror}", _OWN)
        return
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        yield warn(
            f"{parent} is open to all and not sticky: others could replace your sockets", f"chmod +t {parent}, or {_OWN}"
        )
    else:
        yield ok(f"{system.sockets}, {length} of {PATH_LIMIT} bytes")


def socket_round_trip(system: System) -> Iterator[Result]:
    """Binds a socket where runs bind theirs, connects to it and exchanges a word."""
    from ..run.directory import RunError
    from ..run.socket import bind_socket, peer_is_me

    made = not system.sockets.exists()
    path = system.sockets / f"doctor-{secrets.token_hex(4)}.sock"
    try:
        listener = bind_socket(path)
    except RunError as error:
        yield fail(str(error), _OWN)
        return
    except OSError as error:
        yield fail(f"{path}: {error.strerror}", _OWN)
        return
    try:
        with listener, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(2.0)
            client.connect(str(path))
            listener.settimeout(2.0)
            server, _ = listener.accept()
            with server:
                server.settimeout(2.0)
                client.sendall(b"lumina")
                heard, mine = server.recv(16), peer_is_me(server)
        good = heard == b"lumina" and mine
        yield ok("bind, connect, send and receive work") if good else fail("the other end was not recognised", _OWN)
    except OSError as error:
        yield fail(f"{path}: {error.strerror or error}", _OWN)
    finally:
        path.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):  # somebody else uses it by now
                system.sockets.rmdir()
