"""How a configuration key is declared, and what its declaration tells everyone else.

A key is one annotated attribute of a section class with `key(...)` as its value. Python, YAML, the command line, the editor,
the JSON Schema and the documentation are all derived from that one declaration through `FieldInfo`.
"""

from __future__ import annotations

import math
import re
import types
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticUndefined

from lumina_engine.config.finding import nearest

Kind = Literal["int", "float", "bool", "choice", "text", "list", "mapping"]

_TRUE = frozenset({"true", "yes", "on", "y"})
_FALSE = frozenset({"false", "no", "off", "n"})
HINTS = ("write it in quotes", "control characters are not allowed")  # errors that the bounds of a key do not explain
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def key(
    default: Any,
    help: str,
    *,
    read_by: str,
    unit: str = "",
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    also: tuple[float, ...] = (),
    multiple_of: int | None = None,
    pattern: str | None = None,
    form: str = "",
    resume: bool = False,
) -> Any:
    """Declare one configuration key.

    `minimum`/`maximum` include the bound, `above`/`below` exclude it; `also` are single values allowed outside the bounds;
    `pattern` is a regular expression for the whole text and `form` says it in words; `resume` says whether a resumed run may
    change the key; `read_by` are the modules that read it, relative to `lumina_engine/`.
    """
    extra: dict[str, Any] = {"unit": unit, "resume_may_change": resume, "read_by": read_by}
    bounds = {"minimum": minimum, "exclusiveMinimum": above, "maximum": maximum, "exclusiveMaximum": below}
    extra |= {name: value for name, value in bounds.items() if value is not None}
    if also:
        extra["also"] = list(also)
    if multiple_of:
        extra["multipleOf"] = multiple_of
    if pattern:
        extra |= {"pattern": pattern, "form": form}
    if isinstance(default, dict | list):
        return Field(default_factory=default.copy, description=help, json_schema_extra=extra)
    return Field(default=default, description=help, json_schema_extra=extra)


@dataclass(frozen=True, slots=True)
class FieldInfo:
    """All that is known about one key. `choices` are its literal values (`auto` among them where it is allowed)."""

    name: str
    section: str
    kind: Kind
    type_text: str
    choices: tuple[Any, ...]
    nullable: bool
    minimum: float | None
    minimum_exclusive: bool
    maximum: float | None
    maximum_exclusive: bool
    also: tuple[float, ...]
    multiple_of: int | None
    pattern: str | None
    form: str
    unit: str
    help: str
    default: Any
    resume_may_change: bool
    read_by: str

    def requirement(self) -> str:
        """What a value must be, as the end of "must be …"."""
        nouns = {
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
            "text": "text",
            "list": "a list",
            "mapping": "a mapping",
        }
        words = [str(show(c)) for c in self.choices]
        if self.kind == "choice":
            return "one of " + ", ".join(words)
        if self.form:
            text = self.form
        elif self.kind == "list" and "text" in self.type_text:
            text = "text or a list of texts"
        else:
            text = nouns[self.kind]
        text += self._range_text()
        if self.multiple_of and self.multiple_of > 1:
            text += f", a multiple of {self.multiple_of}"
        extra = [show(a) for a in self.also] + [w for w in words if w not in {"true", "false"}]
        extra += ["null"] if self.nullable else []
        return text + (f", or {' or '.join(extra)}" if extra else "")

    def _range_text(self) -> str:
        low = None if self.minimum is None else show(self.minimum)
        high = None if self.maximum is None else show(self.maximum)
        if low is not None and high is not None and not self.minimum_exclusive and not self.maximum_exclusive:
            return f" from {low} to {high}"
        parts = []
        if low is not None:
            parts.append(f"above {low}" if self.minimum_exclusive else f"{low} or more")
        if high is not None:
            parts.append(f"below {high}" if self.maximum_exclusive else f"at most {high}")
        return (", " + " and ".join(parts)) if parts else ""

    def suggestion(self, value: Any) -> str:
        """What to set instead of a wrong `value`."""
        default = show(self.default)
        if self.choices and isinstance(value, str) and (near := nearest(value, [str(c) for c in self.choices])):
            return f"set {near}"
        if isinstance(value, int | float) and not isinstance(value, bool):
            bound = None
            if self.minimum is not None and value < self.minimum and not self.minimum_exclusive:
                bound = self.minimum
            elif self.maximum is not None and value > self.maximum and not self.maximum_exclusive:
                bound = self.maximum
            if bound is not None and show(bound) != default:
                return f"set {show(bound)} or {default}"
        return f"set {default}"


