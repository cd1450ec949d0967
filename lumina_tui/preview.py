"""What a configuration becomes: values in force, DeepSpeed JSON, the commands of the run and of its ranks. Plain Python."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lumina_engine.config.deepspeed import to_deepspeed
from lumina_engine.config.finding import Finding, has_errors
from lumina_engine.config.machine import Machine
from lumina_engine.config.resolve import TOKENIZER_IDS, model_config, resolve
from lumina_engine.config.schema import Config, ConfigError
from lumina_engine.run.directory import RunError
from lumina_engine.run.launch import rank_argv

from .form import Form
from .launching import train_argv
from .widgets.text_panel import Line


@dataclass(frozen=True)
class InForce:
    """The values in force on a machine; `reason` says why there are none, `deepspeed` is JSON text or says the same."""

    resolved: Config | None
    world: int
    deepspeed: str
    ranks: tuple[str, ...] = ()
    reason: str = ""


def in_force(config: Config, machine: Machine, findings: Sequence[Finding]) -> InForce:
    """Resolve a configuration as the engine will at the start."""
    if has_errors(findings):
        return InForce(None, 0, "not before the errors are mended", reason="not before the errors are mended")
    try:
        ids = TOKENIZER_IDS.get(config.tokenizer, model_config(config).vocab_rows)
        resolved = resolve(config, machine, tokenizer_vocab=ids)
        world = int(resolved.num_gpus) * resolved.num_nodes
        text = "use_deepspeed is false: plain torch"
        if config.use_deepspeed:
            text = json.dumps(to_deepspeed(resolved, world), indent=2)
        return InForce(resolved, world, text, tuple(rank_argv(resolved, Path("RUN"), world)))
    except (ConfigError, RunError) as error:
        return InForce(None, 0, str(error), reason=str(error))


def command(arguments: Sequence[str]) -> str:
    """The command for use without lumina, as one pastes it into a shell. It stays in the foreground."""
    words = train_argv(arguments)
    return shlex.join(["lumina-engine", *words[3:-2]])


def preview_lines(form: Form, machine: Machine | None, findings: Sequence[Finding]) -> list[Line]:
    """The exact command and what DeepSpeed gets, for the editor."""
    lines: list[Line] = [(("Command", "title"),), ((command(form.arguments()), "text"),)]
    if form.bad:
        lines.append(((f"without the refused values of {', '.join(form.bad)}", "warn"),))
    if machine is None:
        return [*lines, (("looking at this machine …", "dim"),)]
    found = in_force(form.config(), machine, findings)
    lines += [(("", "text"),), ((f"Ranks ({found.world})" if found.world else "Ranks", "title"),)]
    lines.append(((shlex.join(found.ranks) if found.ranks else found.reason, "text"),))
    lines += [(("", "text"),), (("deepspeed.json", "title"),)]
    return lines + [((text, "text"),) for text in found.deepspeed.splitlines()]
