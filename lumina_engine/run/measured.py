"""What a run measured, for the budget of its rest or of a run like it."""

from __future__ import annotations

from ..config.counts import training_flops_per_token
from ..config.duration import Speed, scaled_by_flops
from ..config.machine import Machine
from ..config.resolve import model_config, world_size
from ..config.schema import Config
from ..monitoring import record as rec
from ..monitoring.log import last_records, surviving
from ..monitoring.speed import measured_speed
from .directory import RunDirectory

READ = 16 << 20  # bytes at the end of a log that are looked at
_TYPES = ("run", "step", "eval", "checkpoint", "rewind")


def measured(directory: RunDirectory, config: Config, machine: Machine) -> tuple[Speed | None, int]:
    """The speed of a run, carried over to `config` on `machine` by its operations and ranks, and the steps that it has done.

    The speed is None before the run timed enough steps.

    Raises:
        ConfigError: its config.yaml cannot be read.
        OSError: its log cannot be read.
    """
    records = surviving(last_records(directory.metrics_path, None, _TYPES, within=READ))
    speed = measured_speed(records, directory.path.name)
    done = max((r.step for r in records if isinstance(r, rec.Step)), default=0)
    if speed is None:
        return None, done
    before = Config.load(directory.config_path)
    ranks = next((r.world for r in reversed(records) if isinstance(r, rec.Run) and r.world), None)
    flops = [training_flops_per_token(model_config(c), c.seq_length) for c in (before, config)]
    return scaled_by_flops(speed, flops[0], flops[1], ranks or world_size(before, machine), world_size(config, machine)), done
