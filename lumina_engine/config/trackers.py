"""The experiment trackers that a run can feed, and the packages that each needs. None is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

# tracker -> (modules that it needs, what pip is told to install); TensorBoard's files are written without it
NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "tensorboard": ((), ""),
    "wandb": (("wandb",), "wandb"),
    "mlflow": (("mlflow", "sqlalchemy", "alembic"), "mlflow-skinny sqlalchemy alembic"),
    "trackio": (("trackio",), "trackio"),
}
NAMES = tuple(NEEDS)
# the same of what DeepSpeed writes itself
OF_DEEPSPEED = {"tensorboard": (("tensorboard",), "tensorboard"), "csv_monitor": ((), "")}


def to_install(name: str, needs: Mapping[str, tuple[tuple[str, ...], str]] = NEEDS) -> str | None:
    """What must be installed for this tracker, None if all of it is here."""
    modules, packages = needs[name]
    return packages if any(find_spec(module) is None for module in modules) else None
