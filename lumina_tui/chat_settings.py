"""How replies are asked for: mode, sampling, seed, trace. Kept from one session of `lumina` to the next. No widget in here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lumina_engine.chat.modes import DEFAULT_MODE, MODES, ChatError, parse_settings, sampling_for
from lumina_engine.chat.session import ChatSession

if TYPE_CHECKING:
    from .memory import Memory

MEANINGS = {
    "temperature": "0 to 10; 0 = likeliest",
    "top_p": "share kept; 1 = all",
    "top_k": "likeliest kept; 0 = all",
    "repetition_penalty": "0.1 to 10; 1 = off",
    "max_new_tokens": "longest reply",
    "seed": "none: new each reply",
    "trace": "probabilities, experts",
}


@dataclass
class ChatSettings:
    """What both panes use. `overrides` win over the mode's numbers; `seed` None draws one for each reply."""

    mode: str = DEFAULT_MODE
    overrides: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    trace: bool = True

    @classmethod
    def remembered(cls, memory: Memory) -> ChatSettings:
        """The settings of the last session, or the defaults for what cannot be used."""
        found = cls(mode=memory.get("chat.mode", DEFAULT_MODE))
        if found.mode not in MODES:
            found.mode = DEFAULT_MODE
        try:
            found.apply_text(memory.get("chat.settings", ""))
        except ChatError:  # written by another version: its bounds were others
            return cls(found.mode)
        return found

    def remember(self, memory: Memory) -> None:
        """Keep them for the next session."""
        memory.set("chat.mode", self.mode)
        memory.set("chat.settings", self.changes())

    @property
    def _seed(self) -> str:
        return f"seed={'none' if self.seed is None else self.seed}"

    def changes(self) -> str:
        """What differs from the mode's own, as `apply_text` reads it."""
        parts = [f"{name}={value}" for name, value in self.overrides.items()]
        return " ".join([*parts, *([self._seed] if self.seed is not None else []), *([] if self.trace else ["trace=off"])])

    def table(self) -> list[str]:
        """All settings with their values and what they mean, one a line."""
        values = {
            **sampling_for(self.mode, self.overrides).to_dict(),
            "seed": self.seed,
            "trace": "on" if self.trace else "off",
        }
        shown = {
            name: "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
            for name, value in values.items()
        }
        rows = [f"{name:<19}{shown[name]:<7} {meaning}" for name, meaning in MEANINGS.items()]
        return [*rows, "", f"The rest is as in mode {self.mode}. temperature=0.5 seed=7"]

    def text(self) -> str:
        """All settings as `apply_text` reads them."""
        values = sampling_for(self.mode, self.overrides).to_dict()
        return " ".join(
            [*(f"{name}={value}" for name, value in values.items()), self._seed, f"trace={'on' if self.trace else 'off'}"]
        )

    def apply_text(self, text: str) -> None:
        """Take settings over; what is not named goes back to the mode's own.

        Raises:
            ChatError: an unknown name or a value that cannot be; then nothing has changed.
        """
        words = text.split()
        traces = [word.partition("=")[2] for word in words if word.startswith("trace=")]
        if traces and traces[-1] not in ("on", "off"):
            raise ChatError(f"trace must be on or off, not {traces[-1]!r}", 2)
        rest = " ".join(word for word in words if not word.startswith("trace="))
        self.overrides, self.seed = parse_settings(self.mode, rest)
        self.trace = not traces or traces[-1] == "on"

    def wrong(self, text: str) -> str | None:
        """What is wrong with settings, or None."""
        try:
            ChatSettings(self.mode).apply_text(text)
        except ChatError as error:
            return str(error)
        return None

    def put_into(self, session: ChatSession) -> None:
        """A session uses them from its next reply on."""
        session.mode, session.overrides, session.seed, session.trace = self.mode, dict(self.overrides), self.seed, self.trace

    def take_from(self, session: ChatSession) -> None:
        """Follow a command or a loaded conversation that has changed the session's."""
        self.mode, self.overrides, self.seed = session.mode, dict(session.overrides), session.seed
