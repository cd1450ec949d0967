"""Starting a run from the screen: the engine's own command, without a shell, without a pipe, without blocking."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class LaunchError(Exception):
    """The run was not started. The message is the engine's own last lines, safe to show through `clean`."""

    def __init__(self, message: str, code: int | None = None, output: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.output = output


@dataclass(frozen=True)
class Launched:
    """A started run: its name and directory."""

    run: str
    path: Path


def train_argv(arguments: Sequence[str]) -> list[str]:
    """The exact argv for a detached run: `arguments` are those of `lumina-engine train`."""
    return [sys.executable, "-m", "lumina_engine.cli", "train", *arguments, "--detach", "--json"]


async def launch(arguments: Sequence[str], runs_root: Path, timeout: float = 180.0) -> Launched:
    """Run `lumina-engine train … --detach --json` and give the run it names.

    The child reads nothing, writes to a file of ours and leads its own session, so neither the terminal nor this process can
    hold it up or take it down.

    Raises:
        LaunchError: refused, failed or not answered within `timeout` seconds.
    """
    for argument in arguments:
        if "\0" in argument or "\n" in argument:
            raise LaunchError(f"an argument holds a line break or NUL: {argument!r}")
    with tempfile.TemporaryDirectory(prefix="lumina-start-") as folder:
        out_path, err_path = Path(folder) / "out", Path(folder) / "err"
        with out_path.open("wb") as out, err_path.open("wb") as err:
            process = await asyncio.create_subprocess_exec(
                *train_argv(arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                env={**os.environ, "LUMINA_RUNS": str(runs_root)},
            )
        try:
            code = await asyncio.wait_for(process.wait(), timeout)
        except asyncio.TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            await process.wait()
            raise LaunchError(f"no answer from the engine in {timeout:.0f} s; lumina-engine train shows why") from None
        output = out_path.read_text(errors="replace")
        errors = err_path.read_text(errors="replace").strip()
    if code != 0:
        last = errors.splitlines()[-1] if errors else f"lumina-engine train ended with exit code {code}"
        raise LaunchError(last, code, errors)
    for text in reversed(output.splitlines()):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            answer = json.loads(text)
            return Launched(str(answer["run"]), Path(answer["path"]))
    raise LaunchError("the engine named no run; lumina-engine runs list shows what there is", code, output)
