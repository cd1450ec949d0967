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
    common.add_json(parser)


def _count(text: str) -> int:
    try:
        return int(float(text.replace("_", "").replace(",", "")))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text} is not a number of tokens") from None


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from ..config.budget import budget, parse_devices
    from ..config.checks import check
    from ..config.schema import ConfigError
    from ..data.size import train_tokens
    from ..monitoring.hardware import detect

    config = common.load_config(args, default_preset="debug").config
    findings = check(config)
    if any(f.severity == "error" for f in findings):
        raise ConfigError(findings)
    machine = detect()
    if args.devices:
        try:
            devices = parse_devices(args.devices)
        except ValueError as error:
            raise common.UserError(str(error)) from None
        # the disk and host of other machines are unknown here: no limit, and a guess of twice the devices' memory
        host = max(machine.host_memory_bytes, 2 * sum(d.memory_bytes for d in devices))
        machine = replace(machine, devices=devices, host_memory_bytes=host, disk_free_bytes=None)
    tokens, basis = train_tokens(config, args.tokens)
    figures = budget(config, machine, train_tokens=tokens, tokens_basis=basis)
    if args.json:
        common.print_json(figures)
    else:
        print(common.safe(describe(figures)))
    return 0


def describe(figures: dict[str, Any]) -> str:
    """The budget as lines of text."""
    from ..config.budget import count_text, flops_text, gb_text

    parameters, device, host, disk = (figures[name] for name in ("parameters", "device", "host", "disk"))
    resolved, time = figures["resolved"], figures["time"]
    ranks = f"{resolved['world']} rank" + ("s" if resolved["world"] > 1 else "")
    zero = f"ZeRO-{resolved['zero_stage']} ({resolved['zero_reason']})"
    planned = f"{gb_text(device['limit'])} of {gb_text(device['available'])} may be planned for"
    lines = [
        ("devices", f"{resolved['devices']}, {ranks}, {zero}, {resolved['precision']}"),
        ("verdict", _verdict(figures)),
        ("parameters", f"{count_text(parameters['total'])} total, {count_text(parameters['active'])} active (computed)"),
        ("", f"embeddings {count_text(parameters['embeddings'])} on top"),
        ("per rank", f"{gb_text(device['total'])}, {planned} (computed)"),
        ("", ", ".join(f"{name} {gb_text(device[name])}" for name in _PARTS if device[name])),
        ("host", f"{gb_text(host['total'])} of {gb_text(host['available'])} (computed, Python and torch guessed)"),
        ("disk", f"{gb_text(disk['total'])}{_of(disk['available'])} (computed)"),
        ("", f"{disk['checkpoints']} checkpoints of {gb_text(disk['checkpoint'])}"),
        ("compute", f"{flops_text(figures['flops_per_token'])} per token, {figures['tokens_per_step']:,} tokens per step"),
        ("time", _time_text(figures["steps"], time)),
    ]
    lines += [("advice", text) for text in figures["advice"]]
    return "\n".join(f"{label:<12}{text}" for label, text in lines)


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


_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buckets")


def _of(available: int | None) -> str:
    from ..config.budget import gb_text

    return "" if available is None else f" of {gb_text(available)} free"


def _time_text(steps: int | None, time: dict[str, Any]) -> str:
    if steps is None:
        return f"{time['basis']}; --tokens N or max_steps=N gives a duration"
    return f"{steps:,} steps, {hours_text(time['p50_h'])} to {hours_text(time['p90_h'])} ({time['basis']})"


def hours_text(hours: float) -> str:
    """A duration in hours for a person: 40 s, 12 min, 3.5 h, 9 days."""
    if hours * 3600 < 90:
        return f"{hours * 3600:.0f} s"
    if hours < 1.5:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.0f} days"
