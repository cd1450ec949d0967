"""What the end of an incarnation means, decided without a process."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lumina_engine.run import policy
from lumina_engine.run.channel import End
from lumina_engine.run.verdict import Ended, judge
from lumina_engine.run.watchdog import Hang

PLAIN = Ended(1, 1, None, None, None, False, False, True, False, lambda: "x\nValueError: bad\n")
HANG = Hang(1, "forward", 12, 70.0)
DEAD, GONE = End(1, 3, "rank 1 said why", 0.0, "node-7"), End(1, None, None, 0.0, "node-7")


@pytest.mark.parametrize(
    ("ended", "state", "code", "words"),
    [
        (replace(PLAIN, code=0), "finished", 0, None),
        (replace(PLAIN, code=75), "preempted", 75, None),
        (replace(PLAIN, code=0, intent="interrupt"), "finished", 130, None),
        (PLAIN, None, 1, "exit code 1: ValueError: bad"),
        (replace(PLAIN, code=-9), None, -9, "SIGKILL"),
        (replace(PLAIN, code=-15, stepped=False), "preempted", 75, "while it still started"),
        (replace(PLAIN, code=-15, pressed=True), None, -15, "SIGTERM"),
        (replace(PLAIN, code=-15, hang=HANG, pressed=True), None, 1, "hang"),
        (replace(PLAIN, code=-15, hang=HANG, intent="stop"), "failed", 1, "SIGTERM; the newest checkpoint is whole"),
        (replace(PLAIN, code=-15, pressed=True, intent="preempt"), "preempted", 75, "before a checkpoint"),
        (replace(PLAIN, code=-15, pressed=True, intent="stop", stepped=False), "finished", 0, "before its first step"),
        (replace(PLAIN, code=-15, world=2, stepped=False), "preempted", 75, "while it still started"),
        (replace(PLAIN, code=-15, world=2, failure=GONE), "preempted", 75, "while it still started"),
        (replace(PLAIN, code=-15, world=2, failure=DEAD), "preempted", 75, "while it still started"),
        (replace(PLAIN, code=-15, world=2, failure=End(0, 75, "saved", 0.0)), "preempted", 75, "saved"),
        (replace(PLAIN, code=-15, world=2, failure=GONE, pressed=True), None, 1, "rank 1 on node-7 died without a word"),
        (replace(PLAIN, code=-9, kernel_killed=True), None, policy.OUT_OF_MEMORY, "want of memory"),
        (replace(PLAIN, code=-9, kernel_killed=True, killed=True), None, -9, "SIGKILL"),
        (replace(PLAIN, world=2, failure=DEAD), None, 3, "rank 1 said why"),
        (replace(PLAIN, world=2, failure=GONE), None, 1, "rank 1 on node-7 died without a word"),
        (replace(PLAIN, world=2, failure=GONE, kernel_killed=True), None, policy.OUT_OF_MEMORY, "want of memory"),
        (replace(PLAIN, code=0, world=2, failure=GONE), "finished", 0, None),
        (replace(PLAIN, code=policy.AGAIN), None, policy.AGAIN, None),
        (replace(PLAIN, failure=End(1, policy.HOST_LOST, "host node-7 is lost", 0.0)), "failed", 1, "host node-7 is lost"),
        (replace(PLAIN, hang=HANG), None, 1, "hang: rank 1 is 70 s in forward of step 12"),
        (replace(PLAIN, hang=HANG, code=0), "finished", 0, None),
        (replace(PLAIN, hang=HANG, intent="preempt"), "preempted", 75, "the newest one counts"),
        (replace(PLAIN, intent="stop", pressed=True, stepped=False), "finished", 0, "before its first step"),
        (replace(PLAIN, intent="interrupt", pressed=True, stepped=False), "finished", 130, "before its first step"),
        (replace(PLAIN, intent="stop", pressed=True, killed=True, code=-9), "failed", 1, "did not stop and was killed"),
        (replace(PLAIN, intent="interrupt", killed=True, code=-9), "finished", 130, "the newest checkpoint is whole"),
    ],
)
def test_ft09_an_end_means(ended: Ended, state: str | None, code: int, words: str | None) -> None:
    found = judge(ended)
    assert (found.state, found.code) == (state, code)
    assert words is None or words in (found.reason or "")
    assert (found.hang is not None) == (state is None and ended.hang is not None)
