"""What `lumina-engine report --moe` says about experts: from the log, and from two checkpoints on rows of the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from ..checkpoint.probe import ProbeRows, Routes
    from ..config.schema import Config
    from ..run.directory import RunDirectory


def routing(directory: RunDirectory, config: Mapping[str, Any] | None, rows: int) -> dict[str, Any]:
    """The diagnostics of `MoEOptimizationManager`, how far the load moved between the run's checkpoints, and, of `rows` rows
    through the newest checkpoint, what experts specialise in. What cannot be had is said in `left_out`."""
    from ..config.schema import Config
    from ..monitoring.log import read_records
    from ..monitoring.moe import MoEOptimizationManager, stability

    found: dict[str, Any] = {"status": "no_data", "left_out": []}
    if directory.metrics_path.is_file():
        manager = MoEOptimizationManager(Config(**(config or {}))).attach(directory)
        found |= manager.get_routing_diagnostics()
        if config is None:  # what is set is not known, so neither is what to change
            found["recommendations"] = []
        found["stability"] = stability(read_records(directory.metrics_path))
    if config is None or not rows:
        found["left_out"].append("specialisation: " + ("no configuration of the run" if rows else "--rows 0"))
        return found
    return found | _on_rows(directory, Config(**config), rows, found["left_out"])


def _on_rows(directory: RunDirectory, config: Config, rows: int, left_out: list[str]) -> dict[str, Any]:
    from ..checkpoint.files import CheckpointError
    from ..checkpoint.keep import committed_paths
    from ..data.facts import DataError
    from ..data.tokenizer import TokenizerError

    if not config.use_moe:
        left_out.append("specialisation: the model has no experts (use_moe = false)")
        return {}
    paths = committed_paths(directory.checkpoints)[:2]
    if not paths:
        left_out.append("specialisation: the run has no checkpoint yet")
        return {}
    try:
        from ..checkpoint.probe import probe_rows

        return _measured(paths, probe_rows(config, rows))
    except (CheckpointError, DataError, TokenizerError, OSError) as error:
        left_out.append(f"specialisation: {error}")
        return {}


def _measured(paths: list[Path], probed: ProbeRows) -> dict[str, Any]:
    from ..checkpoint.keep import told
    from ..checkpoint.loading import load_model
    from ..checkpoint.probe import routes_of
    from ..monitoring.specialisation import kept_experts, specialisation

    taken: list[Routes] = []
    for path in paths:
        model, tokenizer, _ = load_model(path)
        taken.append(routes_of(model, probed))
    new = taken[0]

    def text_of(token: int) -> str:
        return tokenizer.decode([token])

    found: dict[str, Any] = {
        "checkpoint": told(paths[0]),
        "rows": probed.rows,
        "held_out": probed.held_out,
        "specialisation": specialisation(
            new.layers, new.experts, new.experts_LNK, new.token_N, new.position_N, new.task_N, new.tasks, text_of
        ),
    }
    if len(taken) > 1 and taken[1].experts == new.experts:
        kept = kept_experts(taken[1].experts_LNK, new.experts_LNK, new.experts)
        found["kept_experts"] = {"from": told(paths[1]), "to": told(paths[0]), "layers": new.layers, **kept}
    return found


def lines(found: Mapping[str, Any]) -> list[str]:
    """The same in a few lines for a terminal."""
    return [*_logged(found), *_probed(found), *(f"left out  {text}" for text in found["left_out"])]


def _logged(found: Mapping[str, Any]) -> list[str]:
    if found["status"] == "no_data":
        return ["routing   no data: no record of experts in this run"]
    said = [
        f"routing   {found['status']}, score {found['expert_balance_score']:.2f} over {found['observations']} records, "
        f"{found['load_balance_trend']}; worst layer {found['worst_layer']}; "
        f"{len(found['dead_experts'])} experts without a token; {100 * found['dropped']:.1f} % dropped at worst"
    ]
    for row in found["stability"][-5:]:
        worst = max(row["moved"])
        said.append(
            f"moved     step {row['from_step']} to {row['to_step']}: {100 * worst:.1f} % of the load in the worst layer"
        )
    return said + [f"try       {text}" for text in found["recommendations"]]


def _probed(found: Mapping[str, Any]) -> list[str]:
    if "specialisation" not in found:
        return []
    from ..monitoring.routing_page import told_rows

    kind = "held-out" if found["held_out"] else "training"
    said = [
        f"measured  {found['specialisation']['tokens']:,} tokens of {found['rows']} {kind} rows through {found['checkpoint']}"
    ]
    for layer, name, bits, share, chance in told_rows(found["specialisation"]):
        said.append(f"told by   layer {layer}: {name}: {bits} bits above chance ({chance}), {share} of the choice")
    for layer in found["specialisation"]["layers"]:
        for pair in layer["pairs"][:1]:
            one, other = pair["experts"]
            said.append(
                f"together  layer {layer['layer']}: experts {one} and {other}, {pair['lift']:.2f} times as often as expected"
            )
    kept = found.get("kept_experts", {"layers": []})
    for i, layer in enumerate(kept["layers"]):
        said.append(
            f"kept      layer {layer}: {100 * kept['same'][i]:.1f} % of tokens have the same experts in {kept['from']} and "
            f"{kept['to']} ({100 * kept['chance'][i]:.1f} % by chance)"
        )
    return said
