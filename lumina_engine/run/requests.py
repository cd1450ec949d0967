"""Commands from viewers: which there are, what they take, and that each id is applied once."""

from __future__ import annotations

import difflib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

_ARGUMENTS: dict[str, dict[str, type]] = {
    "stop": {"save": bool},
    "checkpoint": {},
    "pause": {},
    "resume": {},
    "set_lr": {"lr": float},
}
COMMANDS = tuple(_ARGUMENTS)
ID_PATTERN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_KEPT = 4_096  # answers remembered


def check_command(cmd: object, args: object) -> str | None:
    """Why this is no valid command, in one line; None if it is."""
    if not isinstance(cmd, str) or cmd not in _ARGUMENTS:
        near = difflib.get_close_matches(cmd, COMMANDS, n=1) if isinstance(cmd, str) else []
        return f"unknown command: {f'did you mean {near[0]}?' if near else 'there are ' + ', '.join(COMMANDS)}"
    if not isinstance(args, dict):
        return f"{cmd}: args must be an object"
    wanted = _ARGUMENTS[cmd]
    for name, value in args.items():
        if name not in wanted:
            return f"{cmd}: takes {', '.join(wanted) or 'no arguments'}"
        if wanted[name] is bool and not isinstance(value, bool):
            return f"{cmd}: {name} must be true or false"
        if wanted[name] is float and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"{cmd}: {name} must be a number"
    if cmd == "set_lr":
        rate = args.get("lr")
        if rate is None or not 0 < rate <= 1:
            return "set_lr: lr must be a number above 0, at most 1"
    return None


class RequestBook:
    """Gives each command to `apply` once. A known id gets its first answer again; an id from the log counts as accepted."""

    def __init__(self, apply: Callable[[str, str, dict[str, Any]], str | None], applied: Iterable[str] = ()) -> None:
        self._apply = apply  # (id, cmd, args) -> why it is refused, or None
        self._applied = set(applied)
        self._answers: OrderedDict[str, str | None] = OrderedDict()

    def note(self, request: str) -> None:
        """The effect of this id is in the log."""
        self._applied.add(request)

    def answer(self, request: str, cmd: object, args: object) -> dict[str, Any]:
        """The reply to one request."""
        if request in self._applied:
            return {"op": "reply", "id": request, "ok": True}
        if request in self._answers:
            error = self._answers[request]
        else:
            error = check_command(cmd, args)
            if error is None:
                assert isinstance(cmd, str) and isinstance(args, dict)
                error = self._apply(request, cmd, args)
            self._answers[request] = error
            while len(self._answers) > _KEPT:
                self._answers.popitem(last=False)
        reply: dict[str, Any] = {"op": "reply", "id": request, "ok": error is None}
        if error is not None:
            reply["error"] = error
        return reply
