"""`lumina-engine bench`: measure on this machine how fast Lumina trains, reads and answers, and what its screen costs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from . import common
from .common import UserError, print_json

HELP = "measure training, generation or the terminal program on this machine"


SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 4,
    "intermediate_size": 1024,
    "num_experts": 8,
    "moe_top_k": 2,
    "moe_dropless": True,
    "seq_length": 256,
    "batch_size": 4,
    "use_deepspeed": False,
    "tokenizer": "lumina-1k",
}


# what a reply depends on beside the model
_ANSWERING = ("precision", "tokenizer", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text, allow_abbrev=False)

    text = "steps of the training loop on random tokens: tokens per second, where the time goes, memory, share of matmul peak"
    _add_shape(add("train", text), "and steps=6, warmup=2, uniform_routing=0 (1: all experts get the same load)")
    text = "replies to random prompts by a model of random weights: tokens per second of prompt and of answer"
    _add_shape(add("generate", text), "and steps=5 (replies), warmup=1, prompt_tokens=128, new_tokens=64")
    text = (
        "the loader beside the training step that it feeds, and mapping a token store of 10 GB: tokens per second, time, memory"
    )
    _add_shape(
        add("data", text), "and steps=6, warmup=2, rounds=6 (passes of the loader), loaded_tokens=4000000, opened_mb=10000"
    )
    supervise = add("supervise", "what writing records costs a run, and whether viewers can slow it down (about a minute)")
    supervise.add_argument("--json", action="store_true", help="a JSON object a line for each figure")
    supervise.add_argument("--seconds", type=float, default=10.0, help="of each of the five runs (default 10)")
    text = "saves beside training, commit, digests, start to first resumed step (about 2 minutes)"
    saving = add("checkpoint", text)
    saving.add_argument("--json", action="store_true", help="a JSON object a line for each part; the last line has all")
    saving.add_argument("--rounds", type=int, default=5, metavar="N", help="repetitions (default 5)")
    health = add("health", "how often the health monitor is right, on recorded runs whose faults are known")
    health.add_argument("--json", action="store_true", help="a JSON object a line for each fault; the last line has all")
    health.add_argument("--corpus", metavar="PATH", help="a corpus file or folder (default: that of the source tree's tests)")
    adaptive = add("adaptive", "the rate controller on and off, in tiny real runs with an injected fault and in healthy ones")
    adaptive.add_argument("--json", action="store_true", help="a JSON object a line for each run; the last line has the table")
    adaptive.add_argument("--seeds", type=int, default=5, metavar="N", help="of each fault and arm (default 5)")
    adaptive.add_argument("--healthy", type=int, default=40, metavar="N", help="healthy runs (default 40)")
    adaptive.add_argument("--policies", default="skip", metavar="LIST", help="spike_policy of both arms (default skip)")
    tui = add("tui", "start-up, key delay, CPU, bytes and memory of `lumina` in a pseudo-terminal (about 12 minutes)")
    tui.add_argument("--json", action="store_true", help="a JSON object a line for each figure; the last line has all")
    tui.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, not what it costs")
    tui.add_argument("--only", metavar="LIST", default="", help="only these measurements, separated by commas")


def _add_shape(parser: argparse.ArgumentParser, own: str) -> None:
    common.add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="a JSON object a line; the last one is the result")
    parser.epilog = f"Any configuration key may be given, {own}."


def run(args: argparse.Namespace) -> int:
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "train": _train,
        "generate": _generate,
        "data": _data,
        "supervise": _supervise,
        "checkpoint": _checkpoint,
        "tui": _tui,
        "health": _health,
        "adaptive": _adaptive,
    }
    return actions[args.action](args)


def _config(args: argparse.Namespace, shape: dict[str, Any], own: dict[str, int]) -> tuple[Any, dict[str, int]]:
    """The configuration (`shape` < preset < file < key=value), checked, and the bench's own whole numbers.

    Raises:
        ConfigError: unknown keys, wrong values, keys that contradict each other.
    """
    from pathlib import Path

    from ..config.checks import check
    from ..config.finding import ConfigError, Finding, has_errors, unknown_key
    from ..config.loading import Layer, combine, file_layer, override_layer, preset_layer
    from ..config.schema import Config, infos_of

    numbers, words, findings = dict(own), [], []
    for word in args.overrides:
        name, _, text = word.partition("=")
        name = name.strip().replace("-", "_")
        if name not in own:
            words.append(word)
            if name not in infos_of(Config) and "=" in word:
                findings.append(unknown_key(name, [*infos_of(Config), *own], "command line"))
        elif text.strip().isdecimal() and (int(text) or own[name] == 0 or name == "warmup"):
            numbers[name] = int(text)
        else:
            findings.append(Finding("bench", "error", (), f"{name} = {text}: not a positive whole number", f"set {own[name]}"))
    if findings:
        raise ConfigError(findings)
    layers = [Layer("default", dict(shape))]
    if args.preset is not None:
        layers.append(preset_layer(args.preset))
    if args.config is not None:
        layers.append(file_layer(Path(args.config)))
    config = combine([*layers, override_layer(words)]).config
    findings = check(config)
    if has_errors(findings):
        raise ConfigError(findings)
    return config, numbers


def _train(args: argparse.Namespace) -> int:
    from ..training.benchmark import measure

    config, numbers = _config(args, SHAPE, {"steps": 6, "warmup": 2, "uniform_routing": 0})
    ranks, started = config.num_gpus, int(os.environ.get("WORLD_SIZE", "1"))
    if ranks != "auto" and ranks * config.num_nodes != started:
        raise UserError(
            f"num_gpus = {ranks}: bench train measures the ranks that it was started on, here {started}; start it as "
            f"torchrun --nproc-per-node {ranks} -m lumina_engine.cli bench train"
        )
    uniform = bool(numbers["uniform_routing"])

    def each(step: dict[str, Any]) -> str:
        return f"step {step['step']:>3}  {step['seconds']:.3f} s  loss {step['loss']:.4f}"

    with _output(args.json) as write:
        figures = measure(config, numbers["steps"], numbers["warmup"], lambda step: write(step, each), uniform=uniform)
        write(figures, describe_train)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from ..chat.benchmark import measure
    from ..config.keys_model import ExpertKeys, ModelKeys
    from ..config.resolve import resolved_precision
    from ..monitoring.hardware import detect

    config, numbers = _config(args, SHAPE, {"steps": 5, "warmup": 1, "prompt_tokens": 128, "new_tokens": 64})
    given = [word.partition("=")[0].strip().replace("-", "_") for word in args.overrides]
    if idle := [
        name for name in given if name not in (*numbers, *_ANSWERING, *ModelKeys.model_fields, *ExpertKeys.model_fields)
    ]:
        raise UserError(
            f"{idle[0]} has no effect on answers: give keys of the model, {', '.join(_ANSWERING)} or {', '.join(numbers)}"
        )
    if numbers["new_tokens"] < 2 or numbers["prompt_tokens"] + numbers["new_tokens"] > config.seq_length:
        total = numbers["prompt_tokens"] + max(2, numbers["new_tokens"])
        raise UserError(
            f"prompt_tokens + new_tokens (2 or more): at most seq_length = {config.seq_length}; set seq_length={total}"
        )

    def each(reply: dict[str, Any]) -> str:
        return f"reply {reply['reply']:>3}  first token {reply['prefill_s']:.3f} s, the others {reply['decode_s']:.3f} s"

    with _output(args.json) as write:
        precision = resolved_precision(config, detect())
        write(measure(config, numbers, precision, lambda reply: write(reply, each)), describe_generate)
    return 0


def _data(args: argparse.Namespace) -> int:
    from ..training.data_benchmark import measure

    own = {"steps": 6, "warmup": 2, "rounds": 6, "loaded_tokens": 4_000_000, "opened_mb": 10_000}
    config, numbers = _config(args, SHAPE, own)
    with _output(args.json) as write:
        figures = measure(config, numbers, lambda part: write(part, _data_part))
        write(figures, describe_data)
    return 0


def _data_part(part: dict[str, Any]) -> str:
    if part["part"] == "step":
        return f"step {part['step']:>3}  {part['seconds']:.3f} s"
    if part["part"] == "loader":
        return f"loader {part['round']:>3}  {part['tokens_per_s']:,.0f} tokens/s"
    return f"open  {part['store_bytes'] / 1e9:.1f} GB  {1e3 * part['open_s']:.1f} ms, {part['open_bytes'] / 1e6:.1f} MB"


def describe_data(figures: dict[str, Any]) -> str:
    """The figures of `bench data` as lines of text."""
    low, high, rate = (figures[name] for name in ("tokens_per_s_min", "tokens_per_s_max", "tokens_per_s"))
    ratio, size = figures["loader_ratio"], figures["opened_bytes"] / 1e9
    lines = [
        ("loader", f"{rate:,.0f} tokens/s (median of {figures['rounds']} passes, {low:,.0f}-{high:,.0f})"),
        ("step", f"{figures['step_tokens_per_s']:,.0f} tokens/s: the loader is {ratio:,.0f} x as fast (goal 20)"),
        ("rows", f"{figures['loaded_tokens']:,} tokens are planned in {figures['plan_s']:.2f} s"),
        (
            "open",
            f"{size:.1f} GB in {1e3 * figures['open_s']:.1f} ms (goal 50), {figures['open_bytes'] / 1e6:.1f} MB (goal 50)",
        ),
        ("run", f"{figures['num_workers']} loader threads, {figures['threads']} threads"),
    ]
    return "\n".join(f"{label:<12}{text}" for label, text in lines)


def _checkpoint(args: argparse.Namespace) -> int:
    from ..config.presets import ConfigPresets
    from ..training.save_benchmark import GOALS, measure

    if args.rounds < 1:
        raise UserError("--rounds: 1 or more")

    def lines(figures: dict[str, Any]) -> str:
        units = {"_s": "s", "_share": "", "bytes": "bytes"}
        unit = {name: next((unit for end, unit in units.items() if name.endswith(end)), "") for name in figures}
        goals = {name: GOALS.get(name) for name in figures}
        holds = {name: None if goal is None else figures[name] <= goal for name, goal in goals.items()}
        return "\n".join(row(name, goals[name], figures[name], unit[name], holds[name], "") for name in figures)

    with _output(args.json) as write:
        found = measure(ConfigPresets.debug(), ["--preset", "debug"], args.rounds, lambda part: write(part, lines))
        if args.json:
            write(found, lines)
    return 0


def describe_generate(figures: dict[str, Any]) -> str:
    """The figures of `bench generate` as lines of text."""
    low, high, rate = (figures[name] for name in ("tokens_per_s_min", "tokens_per_s_max", "tokens_per_s"))
    lines = [
        ("answer", f"{rate:,.1f} tokens/s (median of {figures['steps']} replies, {low:,.1f}-{high:,.1f})"),
        ("prompt", f"{figures['prefill_tokens_per_s']:,.0f} tokens/s, first token after {figures['first_token_s']:.3f} s"),
        ("memory", f"{figures['peak_memory_bytes'] / 1e9:.2f} GB at most"),
        ("run", f"{figures['precision']}, {figures['threads']} threads"),
    ]
    return "\n".join(f"{label:<12}{text}" for label, text in lines)


@contextmanager
def _output(json: bool) -> Iterator[Callable[[dict[str, Any], Callable[[dict[str, Any]], str]], None]]:
    """A function that prints figures as JSON, or as the text that its second argument makes of them; none prints nothing.

    Whatever else is printed meanwhile (libraries announce themselves) goes to standard error.
    """
    out = sys.stdout

    def write(figures: dict[str, Any], text: Callable[[dict[str, Any]], str]) -> None:
        if figures:
            print(common.json_text(figures, lines=True) if json else common.safe(text(figures)), file=out, flush=True)

    with redirect_stdout(sys.stderr):
        yield write


def describe_train(figures: dict[str, Any]) -> str:
    """The figures of `bench train` as lines of text."""
    low, high = figures["tokens_per_s_min"], figures["tokens_per_s_max"]
    split = figures["split_s"]
    whole = sum(split.values()) or 1.0
    own = f"products of the step's own shapes ({figures['matmul_own_shapes_flops_per_s'] / 1e9:,.0f})"
    lines = [
        ("throughput", f"{figures['tokens_per_s']:,.0f} tokens/s (median of {figures['steps']} steps, {low:,.0f}-{high:,.0f})"),
        ("step", f"{figures['step_s']:.3f} s: " + ", ".join(f"{k} {v:.3f} ({v / whole:.0%})" for k, v in split.items())),
        ("matmul", f"{figures['flops_per_s'] / 1e9:,.0f} GFLOP/s, {figures['matmul_share']:.0%} of a large square product"),
        ("", f"({figures['matmul_peak_flops_per_s'] / 1e9:,.0f}), {figures['matmul_share_own_shapes']:.0%} of {own}"),
        ("memory", f"{figures['peak_memory_bytes'] / 1e9:.2f} GB at most"),
        ("run", f"{figures['engine']}, {figures['precision']}, {figures['ranks']} rank(s), {figures['threads']} threads"),
    ]
    return "\n".join(f"{label:<12}{text}" for label, text in lines)


def row(label: str, goal: float | None, value: float | None, unit: str, holds: bool | None, note: str) -> str:
    """One line of the table: what, figure beside goal, whether it holds."""
    shown = "-" if value is None else f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
    limit = "" if goal is None else f"<= {goal:,.3g}"
    word = {None: "", True: "ok", False: "MISSED"}[holds]
    return f"{label:<58} {shown:>9} {unit:<7} {limit:>9}  {word:<6} {note}".rstrip()


def _supervise(args: argparse.Namespace) -> int:
    import tempfile
    from dataclasses import asdict
    from pathlib import Path

    from ..bench.supervise import measure

    if not 0.5 <= args.seconds <= 600:
        raise UserError(f"--seconds {args.seconds:g}: from 0.5 to 600")
    with tempfile.TemporaryDirectory(prefix="lumina-bench-") as folder:
        for figure in measure(Path(folder), args.seconds):
            if args.json:
                print_json({**asdict(figure), "holds": figure.holds}, lines=True)
                continue
            bound = f"<= {figure.most:g}" if figure.most is not None else f">= {figure.least:g}" if figure.least else ""
            word = {None: "", True: "ok", False: "MISSED"}[figure.holds]
            print(f"{figure.row}  {figure.label:<52} {figure.value:>12,.4g} {figure.unit:<4} {bound:>8}  {word}", flush=True)
    return 0


def _health(args: argparse.Namespace) -> int:
    from pathlib import Path

    from ..bench.corpus import read
    from ..bench.generated import machine
    from ..bench.health import measure

    path = Path(args.corpus) if args.corpus else Path(__file__).parents[2] / "tests" / "monitoring" / "health"
    try:
        runs = read(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: name the recorded runs with --corpus (tests/monitoring/health)") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    found = measure([*runs, *machine()])
    if args.json:
        for row in found["table"]:
            print_json(row, lines=True)
        print_json(found, lines=True)
        return 0
    for row in found["table"]:
        print(_health_row(row["fault"], row))
    for part in ("chosen", "held"):
        print(_health_row(f"all, {part} seeds", found[part]))
    print(_health_row("all", found))
    for row in found["codes"]:
        delay = "" if row["delays"] is None else f"  delay {row['delays']:g} steps"
        print(f"  {row['code']:<18} {row['severity']:<9} true {row['true']:>3}  false {row['false']:>3}{delay}")
    return 0


def _health_row(label: str, row: dict[str, Any]) -> str:
    def share(value: float | None) -> str:
        return "     -" if value is None else f"{value:6.1%}"

    delay = "-" if row["median_delay_steps"] is None else f"{row['median_delay_steps']:g}"
    critical = f"critical recall {share(row['critical_recall'])}  false {row['critical_false_alarms']:>2}  delay {delay:>3}"
    warnings = f"warnings {row['warnings']:>3}, precision {share(row['warning_precision'])}"
    return f"{label:<20} runs {row['runs']:>3}  {critical}  {warnings}"


def _adaptive(args: argparse.Namespace) -> int:
    import tempfile
    from dataclasses import asdict
    from pathlib import Path

    import torch

    from ..training.adaptive_benchmark import measure, table

    policies = tuple(word for word in args.policies.split(",") if word)
    if unknown := [word for word in policies if word not in ("alert", "skip", "rollback")]:
        raise UserError(f"--policies {unknown[0]}: there are alert, skip, rollback")
    if args.seeds < 0 or args.healthy < 0 or not ((args.seeds and policies) or args.healthy):
        raise UserError("--seeds and --healthy: give at least one run")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = []
    try:
        with tempfile.TemporaryDirectory(prefix="lumina-bench-") as folder:
            for run in measure(Path(folder), args.seeds, args.healthy, policies):
                runs.append(run)
                if args.json:
                    print_json(asdict(run), lines=True)
                else:
                    print(f"{run.fault:<26} seed {run.seed:>2}  {run.mode:<4} loss {run.loss:.3f}  {' '.join(run.actions)}")
                sys.stdout.flush()
    finally:
        torch.set_num_threads(threads)
    rows = table(runs)
    if args.json:
        print_json({"table": rows}, lines=True)
    for row in [] if args.json else rows:
        print(_adaptive_row(row))
    return 0


def _adaptive_row(row: dict[str, Any]) -> str:
    words = f"{row['fault']:<26} {row['adaptive']:<4} runs {row['runs']:>3}  loss at the end {row['loss']:.3f}"
    if "recovered" in row:
        lost = "-" if row["lost"] is None else f"{row['lost']:g}"
        words += f" (before {row['before']:.3f})  recovered {row['recovered']}  steps lost {lost}  ended {row['ended']}"
    if "hottest" in row:
        words += f"  hottest expert {row['hottest']:.1f} x its share"
    agrees = "agrees" if row["replay_agrees"] else "DIFFERS"
    return f"{words}  without action {row['without_action']}  replay {agrees}"


def _tui(args: argparse.Namespace) -> int:
    import importlib.util
    import tempfile
    from pathlib import Path

    from ..bench.tui import HEADLINES, MEASUREMENTS, QUICK, Sizes, measure

    if importlib.util.find_spec("lumina_tui") is None:
        raise UserError("lumina_tui is not installed: there is no terminal program to measure")
    names = [measurement.__name__ for measurement in MEASUREMENTS]
    only = [word for word in args.only.split(",") if word]
    if unknown := [word for word in only if word not in names]:
        raise UserError(f"no measurement {unknown[0]!r}: there are {', '.join(names)}")
    figures = []
    with tempfile.TemporaryDirectory(prefix="lumina-bench-") as folder:
        for figure in measure(Path(folder), QUICK if args.quick else Sizes(), only):
            figures.append(figure)
            if args.json:
                shown = {"figure": figure.name, "what": figure.label, "unit": figure.unit, "goal": figure.goal}
                print_json({**shown, "value": figure.value, "holds": figure.holds, "note": figure.note}, lines=True)
            else:
                print(row(figure.label, figure.goal, figure.value, figure.unit, figure.holds, figure.note), flush=True)
    if args.json:
        print_json({**dict.fromkeys(HEADLINES), **{figure.name: figure.value for figure in figures}}, lines=True)
    return 0
