"""The application object: look, screens, routing, notices. Screens and feeds do the work."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textual.driver import Driver
from textual.filter import ANSIToTruecolor, LineFilter, NoColor
from textual.screen import Screen
from textual.widget import Widget

from . import actions, session
from .alarms import Alarms, run_command
from .defects import Defects
from .departure import Departure
from .keymap import load_keymap
from .memory import DELAY_S, Memory
from .opening import Opens
from .pace import Pace, queued_writes
from .places import config_dir, state_dir
from .settings import Settings, load_settings
from .talking import Talks
from .terminal import AsciiFilter, ControlFilter, Look, detect
from .themes import SKINS, Skin, skin_for
from .typeahead import TypeAhead
from .widgets.acts import Acts
from .widgets.bars import TitleBar
from .widgets.panel import Panel
from .wire import Wire

if TYPE_CHECKING:
    from .helping import Line
    from .launching import Launched

AHEAD, AHEAD_S = "lumina_tui.screens.monitor", 1.0  # what is imported while the first screen is being read, and after how long


@dataclass(frozen=True)
class Start:
    """What to open first. At most one of the fields is set; nothing set opens Home."""

    run: Path | None = None
    config: Path | None = None
    checkpoint: Path | None = None
    preset: str | None = None  # start a run from it, then open its monitor
    resume: bool = False  # where the session before ended, if that is still there


class LuminaApp(Acts, Opens, Talks, TypeAhead, Defects, inherit_bindings=False):
    """The full-screen program. Killing it at any moment changes no run.

    Args:
        runs_root: folder that holds the run directories.
        look: what the terminal can show; detected from the environment if not given.
        readonly: refuse every action that changes a run or writes a file.
        start: what to open first.
        settings: the user's; read from settings.yaml if not given.
    """

    CSS_PATH = "app.tcss"
    TITLE = "lumina"
    ENABLE_COMMAND_PALETTE = False  # its own palette finds the registry's actions
    BINDINGS = list(actions.bindings("app"))
    NOTIFICATION_TIMEOUT = 6
    scope = "app"

    def __init__(
        self,
        runs_root: str | Path = "runs",
        *,
        look: Look | None = None,
        readonly: bool = False,
        start: Start | None = None,
        settings: Settings | None = None,
    ) -> None:
        problems: tuple[str, ...] = ()
        if settings is None:
            settings, problems = load_settings(config_dir() / "settings.yaml")
        self.settings = settings
        self.look = look or detect(os.environ)
        self.memory = Memory(state_dir() / "session.json", readonly=readonly, wake=self._remember_soon)
        self.skin = skin_for(self._wanted_theme(), self.look.colours, self.look.light)
        self.wire = Wire()
        super().__init__()
        self.runs_root = Path(runs_root)
        self.readonly = readonly
        self.exports_folder = Path(settings.exports).expanduser()
        self.start = start or Start()
        self._ticking = False
        self.pace = Pace(self.look.hz)
        self.alarms = Alarms(settings.alert_command)
        self.open_alerts = 0  # critical ones of watched runs that are not on top
        self._tasks: set[asyncio.Task[Any]] = set()
        self.keys = load_keymap(config_dir() / "keys.yaml")
        self.set_keymap(self.keys.for_textual())
        self.problems = [text for text in (self.memory.problem, *problems, *self.keys.problems) if text]
        self.animation_level = "none"
        for skin in SKINS.values():
            if theme := skin.theme():
                self.register_theme(theme)
        if self.look.ascii:
            self.add_class("-ascii")
        self._wear(self.skin)

    # terminal

    def _wanted_theme(self) -> str:
        """The theme chosen in the palette, as long as the setting is the one that it was chosen over."""
        setting = self.settings.theme
        kept = self.memory.get("app.theme", {"over": "", "chosen": ""})
        return kept.get("chosen", setting) if kept.get("over") == setting else setting

    def choose_theme(self, name: str) -> None:
        """Change to a theme, now and in later sessions."""
        self.memory.set("app.theme", {"over": self.settings.theme, "chosen": name})
        self._wear(SKINS[name])
        for screen in self.screen_stack:
            for widget in screen.walk_children(Widget):
                widget.refresh()

    def _wear(self, skin: Skin) -> None:
        self.skin = skin
        self.look = replace(self.look, palette=skin.palette, ansi=skin.ansi)
        self._line_filters: list[LineFilter] = [ControlFilter()]
        if self.look.ascii:
            self._line_filters.append(AsciiFilter())
        self.theme = skin.textual
        if not skin.ansi:
            self._line_filters.append(ANSIToTruecolor(self.ansi_theme))
        elif not self.look.colours:
            self._line_filters.append(NoColor())

    def get_driver_class(self) -> type[Driver]:
        """Textual's driver for this terminal, with its bytes counted."""
        return self.wire.counting(super().get_driver_class())

    def get_line_filters(self) -> Sequence[LineFilter]:
        """Filters over every line that leaves: control characters always, then ASCII and colour as the terminal needs."""
        return self._line_filters

    def get_theme_variable_defaults(self) -> dict[str, str]:
        """Colours that our style sheets use beyond Textual's."""
        return self.skin.variables()

    # start and end

    def get_default_screen(self) -> Screen[Any]:
        """The first screen, chosen by the command line, so that nothing else is built before the first paint."""
        start = self.start
        if start.run is not None and self.has_screen(5):
            return self._make(5, run=start.run)
        if start.config is not None and self.has_screen(3):
            return self._make(3, path=start.config)
        if start.checkpoint is not None and self.has_screen(7):
            return self._make(7, checkpoint=start.checkpoint)
        place = session.restored(self.memory, self.runs_root) if start.resume else None
        if place is not None and self.has_screen(place.number):
            return self._make(place.number, **place.arguments)
        return self._make(1)

    def on_mount(self) -> None:
        self.set_interval(1 / self.look.hz, self._tick)
        if not self.is_headless:
            loop = asyncio.get_running_loop()
            Departure(lambda: loop.call_soon_threadsafe(self.exit), self.memory.flush).install()
            self.set_timer(AHEAD_S, lambda: self.spawn(asyncio.to_thread(importlib.import_module, AHEAD)))
        for problem in self.problems:
            self.notice(problem, "warning", timeout=20)
        if self.start.preset is not None:
            self.spawn(self.start_preset(self.start.preset))

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        """Run a coroutine beside the screens. Its failure is shown as a notice, never lost."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)

        def done(finished: asyncio.Task[Any]) -> None:
            self._tasks.discard(finished)
            if not finished.cancelled() and finished.exception() is not None and self.is_running:
                self.notice(f"{type(finished.exception()).__name__}: {finished.exception()}", "error")

        task.add_done_callback(done)
        return task

    async def on_unmount(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        self._remember()

    def _remember_place(self) -> None:
        """Keep which screen is shown, and of what."""
        screen = self._screens.get(getattr(self.screen, "number", 0))
        subject = screen.place() if screen is not None else None
        if screen is not None and subject is not None:
            session.remember(self.memory, self.runs_root, screen.number, subject)

    def _watch_alerts(self) -> None:
        """Ring once for each new critical alert of a watched run, on whatever screen; run the user's command."""
        before, self.open_alerts = self.open_alerts, 0
        for screen in self._screens.values():
            run, alerts = screen.watched() or (None, ())
            if run is None:
                continue
            on_top = screen is self.screen
            fresh = self.alarms.look(run, alerts)
            for alert in fresh[-3:]:
                self.notice(f"{run.name}: {alert.severity} {alert.code}: {alert.message}", "error", toast=not on_top)
            if fresh:
                self.bell()
            if not on_top:
                self.open_alerts += sum(alert.severity == "critical" for alert in alerts)
        if self.open_alerts != before:
            for bar in self.screen.query(TitleBar):
                bar.refresh()
        message = self.alarms.due()
        if message is not None:
            self.spawn(self._run_alert_command(message))

    async def _run_alert_command(self, message: dict[str, Any]) -> None:
        wrong = await run_command(self.alarms.command, message)
        if wrong:
            self.notice(wrong, "warning", timeout=20)

    def _remember_soon(self) -> None:
        self.set_timer(DELAY_S, self._remember)

    def _remember(self) -> None:
        """Write what is to be remembered: a few KiB, once a second at most."""
        try:
            self.memory.flush()
        except OSError as error:
            self.notice(f"{self.memory.path}: {error.strerror or error}; this session will not be remembered", "warning")

    def _tick(self) -> None:
        # a slow tick drops the next one instead of piling up; at the end there is no screen any more
        if self._ticking or not self.is_running or not self.screen_stack:
            return
        if not self.pace.due():
            return
        self._ticking = True
        began = time.perf_counter()
        try:
            screen: Any = self.screen
            if getattr(screen, "ready", False):
                screen.tick()
                screen.keep_focus()
            self._remember_place()
            self._watch_alerts()
        finally:
            self._ticking = False
        self.pace.note(time.perf_counter() - began, queued_writes(self))

    @property
    def rate(self) -> float:
        """Panel repaints a second at present."""
        return self.pace.rate

    # starting runs

    async def start_run(self, arguments: Sequence[str]) -> Launched:
        """Start `lumina-engine train` with these arguments, detached.

        Raises:
            LaunchError: with the engine's reason.
        """
        from .launching import LaunchError, launch

        if self.readonly:
            raise LaunchError("--readonly: nothing is started")
        return await launch(arguments, self.runs_root)

    async def start_preset(self, preset: str) -> None:
        """Start a run from a preset as it is, then watch it; a refusal is shown."""
        await self._start_and_watch(["--preset", preset], f"starting {preset} …")

    async def resume_run(self, name: str) -> None:
        """Go on with a run from its newest verified checkpoint, then watch it; a refusal is shown."""
        await self._start_and_watch(["--run", name, "--resume"], f"resuming {name} …")

    async def _start_and_watch(self, arguments: Sequence[str], said: str) -> None:
        from .launching import LaunchError

        self.notice(said)
        try:
            launched = await self.start_run(arguments)
        except LaunchError as error:
            self.notice(str(error), "error", timeout=20)
            return
        self.open_monitor(launched.path)

    # actions

    def why_not(self, action_id: str) -> str | None:
        if action_id.startswith("app.screen_"):
            number = int(action_id.rpartition("_")[2])
            return None if self.has_screen(number) else "this version has no such screen"
        if action_id == "app.maximise" and self.screen.maximized is None:
            if self.focused_panel() is None:
                return "no panel has the focus: Tab moves to one"
            if sum(panel.is_on_screen for panel in self.screen.query(Panel)) < 2:
                return "it is the only panel here"
        if action_id == "app.jump" and not self.screen.focus_chain:
            return "nothing on this screen can have the focus"
        return None

    def action_screen(self, number: int) -> None:
        if getattr(self.screen, "number", 0) != number:
            self.open_screen(number)

    async def action_back(self) -> None:
        if self.screen.maximized is not None:
            self.screen.minimize()
        elif not getattr(self.screen, "number", 0):
            self.pop_screen()
        elif self._back:
            number = self._back.pop()
            self.open_screen(number)
            self._back = [n for n in self._back if n != number]
        elif getattr(self.screen, "number", 0) != 1:
            self.open_home()
            self._back = []

    def action_help(self) -> None:
        from .helping import screen_help

        screen: Any = self.screen
        self._read(f"Help: {screen.heading}", screen_help(screen))

    def open_help(self, page: str) -> None:
        """Show a page of help by its name in `helping.PAGES`."""
        from .helping import PAGES

        title, lines = PAGES[page]
        self._read(f"Help: {title}", lines(self))

    def _read(self, heading: str, lines: Sequence[Line]) -> None:
        """Show lines in a layer, wrapped with their beginnings to the left."""
        from .helping import hanging
        from .screens.sheets import lines_sheet
        from .widgets.text_panel import wrapped

        width = min(110, self.size.width * 96 // 100) - 8  # of the text in a sheet: its frame, padding and scroll bar are 8
        shown = [part for line in lines for part in wrapped(line, width, indent=hanging(line, width))]
        self.push_screen(lines_sheet(heading, shown))

    def action_notices(self) -> None:
        from textual.content import Content

        from .screens.dialogs import Sheet

        lines = [
            f"{time.strftime('%H:%M:%S', time.localtime(n.t))}  {n.severity:<11}  {n.text}" for n in reversed(self.notices)
        ]
        self.push_screen(Sheet("Notices", Content("\n".join(lines) or "Nothing was said yet.")))

    def action_palette(self) -> None:
        from .screens.palette import Palette

        screen: Any = self.screen
        self.push_screen(Palette(screen))

    def action_jump(self) -> None:
        from .screens.jump import Jump

        below = self.screen

        def focus(widget: Widget | None) -> None:
            if widget is not None and widget.is_attached:
                below.set_focus(widget)

        self.push_screen(Jump(below), focus)

    def focused_panel(self) -> Panel | None:
        """The panel that has the focus, itself or something in it."""
        focused = self.screen.focused
        found = None if focused is None else next((n for n in focused.ancestors_with_self if isinstance(n, Panel)), None)
        return found

    def action_maximise(self) -> None:
        panel = self.focused_panel()
        if self.screen.maximized is not None:
            self.screen.minimize()
        elif panel is not None:
            self.screen.maximize(panel, container=False)

    def action_next_panel(self) -> None:
        self.screen.focus_next()

    def action_previous_panel(self) -> None:
        self.screen.focus_previous()

    def action_leave(self) -> None:
        self.exit(return_code=0)

    def action_interrupt(self) -> None:
        self.notice("q leaves lumina; runs go on")
