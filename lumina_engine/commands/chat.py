"""`lumina-engine chat`: talk to a checkpoint on a plain terminal."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .common import UserError, safe

if TYPE_CHECKING:
    from pathlib import Path

    from ..chat.events import Backend

HELP = "talk to a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="RUN, RUN@best, RUN@latest, RUN@step-000123 or a path (default: best of the newest run)",
    )
    parser.add_argument("--checkpoint", dest="checkpoint_option", metavar="PATH", help="the same as the argument")
    parser.add_argument("--mode", default="standard", metavar="MODE", help="standard, creative, analytical or precise")
    parser.add_argument("--system-prompt", metavar="TEXT", help="instruction before the conversation")
    parser.add_argument("--max-history", type=int, default=20, metavar="N", help="messages sent to the model (20)")
    parser.add_argument("--show-timing", action="store_true", help="tokens, rate and times below each reply")
    parser.add_argument("--show-tokens", action="store_true", help="tokens of prompt and reply, and context used")
    sampling = parser.add_argument_group("sampling (each replaces the mode's value)")
    sampling.add_argument("--max-new-tokens", type=int, metavar="N", help="longest reply (512)")
    sampling.add_argument("--temperature", type=float, metavar="X", help="0 = always the likeliest token")
    sampling.add_argument("--top-p", type=float, metavar="X")
    sampling.add_argument("--top-k", type=int, metavar="N", help="0 = all")
    sampling.add_argument("--repetition-penalty", type=float, metavar="X", help="1 = off")
    sampling.add_argument("--seed", type=int, metavar="N", help="same conversation, mode and seed: same text")
    parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--precision", default="auto", metavar="P", help="auto, fp32, bf16, fp16")
    parser.add_argument("--prompt", metavar="TEXT", help="one answer, then exit; - reads the prompt from stdin")
    parser.add_argument("--json", action="store_true", help="one JSON object a reply on stdout, nothing else there")


def run(args: argparse.Namespace) -> int:
    from ..chat.console import Console, Show
    from ..chat.session import ChatSession

    options = {name: getattr(args, name) for name in _SAMPLING}
    text = _prompt(args.prompt)
    # everything that can be wrong without the model is wrong before it is loaded
    ChatSession(_Nobody(), mode=args.mode, max_history=args.max_history, overrides=options, seed=args.seed)  # type: ignore[arg-type]
    backend = _open(args)
    try:
        session = ChatSession(
            backend,
            mode=args.mode,
            system_prompt=args.system_prompt,
            max_history=args.max_history,
            overrides=options,
            seed=args.seed,
        )
        console = Console(session, Show(args.show_timing, args.show_tokens, args.json))
        if text is not None:
            return console.once(text)
        if sys.stdin.isatty():
            _line_editing()
            _say(f"mode {session.mode}; /help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves")
        return console.loop()
    finally:
        backend.close()


_SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")


class _Nobody:
    """Stands for the backend while only the settings are checked."""


def _prompt(given: str | None) -> str | None:
    text = sys.stdin.read() if given == "-" else given
    if text is not None and not text.strip():
        raise UserError("the prompt is empty: give --prompt TEXT, or text on stdin with --prompt -")
    return text


def _open(args: argparse.Namespace) -> Backend:
    """A running server of the checkpoint, else the model in this process; says which checkpoint it is and why."""
    from ..checkpoint.resolve import explain_checkpoint

    if args.checkpoint and args.checkpoint_option and args.checkpoint != args.checkpoint_option:
        raise UserError("CHECKPOINT and --checkpoint name two checkpoints: give one")
    path, why = explain_checkpoint(args.checkpoint or args.checkpoint_option)
    _say(f"{path.name}: {why}")
    backend = _running_server(path, args.device, args.precision)
    if backend is None:
        from ..chat.loading import open_backend, tune_threads

        local = open_backend(path, args.device, args.precision)
        tune_threads(local.model)
        backend = local
    _say(backend.info.line())
    return backend


def _running_server(path: Path, device: str, precision: str) -> Backend | None:
    from ..chat.client import ServerBackend, ServerGone, socket_path

    place = socket_path(path, device, precision)
    if not place.exists():
        return None
    try:
        backend = ServerBackend(place, loading=lambda progress: None)
    except ServerGone:
        return None  # a stale socket, or a server on its way out: this process can load the model itself
    _say(f"through the chat server that has it loaded (process {backend.pid})")
    return backend


def _line_editing() -> None:
    """Arrow keys and recall, where Python has them."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return


def _say(text: str) -> None:
    print(safe(text), file=sys.stderr, flush=True)
