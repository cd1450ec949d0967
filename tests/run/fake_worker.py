"""A worker without torch: writes records, beats, obeys commands. What it does is set by plan.json in the run's folder.

Keys: steps, pace (s per step), crash (incarnation -> how), crash_after (steps), crash_early (the section in which, before it
says that it runs), hold (s before the crash), diverge (from this step on), diverge_in (incarnation), checkpoint_every,
unverified (checkpoints), grandchild, flood, close_output, code, deaf, deaf_in (incarnation), gathers (commands it obeys at
once), tokenises (for ever: its data are never ready). It is run by path, not as a module.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MetricLog
from lumina_engine.run.rank import Command, RankChannel
from lumina_engine.run.sections import TOKENISE


def die(how: str) -> None:
    if how == "abort":
        os.abort()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise RuntimeError("the fake worker was told to raise")
    os._exit(int(how))


class Worker:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan = json.loads((folder / "plan.json").read_text())
        self.channel = RankChannel.from_environment()
        self.inc = int(os.environ["LUMINA_INC"])
        self.log = MetricLog(folder / "metrics.jsonl", self.inc)
        self.wait = threading.Event().wait
        self.paused = False
        self.heard: list[Command] = []
        self.flags: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, _: self.flags.append(number))

    def checkpoint(self, step: int, request: str | None = None) -> None:
        self.channel.report(step, "save")
        (self.folder / "checkpoints" / f"step-{step:06d}").mkdir(exist_ok=True)
        whole = not self.plan.get("unverified")
        self.log.emit(rec.Checkpoint(step=step, path=f"step-{step:06d}", verified=whole, id=request))

    def end(self, state: str, code: int, request: str | None = None) -> int:
        self.log.emit(rec.Run(state=state, exit_code=code, id=request))
        self.log.close()
        self.channel.leave(code)
        return code

    def hear(self) -> list[Command]:
        """What it obeys at this step: nothing until as many commands are there as it gathers; of several stops the last one."""
        self.heard += self.channel.poll()
        if len(self.heard) < self.plan.get("gathers", 1):
            return []
        taken, self.heard = self.heard, []
        stops = [command for command in taken if command.cmd == "stop"]
        return [command for command in taken if command not in stops[:-1]]

    def obey(self, command: Command, step: int) -> int | None:
        if self.plan.get("deaf") is True or self.plan.get("deaf_in") == self.inc:
            return None
        if command.cmd == "stop":
            self.log.emit(rec.Run(state="stopping", id=command.id))
            if command.args["save"]:
                self.checkpoint(step, command.id)
            return self.end("finished", 0, command.id)
        if command.cmd == "preempt":
            self.checkpoint(step)
            return self.end("preempted", 75)
        if command.cmd == "checkpoint":
            self.checkpoint(step, command.id)
        elif command.cmd == "set_lr":
            self.log.emit(rec.Change(what="learning_rate", step=step, after=command.args["lr"], by="user", id=command.id))
        elif command.cmd == "alert":
            self.log.emit(rec.Alert(**command.args))
        else:
            self.paused = command.cmd == "pause"
            self.log.emit(rec.Run(state="paused" if self.paused else "running", id=command.id))
        return None

    def tokenise(self) -> None:
        """Report one document after the other; a signal ends it, as long as the trainer has not taken the signals over."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for documents in itertools.count(1):
            self.channel.report(documents, TOKENISE)
            self.wait(0.002)

    def main(self) -> int:
        plan = self.plan
        steps = plan.get("steps", 1_000_000)
        if plan.get("grandchild"):  # leaves the session and closes everything: only the tree or the nonce finds it
            child = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL)
            (self.folder / "grandchild").write_text(str(child.pid))
        start = 0
        how = plan.get("crash", {}).get(str(self.inc), plan.get("crash", {}).get("*"))
        if plan.get("crash_early") and how is not None:
            self.channel.report(0, plan["crash_early"])
            die(how)
        if plan.get("tokenises"):
            self.tokenise()
        if os.environ.get("LUMINA_RESUME"):
            kept = sorted(self.folder.glob("checkpoints/step-*"))
            start = int(kept[-1].name[5:]) if kept else 0
            self.log.emit(rec.Rewind(to_step=start, reason=os.environ.get("LUMINA_AFTER")))
        self.log.emit(rec.Run(state="running", total_steps=steps))
        step = start
        while step < steps:
            self.channel.report(step, "data")
            for command in self.hear():
                code = self.obey(command, step)
                if code is not None:
                    return code
            if self.paused:
                self.wait(0.005)
                continue
            if plan.get("pace", 0.002):
                self.wait(plan.get("pace", 0.002))
            step += 1
            self.channel.report(step, "step")
            diverges = step >= plan.get("diverge", steps) and plan.get("diverge_in", self.inc) == self.inc
            loss = 5.0 if diverges else 1.0 / step
            self.log.emit(rec.Step(step=step, loss=loss, tokens=step * 8, tokens_per_s=8.0, lr=1e-3))
            if plan.get("close_output") and step == start + 3:
                os.close(1)
                os.close(2)
            if plan.get("flood"):
                os.write(1, b"x" * 65_536)
            if plan.get("checkpoint_every") and step % plan["checkpoint_every"] == 0:
                self.checkpoint(step)
            if how is not None and step >= start + plan.get("crash_after", 3):
                self.wait(plan.get("hold", 0.0))
                die(how)
        if plan.get("code"):
            return self.end("failed", plan["code"])
        self.checkpoint(step)
        return self.end("finished", 0)


if __name__ == "__main__":
    sys.exit(Worker(Path(sys.argv[1])).main())
