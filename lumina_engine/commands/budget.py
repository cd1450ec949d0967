"""`lumina-engine budget`: does it fit, and what does it cost, before anything starts."""

from __future__ import annotations

import argparse
from typing import Any

from . import common

HELP = "parameters, memory, disk and time of a run, for this machine or others"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_config_arguments(parser)
    parser.add_argument("--devices", metavar="NxMGB", help="plan for other devices, e.g. 8x80GB, '2xH100 80GB' or cpu")
    parser.add_argument(
        "--tokens", metavar="N", type=_count, help="tokens of the training data (default: guessed from its size)"
    )
    parser.add_argument("--run", metavar="RUN", help="the rest of this run, with the speed that it measured")
    parser.add_argument("--runs", metavar="DIR", help="folder of the runs (default ./runs or $LUMINA_RUNS)")
    common.add_json(parser)


def _count(text: str) -> int:
    try:
        count = int(float(text.replace("_", "").replace(",", "")))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text} is not a number of tokens") from None
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text}: give at least 1 token")
    return count


def run(args: argparse.Namespace) -> int:
    from ..config.budget import budget
    from ..config.checks import check
    from ..config.resolve import world_size
    from ..config.schema import ConfigError
    from ..data.size import train_tokens
    from ..monitoring.hardware import detect

    directory = _directory(args) if args.run else None
    if directory is not None:
        args.config = str(directory.config_path)
    config = common.load_config(args, default_preset="debug").config
    findings = check(config)
    if any(f.severity == "error" for f in findings):
        raise ConfigError(findings)
    machine = _elsewhere(detect(), args.devices) if args.devices else detect()
    tokens, basis = train_tokens(config, args.tokens)
    speed, done = None, 0
    if directory is not None:
        from ..run.measured import measured

        speed, done = measured(directory, config, machine)
    data = data_figures(config, world_size(config, machine))
    if data["known"] and not args.tokens:  # full rows, as the steps count them
        tokens, basis = -(-data["run_rows"] * data["seq_length"] // config.num_epochs), "counted in the prepared data"
    figures = budget(config, machine, train_tokens=tokens, tokens_basis=basis, speed=speed, done=done) | {"data": data}
    if args.json:
        common.print_json(figures)
    else:
        print(common.safe(describe(figures)))
    return 0


def data_figures(config: Any, world: int) -> dict[str, Any]:
    """What becomes of the prepared data in rows; with `known` false `lines` say why nothing is told."""
    from ..data.facts import look

    facts, why = look(config, world)
    return {"known": False, "lines": [why]} if facts is None else {"known": True, **facts.to_dict(), "lines": facts.lines()}


def _directory(args: argparse.Namespace) -> Any:
    from pathlib import Path

    from ..run.directory import find, runs_root

    if args.preset or args.config:
        raise common.UserError("--run takes the configuration of the run; change single keys with key=value")
    return find(args.run, Path(args.runs) if args.runs else runs_root())


def _elsewhere(machine: Any, devices: str) -> Any:
    """Another machine: its disk and host are unknown here, so no limit, and a guess of twice the devices' memory."""
    from dataclasses import replace

    from ..config.budget import parse_devices

    try:
        found = parse_devices(devices)
    except ValueError as error:
        raise common.UserError(str(error)) from None
    host = max(machine.host_memory_bytes, 2 * sum(d.memory_bytes for d in found))
    return replace(machine, devices=found, host_memory_bytes=host, disk_free_bytes=None)


def describe(figures: dict[str, Any], width: int = 80) -> str:
    """The budget as lines of text, none longer than `width`."""
    from ..config.budget import count_text, flops_text, gb_text

    parameters, device, host, disk = (figures[name] for name in ("parameters", "device", "host", "disk"))
    resolved, time = figures["resolved"], figures["time"]
    ranks = f"{resolved['world']} rank" + ("s" if resolved["world"] > 1 else "")
    backups = f" and {disk['backups']} backups" if disk["backups"] else ""
    lines = [
        ("devices", f"{resolved['devices']}, {ranks}, {resolved['precision']}"),
        ("", f"ZeRO-{resolved['zero_stage']}: {resolved['zero_reason']}"),
        ("verdict", _verdict(figures)),
        *(("advice" if i == 0 else "or", text) for i, text in enumerate(figures["advice"])),
        ("parameters", f"{count_text(parameters['total'])} total, {count_text(parameters['active'])} active (computed)"),
        ("", f"embeddings {count_text(parameters['embeddings'])} on top"),
        ("per rank", f"{gb_text(device['total'])} at once, highest in the {_MOMENTS[device['moment']]} (computed)"),
        ("", f"{gb_text(device['limit'])} of {gb_text(device['available'])} may be planned for"),
        ("parts", ", ".join(f"{name} {gb_text(device[name])}" for name in PARTS if device[name])),
        ("host", f"{gb_text(host['total'])} of {gb_text(host['available'])} (computed, Python and torch guessed)"),
        *([("", f"offloaded {gb_text(host['offload'])}")] if host["offload"] else []),
        *([("", f"saving a checkpoint {gb_text(host['saving'])}")] if host["saving"] else []),
        ("disk", f"{gb_text(disk['total'])}{_of(disk['available'])} (computed)"),
        ("", f"{disk['checkpoints']} checkpoints{backups} of {gb_text(disk['checkpoint'])}"),
        *([("", f"offloaded to NVMe {gb_text(disk['nvme'])}")] if disk["nvme"] else []),
        ("compute", f"{flops_text(figures['flops_per_token'])} per token, {figures['tokens_per_step']:,} tokens per step"),
        *(("data" if i == 0 else "", text) for i, text in enumerate(figures.get("data", {}).get("lines", ()))),
        *_time_lines(figures["steps"], time),
    ]
    return "\n".join(line for label, text in lines for line in _wrapped(label, text, width))


def _wrapped(label: str, text: str, width: int) -> list[str]:
    import textwrap

    rows = textwrap.wrap(text, width - _LABEL, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"{label if i == 0 else '':<{_LABEL}}{row}" for i, row in enumerate(rows)]


def _verdict(figures: dict[str, Any]) -> str:
    """Fits, or what is too small."""
    device, host, disk = (figures[name] for name in ("device", "host", "disk"))
    short = [
        name
        for name, need, have in (
            ("device memory", device["total"], device["limit"]),
            ("host memory", host["total"], host["available"]),
            ("disk", disk["total"], disk["available"]),
        )
        if have is not None and need > have
    ]
    return "fits" if not short else "DOES NOT FIT: too little " + " and ".join(short)


_LABEL = 12
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buckets", "working")
_MOMENTS = {"loss": "loss", "backward": "backward pass", "update": "update"}


def _of(available: int | None) -> str:
    from ..config.budget import gb_text

    return "" if available is None else f" of {gb_text(available)} free"


def _time_lines(steps: int | None, time: dict[str, Any]) -> list[tuple[str, str]]:
    rate = f"{time['tokens_per_s']:,.0f} tokens/s"
    if steps is None:
        return [
            ("time", "unknown: --tokens N or max_steps=N gives a duration"),
            ("", f"{rate} {time['basis'].split('; ')[-1]}"),
        ]
    left = f"{steps - time['steps_done']:,} of {steps:,} steps" if time["steps_done"] else f"{steps:,} steps"
    span = f"{hours_text(time['p50_h'])} (half of such runs) to {hours_text(time['p90_h'])} (nine in ten)"
    hours = f"{time['device_hours']:,.0f} device-hours, " if time["device_hours"] >= 10 else ""
    return [("time", f"{left}, {span}"), ("", f"{hours}{rate}, {time['basis']}")]


def hours_text(hours: float) -> str:
    """A duration in hours for a person: 40 s, 12 min, 3.5 h, 9 days."""
    if hours * 3600 < 90:
        return f"{hours * 3600:.0f} s"
    if hours < 1.5:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.0f} days"
