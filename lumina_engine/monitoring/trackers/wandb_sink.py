"""Weights & Biases: offline unless WANDB_MODE says otherwise; `wandb sync` of the folder is the user's own step."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from .points import Point, Subject


class Sink:
    """One W&B run in the project `lumina` (or WANDB_PROJECT), resumed by the run's id.

    Values lie over `step`, so a run that goes back draws its new branch over the old one.
    """

    def __init__(self, subject: Subject, mark: Any) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or "offline"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "lumina",
            id=subject.id,
            name=subject.name,
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or str(subject.folder),
            mode=mode,
            config=dict(subject.config),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, points: Iterable[Point]) -> None:
        for point in points:
            content: dict[str, Any] = dict(point.values)
            if point.text is not None:
                content[point.text[0]] = point.text[1]
            self._run.log(content | {"step": point.step, "time": point.t, "seq": point.seq})

    def flush(self) -> Any:
        """Nothing: the SDK has no call that waits until its own process has written, or sent, what `log` handed over.

        That process writes its file in blocks of 32 KiB, newer versions every 15 s too, and the rest when the run finishes. If
        it or the follower is killed, what it had not written is not in W&B, and is not delivered again.
        """
        return None

    def close(self, state: str | None) -> None:
        self._run.finish(exit_code=0 if state in (None, "finished") else 1)
