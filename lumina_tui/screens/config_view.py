"""How the config editor looks: its panels, and what stands in them. Drawn from the form and what was checked."""

from __future__ import annotations

from collections.abc import Mapping

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical

from lumina_engine.config.finding import Finding
from lumina_engine.config.schema import SECTIONS

from .. import budget_text, checking
from .. import config_text as say
from ..checking import Checked
from ..form import SECTION_TITLES
from ..widgets.fields import FieldList
from ..widgets.table import Column, Row, Table
from ..widgets.text_panel import TextPanel
from .config_files import STALE, ConfigFiles


class ConfigView(ConfigFiles):
    """Sections, fields, help, findings and budget; with room also the differences and the budget part by part."""

    DEFAULT_CSS = """
    ConfigView #sections { width: 21; }
    ConfigView #middle { width: 1fr; }
    ConfigView #help { height: 6; }
    ConfigView #side { width: 56; display: none; }
    ConfigView #findings { height: 8; }
    ConfigView #budget { height: 5; }
    ConfigView.-compact #help { height: 5; }
    ConfigView.-compact #findings { height: 4; }
    ConfigView.-compact #budget { height: 4; }
    ConfigView.-compact #sections { width: 18; }
    ConfigView.-low #help { display: none; }
    ConfigView.-low #findings, ConfigView.-low #budget { height: 3; }
    ConfigView.-wide #side { display: block; }
    ConfigView.-wide #help, ConfigView.-wide #budget { display: none; }
    ConfigView #side_help { height: 8; }
    ConfigView #diff { height: 1fr; }
    ConfigView #details { height: 2fr; }
    """

    def __init__(self) -> None:
        super().__init__()
        self.findings: list[Finding] = []
        self.checked = Checked((), None, "looking at this machine …")
        self.finding = -1  # the current one

    def content(self) -> ComposeResult:
        with Horizontal(classes="content"):
            yield Table((Column("name", "", 10, grow=True),), title="Sections", id="sections", header=False)
            with Vertical(id="middle"):
                yield FieldList(id="fields")
                yield TextPanel(id="help", focusable=False)
            with Vertical(id="side"):
                yield TextPanel(id="side_help", focusable=False)
                yield TextPanel(id="diff", title="Differences")
                yield TextPanel(id="details")
        yield TextPanel(id="findings")
        yield TextPanel(id="budget", focusable=False)

    @property
    def fields(self) -> FieldList:
        return self.query_one(FieldList)

    @property
    def section(self) -> str:
        return self.query_one("#sections", Table).cursor_key or SECTIONS[0]

    def _panel(self, name: str) -> TextPanel:
        return self.query_one(f"#{name}", TextPanel)

    # showing

    def _show(self) -> None:
        form = self.form
        if form is None:
            return
        self.set_frame(subject=say.document_name(form) + (" *" if form.dirty else ""), badge=say.badge(form))
        problems = checking.worst_by_field(self.findings)
        table = self.query_one("#sections", Table)
        table.set_rows([Row(s, (self._section_cell(s, problems, table.inner[0] - 2),)) for s in SECTIONS])
        self.fields.locked = "the file holds what no field can show: E mends it first" if form.text is not None else ""
        title, note = STALE[self.disk] or SECTION_TITLES[self.section], "" if STALE[self.disk] else "/ search all fields"
        self.fields.show(form, self.section, problems, title, note)
        self._show_help()
        panel = self._panel("findings")
        panel.set_title(f"Findings  {say.count_words(self.findings)}", "] next" if self.findings else "")
        panel.set_lines(say.finding_lines(self.findings, self.finding))
        self._panel("diff").set_lines(say.diff_lines(form.changes(), say.base_name(form)))
        self.refresh_keys()

    def _section_cell(self, section: str, problems: Mapping[str, Finding], width: int) -> tuple[str, str]:
        assert self.form is not None
        marks, title = checking.section_marks(self.form, section, problems), SECTION_TITLES[section]
        text = marks.text if len(title) + len(marks.text) < width else " ".join(marks.text.split()[-2:])
        return title + text.rjust(max(0, width - len(title))), marks.role

    def _show_help(self, problem: Finding | None = None) -> None:
        name = self.fields.current
        if name is None or self.form is None:
            return
        for panel in (self._panel("help"), self._panel("side_help")):
            width = panel.inner[0] - 4
            lines = say.help_lines(name, width)
            panel.set_title(say.help_title(name, width))
            panel.set_foot(say.help_foot(self.form, name))
            panel.set_lines([((problem.line(), "bad"),), *lines] if problem else lines)

    def _show_budget(self) -> None:
        figures, machine = self.checked.figures, self.machine
        title = f"Budget on {machine.label}" if machine else "Budget"
        refused = self.form is not None and bool(self.form.bad)
        source = "last valid values" if refused else "computed"  # a refused text is in no figure
        for name, lines in (("budget", budget_text.summary_lines), ("details", budget_text.detail_lines)):
            panel = self._panel(name)
            panel.set_title(title, source if figures else "")
            width = max(0, panel.inner[0] - 2)
            panel.set_lines(lines(figures, width) if figures else [((self.checked.reason, "dim"),)])
