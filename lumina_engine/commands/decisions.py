"""`lumina-engine runs decisions` and `runs set-lr`: what was done about rate and experts, and setting the rate by hand."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from . import common

if TYPE_CHECKING:
    from ..monitoring.decisions import Replayed
    from ..run.directory import RunDirectory


def add_rate(parser: argparse.ArgumentParser) -> None:
    """The argument behind RUN."""
    parser.add_argument("rate", metavar="RATE", type=float, help="learning rate of the next step, e.g. 1e-4")


def set_rate(args: argparse.Namespace, directory: RunDirectory) -> int:
    """Give a living run another rate, by its socket as the terminal program does."""
    from ..run.client import send_command
    from ..run.requests import check_command

    wrong = check_command("set_lr", {"lr": args.rate})
    if wrong:
        raise common.UserError(f"{args.rate:g}: {wrong}")
    send_command(directory, "set_lr", {"lr": args.rate})
    if args.json:
        common.print_json({"run": directory.name, "learning_rate": args.rate})
    else:
        print(
            common.safe(f"run {directory.name}: learning rate {args.rate:g} from the next step; the schedule keeps its shape")
        )
    return 0


def show(args: argparse.Namespace, directory: RunDirectory) -> int:
    """The decisions of a run, decided again from its log; 1 if the log has others."""
    from ..config.schema import Config
    from ..monitoring.decisions import replay
    from ..monitoring.log import read_records

    if not directory.config_path.is_file():
        raise common.UserError(f"run {directory.name}: config.yaml is not there, and the decisions depend on it", 65)
    found = replay(read_records(directory.metrics_path), Config.load(directory.config_path))
    if args.json:
        common.print_json(as_json(found))
    else:
        for line in lines(found):
            print(common.safe(line))
    for line in found.differences if found.known else []:
        print(common.safe(f"differs: {line}"), file=sys.stderr)
    return 0 if found.agrees or not found.known else 1


def as_json(found: Replayed) -> dict[str, Any]:
    """A replay as JSON values."""
    from ..monitoring.decisions import as_dict

    return {
        "decisions": [as_dict(record) for record in found.decisions],
        "factor": found.factor,
        "actions": found.spent,
        "unwritten": found.unwritten,
        "agrees": found.agrees if found.known else None,
        "differences": found.differences if found.known else [],
    }


def lines(found: Replayed) -> list[str]:
    """A replay for a person."""
    from ..monitoring.decisions import as_dict

    if not found.known:
        return ["not known: the log was written without the controllers"]
    shown = [_line(as_dict(record)) for record in found.decisions]
    if not shown:
        shown = ["no decision about the learning rate or the experts"]
    else:
        shown.append(f"the rate is {found.factor:.3g} times the schedule's; actions so far: {found.spent}")
    agreed = "the log alone gives the same decisions" if found.agrees else "the log alone gives other decisions"
    again = f"; {found.unwritten} came again after a kill" if found.unwritten else ""
    return [*shown, agreed + again]


def _line(item: dict[str, Any]) -> str:
    from ..monitoring.adaptive import FACTOR
    from ..monitoring.early_stop import EARLY_STOP

    evidence = item.get("evidence")
    if evidence is None:
        advice = f" - {item['advice']}" if item.get("advice") else ""
        return f"step {item['step']:,}  {item['what']}: {item['reason']}{advice}"
    if evidence["action"] == "outcome":
        return f"step {item['step']:,}  outcome of step {evidence['of']:,}: {item['reason']}"
    figures = f"{evidence['rule']} {evidence['statistic']:.3g}, threshold {evidence['threshold']:.3g}"
    how = f"window {evidence['window']}, cooldown {evidence['cooldown']}"
    if item["what"] == EARLY_STOP:
        return f"step {item['step']:,}  {evidence['action']} of {item['before']:,} steps: {item['reason']} ({figures}, {how})"
    what = "factor" if item["what"] == FACTOR else item["what"]
    before, after = (f"{value}" if isinstance(value, int) else f"{value:.3g}" for value in (item["before"], item["after"]))
    return f"step {item['step']:,}  {evidence['action']}: {what} {before} to {after}: {item['reason']} ({figures}, {how})"
