"""`lumina-engine config check | show | schema`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from . import common

if TYPE_CHECKING:
    from ..config.loading import Loaded
    from ..config.schema import FieldInfo

HELP = "check and show a configuration, and list all keys"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="config_verb", metavar="VERB", required=True, parser_class=type(parser))
    check = verbs.add_parser("check", help="all problems at once, each with its fix; exit code 1 if there are errors")
    common.add_config_arguments(check)
    check.add_argument("--here", action="store_true", help="also what depends on this machine: memory, disk, data files")
    common.add_json(check)
    show = verbs.add_parser("show", help="the configuration as YAML, with every auto as the value in force on this machine")
    common.add_config_arguments(show)
    show.add_argument("--origins", action="store_true", help="say where each value comes from")
    show.add_argument("--deepspeed", action="store_true", help="the JSON that DeepSpeed would get")
    common.add_json(show)
    schema = verbs.add_parser("schema", help="JSON Schema of all keys")
    schema.add_argument("--markdown", action="store_true", help="a table for people instead")
    common.add_json(schema)


def run(args: argparse.Namespace) -> int:
    return {"check": _check, "show": _show, "schema": _schema}[args.config_verb](args)


def _check(args: argparse.Namespace) -> int:
    from ..config.checks import check
    from ..config.schema import ConfigError

    try:
        loaded = common.load_config(args)
        findings = check(loaded.config, _machine() if args.here else None)
    except ConfigError as error:
        findings = error.findings
        if any(f.code in ("file", "unknown_preset") for f in findings):
            raise  # nothing was checked: that is a usage error
    errors = sum(f.severity == "error" for f in findings)
    if args.json:
        common.print_json({"ok": not errors, "findings": [f.to_dict() for f in findings]})
    else:
        for finding in findings:
            print(common.safe(f"{finding.severity:<8}{finding.line()}"))
        warnings = sum(f.severity == "warning" for f in findings)
        words = [f"{n} {word}{'s' if n != 1 else ''}" for n, word in ((errors, "error"), (warnings, "warning"))]
        print(", ".join(words) if findings else "no problems")
    return 1 if errors else 0


def _machine() -> Any:
    from ..monitoring.hardware import detect

    return detect()


def _show(args: argparse.Namespace) -> int:
    from ..config.deepspeed import to_deepspeed
    from ..config.loading import to_yaml
    from ..config.resolve import world_size

    loaded = common.load_config(args)
    machine = _machine()
    resolved = _resolved(loaded, machine)
    if args.deepspeed:
        print(json.dumps(to_deepspeed(resolved, world_size(resolved, machine)), indent=2))
    elif args.json:
        common.print_json({"config": resolved.to_dict(), "origins": _origins(loaded, resolved)})
    elif args.origins:
        rows = [(name, value, origin, place) for name, (value, origin, place) in _origins_rows(loaded, resolved).items()]
        print(common.safe(common.table(rows, ("key", "value", "origin", "from"))))
    else:
        print(common.safe(to_yaml(resolved)), end="")
    return 0


def _resolved(loaded: Loaded, machine: Any) -> Any:
    """The values in force here. Raises `ConfigError` with every finding if one is an error."""
    from ..config.checks import check
    from ..config.resolve import resolve
    from ..config.schema import ConfigError
    from ..data.tokenizer import ConversationTokenizer

    findings = check(loaded.config)
    if any(f.severity == "error" for f in findings):
        raise ConfigError(findings)
    vocab = ConversationTokenizer(loaded.config.tokenizer).get_vocab_size()
    return resolve(loaded.config, machine, tokenizer_vocab=vocab)


def _origins(loaded: Loaded, resolved: Any) -> dict[str, str]:
    return {
        name: "auto" if getattr(resolved, name) != getattr(loaded.config, name) else origin
        for name, origin in loaded.origins.items()
    }


def _origins_rows(loaded: Loaded, resolved: Any) -> dict[str, tuple[str, str, str]]:
    from ..config.declare import show

    origins = _origins(loaded, resolved)
    return {name: (show(getattr(resolved, name)), origins[name], loaded.where.get(name, "")) for name in origins}


def _schema(args: argparse.Namespace) -> int:
    from ..config.schema import Config, fields_info

    if args.markdown:
        print(_markdown(fields_info()))
        return 0
    infos = {info.name: info for info in fields_info()}
    schema = Config.model_json_schema()
    for name, entry in schema["properties"].items():
        entry["section"] = infos[name].section
    schema["properties"] = {name: schema["properties"][name] for name in infos}
    common.print_json(schema)
    return 0


def _markdown(infos: list[FieldInfo]) -> str:
    from ..config.declare import show

    lines = []
    section = ""
    for info in infos:
        if info.section != section:
            section = info.section
            lines += [
                "",
                f"## {section}",
                "",
                "| key | default | must be | unit | on resume | meaning |",
                "|---|---|---|---|---|---|",
            ]
        cells = (
            f"`{info.name}`",
            f"`{show(info.default)}`",
            info.requirement(),
            info.unit,
            "may change" if info.resume_may_change else "fixed",
            info.help,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).strip()
