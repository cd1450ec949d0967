"""Data: where conversations come from, what is wrong with them, and the rows that training would see."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from textual.app import ComposeResult
from textual.containers import Container, Horizontal

from .. import data_text as say
from ..data_sources import BUILT_IN, Look, Settings, Source, Sources, look_at, output_name
from ..data_work import Work, command, export_text, wrong_output, wrong_path
from ..drafts import draft_path, load_draft
from ..form import Form, stamp_of
from ..talking import Severity
from ..widgets.table import Table
from ..widgets.text_panel import TextPanel
from .base import LuminaScreen, State

LOOK_TIME = 2.0  # s between two looks at the files
REST_TIME = 0.4  # s that the cursor rests on a source before its rows are fetched


class Detail(Container):
    """What is known of one source. Alone on the screen after Enter where there is room for one thing only."""

    ALLOW_MAXIMIZE = True


class DataScreen(LuminaScreen):
    """The list, and for the chosen source its findings and a sample."""

    scope = "data"
    number = 8
    heading = "Data"
    DEFAULT_CSS = """
    DataScreen #list { width: 62; }
    DataScreen Detail { layout: vertical; width: 1fr; height: 1fr; }
    DataScreen #sample, DataScreen #findings { width: 1fr; height: 1fr; }
    DataScreen.-compact #list { width: 1fr; }
    DataScreen.-compact Detail { display: none; }
    DataScreen.-compact Detail.-maximized { display: block; }
    DataScreen.-wide #list { width: 84; }
    DataScreen.-wide Detail { layout: horizontal; }
    """

    def __init__(self) -> None:
        super().__init__()
        self.sources = Sources(Settings.of(None))
        self.work = Work(self.sources, self._spawn, self._tell, self._changed, lambda path: self._add(path, select=False))
        self._looked, self._looking = 0.0, False
        self._draft: tuple[Any, Settings] = (None, self.sources.settings)  # what the settings were made from, and they
        # jobs may tell something before the panels are on the screen, and after they have left it
        self.table = Table(say.COLUMNS, title="Sources", id="list")
        self.findings = TextPanel(id="findings", title="Findings", indent=4)
        self.sample = TextPanel(id="sample", title="Sample")

    def content(self) -> ComposeResult:
        yield Horizontal(self.table, Detail(self.findings, self.sample), classes="content")

    # life

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.lumina.spawn(work)

    def _tell(self, text: str, severity: Severity, seen: bool) -> None:
        if self.lumina.is_running:
            self.lumina.notice(text, severity, toast=not (seen and self.is_current))

    def _changed(self) -> None:
        self._show()
        self.refresh_keys()

    def on_mount(self) -> None:
        for key in filter(None, self.lumina.memory.get("data.paths", [""])):
            self.sources.add(key)
        self.table.focus()
        self._show()

    def on_screen_resume(self) -> None:
        self._looked = 0.0
        self.tick()

    def tick(self) -> None:
        if not self._looking and time.monotonic() - self._looked >= LOOK_TIME:
            self._looking = True
            self.run_worker(self._look_around(), group="look", exit_on_error=False)
        if any(source.running for source in self.sources.rows.values()):
            self._show()

    async def _look_around(self) -> None:
        """The configuration at hand and the files, in a thread."""
        installed = self.lumina.is_screen_installed("screen-3")
        edited = getattr(self.lumina.get_screen("screen-3"), "form", None) if installed else None
        try:
            known = {key: source.look for key, source in self.sources.rows.items()}
            settings, looks = await asyncio.to_thread(self._look, edited, list(self.sources.added), known)
            if self.sources.configure(settings) | self.sources.took(looks):
                self._changed()
                self._fetch_soon()
        finally:
            self._looked, self._looking = time.monotonic(), False

    def _look(self, edited: Form | None, added: list[str], known: dict[str, Look | None]) -> tuple[Settings, dict[str, Look]]:
        """Settings (made again only for another draft) and sources as they lie there now. In a thread."""
        draft = edited.stamp if edited is not None else stamp_of(draft_path())
        if draft != self._draft[0]:
            self._draft = (draft, Settings.of(edited or load_draft()))
        settings = self._draft[1]
        keys = dict.fromkeys([BUILT_IN, *settings.train, *settings.eval, *added])
        return settings, {key: look_at(key, known.get(key)) for key in keys}

    # showing

    @property
    def chosen(self) -> Source | None:
        """The source under the cursor."""
        key = say.key_of(self.table.cursor_key)
        return None if key is None else self.sources.rows.get(key)

    def _show(self) -> None:
        if not self.is_mounted:
            return
        config = self.sources.settings.config
        self.set_frame(subject=f"for {self.sources.settings.origin}: {config.tokenizer}, seq_length {config.seq_length:,}")
        running = sum(len(source.running) for source in self.sources.rows.values())
        self.set_frame(badge=f"{running} job{'s' if running > 1 else ''}" if running else "", badge_role="accent")
        self.table.set_rows([say.row(source, self.sources) for source in self.sources.rows.values()])
        only = len(self.sources.rows) == 1
        self.table.set_foot(say.NOTHING if only else "~ guessed")
        self._show_detail()

    def _show_detail(self) -> None:
        source = self.chosen
        if source is None:
            return
        findings, sample, job = self.findings, self.sample, source.jobs.get("preview")
        findings.set_title("Findings", say.state(source)[0])
        findings.set_lines(say.findings(source, self.sources.settings), about=source.key)
        sample.set_title(*say.sample_title(source))
        if source.rows.get(source.at_row) is not None:
            sample.set_state(State.LIVE)
            sample.set_lines(say.sample(source), about=(source.key, source.at_row))
        elif job is not None and not job.over:
            sample.set_state(State.LOADING, say.sampling(job))
        elif job is not None and job.error:
            sample.set_state(State.ERROR, f"{job.error}\nr tries again")
        elif source.look is not None and source.look.problem:
            sample.set_state(State.EMPTY, "no rows without a usable file")
        else:
            sample.set_state(State.EMPTY, "> shows rows as training sees them")

    def on_table_moved(self) -> None:
        self._show_detail()
        self.refresh_keys()
        self._fetch_soon()

    def on_table_chosen(self) -> None:
        detail = self.query_one(Detail)
        if self.has_class("-compact"):
            self.maximize(detail, container=False)
        self.findings.focus()
        self._fetch_soon()

    # rows

    def _fetch_soon(self) -> None:
        """Fetch rows of the chosen source once the cursor rests on it, if they can be seen."""
        source = self.chosen
        if source is not None and self.sample.display and (not self.has_class("-compact") or self.maximized):
            self.set_timer(REST_TIME, lambda: self.work.fetch(source) if source is self.chosen else None)

    def action_next(self) -> None:
        self._move(1)

    def action_previous(self) -> None:
        self._move(-1)

    def _move(self, step: int) -> None:
        source = self.chosen
        if source is None:
            return
        if source.total_rows is not None:
            source.at_row = (source.at_row + step) % source.total_rows
        self.work.fetch(source)
        self._show_detail()

    # actions

    def why_not(self, action_id: str) -> str | None:
        return self.work.refusal(action_id.rpartition(".")[2], self.chosen)

    def action_add(self) -> None:
        from .path_prompt import PathPrompt

        def done(text: str | None) -> None:
            if text is not None:
                self._add(text.strip())

        lines = ["A file, a folder or a pattern such as data/*.jsonl."]
        self.lumina.push_screen(PathPrompt("Add a source", lines=lines, check=wrong_path), done)

    def _add(self, key: str, select: bool = True) -> None:
        self.sources.add(key)
        self.lumina.memory.set("data.paths", self.sources.added)
        self._looked = 0.0
        self._show()
        if select:
            self.table.move_to(key)

    def action_forget(self) -> None:
        source = self.chosen
        assert source is not None
        self.work.cancel(source)
        self.sources.forget(source.key)
        self.lumina.memory.set("data.paths", self.sources.added)
        self._show()

    def action_validate(self) -> None:
        source = self.chosen
        assert source is not None
        self.work.begin(source, self.sources.validate(source))

    def action_prepare(self) -> None:
        source = self.chosen
        assert source is not None
        self.work.begin(source, self.sources.prepare(source), keep=True)

    def action_convert(self) -> None:
        from .path_prompt import PathPrompt

        source = self.chosen
        assert source is not None

        def done(text: str | None) -> None:
            if text is not None:
                self.work.begin(source, self.sources.convert(source, text.strip()), keep=True)

        lines = [f"{source.name} as conversation JSON Lines."]
        self.lumina.push_screen(PathPrompt("Convert to", output_name(source), lines, wrong_output), done)

    def action_cancel(self) -> None:
        source = self.chosen
        assert source is not None
        self.work.cancel(source)

    def action_report(self) -> None:
        source = self.chosen
        assert source is not None
        try:
            self.lumina.save_export(f"data-{Path(source.name).stem}", "json", export_text(source))
        except OSError as error:
            self.lumina.notice(f"not written: {error}", "error")

    def action_copy(self) -> None:
        source = self.chosen
        assert source is not None
        self.lumina.copy_text(source.key, "path.txt")

    def action_command(self) -> None:
        source = self.chosen
        assert source is not None
        last = list(source.jobs.values())[-1:]
        self.lumina.copy_text(command(last[0].arguments if last else self.sources.validate(source)), "command.txt")

    def action_find(self) -> None:
        self.lumina.prompt("Find a source", self.table.find, value=self.table.needle)

    def action_reload(self) -> None:
        source = self.chosen
        if source is not None:
            source.forget_rows()
        self._looked = 0.0
        self.tick()
        self._fetch_soon()
