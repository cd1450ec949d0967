"""`lumina-engine serve`: a chat server for one checkpoint, on a Unix socket."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from .common import print_json, safe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ..chat.events import Backend
    from ..chat.server import ChatServer

HELP = "serve a checkpoint for chat on a Unix socket"
START_TIME = 60.0  # s until a detached server must answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="RUN, RUN@best, RUN@latest, RUN@step-000123 or a path")
    parser.add_argument(
        "--idle-timeout",
        type=float,
        default=1800.0,
        metavar="S",
        help="leave after S seconds without a request (1800; 0 = never)",
    )
    parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--precision", default="auto", metavar="P", help="auto, fp32, bf16, fp16")
    parser.add_argument(
        "--detach", action="store_true", help="return as soon as the server answers; it goes on without a terminal"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout: socket, pid, checkpoint")


def run(args: argparse.Namespace) -> int:
    from ..chat.client import probe, socket_path
    from ..chat.modes import ChatError
    from ..checkpoint.resolve import explain_checkpoint

    if not args.idle_timeout >= 0:
        raise ChatError(f"--idle-timeout must be 0 or more seconds, not {args.idle_timeout:g}", 2)
    path, why = explain_checkpoint(args.checkpoint)
    place = socket_path(path, args.device, args.precision)
    running = probe(place)
    if running is not None:
        _say(f"{path.name} ({why}) is served already by process {running.pid}")
        _tell(args, place, running.pid, path)
        return 0
    if args.detach:
        return _detach(args, path, place)
    return _serve(args, path, place, why)


def _serve(args: argparse.Namespace, path: Path, place: Path, why: str) -> int:
    from ..chat.events import Loading
    from ..chat.server import ChatServer

    def load(say: Callable[[Loading], None]) -> Backend:
        say(Loading("starting torch", 0.0))
        from ..chat.loading import open_backend, tune_threads

        backend = open_backend(path, args.device, args.precision, say)
        tune_threads(backend.model)
        return backend

    server = ChatServer(place, load, idle_timeout_s=args.idle_timeout)
    codes = _signals(server)
    _say(f"{path.name}: {why}")
    _tell(args, place, os.getpid(), path)
    reason = server.serve(ready=lambda backend: _say(f"ready: {backend.info.line()}"))
    _say(f"chat server ended: {reason}")
    code = codes[0] if codes else 0
    if server.still_loading:  # a thread inside torch cannot be asked to stop, and must not outlive the interpreter
        sys.stdout.flush()
        os._exit(code)
    return code


def _signals(server: ChatServer) -> list[int]:
    """TERM and INT end the server, HUP does nothing; the list receives the exit code."""
    codes: list[int] = []

    def stop(number: int, frame: object) -> None:
        codes.append(130 if number == signal.SIGINT else 0)
        server.stop(f"stopped by {signal.Signals(number).name}")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return codes


def _detach(args: argparse.Namespace, path: Path, place: Path) -> int:
    """Start this command again without a terminal, and leave once its model is loaded: it is nobody's child then."""
    from ..chat.client import ServerBackend, ServerGone, probe
    from ..chat.modes import ChatError
    from ..run.socket import prepare_folder

    prepare_folder(place.parent)
    log = place.with_suffix(".log")
    options = ["--idle-timeout", str(args.idle_timeout), "--device", args.device, "--precision", args.precision]
    argv = [sys.executable, "-m", "lumina_engine.cli", "serve", str(path), *options]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=descriptor, stderr=descriptor, start_new_session=True, close_fds=True
        )
    finally:
        os.close(descriptor)
    end = time.monotonic() + START_TIME
    while (hello := probe(place)) is None:
        code = process.poll()
        if code is not None:
            raise ChatError(_last_line(log) or f"the chat server ended with exit code {code}; see {log}", max(code, 1))
        if time.monotonic() > end:
            process.kill()
            raise ChatError(f"the chat server did not answer in {START_TIME:.0f} s; see {log}")
        time.sleep(0.05)
    try:
        ServerBackend(place, client="serve").close()
    except ServerGone as error:
        raise ChatError(str(error), max(process.wait(START_TIME), 1)) from error
    _tell(args, place, hello.pid, path)
    return 0


def _last_line(log: Path) -> str:
    """What the server said last, without our own prefix."""
    try:
        lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].removeprefix("lumina-engine: ") if lines else ""


def _tell(args: argparse.Namespace, place: Path, pid: int, path: Path) -> None:
    answer: dict[str, Any] = {"socket": str(place), "pid": pid, "checkpoint": str(path)}
    if args.json:
        print_json(answer, lines=True)
    else:
        print(place, flush=True)


def _say(text: str) -> None:
    print(safe(text), file=sys.stderr, flush=True)