def show(value: Any) -> str:
    """A value as a person writes it in YAML: true, null, 3e-4, 200,000,000 with separators from 10,000 on."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return _float_text(value)
    if isinstance(value, list):
        return "[" + ", ".join(show(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {show(v)}" for k, v in value.items()) + "}"
    return str(value)


def _float_text(value: float) -> str:
    """A float that reads back as the same number, without needless digits: 0.01, 3e-4, 500,000."""
    if value.is_integer() and abs(value) < 1e15:
        return show(int(value))
    text = f"{value:.9g}"
    if abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.8e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return text if float(text) == value else repr(value)


def _members(annotation: Any) -> list[Any]:
    return list(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else [annotation]


def _kind(annotation: Any) -> tuple[Kind, str, tuple[Any, ...], bool]:
    """Kind, readable type, literal choices, nullable."""
    choices: list[Any] = []
    names: list[str] = []
    nullable = False
    for member in _members(annotation):
        origin = get_origin(member) or member
        if member is type(None):
            nullable = True
        elif origin is Literal:
            choices += get_args(member)
        else:
            names.append({int: "int", float: "float", bool: "bool", str: "text", list: "list", dict: "mapping"}[origin])
    kind: Kind = "choice" if not names else names[-1]  # type: ignore[assignment]
    if kind == "bool" and choices:
        kind, choices, names = "choice", [True, False, *choices], []
    shown = names + [show(c) for c in choices] + (["null"] if nullable else [])
    return kind, ", ".join(shown), tuple(choices), nullable


def field_info(name: str, section: str, field: Any) -> FieldInfo:
    """The `FieldInfo` of a pydantic field that `key` declared."""
    extra = field.json_schema_extra
    kind, type_text, choices, nullable = _kind(field.annotation)
    default = field.default_factory() if field.default is PydanticUndefined else field.default
    minimum = extra.get("exclusiveMinimum", extra.get("minimum"))
    maximum = extra.get("exclusiveMaximum", extra.get("maximum"))
    return FieldInfo(
        name=name,
        section=section,
        kind=kind,
        type_text=type_text,
        choices=choices,
        nullable=nullable,
        minimum=minimum,
        minimum_exclusive="exclusiveMinimum" in extra,
        maximum=maximum,
        maximum_exclusive="exclusiveMaximum" in extra,
        also=tuple(extra.get("also", ())),
        multiple_of=extra.get("multipleOf"),
        pattern=extra.get("pattern"),
        form=extra.get("form", ""),
        unit=extra["unit"],
        help=field.description,
        default=default,
        resume_may_change=extra["resume_may_change"],
        read_by=extra["read_by"],
    )


class Section(BaseModel):
    """Base of all configuration classes: unknown keys are refused, assignment validates, YAML's traps are undone."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )
    section_name: ClassVar[str] = ""

    @classmethod
    def infos(cls) -> dict[str, FieldInfo]:
        """The declarations of this class, by key."""
        owners = {name: base for base in reversed(cls.__mro__) for name in getattr(base, "__annotations__", {})}
        return {
            name: field_info(name, getattr(owners[name], "section_name", ""), field) for name, field in cls.model_fields.items()
        }

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: Any) -> Any:
        """Take a value as its writer meant it: `1e-4` as text is a number, `off` may arrive as false, 2024 may be a name."""
        field = cls.model_fields[info.field_name]
        kind, _, choices, _ = _kind(field.annotation)
        if isinstance(value, bool):
            if kind in ("int", "float", "text", "list") or (
                kind == "choice" and value not in [c for c in choices if c is value]
            ):
                if not value and "off" in choices:
                    return "off"
                raise ValueError("true and false are no value here")
            return value
        if isinstance(value, str):
            return _from_text(value, kind, choices)
        if isinstance(value, float) and kind in ("text", "list"):
            raise ValueError(HINTS[0])
        if isinstance(value, int) and kind in ("text", "list"):
            return str(value)
        if isinstance(value, tuple) and kind == "list":
            return list(value)
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _inside_bounds(cls, value: Any, info: Any) -> Any:
        extra = cls.model_fields[info.field_name].json_schema_extra
        assert isinstance(extra, dict)
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(value, extra)
        for text in _texts(value):
            if _CONTROL.search(text):
                raise ValueError(HINTS[1])
        pattern = extra.get("pattern")
        if pattern and isinstance(value, str) and not re.fullmatch(str(pattern), value):
            raise ValueError("does not match")
        return value


def _from_text(value: str, kind: Kind, choices: tuple[Any, ...]) -> Any:
    """A value given as text, as the kind of its key means it."""
    if value in choices or kind == "text":
        return value
    word = value.strip().lower()
    if kind in ("int", "float"):
        plain = word.replace("_", "")
        if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+", plain):
            plain = plain.replace(",", "")
        try:
            return int(plain) if re.fullmatch(r"[+-]?\d+", plain) else float(plain)
        except ValueError:
            return value
    if kind == "bool" or (kind == "choice" and any(c is True for c in choices)):
        return True if word in _TRUE else False if word in _FALSE else value
    if kind == "choice":
        return next((c for c in choices if str(c) == word), value)
    return value


def _check_number(value: float, extra: dict[str, Any]) -> None:
    """Raise ValueError if a number is outside its declared bounds."""
    if value in extra.get("also", ()):
        return
    if not math.isfinite(value):
        raise ValueError("not a finite number")
    inside = (
        value >= extra.get("minimum", -math.inf)
        and value <= extra.get("maximum", math.inf)
        and value > extra.get("exclusiveMinimum", -math.inf)
        and value < extra.get("exclusiveMaximum", math.inf)
    )
    if not inside:
        raise ValueError("out of bounds")
    step = extra.get("multipleOf")
    if step and value % step:
        raise ValueError(f"not a multiple of {step}")


def _texts(value: Any) -> list[str]:
    """Every text inside a value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [t for v in value for t in _texts(v)]
    if isinstance(value, dict):
        return [t for k, v in value.items() for t in (*_texts(k), *_texts(v))]
    return []
