"""The supervisor of one run: starts its ranks, watches and restarts them, serves its viewers. Never imports torch.

`python -m lumina_engine.run.supervisor RUN_DIR FD` is started by launch.start and detaches itself. One thread, one selector:
nothing here waits for a rank, a viewer or the disk for longer than a system call.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
import uuid
from typing import Any

from ..monitoring import record as rec
from ..monitoring.cgroup import oom_kills
from ..monitoring.log import MetricLog, last_records
from ..monitoring.say import say
from . import output, policy
from .alarm import AlertCommand
from .channel import RankServer
from .directory import RunDirectory, RunError
from .health import RunHealth
from .launch import rank_environment
from .process import (
    Process,
    become_subreaper,
    boot_id,
    descendants,
    end_marked,
    held,
    leash,
    myself,
    send_all,
    send_signal,
)
from .rank import Command
from .requests import RequestBook
from .sections import EXPERTS, RARE, TOKENISE
from .signals import SignalQueue
from .socket import ViewerServer, socket_folder
from .straggler import Stragglers
from .tail import LogTail, Mark, command_ids
from .verdict import Ended, judge
from .watchdog import Limits, Watchdog

TICK = 0.05  # s between two looks at the log
LOG_CHECK_TIME = 0.5  # s between two looks at the size of engine.log
SECOND_SIGNAL_TIME = 1.0  # s after which a second TERM or INT kills
LEFTOVERS_TIME = 15.0  # s that processes of a killed supervisor get to die
LAUNCHER_TIME = 30.0  # s that a launcher gets to leave once its ranks were killed
CLEAR_TIME = 5.0  # s that left-over processes of a finished worker get after TERM
SLOW_SECTIONS = RARE | {"save", "eval"}  # a stop waits longer for a rank in one of these
SLOW_TIME = 1_800.0  # s
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGCHLD)


class Supervisor:
    """Owns a run from `open` to the end of `loop`.

    Args:
        run: the run's folder.
        order: argv, world, resume, settings, versions, host (see launch.start).
    """

    def __init__(self, run: RunDirectory, order: dict[str, Any]) -> None:
        self.run = run
        self.settings = policy.Settings.of(order["settings"])
        self.argv: list[str] = order["argv"]
        self.world: int = order["world"]
        self.resume: bool = order["resume"]
        self.order = order
        self.selector = selectors.DefaultSelector()
        self.state = "preparing"  # of the run, as the log says
        self.state_code: int | None = None  # the exit code that came with it
        self.child: subprocess.Popen[bytes] | None = None
        self.ended: int | None = None  # exit code of the worker, while what it left behind is cleared away
        self.restart_at: float | None = None
        self.after: str | None = None  # why the next incarnation starts, where its ranks must know
        self.again: str | None = None  # why the ranks asked to be started again
        self.oom_kills = 0  # of this cgroup before the incarnation
        self.code: int | None = None  # ours, once the run is over
        self.intent: str | None = None  # stop, interrupt or preempt, once somebody wants the run to end
        self.intent_at = 0.0
        self.intent_id: str | None = None  # the command behind it
        self.joined: list[str] = []  # ids of the stops that came while the run was stopping
        self.kill_at: float | None = None
        self.pressed = False  # TERM was sent to this incarnation
        self.killed = False  # and KILL
        self.survivors_killed = False  # of one that died: the launcher still tells how
        self.grown_at = 0.0  # when the log grew last
        self.log_checked = 0.0
        self._stack = contextlib.ExitStack()  # what release() undoes, the lock last

    # --- start ---------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Take the run over and start its ranks.

        Raises:
            RunError: somebody else owns it, or its sockets cannot be placed.
            OSError: a file cannot be written, the ranks' program cannot be started.
        """
        become_subreaper()
        self.signals = SignalQueue(self.selector, _SIGNALS, (signal.SIGHUP, signal.SIGPIPE))
        self._stack.callback(self.run.lock().release)
        before, owner = self.run.identity(), self.run.owner()
        if owner is not None and owner != myself():
            raise RunError(
                f"process {owner.pid}, which run.json names as this run's, lives: either run.lock was removed under it, or "
                f"{self.run.path} is a copy of a run that goes on; stop that one first",
                65,
            )
        if isinstance(before.get("nonce"), str):
            left = end_marked(before["nonce"], LEFTOVERS_TIME)
            if left:
                pids = ", ".join(str(item.pid) for item in left)
                raise RunError(f"processes of the earlier start do not end: {pids}", 1)
        me = myself()
        self.nonce = secrets.token_hex(16)
        self.socket_path = socket_folder() / f"{before['id']}.sock"
        with MetricLog(self.run.metrics_path, 0, sync_interval=0) as log:
            self.tail = LogTail(self.run.metrics_path, log.offset, log.seq)
        last = last_records(self.run.metrics_path, 1)
        self.inc = max(int(before.get("inc") or 0), last[0].inc if last else 0)
        self.book = RequestBook(self._command, command_ids(self.run.metrics_path))
        self.viewers = ViewerServer(
            self.socket_path,
            self.selector,
            self._hello,
            self.book.answer,
            asks={"ranks": self._ranks},
            rebind_time=self.settings.rebind_s,
        )
        self._stack.callback(lambda: self.viewers.close(f"the run is over: {self.state}"))
        self.viewers.head_seq = self.tail.head_seq
        self.ranks = RankServer(self.socket_path.with_suffix(".rank"), self.selector, self.nonce, self.world)
        self._stack.callback(self.ranks.close)
        self.watchdog = Watchdog(
            Limits(
                self.settings.hang_timeout_s,
                self.settings.hang_factor,
                self.settings.startup_timeout_s,
                self.settings.hang_grace_s,
            ),
            self._tree,
        )
        self.stragglers = Stragglers(own_best=not self.settings.rows_grow)
        self.alarm = AlertCommand(self.settings.alert_command, self.run.path)
        report = self.run.reports / "health.json"
        self.health = RunHealth(self.run.metrics_path, report, self._tell, self.alarm.take, self.run.name)
        self.policy = policy.RestartPolicy(self.settings.max_restarts, self.settings.restart_pause_s)
        self.run.update_identity(
            **{key: self.order[key] for key in ("argv", "world", "settings", "versions", "host")},
            pid=me.pid,
            start_time=me.start,
            boot_id=boot_id(),
            nonce=self.nonce,
            socket=str(self.socket_path),
            state="preparing",
            reason=None,
            exit_code=None,
        )
        try:
            self._spawn(resume=self.resume, reason=None)
        except OSError as error:
            self._finish("failed", policy.CRASHED, f"the worker cannot be started: {error}")
            raise

    def _spawn(self, *, resume: bool, reason: str | None) -> None:
        """Start the ranks as a new incarnation. The main thread must do it: PR_SET_PDEATHSIG follows the starting thread."""
        self.inc += 1
        self.ranks.renew()
        self.pressed = self.killed = self.survivors_killed = False
        self._record(rec.Run(state="preparing", reason=reason, world=self.world))
        environment = rank_environment(
            self.run, channel=self.ranks.path, nonce=self.nonce, inc=self.inc, resume=resume, world=self.world, after=self.after
        )
        self.after, self.oom_kills = None, oom_kills()
        self.health.inc = self.health.inc or self.inc
        self.health.renew()
        with held():
            self.child = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                cwd=self.run.path,
                env={**os.environ, **environment},
                preexec_fn=leash(os.getpid()),
            )
        self.grown_at = time.monotonic()
        self.watchdog.renew(self.grown_at)
        self.stragglers.renew()

    # --- the loop ------------------------------------------------------------------------------------------------------

    def loop(self) -> int:
        """Supervise until the run is over; the exit code."""
        while self.code is None:
            for key, _ in self.selector.select(TICK):
                key.data()
            now = time.monotonic()
            self._read_log(now)
            self.health.tick(now)
            for number in self.signals.take():
                self._signal(number, now)
            self._reap(now)
            self._advance(now)
            self.alarm.tick(now)
            self.viewers.tick()
            self.ranks.tick()
            if now - self.log_checked > LOG_CHECK_TIME:
                self.log_checked = now
                output.cap(self.run.log_path, int(self.settings.engine_log_mb * (1 << 20)))
        self.release()
        return self.code

    def release(self) -> None:
        """Take leave of viewers and ranks, then give the run up."""
        self._stack.close()

    def _hello(self) -> dict[str, Any]:
        return {
            "run": self.run.name,
            "inc": self.inc,
            "state": self.state,
            "head_seq": self.tail.head_seq,
            "offset": self.tail.offset,
            **self._ranks(),
        }

    def _ranks(self) -> dict[str, Any]:
        return {"world": self.world, "ranks": self.ranks.shown()}

    def _read_log(self, now: float) -> None:
        chunks, marks = self.tail.poll()
        if chunks:
            self.grown_at = now
        for item in marks:
            if item.id is not None:
                self.book.note(item.id)
                self.ranks.applied(item.id)
            if item.type == "run" and item.state is not None:
                self._follow(item)
            elif item.type == "checkpoint" and item.verified and item.step is not None:
                self.policy.verified(item.step)
            elif item.type == "rewind" and item.to_step is not None:
                self.policy.resumed(item.to_step)
        self.viewers.publish(chunks)

    def _read_whole_log(self, now: float) -> None:
        """All that the worker wrote, now that it is gone."""
        before = -1
        while before < self.tail.offset:
            before = self.tail.offset
            self._read_log(now)

    def _follow(self, item: Mark) -> None:
        """The run's state changed: so does run.json."""
        assert item.state is not None
        self.state, self.state_code = item.state, item.exit_code
        changes: dict[str, Any] = {"state": item.state, "reason": item.reason, "exit_code": item.exit_code, "inc": item.inc}
        if item.total_steps is not None:
            changes["total_steps"] = item.total_steps
        self._identify(changes)

    def _identify(self, changes: dict[str, Any]) -> None:
        """Change run.json; a full disk costs the change, not the run (readers then believe the log)."""
        try:
            self.run.update_identity(**changes)
        except (OSError, RunError) as error:
            say(f"lumina: run.json cannot be updated: {error}")

    def _record(self, record: rec.Record) -> None:
        """Write a record. Only while no rank 0 lives: the log has one writer at a time."""
        with MetricLog(self.run.metrics_path, self.inc, sync_interval=0) as log:
            log.emit(record)
        self._read_log(time.monotonic())

    # --- commands and signals ------------------------------------------------------------------------------------------

    def _command(self, request: str, cmd: str, args: dict[str, Any]) -> str | None:
        """A viewer's command; why it is refused, or None."""
        if cmd == "stop":
            command = Command(request, cmd, {"save": args.get("save", True)})
            return self._want("stop", command) if self.intent is None else self._join(command)
        if self.intent is not None:
            return "the run is stopping already"
        if self.child is None:
            return "the run is between two starts: try again when it runs"
        return self.ranks.send(Command(request, cmd, args))

    def _want(self, intent: str, command: Command) -> str | None:
        """Somebody wants the run to end, in an orderly way."""
        error = self.ranks.send(command) if self.child is not None else None
        if (
            error is None or command.cmd == "preempt" or intent == "interrupt"
        ):  # a signal is no request: no answer can refuse it
            self.intent, self.intent_at, self.intent_id = intent, time.monotonic(), command.id
        return error

    def _join(self, command: Command) -> str | None:
        """One more stop while the run is stopping is the same stop; one without a checkpoint reaches the ranks too, who may not
        have come to the step that would save it."""
        if self.child is not None and not command.args["save"]:
            error = self.ranks.send(command)
            if error is not None:
                return error
        self.joined.append(command.id)
        return None

    def _signal(self, number: int, now: float) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            if self.intent in ("preempt", "interrupt") and now - self.intent_at >= SECOND_SIGNAL_TIME:
                self._kill("a second signal came")
            elif self.intent not in ("preempt", "interrupt"):
                self._end_by_signal(number, now)
        elif number in (signal.SIGUSR1, signal.SIGUSR2):
            if self.child is not None:
                self.ranks.send(Command(uuid.uuid4().hex, "checkpoint"))
        elif number == signal.SIGQUIT:
            for state in self.ranks.ranks.values():
                send_signal(state.process, signal.SIGQUIT)

    def _end_by_signal(self, number: int, now: float) -> None:
        grace = self.settings.preempt_grace_s
        request = uuid.uuid4().hex
        if number == signal.SIGINT:
            self._want("interrupt", Command(request, "stop", {"save": True}))
        else:
            self._want("preempt", Command(request, "preempt", {"grace": grace}))
            self.kill_at = now + grace
        if self.child is not None and not self.ranks.connected:
            self._terminate()  # still starting: nothing to save, nobody to take the command

    def _tree(self) -> list[Process]:
        return self.alarm.without(descendants(os.getpid()))

    def _terminate(self) -> None:
        self.pressed = True
        send_all(self._tree(), signal.SIGTERM)

    def _kill(self, reason: str) -> None:
        if self.child is not None:
            say(f"lumina: {reason}: the run's processes are killed")
            self.killed = self.pressed = True
            send_all(self._tree(), signal.SIGKILL)

    # --- the ranks' end ------------------------------------------------------------------------------------------------

    def _reap(self, now: float) -> None:
        """Collect ended children: the worker, and orphans that became ours."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if self.alarm.ended(pid, os.waitstatus_to_exitcode(status)):
                    continue
                if self.child is not None and pid == self.child.pid:
                    self.child.returncode = self.ended = os.waitstatus_to_exitcode(status)
                    self.child = None
                    self.kill_at = now + CLEAR_TIME
                    send_all(self._tree(), signal.SIGTERM if policy.final_state(self.ended) else signal.SIGKILL)

    def _advance(self, now: float) -> None:
        if self.ended is not None:
            if not self._tree():
                self._judge(now)
            elif policy.final_state(self.ended) is None or (self.kill_at is not None and now >= self.kill_at):
                send_all(self._tree(), signal.SIGKILL)
        elif self.child is not None:
            self._watch(now)
            self._press(now)
            self._press_survivors(now)
        elif self.intent is not None:
            self._finish_between()
        elif self.restart_at is not None and now >= self.restart_at:
            self.restart_at = None
            reason = "restart with a smaller micro batch" if self.after else self.again
            self.again = None
            try:
                self._spawn(resume=True, reason=reason or f"restart {self.policy.failures} of {self.policy.limit}")
            except (OSError, RunError) as error:
                self._finish("failed", policy.CRASHED, f"the worker cannot be started: {error}")

    def _watch(self, now: float) -> None:
        """Ranks that hang or hold the others up. The log is rank 0's: a hang is told there once it is gone."""
        if self.intent is not None and self.watchdog.found is None:
            return
        hang = self.watchdog.tick(now, self.ranks.ranks, self.world)
        if hang is not None:
            self._identify({"reason": f"{hang}: it hangs and is being ended"})
        for slow in self.stragglers.look(self.ranks.ranks):
            self._tell(rec.Alert(severity="warning", code="straggler", message=str(slow), step=slow.step))

    def _tell(self, alert: rec.Alert) -> bool:
        """Let rank 0 write an alert: the log has one writer. Whether it took it."""
        words = {name: getattr(alert, name) for name in ("severity", "code", "message", "recommendation", "step")}
        return self.ranks.tell(Command(uuid.uuid4().hex, "alert", words))

    def _stepped(self) -> bool:
        """Whether a rank has finished a step since this start; what it reports of its data counts documents."""
        return any(state.steps for state in self.ranks.ranks.values())

    def _press(self, now: float) -> None:
        """Somebody wants the run to end: make sure that it does."""
        if self.intent == "preempt":
            if self.kill_at is not None and now >= self.kill_at and not self.killed:
                self._kill(f"the run did not leave within {self.settings.preempt_grace_s:g} s")
        elif self.intent is not None:
            states = [state for state in self.ranks.ranks.values() if state.connected]
            # before the first step nothing can be lost and no command is heard: that the data come on puts no end off
            signs = [self.grown_at, *(state.at for state in states)] if self._stepped() else []
            moved = max([self.intent_at, *signs])
            slow = any(state.section in SLOW_SECTIONS for state in states)
            limit = SLOW_TIME if slow else self.settings.preempt_grace_s
            if self.kill_at is None and now - moved > limit:
                self._terminate()
                self.kill_at = now + self.settings.preempt_grace_s
            elif self.kill_at is not None and now >= self.kill_at and not self.killed:
                self._kill("the run did not stop")

    def _press_survivors(self, now: float) -> None:
        """One rank has died: the others wait for it in a collective, and its launcher waits for them."""
        failure = self.ranks.failure
        if failure is None or self.killed or (failure.code is not None and policy.final_state(failure.code) is not None):
            return
        late = now - failure.at - self.settings.survivors_s
        if late >= LAUNCHER_TIME:
            self._kill(f"{failure.who} has died and the launcher does not leave")
        elif late >= 0 and not self.survivors_killed:
            say(f"lumina: {failure.who} has died and the others do not leave: they are killed")
            self.survivors_killed = True
            here = [state.process for state in self.ranks.ranks.values() if state.host is None and state.process.alive]
            send_all([*here, *(below for rank in here for below in descendants(rank.pid))], signal.SIGKILL)

    def _judge(self, now: float) -> None:
        """The worker and everything it started are gone: what now?"""
        code, self.ended, self.kill_at = self.ended or 0, None, None
        self._read_whole_log(now)
        found = judge(
            Ended(
                code,
                self.world,
                self.ranks.failure,
                self.watchdog.found,
                self.intent,
                self.pressed,
                self.killed,
                stepped=self._stepped(),
                kernel_killed=oom_kills() > self.oom_kills,
                log_tail=lambda: output.end_of(self.run.log_path),
            )
        )
        if found.hang is not None:
            advice = "the stacks of all ranks are in engine.log; the run goes on from its newest checkpoint"
            hang = found.hang
            self._record(
                rec.Alert(severity="critical", code="hang", message=str(hang), recommendation=advice, step=hang.at_step)
            )
        if found.state is not None:
            self._finish(found.state, found.code, found.reason)
        elif found.code == policy.AGAIN:
            self._start_again(found.reason, now)
        else:
            self._crashed(found.code, found.reason or "", now)

    def _start_again(self, reason: str | None, now: float) -> None:
        """The ranks left in order to be started again: no failure."""
        if self.intent is not None:
            self._finish_between()
        else:
            self.again, self.restart_at = reason or "started again", now

    def _read_data(self) -> bool:
        """Whether the ranks had come no further than to their data: so far no micro batch matters."""
        return self.state == "preparing" and all(item.section in (None, "data", TOKENISE) for item in self.ranks.ranks.values())

    def _rewrote_experts(self) -> bool:
        """Whether a checkpoint was given other experts meanwhile: no micro batch is in memory then, so none is too large."""
        return any(item.section == EXPERTS for item in self.ranks.ranks.values())

    def _crashed(self, code: int, reason: str, now: float) -> None:
        if code == policy.OUT_OF_MEMORY:
            code = policy.CRASHED
            if self.policy.limit and not self._rewrote_experts():
                self.after = "out_of_memory"
            if self.after and not self._read_data():
                # the ranks lower the micro batch each time, so this comes to an end by itself
                self._record(rec.Run(state="crashed", reason=reason, exit_code=code))
                self.restart_at = now + self.settings.restart_pause_s
                return
        self._record(rec.Run(state="crashed", reason=reason, exit_code=code))
        pause = self.policy.crashed()
        if pause is not None:
            self.restart_at = now + pause
        elif self.policy.limit == 0:
            self._finish("failed", policy.CRASHED, reason)
        else:
            self._finish(
                "failed", policy.NO_PROGRESS, f"{self.policy.limit} restarts without a newer checkpoint; last cause: {reason}"
            )

    def _finish_between(self) -> None:
        """The end was asked for while no worker lived."""
        if self.intent == "preempt":
            self._finish("preempted", policy.PREEMPTED, "between two starts: the newest checkpoint counts")
        else:
            code = policy.INTERRUPTED if self.intent == "interrupt" else policy.FINISHED
            self._finish("finished", code, "stopped between two starts: the newest checkpoint counts")

    def _finish(self, state: str, code: int, reason: str | None) -> None:
        """The run is over. The worker's own last word stands, if it says the same."""
        for alert in self.health.finish():
            self._record(alert)
            self.alarm.take(alert)
        self.alarm.finish()
        for request in self.joined:
            self._record(rec.Note(message="the run was stopping already", id=request))
        if self.state != state or self.state_code not in (None, code):
            self._record(rec.Run(state=state, reason=reason, exit_code=code, id=self.intent_id))
        self.state = state
        self._identify({"state": state, "exit_code": code, **({"reason": reason} if reason else {})})
        self.code = code


def main(argv: list[str] | None = None) -> int:
    """Detach, take the run over, report to the starter, supervise."""
    folder, descriptor = sys.argv[1:] if argv is None else argv
    if os.fork():
        os._exit(0)
    with socket.socket(fileno=int(descriptor)) as link:
        with link.makefile("rb") as lines:
            order = json.loads(lines.readline())
        answer: dict[str, Any] = {"ok": True}
        try:
            supervisor = Supervisor(RunDirectory(folder), order)
            try:
                supervisor.open()
            except BaseException:
                supervisor.release()
                raise
        except (RunError, OSError) as error:
            answer = {"ok": False, "error": str(error), "code": getattr(error, "exit_code", 1)}
        with contextlib.suppress(OSError):  # the starter may be gone; the run goes on
            link.sendall(json.dumps(answer).encode() + b"\n")
    return supervisor.loop() if answer["ok"] else int(answer["code"])


if __name__ == "__main__":
    sys.exit(main())
