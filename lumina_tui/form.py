"""The form model of the config editor: values, origins, problems, undo. Plain Python, no widget.

A value that its field refuses stays in the form as the text that was typed, with its problem, so that nothing typed is lost and
a configuration with errors can be written. `changed` always means: other than the preset (or the defaults without one).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lumina_engine.config import yaml_text
from lumina_engine.config.checks import check
from lumina_engine.config.declare import show
from lumina_engine.config.finding import Finding
from lumina_engine.config.loading import Layer, build, file_layer, merge, text_layer
from lumina_engine.config.presets import NAMES
from lumina_engine.config.schema import Config, ConfigError, FieldInfo, fields_info

if TYPE_CHECKING:
    from lumina_engine.config.machine import Machine

UNDO_STEPS = 200
DEFAULT_PRESET = "debug"  # what `lumina-engine train` takes without --preset and --config
SECTION_TITLES = {
    "model": "Model",
    "moe": "Experts",
    "training": "Training",
    "data": "Data",
    "deepspeed": "DeepSpeed",
    "run": "Run",
    "checkpoint": "Checkpoints",
    "monitoring": "Monitoring",
    "adaptive": "Adaptive",
}
INFOS: Mapping[str, FieldInfo] = {info.name: info for info in fields_info()}
_PRESET_MARK = "preset:"
# findings of a file that the form cannot hold: they are mended in the YAML view
TEXT_ONLY = frozenset({"yaml", "unknown_key", "wrong_section", "duplicate", "section"})


Stamp = tuple[int, int, int]  # of a file: time of its last change (ns), bytes, inode


@dataclass
class Document:
    """Where a configuration lives: its file, its values when it was last read or written, and the file's stamp then."""

    path: Path | None = None
    saved: Mapping[str, Any] = field(default_factory=dict)
    stamp: Stamp | None = None


@dataclass(frozen=True)
class Content:
    """One state of the form; undo keeps these. `values` has every key; refused ones hold the text that was typed.

    `text` is the text of a file that the fields cannot hold, until it is mended, and `text_findings` say why.
    """

    values: Mapping[str, Any]
    origins: Mapping[str, str]
    bad: Mapping[str, Finding] = field(default_factory=dict)
    preset: str | None = None
    text: str | None = None
    text_findings: tuple[Finding, ...] = ()
    document: Document = field(default_factory=Document, compare=False)


def stamp_of(path: Path | None) -> Stamp | None:
    """The stamp of a file; None if there is none that can be looked at."""
    try:
        found = None if path is None else path.stat()
    except OSError:
        return None
    return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)


@dataclass(frozen=True)
class Change:
    """A key that differs from the preset, both values as text."""

    name: str
    before: str
    after: str


def field_text(name: str) -> str:
    """What a field is found by: name, help and section."""
    return f"{name} {INFOS[name].help} {SECTION_TITLES[INFOS[name].section]}"


def parse_value(info: FieldInfo, text: str) -> Any:
    """What the text of a field means. Raises `yaml_text.YamlError` for bad flow YAML."""
    word = text.strip()
    if info.nullable and word.lower() in ("", "null", "~"):
        return None
    if info.kind == "text" or (info.kind == "list" and "text" in info.type_text and not word.startswith("[")):
        return word
    if info.kind in ("int", "float"):
        try:
            return int(word)
        except ValueError:
            return _number(word)
    if info.kind in ("list", "mapping"):
        return yaml_text.plain(yaml_text.parse(word)) if word else [] if info.kind == "list" else {}
    return word


