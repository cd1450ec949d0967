"""Two ranks under a launcher that, like torchrun, ends the other one when one fails, and hides their exit codes.

plan.json: `ranks`: what each does: "kill", "stuck" (hears no TERM), "polite" (leaves with 75 at TERM), "preempt" (leaves with
75 at the command), "starting" (does not listen to TERM yet), "bereft" (fails once the other one is gone), or an exit code to
leave with.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from lumina_engine.run.process import process
from lumina_engine.run.rank import RankChannel


def rank(folder: Path) -> int:
    channel = RankChannel.from_environment()
    number = int(os.environ["RANK"])
    what = json.loads((folder / "plan.json").read_text())["ranks"][number]
    told = threading.Event()
    if what != "starting":
        signal.signal(signal.SIGTERM, signal.SIG_IGN if what == "stuck" else lambda *_: told.set())
    (folder / f"up-{number}").touch()
    (folder / f"pid-{number}").write_text(str(os.getpid()))
    while not all((folder / f"up-{other}").exists() for other in range(2)):
        told.wait(0.005)
    channel.report(1, "step")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while what in ("stuck", "polite", "preempt", "starting", "bereft"):
        told.wait(0.01)
        if any(command.cmd == "preempt" for command in channel.poll()):
            (folder / "preempted").touch()
        if (what == "polite" and told.is_set()) or (what == "preempt" and (folder / "preempted").exists()):
            what = 75
        if what == "bereft" and gone(folder / f"pid-{1 - number}"):
            what = 1
    channel.leave(int(what), f"rank {number} says {what}")
    return int(what)


def gone(path: Path) -> bool:
    """Whether the rank that left its pid there has ended; reaped or not."""
    found = process(int(path.read_text())) if path.exists() and path.read_text() else None
    return path.exists() and path.read_text() != "" and (found is None or not found.alive)


def main() -> int:
    folder = Path(sys.argv[1])
    if "RANK" in os.environ:
        return rank(folder)
    command = [sys.executable, __file__, str(folder)]
    ranks = [subprocess.Popen(command, env={**os.environ, "RANK": str(number)}) for number in range(2)]
    pause = threading.Event().wait
    while any(child.poll() is None for child in ranks):
        if any(child.poll() for child in ranks):
            for child in ranks:
                child.terminate()
        pause(0.01)
    return 1 if any(child.returncode for child in ranks) else 0


if __name__ == "__main__":
    sys.exit(main())
