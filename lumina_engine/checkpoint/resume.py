"""May this checkpoint be continued here? The ledger and the configuration have a say, beside the digests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import ledger
from .files import CheckpointError
from .keep import list_steps
from .saving import config_dict
from .verify import Report, step_name, verify

_COMMITTED = ("checkpoints", "emergency", "backups")  # folders of a run that hold what it committed


def check_ledger(report: Report, run: str | None = None) -> list[str]:
    """Compare the manifest's digest with what this user's runs have recorded.

    Args:
        run: id of the run whose folder the checkpoint lies in; read from there when left out. The manifest names a run too, but
            whoever replaced the checkpoint wrote that name: it counts only where no run commits anything, as of a copy.

    Returns:
        notes for the user.

    Raises:
        CheckpointError: this run committed that step with other content (a file and its manifest were replaced).
    """
    named, step = str(report.manifest.get("run")), report.manifest["step"]
    owner = run if run is not None else run_id_of(report.path.parent.parent)
    in_place = run is not None or report.path.parent.name in _COMMITTED
    known = ledger.recorded(owner, step)
    if not known or not (in_place or report.digest in known):
        owner, known = named, ledger.recorded(named, step)
    if not known:
        return [f"{report.path.name} of run {named} was not committed by this user on this machine; its digests are right"]
    if report.digest not in known:
        raise CheckpointError(
            f"{report.path} was replaced after this run committed it: its manifest is not the one recorded in "
            f"{ledger.ledger_path()}. "
            f"Resume from another checkpoint, or remove the entries of run {owner} there if you replaced it yourself"
        )
    return []


def check_nothing_lost(checkpoints: Path, backups: Path, run: str, logged: Iterable[int]) -> None:
    """Refuse to start a run from scratch that has committed before: its checkpoints are not mounted, or somebody removed them.

    Args:
        logged: steps of the verified checkpoints that the run's log tells of.

    Raises:
        CheckpointError: names what was expected, the backups that are there, and the ways to go on.
    """
    copies = [verify(backups / name) for name in list_steps(backups)]
    found = [
        _told("its log tells of", logged),
        _told(f"{ledger.ledger_path()} tells of", ledger.committed_steps(run)),
        f"{backups} holds {', '.join(report.path.name for report in copies)}" if copies else "",
    ]
    if not any(found):
        return
    sound = next((report.path for report in copies if report.ok), None)
    damaged = "".join(f" ({report.path.name} is damaged: {report.line()})" for report in copies if not report.ok)
    copy = f"copy a backup back (cp -a {sound} {checkpoints}/)" if sound else f"there is no sound backup in {backups}"
    raise CheckpointError(
        f"{checkpoints} holds no checkpoint, but this run has committed some: {'; '.join(filter(None, found))}. Nothing is "
        f"started over, and nothing was changed. Mount or restore {checkpoints}, or {copy}{damaged}, and resume; or start "
        "again with --fresh (moves the whole run aside)"
    )


def _told(source: str, steps: Iterable[int]) -> str:
    known = sorted(set(steps))
    return f"{source} {len(known)}, the last one {step_name(known[-1])}" if known else ""


def run_id_of(run_dir: Path) -> str:
    """Id of the run in a directory: that of run.json, else (a plain script has none) the path."""
    return str(run_identity(run_dir).get("id") or run_dir)


def run_identity(run_dir: Path) -> dict[str, Any]:
    """The content of run.json; empty without one."""
    try:
        content = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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


def check_tokenizer(saved: Mapping[str, Any], tokenizer: Any, path: Path) -> None:
    """Refuse to go on with other ids than those of the checkpoint, even where the data make the same ones.

    Raises:
        CheckpointError: the digests differ.
    """
    then, now = saved.get("digest"), getattr(tokenizer, "digest", None)
    if then is None or now is None or then == now:
        return  # not known of a tokenizer of a user's own kind
    raise CheckpointError(
        f"{path} was saved with tokenizer {saved.get('name')} of digest {str(then)[:16]}, {tokenizer.name} has {now[:16]} now: "
        "its ids mean other text. Put the vocabulary back as it was, or start a new run"
    )


def _same(one: Any, other: Any) -> bool:
    """Equal values; `auto` may have been resolved since, which the shapes and digests of what it decides will tell."""
    return "auto" in (one, other) or _plain(one) == _plain(other)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
