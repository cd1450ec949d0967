"""May this checkpoint be continued here? The ledger and the configuration have a say, beside the digests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import ledger
from .files import CheckpointError
from .saving import config_dict
from .verify import Report


def check_ledger(report: Report) -> list[str]:
    """Compare the manifest's digest with what this user's runs have recorded.

    Returns:
        notes for the user.

    Raises:
        CheckpointError: this run committed that step with other content (a file and its manifest were replaced).
    """
    run, step = report.manifest.get("run"), report.manifest["step"]
    known = ledger.recorded(str(run), step)
    if not known:
        return [f"{report.path.name} of run {run} was not committed by this user on this machine; its digests are right"]
    if report.digest not in known:
        raise CheckpointError(
            f"{report.path} was replaced after this run committed it: its manifest is not the one recorded in "
            f"{ledger.ledger_path()}. "
            f"Resume from another checkpoint, or remove the entries of run {run} there if you replaced it yourself"
        )
    return []


def check_config(saved: dict[str, Any] | None, config: Any, path: Path) -> None:
    """Refuse to go on under a configuration whose shapes, data or tokenizer differ from the saved one.

    Raises:
        CheckpointError: names every such key with both values.
    """
    current = config_dict(config)
    if saved is None or current is None:
        return  # a plain script without a Config: the shapes are compared when the weights are loaded
    from ..config.schema import fields_info

    fixed = [info.name for info in fields_info() if not info.resume_may_change and info.name in saved]
    differing = [f"{name} was {saved[name]!r}, is {current[name]!r}" for name in fixed if not _same(saved[name], current[name])]
    if differing:
        raise CheckpointError(
            f"{path} was saved under another configuration: {'; '.join(differing)}. Set these back, or start a new run"
        )


def _same(one: Any, other: Any) -> bool:
    """Equal values; `auto` may have been resolved since, which the shapes and digests of what it decides will tell."""
    return "auto" in (one, other) or _plain(one) == _plain(other)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
