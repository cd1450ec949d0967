"""`lumina-engine presets list | show NAME | compare A B …`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import common

if TYPE_CHECKING:
    from ..config.schema import Config

HELP = "list, show and compare the presets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="presets_verb", metavar="VERB", required=True, parser_class=type(parser))
    common.add_json(verbs.add_parser("list", help="all presets with computed parameters and memory"))
    show = verbs.add_parser("show", help="one preset: the keys it sets, and what is computed from them")
    show.add_argument("name", metavar="NAME")
    common.add_json(show)
    compare = verbs.add_parser("compare", help="numbers of presets side by side, and the keys in which they differ")
    compare.add_argument("names", metavar="NAME", nargs="*", help="two or more presets (default: all)")
    common.add_json(compare)


def run(args: argparse.Namespace) -> int:
    from ..config.presets import NAMES, preset_path, preset_row

    if args.presets_verb == "list":
        return _list([preset_row(name) for name in NAMES], args.json)
    if args.presets_verb == "show":
        preset_path(args.name)
        return _show(args.name, args.json)
    names = args.names or list(NAMES)
    for name in names:
        preset_path(name)
    if len(names) < 2:
        raise common.UserError("presets compare needs two names or more, for example `presets compare b1 b7`")
    return _compare(names, args.json)


def _list(rows: list[dict[str, Any]], as_json: bool) -> int:
    from ..config.budget import count_text, gb_text

    if as_json:
        common.print_json(rows)
        return 0
    shown = [
        (
            row["name"],
            count_text(row["active_parameters"]),
            count_text(row["active_parameters_top2"]),
            count_text(row["total_parameters"]),
            count_text(row["embedding_parameters"]),
            gb_text(row["weights_bytes"]),
            gb_text(row["training_state_bytes"]),
            row["description"],
        )
        for row in rows
    ]
    columns = ("preset", "active", "top-2", "total", "+ embedding", "weights", "train state", "for")
    print(common.table(shown, columns, right=range(1, 7)))
    print("\nActive: parameters that one token uses, embeddings not counted; top-2: the same with moe_top_k=2. All computed,")
    print("bf16; the train state is 16 bytes a parameter, activations come on top. `budget --preset NAME` plans for a machine.")
    return 0


def _show(name: str, as_json: bool) -> int:
    from ..config.loading import to_yaml
    from ..config.presets import ConfigPresets

    config = ConfigPresets.get(name)
    info = ConfigPresets.get_preset_info()[name]
    if as_json:
        common.print_json(info | {"config": config.to_dict(), "changed": _changed(config)})
        return 0
    print(f"{name}: {info['description']}\n")
    nominal = info["nominal"]
    lines = (
        ("active", f"{info['active_parameters']:,} parameters ({info['active_parameters_top2']:,} with moe_top_k=2)"),
        ("total", f"{info['total_parameters']:,} parameters, {info['parameter_efficiency']}"),
        ("embedding", f"{info['embedding_parameters']:,} parameters on top"),
        ("memory", info["memory_usage"]),
        ("chat cache", f"{info['kv_cache_bytes_per_token']:,} bytes per token (computed, bf16)"),
        ("hardware", info["hardware"]),
        (
            "nominal",
            f"{nominal['total']}, {nominal['memory']}, {nominal['hardware']}, {nominal['time']} (labels, not computed)",
        ),
    )
    for label, text in lines:
        print(f"  {label:<11}{text}")
    print("\nkeys that differ from the defaults:\n")
    print(to_yaml(config, only=_changed(config)), end="")
    return 0


def _changed(config: Config) -> list[str]:
    from ..config.schema import fields_info

    return [info.name for info in fields_info() if getattr(config, info.name) != info.default]


def _compare(names: list[str], as_json: bool) -> int:
    from ..config.budget import count_text, gb_text
    from ..config.declare import show
    from ..config.presets import ConfigPresets, preset_row
    from ..config.schema import fields_info

    rows = {name: preset_row(name) for name in names}
    configs = {name: ConfigPresets.get(name) for name in names}
    differing = [i.name for i in fields_info() if len({show(getattr(c, i.name)) for c in configs.values()}) > 1]
    if as_json:
        keys = {key: {name: getattr(configs[name], key) for name in names} for key in differing}
        common.print_json({"presets": list(rows.values()), "keys": keys})
        return 0
    numbers = (("active", "active_parameters"), ("total", "total_parameters"), ("embedding", "embedding_parameters"))
    table: list[tuple[str, ...]] = [(label, *(count_text(rows[n][key]) for n in names)) for label, key in numbers]
    table.append(("active share", *(f"{rows[n]['active_share']:.1%}" for n in names)))
    for label, key in (("weights", "weights_bytes"), ("train state", "training_state_bytes")):
        table.append((label, *(gb_text(rows[n][key]) for n in names)))
    table += [(key, *(show(getattr(configs[n], key)) for n in names)) for key in differing]
    print(common.table(table, ("", *names), right=range(1, len(names) + 1)))
    return 0
