"""`lumina-engine report RUN`: one self-contained HTML page and one JSON file about a run, whatever became of it."""

from __future__ import annotations

import argparse
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import common, routing
from .common import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..monitoring.report import Subject
    from ..run.directory import RunDirectory

HELP = "one HTML page and one JSON file about a run"
_KINDS = (".html", ".htm", ".json")
_SMALL = 1 << 20  # bytes of a JSON file that is taken into the report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="name of a run, or its folder")
    parser.add_argument(
        "--out", metavar="FILE", help="the HTML file; the JSON file stands beside it (default: reports/ of the run)"
    )
    parser.add_argument("--moe", action="store_true", help="also how the experts are used: balance, stability, specialisation")
    parser.add_argument(
        "--rows", type=int, default=64, metavar="N", help="rows of the run for --moe to put through its checkpoints (0: none)"
    )
    parser.add_argument("--runs", metavar="DIR", help="folder of the runs (default ./runs or $LUMINA_RUNS)")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from ..monitoring import scaling_page
    from ..monitoring.curves import History, read_history
    from ..monitoring.health.timeline import HealthTimeline
    from ..monitoring.report import document
    from ..monitoring.report_page import page
    from ..run.directory import find, runs_root

    directory = find(args.run, Path(args.runs) if args.runs else runs_root())
    target, data = _files(args.out or str(directory.reports / "report.html"))
    about, health = subject(directory), HealthTimeline()
    try:
        history = read_history(directory.metrics_path, health.take)
    except OSError as error:
        history, health = History(), HealthTimeline()
        about = replace(about, missing=(*about.missing, f"metrics.jsonl: cannot be read ({error.strerror or error})"))
    found = document(about, history, health)
    if args.moe:
        found["moe"] = routing.routing(directory, about.config, args.rows)
    target.parent.mkdir(parents=True, exist_ok=True)
    _replace(target, page(found, history))
    _replace(data, common.json_text(found, lines=True) + "\n")
    if args.json:
        shown = {"html": str(target), "json": str(data), "missing": found["missing"], "summary": found["summary"]}
        common.print_json(shown | ({"moe": found["moe"]} if args.moe else {}))
        return 0
    print(common.safe(f"written: {target} and {data.name}"))
    for text in found["missing"]:
        print(common.safe(f"  not in it: {text}"))
    for text in scaling_page.lines(found["scaling"]):
        print(common.safe(text))
    for text in routing.lines(found["moe"]) if args.moe else ():
        print(common.safe(text))
    return 0


def _files(name: str) -> tuple[Path, Path]:
    """The HTML and the JSON file of a name; what follows a dot in it is part of it unless it names one of the two kinds.

    Raises:
        UserError: a URL or a folder (exit code 2).
    """
    named = Path(name)
    if "://" in name:
        raise UserError(f"{name} is a URL, and a report is written here only: name a local file")
    if not named.name or name.endswith("/") or named.is_dir():
        raise UserError(f"{name} is a folder: name a file")
    stem = named.stem if named.suffix.lower() in _KINDS else named.name
    return named.parent / f"{stem}.html", named.parent / f"{stem}.json"


def _replace(path: Path, text: str) -> None:
    """Write a file (0600) whole or not at all."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def subject(directory: RunDirectory) -> Subject:
    """What the folder of a run says about it; what cannot be read is named, never raised."""
    from ..monitoring.report import Subject
    from ..run.directory import RunError

    missing: list[str] = []
    try:
        identity: Mapping[str, Any] = directory.identity()
    except RunError as error:
        identity = {}
        missing.append(f"run.json: {error}")
    info = directory.info()
    config, preset = _config(directory, identity.get("preset"), missing)
    return Subject(
        name=directory.name,
        path=str(directory.path),
        state=info.state,
        reason=info.reason,
        exit_code=info.exit_code,
        alive=info.alive,
        identity=identity,
        config=config,
        preset=preset,
        saved=_saved(directory.checkpoints, missing),
        best=_pointer(directory.checkpoints / "best"),
        latest=_pointer(directory.checkpoints / "latest"),
        sample_eval=_sample_eval(directory.reports / "sample_eval.json", missing),
        missing=tuple(missing),
    )


def _config(
    directory: RunDirectory, preset: object, missing: list[str]
) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """The values in force and the preset's, flat."""
    from ..config.presets import NAMES, ConfigPresets
    from ..config.schema import Config, ConfigError

    try:
        config = Config.load(directory.config_path).to_dict(sectioned=False)
    except (ConfigError, OSError) as error:
        missing.append(f"config.yaml: {error}")
        return None, None
    if preset not in NAMES:
        missing.append("differences from a preset: the run was made from none")
        return config, None
    return config, ConfigPresets.get(str(preset)).to_dict(sectioned=False)


def _saved(folder: Path, missing: list[str]) -> tuple[str, ...]:
    """What lies there by name, what is set aside as damaged too, then the emergency saves beside it."""
    from ..checkpoint.keep import EMERGENCY, committed_paths, told

    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("step-"))
        saves = [told(path) for path in reversed(committed_paths(folder)) if path.parent.name == EMERGENCY]
        return (*names, *saves)
    except OSError as error:
        missing.append(f"checkpoints: {error.strerror or error}")
        return ()


def _pointer(path: Path) -> str | None:
    """The checkpoint that a pointer names."""
    try:
        return path.readlink().name if path.is_symlink() else path.read_text(encoding="utf-8")[:200].strip() or None
    except (OSError, ValueError):
        return None


def _sample_eval(path: Path, missing: list[str]) -> Mapping[str, Any] | None:
    try:
        if path.stat().st_size > _SMALL:
            missing.append(f"sample_eval.json: larger than {_SMALL >> 20} MiB")
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        missing.append(f"sample_eval.json: {error}")
        return None
    if not isinstance(found, dict):
        missing.append("sample_eval.json: no JSON object")
        return None
    return found
