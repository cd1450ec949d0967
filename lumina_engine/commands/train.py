"""`lumina-engine train`: check, prepare, start a supervised run, and follow it with a progress line."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import common, machines

if TYPE_CHECKING:
    from ..config.machine import Machine
    from ..config.schema import Config
    from ..run.directory import RunDirectory

HELP = "start a run (default: preset debug on the built-in corpus)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_config_arguments(parser)
    parser.add_argument("--run", metavar="NAME", help="name of the run (the same as experiment_name=NAME)")
    parser.add_argument("--runs", metavar="DIR", help="folder of the runs (default ./runs or $LUMINA_RUNS)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="go on from the newest verified checkpoint; starts a new name")
    mode.add_argument("--fresh", action="store_true", help="move a run of that name aside and start again")
    parser.add_argument(
        "--accept-data-change", action="store_true", help="with --resume: go on although the training data is another now"
    )
    parser.add_argument("--detach", action="store_true", help="return as soon as the run has started")
    parser.add_argument(
        "--dry-run", action="store_true", help="show findings, budget, command and deepspeed.json; start nothing"
    )
    machines.add_arguments(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..run.directory import RunDirectory, runs_root

    root = Path(args.runs) if args.runs else runs_root()
    name = args.run or _override(args.overrides, "experiment_name")
    existing = RunDirectory(root / name) if name and (root / name).exists() else None
    if args.accept_data_change and not args.resume:
        raise common.UserError("--accept-data-change is for a run that goes on: add --resume")
    if args.check or args.slurm or _override(args.overrides, "node_rank") not in (None, "null", "0"):
        return _elsewhere(args, _plan(args, name), root, name)
    if existing is not None and args.resume:
        return _resume(args, existing)
    plan = _plan(args, name)
    if existing is not None and not args.fresh:
        raise common.UserError(
            f"run {name!r} exists: add --resume to go on with it, --fresh to move it aside, or choose another --run"
        )
    if args.dry_run:
        return _show(args, plan)
    return _start(args, plan, root, existing)


def _elsewhere(args: argparse.Namespace, plan: Plan, root: Path, name: str | None) -> int:
    """What starts no run here: a look at the machines, a batch script, or this machine's part of a run that another has."""
    from ..run.directory import RunDirectory

    if args.check:
        return machines.check(args, plan.config, plan.world, root)
    if args.slurm:
        return machines.slurm_script(args, plan.config, plan.world // plan.config.num_nodes, len(plan.machine.devices), root)
    if name is None:
        raise common.UserError("a machine that joins a run must know its name: add the --run NAME of node_rank=0")
    return machines.join(RunDirectory(root / name), plan.config, plan.world)


def _override(overrides: list[str], key: str) -> str | None:
    values = [text.partition("=")[2] for text in overrides if text.partition("=")[0].strip().replace("-", "_") == key]
    return values[-1] if values and values[-1] != "auto" else None


class Plan:
    """A checked and resolved configuration, and what would be started from it."""

    def __init__(self, config: Config, findings: list[Any], machine: Any, world: int, preset: str | None) -> None:
        from ..config.deepspeed import to_deepspeed

        self.config, self.findings, self.machine, self.world, self.preset = config, findings, machine, world, preset
        self.deepspeed = to_deepspeed(config, world) if config.use_deepspeed else None


def _plan(args: argparse.Namespace, name: str | None) -> Plan:
    """Merge, check and resolve; every problem at once.

    Raises:
        ConfigError: there are errors.
    """
    from ..run.directory import auto_name

    loaded = common.load_config(args, default_preset="debug")
    config = loaded.config
    preset = args.preset or (None if args.config else "debug")
    if name:
        config.experiment_name = name
    elif config.experiment_name == "auto":
        config.experiment_name = auto_name(preset or Path(args.config).stem)
    return _checked(config, preset)


def _checked(config: Config, preset: str | None) -> Plan:
    from ..config.checks import check
    from ..config.resolve import resolve, world_size
    from ..config.schema import ConfigError
    from ..data.tokenizer import ConversationTokenizer
    from ..monitoring.hardware import detect

    machine = detect()
    findings = check(config, machine)
    if any(f.severity == "error" for f in findings):
        raise ConfigError([f for f in findings if f.severity == "error"])
    fix_paths(config)
    world = world_size(config, machine)
    tokenizer = ConversationTokenizer(config.tokenizer)
    resolved = resolve(config, machine, tokenizer_vocab=tokenizer.get_vocab_size(), world=world)
    if errors := [f for f in check(resolved) if f.severity == "error"]:
        raise ConfigError(errors)  # of values that were auto
    return Plan(resolved, findings, machine, world, preset)


def fix_paths(config: Config) -> None:
    """Make relative paths absolute (the run works in its own folder), and refuse bad data before anything is made.

    Raises:
        DataError: a path that names nothing or only empty files (exit code 2), a file whose head training could not read (65);
            the key or the file and line, and what to do.
    """
    from ..config.task_checks import train_paths
    from ..data.size import check_head

    for key, value in {**train_paths(config), "eval_data_path": config.eval_data_path}.items():
        if value is not None:
            check_head(value, config.data_format, key=key)
    make_absolute(config)


def make_absolute(config: Config) -> None:
    """Make the relative paths of a configuration absolute, that of a tokenizer's file too; a URL stays as it is. Reads no file.

    Raises:
        TokenizerError: a tokenizer in the home folder of nobody.
    """
    from ..data.vocabulary import full_name

    for key in ("train_data_path", "eval_data_path"):
        setattr(config, key, _absolute(getattr(config, key)))
    config.task_data_paths = {name: _absolute(value) for name, value in config.task_data_paths.items()}
    for key in ("data_cache_dir", "hostfile", "backup_path", "nvme_path"):
        value = getattr(config, key)
        setattr(config, key, value if value is None else _absolute_path(value))
    config.tokenizer = full_name(config.tokenizer)


def _absolute(given: Any) -> Any:
    """A data path, or each of a list, made absolute; a URL is so already."""
    from ..data.remote import is_remote

    if isinstance(given, list):
        return [_absolute(entry) for entry in given]
    return given if given is None or is_remote(given) else _absolute_path(given)


def _absolute_path(given: str) -> str:
    return os.path.abspath(os.path.expanduser(given))  # noqa: PTH100, PTH111 -- a link stays, and so does ~name of nobody


def _show(args: argparse.Namespace, plan: Plan) -> int:
    from ..config.budget import budget
    from ..run.launch import rank_argv

    argv = rank_argv(plan.config, Path("RUN"), plan.world)
    from .budget import data_figures, describe

    figures = budget(plan.config, plan.machine) | {"data": data_figures(plan.config, plan.world)}
    if args.json:
        findings = [
            {"code": f.code, "severity": f.severity, "keys": list(f.keys), "message": f.message, "fix": f.fix}
            for f in plan.findings
        ]
        common.print_json({"findings": findings, "budget": figures, "argv": argv, "deepspeed": plan.deepspeed})
        return 0
    for finding in plan.findings:
        print(common.safe(finding.line()))
    print(common.safe(describe(figures)))
    print("ranks     " + " ".join(argv))
    print("deepspeed " + json.dumps(plan.deepspeed))
    return 0


def _start(args: argparse.Namespace, plan: Plan, root: Path, existing: Any) -> int:
    from ..run.directory import RunDirectory, require_free_space

    for finding in plan.findings:
        if finding.severity == "warning":
            print(common.safe(finding.line()), file=sys.stderr)
    machines.require(plan.config, plan.world, root)
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_free_space(root, _first_checkpoint_bytes(plan))
    _require_cache_space(plan.config)
    if existing is not None:
        _move_aside(existing)
    path = root / plan.config.experiment_name
    there = path.exists()
    try:
        directory = RunDirectory.create(root, plan.config.experiment_name, preset=plan.preset)
        _write_plan(directory, plan)
    except OSError:
        if not there:  # nothing was started: the name is free again
            shutil.rmtree(path, ignore_errors=True)
        raise
    _launch(directory, plan, resume=False)
    return _after_start(args, directory)


def _write_plan(directory: RunDirectory, plan: Plan) -> None:
    from ..run.directory import write_json

    _save_config(directory, plan.config)
    if plan.deepspeed is not None:
        write_json(directory.deepspeed_path, plan.deepspeed)


def _require_cache_space(config: Config) -> None:
    """Refuse where the token stores have no room, unless they are there already.

    Raises:
        RunError: too little is free (exit code 2).
    """
    from ..data.size import cache_bytes, content_digest, counted
    from ..run.directory import RunError, require_free_space

    try:
        require_free_space(config.data_cache_dir, cache_bytes(config), "free space there, or set data_cache_dir")
    except RunError:
        if counted(config, content_digest(config)) is None:
            raise


def _save_config(directory: RunDirectory, config: Config) -> None:
    config.save(directory.config_path).chmod(0o600)


def _launch(directory: RunDirectory, plan: Plan, *, resume: bool, accept_data_change: bool = False) -> None:
    from ..run.launch import rank_argv, start
    from ..run.policy import Settings

    config = plan.config
    settings = Settings.of_config(config)
    argv = rank_argv(config, directory.path, plan.world)
    start(directory, argv, world=plan.world, resume=resume, settings=settings, accept_data_change=accept_data_change)
    if config.trackers:
        from ..run import tracking

        tracking.start(directory, config.trackers)


def _move_aside(run: RunDirectory) -> None:
    """Rename an ended run, so that its name is free; nothing of it is deleted."""
    if run.alive:
        raise common.UserError(f"run {run.name!r} is running: stop it first (`lumina-engine runs stop {run.name}`)", 65)
    moved = run.path.with_name(f"{run.name[:40]}-until-{time.strftime('%Y%m%d-%H%M%S')}")
    run.path.rename(moved)
    print(common.safe(f"the earlier run is now {moved}"), file=sys.stderr)


def _first_checkpoint_bytes(plan: Plan) -> int:
    """Room that two checkpoints (weights, masters, two moments, at 4 bytes) need, and a little for the logs."""
    from ..config.budget import parameter_counts
    from ..config.schema import DeepSeekConfig

    counts = parameter_counts(DeepSeekConfig.from_config(plan.config))
    return 2 * 16 * (counts.total + counts.embeddings) + 16_000_000


def _resume(args: argparse.Namespace, directory: Any) -> int:
    """Go on with a run: its own configuration, plus the keys that a resumed run may change."""
    from ..config.resolve import left_to_auto
    from ..config.schema import Config

    if directory.alive:
        owner = directory.owner()
        raise common.UserError(
            f"run {directory.name!r} is running (pid {owner.pid if owner else '?'}): watch it with `lumina {directory.name}`",
            65,
        )
    config = left_to_auto(Config.load(directory.config_path))
    if args.preset or args.config or args.overrides:
        config = _changed(config, args, directory)
    plan = _checked(config, None)
    if args.dry_run:
        return _show(args, plan)
    machines.require(plan.config, plan.world, directory.path.parent)
    _save_config(directory, plan.config)
    _launch(directory, plan, resume=True, accept_data_change=args.accept_data_change)
    return _after_start(args, directory)


def _changed(config: Config, args: argparse.Namespace, directory: RunDirectory) -> Config:
    """A run's own configuration with the keys that were given. Raises `ConfigError` for those that a resumed run must keep."""
    from ..config.checks import resume_findings
    from ..config.loading import merge
    from ..config.resolve import world_size
    from ..config.schema import Config, ConfigError, infos_of
    from ..monitoring.hardware import detect

    wanted = merge(args.preset, Path(args.config) if args.config else None, list(args.overrides))
    make_absolute(wanted.config)  # as the run's own are
    given = [key for key, origin in wanted.origins.items() if origin != "default" and key != "experiment_name"]
    changes = {key: getattr(wanted.config, key) for key in given if getattr(wanted.config, key) != "auto"}
    if changes.get("num_experts", config.num_experts) != config.num_experts:
        changes = _without_own_experts(changes, directory)
    asked = [key for key, origin in wanted.origins.items() if origin == "cli" and infos_of(Config)[key].resume_may_change]
    changes |= {key: "auto" for key in asked if getattr(wanted.config, key) == "auto"}  # resolved anew
    if "num_gpus" in changes and config.launcher in ("none", "torchrun"):  # what auto chose for one rank, and for several
        changes.setdefault("launcher", "auto")
    machine = detect()
    new = Config(**(config.to_dict(sectioned=False) | changes))
    if ("batch_size" in changes) != ("gradient_accumulation_steps" in changes):
        new = _same_global_batch(config, new, "batch_size" in changes, machine)
    findings = resume_findings(config, new, world_size(config, machine), world_size(new, machine))
    if findings:
        raise ConfigError(findings)
    return new


def _without_own_experts(changes: dict[str, Any], directory: RunDirectory) -> dict[str, Any]:
    """`changes` without a number of experts that the run had before it changed it by itself, and without their room then.

    A command that gives it is the one that a requeued job gives again.
    """
    from ..monitoring import record as rec
    from ..monitoring.log import read_records

    had: dict[str, list[Any]] = {"num_experts": [], "capacity_factor": []}
    for record in read_records(directory.metrics_path, ("change",)):
        if isinstance(record, rec.Change) and record.by == "recovery" and record.what in had:
            had[record.what].append(record.before)
    if changes["num_experts"] not in had["num_experts"]:
        return changes
    return {key: value for key, value in changes.items() if value not in had.get(key, ())}


def _same_global_batch(old: Config, new: Config, by_rows: bool, machine: Machine) -> Config:
    """`new` with the other factor of its batch as the global batch of `old` wants it, where that can be.

    A command that gives one of the two is the one that a requeued job gives again, after Lumina itself changed both.
    """
    from ..config.resolve import world_size

    rows, left = divmod(old.batch_size * old.gradient_accumulation_steps * world_size(old, machine), world_size(new, machine))
    given, other = ("batch_size", "gradient_accumulation_steps")[:: 1 if by_rows else -1]
    value, more = divmod(rows, getattr(new, given))
    return new if left or more or not value else new.model_copy(update={other: value})


def _after_start(args: argparse.Namespace, directory: Any) -> int:
    facts = {"run": directory.name, "path": str(directory.path)}
    if args.json:
        common.print_json(facts, lines=True)
    if args.detach:
        if not args.json:
            name = directory.name
            print(common.safe(f"run {name} started: `lumina {name}` watches it, `lumina-engine runs stop {name}` ends it"))
        return 0
    from .follow import follow

    return follow(directory, quiet=args.json, tty=sys.stderr.isatty() and os.environ.get("TERM") != "dumb")
