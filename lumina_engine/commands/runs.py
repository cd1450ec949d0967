"""`lumina-engine runs`: list, show, tail, stop, plot, set-lr, decisions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import common, decisions, plot

if TYPE_CHECKING:
    from ..monitoring import record as rec
    from ..run.directory import RunDirectory, RunInfo

HELP = "list, show, tail, stop, plot, set-lr, decisions"
POLL_TIME = 0.2  # s between two looks at a log that is followed
LEAVING_TIME = 2.0  # s that a run which is ending needs at most from closing its socket to its end
_COLUMNS = ("name", "state", "step", "loss", "tokens/s", "left", "age", "alerts", "path")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--runs", metavar="DIR", help="folder of the runs (default ./runs or $LUMINA_RUNS)")
        common.add_json(sub)
        if name != "list":
            sub.add_argument("run", metavar="RUN", help="name of a run, or its folder")
        return sub

    rows = action("list", "every run: living ones first, then the most recently active")
    rows.add_argument("--filter", metavar="WORDS", default="", help="only runs with these words: state:failed, preset:b1, text")
    rows.add_argument("--sort", metavar="ORDER", default="age", help="age (default), name, state, loss, alerts")
    action("show", "one run in detail")
    tail = action("tail", "the last records of a run, then each new one until the run ends")
    tail.add_argument("--type", metavar="LIST", help="only these record types, e.g. step,alert")
    tail.add_argument("--lines", metavar="N", default="10", help="records to begin with (default 10), or all")
    tail.add_argument("--no-follow", action="store_true", help="print what is there and leave")
    stop = action("stop", "stop a run after a checkpoint, and wait for its end; again: wait for the same end")
    stop.add_argument(
        "--no-save", action="store_true", help="stop at the next step without a checkpoint, also where a stop is under way"
    )
    stop.add_argument("--no-wait", action="store_true", help="return when the run has accepted the command")
    plot.add_arguments(action("plot", "curves of a run, printed or as SVG"))
    decisions.add_rate(action("set-lr", "give a living run another learning rate from its next step on"))
    action(
        "decisions",
        "what the controllers of rate and balance decided, why, what came of it, and whether the log gives the same again",
    )


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from ..run.directory import find, runs_root

    root = Path(args.runs) if args.runs else runs_root()
    if args.action == "list":
        return _list(args, root)
    actions = {
        "show": _show,
        "tail": _tail,
        "stop": _stop,
        "plot": plot.run,
        "set-lr": decisions.set_rate,
        "decisions": decisions.show,
    }
    return actions[args.action](args, find(args.run, root))


def _out(text: str) -> None:
    """Text for a person: safe for a terminal; a pipe or file gets the data with every control character escaped."""
    if sys.stdout.isatty():
        print(common.safe(text))
    else:
        print("".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text))


def _list(args: argparse.Namespace, root: Any) -> int:
    from ..run.listing import SORTS, listed, matches, ordered, row_dict

    if args.sort not in SORTS:
        raise common.UserError(f"--sort {args.sort}: there is no such order; orders: {', '.join(SORTS)}")
    found = listed(root)
    rows = ordered((info for info in found if matches(info, args.filter)), args.sort)
    if args.json:
        common.print_json([row_dict(info) for info in rows])
        return 0
    if not rows:
        _out(f"no run matches {args.filter}" if found else f"no runs in {root}; `lumina-engine train` starts one")
        return 0
    cells = [
        (
            _one_line(info.name),
            info.state,
            _steps(info),
            _figure(info.smoothed_loss),
            f"{info.tokens_per_s:,.0f}" if info.tokens_per_s is not None else "-",
            duration(info.left_s),
            duration(info.age_s),
            f"{info.alerts}" if info.alerts else "",
            _one_line(info.reason if info.state == "unreadable" and info.reason else str(info.path)),
        )
        for info in rows
    ]
    _out(common.table(cells, _COLUMNS, right=(2, 3, 4, 5, 6, 7)))
    return 0


def _one_line(text: str) -> str:
    return text.replace("\n", "␊").replace("\t", "␉")


def _steps(info: RunInfo) -> str:
    if info.step is None:
        return "-"
    return f"{info.step:,}" + (f"/{info.total_steps:,}" if info.total_steps else "")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """Seconds as the largest fitting unit: 12 s, 5 m, 3 h, 2 d."""
    if seconds is None:
        return "-"
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _show(args: argparse.Namespace, directory: RunDirectory) -> int:
    from ..checkpoint.keep import EMERGENCY, committed_paths
    from ..monitoring.log import last_records
    from ..monitoring.task_words import task_losses
    from ..run.listing import row_dict

    info = directory.info()
    if info.state == "unreadable":
        raise common.UserError(info.reason or "unreadable", 65)
    identity = directory.identity()
    alerts = last_records(directory.metrics_path, 3, ["alert"], within=8 << 20)
    evals = last_records(directory.metrics_path, 1, ["eval"], within=8 << 20)
    saved = committed_paths(directory.checkpoints)[::-1]  # oldest first
    named = [path.name + (" (emergency)" if path.parent.name == EMERGENCY else "") for path in saved]
    ranks = _ranks(directory) if info.alive else []
    if args.json:
        details = {key: identity.get(key) for key in ("world", "argv", "versions", "host", "settings")}
        common.print_json(
            {
                **row_dict(info),
                "pid": info.pid,
                "socket": info.socket,
                **details,
                "ranks": ranks,
                "checkpoints": [path.name for path in saved],
                "eval": _plain(evals)[0] if evals else None,
                "alerts": _plain(alerts),
            }
        )
        return 0
    by_task = getattr(evals[0], "tasks", None) if evals else None
    lines = [
        ("run", info.name),
        (
            "state",
            info.state
            + (f": {info.reason}" if info.reason else "")
            + (f" (exit code {info.exit_code})" if info.exit_code else ""),
        ),
        ("step", _steps(info)),
        ("loss", _figure(info.loss)),
        ("tokens/s", f"{info.tokens_per_s:,.0f}" if info.tokens_per_s is not None else "-"),
        ("eval loss", _figure(getattr(evals[0], "loss", None)) if evals else "-"),
        *([("by task", task_losses(by_task))] if by_task else []),
        ("last record", f"{duration(info.age_s)} ago" if info.age_s is not None else "-"),
        ("started", f"{info.inc} times" if info.inc != 1 else "once"),
        ("preset", info.preset or "-"),
        ("ranks", str(identity.get("world", "-"))),
        ("checkpoints", ", ".join(named) or "none"),
        ("folder", str(info.path)),
        ("process", f"{info.pid}, socket {info.socket}" if info.alive else "none"),
        ("versions", ", ".join(f"{name} {version}" for name, version in (identity.get("versions") or {}).items()) or "-"),
    ]
    lines += [(f"rank {rank['rank']}", place(rank)) for rank in ranks]
    for name, value in lines:
        _out(f"{name:<12} {_one_line(value)}")
    for alert in alerts:
        _out("alert        " + describe(alert))
    return 0


def _ranks(directory: RunDirectory) -> list[dict[str, Any]]:
    """Where each rank of a living run is, by its supervisor's word; none if it has just ended."""
    from ..run.client import RunClient
    from ..run.directory import RunError

    try:
        with RunClient(directory) as client:
            return list(client.hello.get("ranks", []))
    except RunError as error:
        print(common.safe(f"ranks: {error}"), file=sys.stderr)
        return []


