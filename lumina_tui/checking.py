"""Checks of an edited configuration: findings of keys and rules, and the budget, by the functions of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lumina_engine.config.budget import budget
from lumina_engine.config.finding import Finding
from lumina_engine.config.machine import Machine
from lumina_engine.config.schema import Config, ConfigError
from lumina_engine.data.facts import look
from lumina_engine.data.size import train_tokens

from .form import INFOS, Form

Tokens = tuple[int | None, str]  # of the training data, and how they are known
_RANK = {"error": 0, "warning": 1, "info": 2}


@dataclass(frozen=True)
class Checked:
    """What a look at a form found. `figures` are those of `config.budget`; without them `reason` says why."""

    findings: tuple[Finding, ...]
    figures: dict[str, Any] | None
    reason: str


def checked(
    form: Form,
    machine: Machine | None,
    trial: tuple[str, str] | None = None,
    tokens: Tokens = (None, ""),
    data: Sequence[str] = (),
) -> Checked:
    """Check a form, with `trial` (field, text) as if it were entered. Pure arithmetic: a few milliseconds.

    `data` are lines on the data that stand beside the budget.
    """
    seen = form if trial is None else form.tried(*trial)
    findings = tuple(seen.findings(machine))
    if machine is None:
        return Checked(findings, None, "looking at this machine …")
    figures, reason = figures_of(seen.config(), machine, tokens, data)
    return Checked(findings, figures, reason)


def figures_of(
    config: Config, machine: Machine, tokens: Tokens = (None, ""), data: Sequence[str] = ()
) -> tuple[dict[str, Any] | None, str]:
    """The budget, or why there is none."""
    count, basis = tokens
    try:
        figures = budget(config, machine, train_tokens=count, tokens_basis=basis)
        return figures | ({"data": {"lines": list(data)}} if data else {}), ""
    except ConfigError as error:
        return None, str(error)
    except (ArithmeticError, ValueError):
        return None, "this shape has no budget: mend the errors first"


class DataLook:
    """Tokens of the training data, and what becomes of them in rows where they are prepared.

    Looked up again only when a key changes that they depend on. `look` reads the disk; use it in a thread.
    """

    def __init__(self) -> None:
        self._key: object = object()
        self._found: tuple[Tokens, list[str]] = ((None, ""), [])

    def of(self, config: Config) -> tuple[Tokens, list[str]] | None:
        """What is known for these data; None: `look` was not asked yet."""
        return self._found if self._key == _key(config) else None

    def look(self, config: Config) -> tuple[Tokens, list[str]]:
        """Look at the files, and at what was prepared of them."""
        found = train_tokens(config), data_lines(config)
        self._key, self._found = _key(config), found
        return found


def data_lines(config: Config, world: int = 1) -> list[str]:
    """Rows, padding, cuts and tasks of the prepared data, or why they are not known."""
    facts, why = look(config, world, _READ_BYTES)
    return [why] if facts is None else facts.lines()


_READ_BYTES = 200_000_000  # of data for a look beside the budget
# what the rows of a configuration depend on
_ROWS = (
    "train_data_path data_format tokenizer seq_length packing train_on seed data_cache_dir streaming_threshold_gb num_epochs "
    "max_steps batch_size gradient_accumulation_steps multi_task task_weights task_data_paths task_temperature task_max_epochs"
)


def _key(config: Config) -> str:
    return repr([getattr(config, name) for name in _ROWS.split()])


def worst_by_field(findings: Sequence[Finding]) -> dict[str, Finding]:
    """The worst finding of each field, shown below it: the first key of a finding is the one to change."""
    found: dict[str, Finding] = {}
    for finding in sorted(findings, key=lambda f: _RANK[f.severity]):
        if finding.keys and finding.keys[0] in INFOS:
            found.setdefault(finding.keys[0], finding)
    return found


def after_entry(form: Form, findings: Sequence[Finding]) -> list[Finding]:
    """What is known right after an entry, before the rules are checked again: refused values, and the rules of other keys."""
    bad = set(form.bad)
    return [*form.text_findings, *form.bad.values(), *(f for f in findings if _is_rule(form, f) and not bad & set(f.keys))]


def _is_rule(form: Form, finding: Finding) -> bool:
    return finding.code not in ("bad_value", "yaml") and finding not in form.text_findings


@dataclass(frozen=True)
class SectionMarks:
    """Counts of a section: changed fields, warnings, errors."""

    changed: int
    warnings: int
    errors: int

    @property
    def text(self) -> str:
        """`3* 1? 1!`, leaving out what is 0."""
        parts = ((self.changed, "*"), (self.warnings, "?"), (self.errors, "!"))
        return " ".join(f"{count}{mark}" for count, mark in parts if count)

    @property
    def role(self) -> str:
        return "bad" if self.errors else "warn" if self.warnings else "accent" if self.changed else "text"


def section_marks(form: Form, section: str, problems: Mapping[str, Finding]) -> SectionMarks:
    """The counts of one section."""
    names = [name for name, info in INFOS.items() if info.section == section]
    severities = [problems[name].severity for name in names if name in problems]
    return SectionMarks(sum(form.changed(n) for n in names), severities.count("warning"), severities.count("error"))
