"""Which screens there are, and how one comes to the top: one instance of each, imported on first use."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .talking import Talks

if TYPE_CHECKING:
    from .screens.base import LuminaScreen

# number -> module below lumina_tui.screens, class. A screen whose module is not there is not offered.
SCREENS: Mapping[int, tuple[str, str]] = {
    1: ("home", "HomeScreen"),
    2: ("presets", "PresetsScreen"),
    3: ("config", "ConfigScreen"),
    4: ("launch", "LaunchScreen"),
    5: ("monitor", "MonitorScreen"),
    6: ("compare", "CompareScreen"),
    7: ("chat", "ChatScreen"),
    8: ("data", "DataScreen"),
    9: ("doctor", "DoctorScreen"),
}


class Opens(Talks, inherit_bindings=False):
    """The part of the application that opens screens and remembers the way back."""

    def __init__(self) -> None:
        super().__init__()
        self._screens: dict[int, LuminaScreen] = {}
        self._back: list[int] = []

    def has_screen(self, number: int) -> bool:
        """Whether screen `number` exists in this version."""
        if number in self._screens:
            return True
        entry = SCREENS.get(number)
        return entry is not None and importlib.util.find_spec(f"lumina_tui.screens.{entry[0]}") is not None

    def _make(self, number: int, **arguments: Any) -> LuminaScreen:
        module, name = SCREENS[number]
        screen: LuminaScreen = getattr(importlib.import_module(f"lumina_tui.screens.{module}"), name)(**arguments)
        self._screens[number] = screen
        self.install_screen(screen, f"screen-{number}")
        return screen

    def open_screen(self, number: int, **arguments: Any) -> LuminaScreen | None:
        """Show screen `number`; with `arguments`, show that subject in it. Layers above the current screen are closed."""
        if not self.has_screen(number):
            self.notice(f"this version has no screen {number}", "warning")
            return None
        self._close_layers()
        current = getattr(self.screen, "number", 0)
        known = self._screens.get(number)
        if known is not None and arguments and not known.retarget(**arguments):
            self._forget(number)
            known = None
        screen = known or self._make(number, **arguments)
        if screen is not self.screen:
            if current and current != number:
                self._back = [*(n for n in self._back if n not in (number, current)), current]
            self._show(screen)
        return screen

    def _close_layers(self) -> None:
        while len(self.screen_stack) > 1 and not getattr(self.screen, "number", 0):
            self.pop_screen()

    def _show(self, screen: LuminaScreen) -> None:
        """Bring a screen to the top: the first one stays at the bottom of the stack, one other may lie on it."""
        if screen is self.screen_stack[0]:
            self.pop_screen()
        elif len(self.screen_stack) == 1:
            self.push_screen(screen)
        else:
            self.switch_screen(screen)

    def _forget(self, number: int) -> None:
        """Drop a screen, so that the next one of its number is built anew."""
        screen = self._screens.pop(number)
        self.uninstall_screen(screen)
        if screen not in self.screen_stack and screen.is_attached:
            screen.remove()

    def open_home(self) -> None:
        self.open_screen(1)

    def open_presets(self, select: str | None = None) -> None:
        self.open_screen(2, **({"select": select} if select else {}))

    def open_config(
        self,
        *,
        preset: str | None = None,
        path: Path | None = None,
        config: Any = None,
        origins: Mapping[str, str] | None = None,
    ) -> None:
        """Edit a preset, a file, or a Config at hand (with the origin of each value)."""
        given = {"preset": preset, "path": path, "config": config, "origins": origins}
        self.open_screen(3, **{key: value for key, value in given.items() if value is not None})

    def open_field(self, name: str) -> None:
        """Edit the configuration at hand (or the default preset, if there is none), with the cursor on a field."""
        screen: Any = self.open_screen(3)
        if screen is not None and screen.form is None:
            screen = self.open_screen(3, preset="debug")
        screen.when_ready(lambda: screen.go_to_field(name))

    def open_launch(
        self,
        *,
        config: Any = None,
        origins: Mapping[str, str] | None = None,
        preset: str | None = None,
        path: Path | None = None,
    ) -> None:
        """Review a configuration and start it."""
        given = {"config": config, "origins": origins, "preset": preset, "path": path}
        self.open_screen(4, **{key: value for key, value in given.items() if value is not None})

    def open_monitor(self, run: str | Path) -> None:
        """Watch a run (a name below the root, or a path)."""
        self.open_screen(5, run=run)

    def open_compare(self, runs: Sequence[Path] = ()) -> None:
        """Lay runs over each other (at most eight); without any, offer those below the root."""
        self.open_screen(6, **({"runs": tuple(runs)} if runs else {}))

    def open_chat(self, checkpoint: str | Path) -> None:
        """Talk to a checkpoint: RUN, RUN@best, RUN@step-000123 or a path."""
        self.open_screen(7, checkpoint=checkpoint)
