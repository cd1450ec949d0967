"""The one YAML loader of Lumina: safe, small, with line numbers.

It reads scalars as their writer meant them (YAML 1.2): `1e-4` is a number; `off`, `no`, `2024-01-01` and `010` are text.
Only plain data comes out; tags for other types, deep nesting, many aliases and duplicate keys are refused.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_BYTES = 1 << 20
MAX_ALIASES = 16
MAX_DEPTH = 16
MAX_NODES = 20_000

_TOO_LARGE = "too large or refers to itself"
_PREFIX = "tag:yaml.org,2002:"
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+|0o[0-7_]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)|[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
)


class YamlError(ValueError):
    """A text that is no acceptable YAML. `line` counts from 1; 0 means the text as a whole."""

    def __init__(self, message: str, line: int = 0, fix: str = "") -> None:
        super().__init__(message)
        self.line = line
        self.fix = fix


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of a mapping, the line where it stands, and its value; a value that is a mapping is an `Entries`."""

    key: str
    value: Any
    line: int


class Entries(list[Entry]):
    """A mapping, in the order of its lines."""


class _Loader(yaml.SafeLoader):
    """PyYAML's composer with our resolvers and caps; values are built by `_value`, never by PyYAML's constructor."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._aliases = 0
        self._budget = _budget()

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            self._aliases += 1
            if self._aliases > MAX_ALIASES:
                raise YamlError(
                    f"more than {MAX_ALIASES} aliases", self.peek_event().start_mark.line + 1, "write the values out"
                )
        is_key = isinstance(parent, MappingNode) and index is None  # as in `_value`, keys are not counted
        if not is_key and next(self._budget, None) is None:
            raise YamlError(_TOO_LARGE, self.peek_event().start_mark.line + 1)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise YamlError(f"nested deeper than {MAX_DEPTH} levels", self.peek_event().start_mark.line + 1)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either YAML 1.1 or this loader would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_PREFIX + _name, re.compile(f"^(?:{_pattern})$"), _first)
    _Dumper.add_implicit_resolver(_PREFIX + _name, re.compile(f"^(?:{_pattern})$"), _first)


def read_text(path: Path) -> str:
    """The text of a YAML file. Raises `YamlError` for what cannot be read: missing, no regular file, too large, no UTF-8."""
    try:
        if not path.is_file():
            raise YamlError(
                "is a folder" if path.is_dir() else "no such file" if not path.exists() else "is not a regular file"
            )
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, YamlError):
            raise
        raise YamlError(getattr(error, "strerror", None) or str(error)) from None
    if len(data) > MAX_BYTES:
        raise YamlError("larger than 1 MiB, which is no configuration")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlError("is not UTF-8 text", data[: error.start].count(b"\n") + 1) from None


def parse(text: str) -> Any:
    """The value of a YAML document; mappings come as `Entries`, an empty document as None.

    Raises:
        YamlError: bad syntax, several documents, unknown tags, more than the caps allow.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise YamlError("larger than 1 MiB, which is no configuration")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = mark.line + 1 if mark else text[: getattr(error, "position", 0) or 0].count("\n") + 1
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        raise YamlError(f"not YAML: {reason}", line, _syntax_fix(str(reason))) from None
    finally:
        if loader is not None:
            loader.dispose()
    return None if node is None else _value(node, _budget(), 0)


def _syntax_fix(reason: str) -> str:
    if "\\t" in reason or "'\t'" in reason:
        return "indent with spaces, not tabs"
    if "mapping values are not allowed" in reason:
        return "write one `key: value` on a line, with the same indent as its neighbours"
    return ""


def _budget() -> Iterator[int]:
    return iter(range(MAX_NODES))


def _value(node: Node, budget: Iterator[int], depth: int) -> Any:
    """Plain data of a node. Aliases are expanded, so both the depth and the number of nodes are bounded here."""
    line = node.start_mark.line + 1
    if next(budget, None) is None or depth > MAX_DEPTH:
        raise YamlError(_TOO_LARGE, line)
    tag = node.tag.removeprefix(_PREFIX) if node.tag.startswith(_PREFIX) else node.tag
    if isinstance(node, ScalarNode) and tag in ("str", "int", "float", "bool", "null"):
        return _scalar(tag, node.value, line)
    if isinstance(node, SequenceNode) and tag == "seq":
        return [plain(_value(child, budget, depth + 1)) for child in node.value]
    if isinstance(node, MappingNode) and tag == "map":
        return _mapping(node, budget, depth)
    raise YamlError(f"the tag {node.tag.replace(_PREFIX, '!!')} is not allowed", line, "write plain values only")


def _mapping(node: MappingNode, budget: Iterator[int], depth: int) -> Entries:
    entries = Entries()
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, ScalarNode):
            raise YamlError("a key must be a word", line)
        name = key_node.value
        if name in seen:
            raise YamlError(f"{name} is given twice, first in line {seen[name]}", line, "remove one of them")
        seen[name] = line
        entries.append(Entry(name, _value(value_node, budget, depth + 1), line))
    return entries


def _scalar(tag: str, text: str, line: int) -> Any:
    try:
        if tag == "null":
            return None
        if tag == "bool":
            return text.lower() == "true"
        if tag == "int":
            return int(text.replace("_", ""), 0 if text.lstrip("+-")[:2] in ("0x", "0o") else 10)
        if tag == "float":
            return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        raise YamlError(f"{text[:40]} is not a number", line) from None
    return text


def plain(value: Any) -> Any:
    """A parsed value with its mappings as dicts, without line numbers."""
    if isinstance(value, Entries):
        return {entry.key: plain(entry.value) for entry in value}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def dump(values: Any) -> str:
    """YAML text that this loader and any YAML 1.1 loader read back as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)


def write_atomic(path: Path, text: str) -> Path:
    """Write a text file so that a reader sees the old or the new one, never a part. Folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        os.chmod(name, mode)  # noqa: PTH101  (the name is a string from mkstemp)
        os.replace(name, path)  # noqa: PTH105
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def flow(value: Any) -> str:
    """A value on one line, as `key=value` words and the editor take it: 3.0e-04, [a, b], {code: 0.3}."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 30, default_flow_style=True)
    return text.removesuffix("...\n").strip()