def _number(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word


def edit_text(info: FieldInfo, value: Any) -> str:
    """A value as the text that a person edits; `parse_value` reads it back."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool):
        return show(value)
    if isinstance(value, int | float):
        return show(value).replace(",", "")
    return yaml_text.flow(value)


def check_value(info: FieldInfo, text: str, preset: str | None = None) -> tuple[Any, Finding | None]:
    """The value that a text means for one field, or the text itself with what is wrong: its advice names the preset's value."""
    try:
        value = parse_value(info, text)
        return getattr(Config(**{info.name: value}), info.name), None
    except yaml_text.YamlError as error:
        return text, Finding(
            "yaml", "error", (info.name,), f"{info.name} = {text}: {error}", error.fix or info.suggestion(None)
        )
    except ConfigError as error:
        found = replace(error.findings[0], where="")
        if found.code == "bad_value":
            known = replace(info, default=reference_values(preset)[info.name])
            found = replace(found, fix=known.suggestion(value))
        return text, found


class Form:
    """A configuration that is being edited. Every method leaves it in a sound state; none touches the disk but `save`."""

    def __init__(self, content: Content) -> None:
        """A form of its own; `content.document` must describe where the values come from (`new_document` makes one)."""
        self._content = content
        self._undo: list[Content] = []
        self._redo: list[Content] = []
        self.stamp = time.monotonic()  # of the newest edit
        self.pending: str | None = None  # text in the YAML view that was not taken over yet

    # where it comes from

    @classmethod
    def from_preset(cls, preset: str) -> Form:
        """A copy of a preset. Raises `ConfigError` for an unknown name."""
        loaded = merge(preset, None, [])
        return cls.from_config(loaded.config, loaded.origins, preset)

    @classmethod
    def from_config(cls, config: Config, origins: Mapping[str, str] | None = None, preset: str | None = None) -> Form:
        """A Config at hand. Without origins, values other than the preset's count as the user's."""
        values = config.to_dict(sectioned=False)
        base = reference_values(preset)
        default = "preset" if preset else "default"
        given = origins or {name: default if same(values[name], base[name]) else "you" for name in values}
        found = {name: given.get(name, "default") for name in values}
        return cls(Content(values, found, preset=preset, document=Document(saved=values)))

    @classmethod
    def from_file(cls, path: Path) -> Form:
        """A YAML file. Problems that a field can show are shown there; others leave the text in `text`, to be mended."""
        stamp = stamp_of(path)
        try:
            text = yaml_text.read_text(path)
        except yaml_text.YamlError:
            raise ConfigError(file_layer(path).findings) from None
        content = content_of(text_layer(text, str(path)), named_preset(text), text)
        return cls(replace(content, document=Document(path, content.values, stamp)))

    # reading

    @property
    def content(self) -> Content:
        """The present state."""
        return self._content

    @property
    def preset(self) -> str | None:
        return self._content.preset

    @property
    def path(self) -> Path | None:
        """The file that is edited, None while there is none."""
        return self._content.document.path

    @property
    def text(self) -> str | None:
        """The text of a file that the fields cannot hold: it is mended in the YAML view first."""
        return self._content.text

    @property
    def text_findings(self) -> tuple[Finding, ...]:
        return self._content.text_findings

    def disk_state(self) -> str:
        """How the file stands to what was read or written: same, changed or gone; same without a file. Looks at the disk."""
        document = self._content.document
        if document.path is None or document.stamp is None:
            return "same"
        now = stamp_of(document.path)
        return "gone" if now is None else "same" if now == document.stamp else "changed"

    @property
    def bad(self) -> Mapping[str, Finding]:
        """Problems of single values, by key."""
        return self._content.bad

    def value(self, name: str) -> Any:
        """The value, or the text that was typed if it is refused."""
        return self._content.values[name]

    def edit_text(self, name: str) -> str:
        return edit_text(INFOS[name], self.value(name))

    def shown(self, name: str) -> str:
        return show(self.value(name))

    def origin(self, name: str) -> str:
        """default, preset, file, cli or you."""
        return self._content.origins[name]

    def reference(self, name: str) -> Any:
        """The preset's value, or the default."""
        return reference_values(self.preset)[name]

    def changed(self, name: str) -> bool:
        return name in self.bad or not same(self.value(name), self.reference(name))

    def changes(self) -> list[Change]:
        """All keys that differ from the preset, in the order of the sections."""
        return [Change(n, show(self.reference(n)), self.shown(n)) for n in INFOS if self.changed(n)]

    @property
    def dirty(self) -> bool:
        """Whether it differs from what was loaded or last written."""
        saved = self._content.document.saved
        return any(not same(value, saved.get(name, value)) for name, value in self._content.values.items())

    def config(self) -> Config:
        """The Config of all values that are valid; those that are not stand at the preset's value."""
        values = {n: v for n, v in self._content.values.items() if n not in self.bad}
        return Config(**({n: self.reference(n) for n in self.bad} | values))

    def findings(self, machine: Machine | None = None, trial: tuple[str, str] | None = None) -> list[Finding]:
        """All problems: of single values first, then of the rules between keys. `trial` is a field's text not yet entered."""
        form = self if trial is None else self.tried(*trial)
        bad = list(form.bad.values())
        rules = [f for f in check(form.config(), None if bad else machine) if not form.bad.keys() & set(f.keys)]
        return [*self.text_findings, *bad, *rules]

    def tried(self, name: str, text: str) -> Form:
        """A form like this one with a text in one field; this one stays as it is."""
        other = Form(self._content)
        other.set_text(name, text)
        return other

    # changing

    def set_text(self, name: str, text: str) -> Finding | None:
        """Enter a text into a field; gives what is wrong with it. One undo step, none if nothing changes."""
        value, problem = check_value(INFOS[name], text, self.preset)
        self._put(name, value, problem)
        return problem

    def set_value(self, name: str, value: Any) -> None:
        """Enter a valid value."""
        self._put(name, value, None)

    @staticmethod
    def choices(name: str) -> list[Any]:
        """The possible values of a field that has choices or is true or false; empty for all others."""
        info = INFOS[name]
        return [True, False] if info.kind == "bool" else list(info.choices) if info.kind == "choice" else []

    def cycle(self, name: str, step: int) -> bool:
        """The next choice of a field that has choices. False: it has none."""
        choices = self.choices(name)
        if not choices:
            return False
        at = next((i for i, choice in enumerate(choices) if same(choice, self.value(name))), -1)
        self._put(name, choices[(at + step) % len(choices)], None)
        return True

    def reset(self, name: str) -> None:
        """Back to the preset's value."""
        origin = "default" if self.preset is None or self.reference(name) == INFOS[name].default else "preset"
        self._put(name, self.reference(name), None, origin)

    def load_preset(self, preset: str) -> None:
        """Take over a preset. One undo step."""
        self.load(Form.from_preset(preset))

    def load(self, other: Form) -> None:
        """Take over another form with its file. One undo step, which brings the earlier file back too."""
        self.pending = None
        self._push(other._content)

    def apply_yaml(self, text: str) -> list[Finding]:
        """Take over edited YAML: one undo step. Gives the problems that the form cannot hold; then nothing is taken over."""
        content = content_of(text_layer(text, "line"), named_preset(text) or self.preset, text)
        if content.text_findings:
            return list(content.text_findings)
        origins = {n: self.origin(n) if same(content.values[n], self.value(n)) else "you" for n in content.values}
        content = replace(content, origins=origins, document=self._content.document)
        if (
            self.text is not None
            or content.preset != self.preset
            or any(not same(content.values[n], self.value(n)) for n in content.values)
        ):
            self._push(content)
        self.pending = None
        return []

    def _put(self, name: str, value: Any, problem: Finding | None, origin: str = "you") -> None:
        if same(value, self.value(name)) and self.bad.get(name) == problem:
            return
        content = self._content
        bad = {n: f for n, f in content.bad.items() if n != name} | ({name: problem} if problem else {})
        self._push(replace(content, values={**content.values, name: value}, origins={**content.origins, name: origin}, bad=bad))

    def _push(self, content: Content) -> None:
        self._undo = [*self._undo[1 - UNDO_STEPS :], self._content]
        self._redo = []
        self._take(content)

    def _take(self, content: Content) -> None:
        self._content = content
        self.stamp = time.monotonic()

    def undo(self) -> str | None:
        """One step back; gives the key that changed (or "everything"), None if there is nothing to undo."""
        return self._step(self._undo, self._redo)

    def redo(self) -> str | None:
        """One undone step forward again."""
        return self._step(self._redo, self._undo)

    def _step(self, source: list[Content], target: list[Content]) -> str | None:
        if not source:
            return None
        before = self._content
        target.append(before)
        self._take(source.pop())
        names = [n for n in INFOS if not same(before.values[n], self.value(n))]
        return names[0] if len(names) == 1 else "everything"

    # out of it

    def to_yaml(self, full: bool = False) -> str:
        """YAML by section with the preset's name in the first line: keys that differ from defaults or preset, or all.

        A key that was set on purpose is written also where it equals the default: the file says what was meant.
        """
        sections: dict[str, dict[str, Any]] = {}
        for name, info in INFOS.items():
            if full or name in self.bad or self.value(name) != info.default or self.changed(name):
                sections.setdefault(info.section, {})[name] = (
                    _written(self.value(name)) if name in self.bad else self.value(name)
                )
        head = f"# {_PRESET_MARK} {self.preset}\n" if self.preset else ""
        errors = sum(f.severity == "error" for f in self.findings())
        if errors:
            head += (
                f"# {errors} error{'s' if errors > 1 else ''}: cannot be launched until mended (`lumina-engine config check`)\n"
            )
        return head + (yaml_text.dump(sections) if sections else "")

    def save(self, path: Path) -> Path:
        """Write the YAML, problems included, and go on in that file. Raises OSError."""
        yaml_text.write_atomic(path, self.text if self.text is not None else self.to_yaml())
        document = self._content.document
        document.path, document.saved, document.stamp = path, self._content.values, stamp_of(path)
        return path

    def arguments(self) -> list[str]:
        """The words of `lumina-engine train` that give exactly this configuration (without a name for the run)."""
        words, base = self._base()
        config = self.config().to_dict(sectioned=False)
        return words + [f"{n}={_word(v)}" for n, v in config.items() if not same(v, base[n])]

    def _base(self) -> tuple[list[str], Mapping[str, Any]]:
        """The file or preset that the command starts from, and its values; a file with errors is no start.

        Without either the command takes a preset by itself, so that preset is named.
        """
        if self.path is not None and self.path.exists():
            try:
                return ["--config", str(self.path)], merge(None, self.path, []).config.to_dict(sectioned=False)
            except ConfigError:
                pass
        preset = self.preset or DEFAULT_PRESET
        return ["--preset", preset], reference_values(preset)


def _written(text: str) -> Any:
    """A refused text as YAML has it: 99999 as a number, what is no YAML in quotes."""
    try:
        value = yaml_text.plain(yaml_text.parse(text))
    except yaml_text.YamlError:
        return text
    return text if value is None else value


def _word(value: Any) -> str:
    """A value as the command line takes it."""
    return show(value).replace(",", "") if isinstance(value, int | float) else yaml_text.flow(value)


def same(one: Any, other: Any) -> bool:
    """Equal and of the same type: true is not 1, and the text "3" is not the number 3."""
    return type(one) is type(other) and one == other


@cache
def reference_values(preset: str | None) -> Mapping[str, Any]:
    """Every key's value in a preset, or by default."""
    config = Config() if preset is None else merge(preset, None, []).config
    return MappingProxyType(config.to_dict(sectioned=False))


def named_preset(text: str) -> str | None:
    """The preset that a written configuration names in its first line."""
    first = text.split("\n", 1)[0]
    name = first.removeprefix("#").strip().removeprefix(_PRESET_MARK).strip()
    return name if first.startswith("#") and _PRESET_MARK in first and name in NAMES else None


def content_of(layer: Layer, preset: str | None, text: str = "") -> Content:
    """The form's content for the keys of a file; values that a field refuses stay as text with their problem.

    `text` is kept in it where the layer has problems that no field can show.
    """
    config, findings = build(layer.values, layer.where)
    values = config.to_dict(sectioned=False)
    bad: dict[str, Finding] = {}
    for finding in findings:
        name = finding.keys[0]
        bad[name] = finding
        given = layer.values[name]
        values[name] = given if isinstance(given, str) else yaml_text.flow(given)
    origins = {name: "file" if name in layer.values else "default" for name in values}
    unfit = tuple(f for f in layer.findings if f.code in TEXT_ONLY)
    return Content(values, origins, bad, preset, text if unfit else None, unfit)
