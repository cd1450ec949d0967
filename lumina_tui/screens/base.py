"""What all screens share, and how they are opened.

Screens are imported on first use. Their constructors take keyword arguments only, all optional, so that the number key alone
opens an empty screen that says what fills it:

    HomeScreen()                                                                    screens/home.py      1
    PresetsScreen(*, select: str | None = None)                                     screens/presets.py   2
    ConfigScreen(*, preset: str | None = None, path: Path | None = None,            screens/config.py    3
                 config: Config | None = None, origins: dict[str, str] | None = None)
    LaunchScreen(*, config: Config | None = None, origins: dict[str, str] | None = None,  screens/launch.py  4
                 preset: str | None = None, path: Path | None = None)
    MonitorScreen(*, run: str | Path | None = None)                                 screens/monitor.py   5
    CompareScreen(*, runs: Sequence[Path] | None = None)                            screens/compare.py   6
    ChatScreen(*, checkpoint: str | Path | None = None)                             screens/chat.py      7

The app keeps one instance of each. Opening it again with arguments calls `retarget(**arguments)`; if that returns False
(the default) the old instance is dropped and a new one built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual import on
from textual.binding import BindingType
from textual.content import Content
from textual.events import DescendantFocus, Mount
from textual.screen import Screen
from textual.widget import Widget

from ..actions import Action, bindings
from ..widgets.acts import Acts
from ..widgets.bars import KeyBar, TitleBar
from ..widgets.panel import Drawn, Panel, State

if TYPE_CHECKING:
    from textual.app import ComposeResult

    from lumina_engine.monitoring.record import Alert

    from ..terminal import Look, Palette

__all__ = ["Drawn", "LuminaScreen", "Panel", "State"]


class LuminaScreen(Acts, Screen[None], inherit_bindings=False):
    """Title line, content, key line. Subclasses set `scope`, `number`, `heading` and yield their panels in `content()`."""

    number: ClassVar[int] = 0
    heading: ClassVar[str] = ""
    smallest: ClassVar[tuple[int, int]] = (60, 15)  # below: one sentence says what the screen needs and has
    ALLOW_IN_MAXIMIZED_VIEW: ClassVar[str] = "TitleBar, KeyBar"
    BINDINGS: ClassVar[list[BindingType]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if cls.scope and "BINDINGS" not in cls.__dict__:
            cls.BINDINGS = list(bindings(cls.scope))
        super().__init_subclass__(**kwargs)

    def __init__(self) -> None:
        super().__init__()
        self.subject = ""
        self.state_word = ""
        self.badge = ""
        self.badge_role = "dim"
        self.alerts = 0
        self.critical = False
        self.ready = False
        self._held: Widget | None = None  # has the keys, or had them when it was hidden
        self._waiting: list[Callable[[], object]] = []

    def when_ready(self, work: Callable[[], object]) -> None:
        """Call `work` when the panels are there and shown: at once if they are."""
        if self.ready:
            self.call_after_refresh(work)
        else:
            self._waiting.append(work)

    @on(Mount)
    def _became_ready(self) -> None:
        self.ready = True
        while self._waiting:
            self.call_after_refresh(self._waiting.pop(0))

    # to override

    def content(self) -> Iterable[Widget]:
        """The widgets between first and last line."""
        return ()

    def retarget(self, **arguments: Any) -> bool:
        """Show something else in this instance. False: build a new one."""
        return False

    def place(self) -> dict[str, str | list[str]] | None:
        """The arguments (paths as text) with which the next session opens this screen; None: it opens the screen before."""
        return {}

    def watched(self) -> tuple[Path, Sequence[Alert]] | None:
        """The run that this screen watches, and those of its alerts that were not opened yet."""
        return None

    def footer_text(self, action: Action) -> str:
        """What the key line says about an action."""
        return action.short or action.title.lower()

    def tick(self) -> None:
        """Called `look.hz` times a second while this screen is on top: refresh what has changed, nothing else."""

    # frame

    @property
    def look(self) -> Look:
        return self.lumina.look

    @property
    def palette(self) -> Palette:
        return self.look.palette

    def compose(self) -> ComposeResult:
        yield TitleBar()
        yield from self.content()
        yield TooSmall()
        yield KeyBar()

    def set_frame(
        self,
        *,
        subject: str | None = None,
        state: str | None = None,
        badge: str | None = None,
        badge_role: str | None = None,
        alerts: int | None = None,
        critical: bool | None = None,
    ) -> None:
        """Change parts of the first line; what is None stays. Outside text may come as it is."""
        before = (self.subject, self.state_word, self.badge, self.badge_role, self.alerts, self.critical)
        self.subject = self.subject if subject is None else subject
        self.state_word = self.state_word if state is None else state
        self.badge = self.badge if badge is None else badge
        self.badge_role = self.badge_role if badge_role is None else badge_role
        self.alerts = self.alerts if alerts is None else alerts
        self.critical = self.critical if critical is None else critical
        if before != (self.subject, self.state_word, self.badge, self.badge_role, self.alerts, self.critical):
            for bar in self.query(TitleBar):
                bar.refresh()

    def refresh_keys(self) -> None:
        """Repaint the key line where something became possible or impossible."""
        for bar in self.query(KeyBar):
            bar.sync()

    def on_descendant_focus(self) -> None:
        self.refresh_keys()

    @on(DescendantFocus)
    def _hold(self, event: DescendantFocus) -> None:
        if _is_shown(event.widget):
            self._held = event.widget

    def keep_focus(self) -> None:
        """Give the keys back to the panel that had them when it was hidden (a small terminal, a run that starts)."""
        lost = self.focused is None or not _is_shown(self.focused)
        if lost and self._held is not None and self._held.is_attached and _is_shown(self._held):
            self._held.focus(scroll_visible=False)

    def on_screen_resume(self) -> None:
        for bar in self.query(TitleBar):
            bar.refresh()  # alerts of another screen may have been opened meanwhile
        if self.ready:
            self.tick()

    def on_resize(self) -> None:
        width, height = self.size
        self.set_class(width < 100 or height < 30, "-compact")
        self.set_class(width >= 160 and height >= 45, "-wide")
        self.set_class(width < self.smallest[0] or height < self.smallest[1], "-tiny")


def _is_shown(widget: Widget) -> bool:
    return all(node.display for node in widget.ancestors_with_self)


class TooSmall(Widget):
    """Stands in for the content when the terminal is too small for it."""

    DEFAULT_CSS = """
    TooSmall { display: none; height: 1fr; }
    .-tiny > TooSmall { display: block; }
    .-tiny > Panel, .-tiny > .content { display: none; }
    """
    SCOPED_CSS = False  # it hides what stands beside it

    def render(self) -> Content:
        needs = getattr(self.screen, "smallest", (60, 15))
        return Content(f"needs {needs[0]}x{needs[1]}, has {self.screen.size.width}x{self.screen.size.height}")
