"""A supervised run from a Python script: the same start, watch and restarts as `lumina-engine train`, which it calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..monitoring.decisions import decisions_of
from ..monitoring.log import read_records
from ..run.directory import RunDirectory, RunError, runs_root
from ..run.launch import wait

if TYPE_CHECKING:
    from ..config.schema import Config


class AdaptiveTrainingOrchestrator:
    """Starts a supervised run of a configuration and waits for it.

    The ranks are processes of their own, so what the script has set up before (a process group, say) is not in their way, and
    an interrupted script leaves the run going: `lumina-engine runs stop NAME` ends it. What may be changed in a run by itself
    is set by `adaptive`, `spike_policy`, `dynamic_batching`, `dynamic_precision` and `max_restarts`.

    Args:
        config: a `Config`; what is `auto` is resolved at the start.
        runs: folder of the runs (default ./runs or $LUMINA_RUNS).
    """

    def __init__(self, config: Config, runs: str | os.PathLike[str] | None = None) -> None:
        self.config = config
        self.runs = Path(runs) if runs is not None else runs_root()
        self.plan: dict[str, Any] | None = None
        self.summary: dict[str, Any] | None = None

    def initialize_training(self) -> dict[str, Any]:
        """Check and resolve, and start nothing: `findings`, `budget`, `argv` of the ranks, `deepspeed`. A second call gives
        the same.

        Raises:
            RunError: the configuration is refused; every problem with its fix.
        """
        if self.plan is None:
            self.plan = self._train("--dry-run")
        return self.plan

    def run_adaptive_training(self) -> dict[str, Any]:
        """Start the run, wait for its end, and return `run`, `path`, `state`, `exit_code`, `reason`, `step`, `total_steps`,
        `loss`, `starts` (1 plus the restarts), `decisions` (about the learning rate, the balance and the number of experts, in
        order: step, what, before, after, reason, evidence; for advice its severity and command). A second call gives the same
        summary.

        Raises:
            RunError: it could not be started (the name is taken, the configuration is refused), or this script is itself a
                rank of a launcher.
        """
        if self.summary is None:
            self.initialize_training()
            started = self._train("--detach")
            run = RunDirectory(started["path"])
            wait(run)
            info = run.info()
            self.summary = {
                "run": run.name,
                "path": str(run.path),
                **{name: getattr(info, name) for name in ("state", "exit_code", "reason", "step", "total_steps", "loss")},
                "starts": info.inc,
                "decisions": decisions_of(read_records(run.metrics_path)),
            }
        return self.summary

    def _train(self, *options: str) -> dict[str, Any]:
        if "RANK" in os.environ:
            raise RunError(
                "this script is a rank of a launcher already: run it by itself, Lumina starts the ranks (num_gpus, num_nodes)"
            )
        with tempfile.TemporaryDirectory(prefix="lumina-") as folder:
            path = self.config.save(Path(folder) / f"{self.config.experiment_name}.yaml")
            command = [sys.executable, "-m", "lumina_engine.cli", "train", "--config", str(path), "--runs", str(self.runs)]
            done = subprocess.run([*command, "--json", *options], capture_output=True, text=True)
        if done.returncode:
            raise RunError(done.stderr.strip().removeprefix("lumina-engine: "), done.returncode)
        sys.stderr.write(done.stderr)
        found: dict[str, Any] = json.loads(done.stdout)
        return found