def place(rank: dict[str, Any]) -> str:
    """Section, step and time of a rank, its process and machine."""
    from ..run.sections import place_words

    who = f"process {rank['pid']}" + (f" on {rank['host']}" if rank.get("host") else "")
    if not rank["connected"]:
        return f"gone, {who}" + (f", exit code {rank['exit_code']}" if rank["exit_code"] is not None else "")
    if rank["section"] is None:
        return f"starting, {who}"
    return f"{rank['age_s']:.1f} s in {place_words(rank['section'], rank['step'])}, {who}"


def _plain(records: list[rec.Record]) -> list[Any]:
    import msgspec

    from ..monitoring import record

    return [msgspec.json.decode(record.encode(item)) for item in records]


def _ask_to_stop(directory: RunDirectory, save: bool) -> None:
    """Send a living run the command; one that ends before it can answer has stopped.

    Raises:
        RunError: the run is not running, or refuses.
    """
    from ..run.client import send_command
    from ..run.directory import RunError
    from ..run.launch import wait

    was_alive = directory.alive
    try:
        send_command(directory, "stop", {"save": save})
    except RunError:
        if not was_alive or wait(directory, LEAVING_TIME) is None:
            raise


def _stop(args: argparse.Namespace, directory: RunDirectory) -> int:
    from ..run.launch import wait
    from ..run.listing import row_dict

    _ask_to_stop(directory, save=not args.no_save)
    if not args.no_wait:
        if not args.json:
            print(common.safe(f"run {directory.name} stops (Ctrl-C leaves; it stops all the same)"), file=sys.stderr)
        wait(directory)
    info = directory.info()
    if args.json:
        common.print_json(row_dict(info))
    else:
        _out(f"run {info.name}: {info.state}, step {_steps(info)}")
    return 0 if args.no_wait or info.state == "finished" else 1


