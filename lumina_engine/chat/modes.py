"""The chat modes and the sampling settings behind them. No torch here: the terminal reads this table too."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType

DEFAULT_MODE = "standard"
MAX_NEW_TOKENS = 1_048_576  # the longest context a model here may have


class ChatError(Exception):
    """Something that ends a reply or a chat; the message is one line with its remedy.

    `exit_code` is what `lumina-engine` leaves with: 2 usage, 65 refused, 1 everything else.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, in the order of the steps: penalty, temperature, top-k, top-p, draw.

    temperature: divides the logits; 0 takes the likeliest token (greedy).
    top_p: smallest set of tokens whose probability reaches this share; 1 = all.
    top_k: number of likeliest tokens kept; 0 = all.
    repetition_penalty: divides positive and multiplies negative logits of tokens already in the text; 1 = off.
    max_new_tokens: longest reply, in tokens.

    Raises:
        ValueError: a value out of its bounds.
    """

    temperature: float = 0.8
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (0.0, 10.0),
            "top_p": (0.0, 1.0),
            "top_k": (0, 1_000_000),
            "repetition_penalty": (0.1, 10.0),
            "max_new_tokens": (1, MAX_NEW_TOKENS),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} must be a number from {low:,} to {high:,}, not {value!r}")
            if isinstance(low, int) and not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number from {low:,} to {high:,}, not {value!r}")
            if not low <= value <= high:
                raise ValueError(f"{name} must lie between {low:,} and {high:,}, not {value:,}")
        if self.top_p == 0:
            raise ValueError("top_p must be above 0; for the likeliest token only, set temperature 0")

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


SAMPLING_NAMES = tuple(field.name for field in fields(Sampling))

MODES: Mapping[str, Sampling] = MappingProxyType(
    {
        "standard": Sampling(temperature=0.8, top_p=0.9, top_k=50),
        "creative": Sampling(temperature=1.0, top_p=0.95, top_k=100),
        "analytical": Sampling(temperature=0.3, top_p=0.7, top_k=20),
        "precise": Sampling(temperature=0.1, top_p=0.5, top_k=10),
    }
)


def check_mode(mode: str) -> str:
    """The mode's name as it is written here.

    Raises:
        ChatError: there is no such mode; lists those that exist.
    """
    name = mode.strip().lower()
    if name in MODES:
        return name
    near = difflib.get_close_matches(name, MODES, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ChatError(f"unknown mode {mode.strip()!r}{hint}; modes: {', '.join(MODES)}", 2)


def sampling_for(mode: str, overrides: Mapping[str, float | None] | None = None) -> Sampling:
    """The mode's sampling with single values replaced; an override of None leaves the mode's value.

    Raises:
        ChatError: unknown mode or setting, or a value out of its bounds.
    """
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    unknown = [name for name in given if name not in SAMPLING_NAMES]
    if unknown:
        raise ChatError(f"unknown sampling setting {unknown[0]!r}; settings: {', '.join(SAMPLING_NAMES)}", 2)
    try:
        return replace(MODES[check_mode(mode)], **given)  # type: ignore[arg-type]
    except ValueError as error:
        raise ChatError(str(error), 2) from error


def overrides_of(mode: str, sampling: Sampling) -> dict[str, float]:
    """What differs from the mode's own numbers: the inverse of `sampling_for`."""
    base = MODES[check_mode(mode)].to_dict()
    return {name: value for name, value in sampling.to_dict().items() if value != base[name]}


def parse_settings(mode: str, text: str) -> tuple[dict[str, float], int | None]:
    """Overrides of a mode and the seed from `temperature=0.7 top_k=20 seed=none`.

    Raises:
        ChatError: an unknown name, a value that is no number, or one out of bounds.
    """
    found: dict[str, float | None] = {}
    seed: int | None = None
    for word in text.split():
        name, _, value = word.partition("=")
        if name == "seed" and value in ("none", ""):
            continue
        if name != "seed" and name not in SAMPLING_NAMES:
            raise ChatError(f"unknown setting {name!r}; settings: {', '.join(SAMPLING_NAMES)}, seed", 2)
        try:
            parsed: float = int(value) if value.lstrip("+-").isdecimal() else float(value)
        except ValueError:
            raise ChatError(f"{name}: {value!r} is no number", 2) from None
        if name != "seed":
            found[name] = parsed
        elif isinstance(parsed, int) and 0 <= parsed < 2**62:
            seed = parsed
        else:
            raise ChatError("seed must be a whole number from 0 on, or none", 2)
    return overrides_of(mode, sampling_for(mode, found)), seed