def _tail(args: argparse.Namespace, directory: RunDirectory) -> int:
    from ..monitoring.record import RECORD_TYPES, encode

    types = [name.strip() for name in args.type.split(",")] if args.type else []
    for name in types:
        if name not in RECORD_TYPES:
            raise common.UserError(f"--type {name}: there is no such record; types: {', '.join(sorted(RECORD_TYPES))}")
    if args.lines != "all" and not args.lines.isdecimal():
        raise common.UserError(f"--lines {args.lines}: give a number, or all")
    for item in _records(directory, types, None if args.lines == "all" else int(args.lines), not args.no_follow):
        if args.json:
            sys.stdout.write(_ascii(encode(item)))
            sys.stdout.flush()
        else:
            _out(describe(item))
    return 0


def _ascii(line: bytes) -> str:
    import json

    return json.dumps(json.loads(line), ensure_ascii=True) + "\n"


def _records(directory: RunDirectory, types: list[str], count: int | None, follow: bool) -> Iterator[rec.Record]:
    """The last `count` records of these types, then those that come, until the run is over."""
    import time

    from ..monitoring.log import LogReader, last_records, whole_length

    reader = LogReader(directory.metrics_path, whole_length(directory.metrics_path))
    yield from last_records(directory.metrics_path, count, types, end=reader.offset)
    while follow:
        alive = directory.alive  # looked at before the log: what is written until then is read below
        while batch := reader.read_new():
            for item in batch:
                if not types or item.__struct_config__.tag in types:
                    yield item
        if not alive:
            return
        time.sleep(POLL_TIME)


def describe(item: rec.Record) -> str:
    """A record as one line for a person: time, type, and each field that is set."""
    import time

    import msgspec

    fields = msgspec.structs.asdict(item)
    defaults = {field.name: field.default for field in msgspec.structs.fields(item)}
    skip = ("seq", "t", "inc")
    shown = [
        f"{name} {_short(value)}"
        for name, value in fields.items()
        if name not in skip and value not in (defaults[name], None, [])
    ]
    clock = time.strftime("%H:%M:%S", time.localtime(item.t))
    return _one_line(f"{clock} {item.__struct_config__.tag!s:<10} {'  '.join(shown)}")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        text = "[" + ", ".join(_short(entry) for entry in value[:8]) + (", …]" if len(value) > 8 else "]")
        return text if len(text) <= 120 else text[:119] + "…"
    return str(value)
