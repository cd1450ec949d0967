"""How the launch screen looks: its panels, and what stands in them. Drawn from the review or the start under way."""

from __future__ import annotations

import shlex

from textual.app import ComposeResult
from textual.containers import Container, Vertical

from lumina_engine.config.machine import Machine

from .. import budget_text
from .. import config_text as say
from ..form import Form
from ..preview import command
from ..review import Review, Row, check_lines
from ..starting import Start, failure_lines, progress_lines
from ..widgets.text_panel import TextPanel
from .base import LuminaScreen, State

_PANELS = ("checks", "budget", "findings", "command", "diff", "deepspeed")


class LaunchView(LuminaScreen):
    """Checks, budget and findings; differences, command and DeepSpeed JSON beside them where there is room."""

    DEFAULT_CSS = """
    LaunchView #body { layout: horizontal; height: 1fr; }
    LaunchView #left, LaunchView #right, LaunchView #middle, LaunchView #rest { width: 1fr; height: 1fr; }
    LaunchView TextPanel { height: 1fr; }
    LaunchView #checks { height: 21; }
    LaunchView #command { height: 8; }
    LaunchView.-failed #checks { height: 1fr; }
    LaunchView.-failed #budget, LaunchView.-failed #findings { display: none; }
    LaunchView.-wide #rest { width: 2fr; layout: horizontal; }
    LaunchView.-compact #body { layout: vertical; overflow-y: auto; }
    LaunchView.-compact #body Vertical { width: 1fr; height: auto; }
    LaunchView.-compact #rest { width: 1fr; height: auto; }
    LaunchView.-compact #checks { height: 16; }
    LaunchView.-compact.-failed #checks { height: 22; }
    LaunchView.-compact #budget { height: 6; }
    LaunchView.-compact #command { height: 7; }
    LaunchView.-compact #findings, LaunchView.-compact #diff, LaunchView.-compact #deepspeed { height: 9; }
    """

    def __init__(self) -> None:
        super().__init__()
        self.form: Form | None = None
        self.review: Review | None = None
        self.machine: Machine | None = None
        self.start: Start | None = None  # under way, or failed
        self.stale = False  # configuration or data changed since the review
        self.reviewing = False
        self.finding = -1  # the current one
        self._budget_width = 0  # cells that the budget was laid out for
        self._rows: dict[str, Row] = {}  # as a review finds them

    def content(self) -> ComposeResult:
        with Container(id="body", classes="content"):
            with Vertical(id="left"):
                yield TextPanel(id="checks", title="Before the start")
                yield TextPanel(id="budget", title="Budget")
                yield TextPanel(id="findings", title="Findings")
            with Container(id="rest"):
                with Vertical(id="middle"):
                    yield TextPanel(id="diff", title="Differences")
                with Vertical(id="right"):
                    yield TextPanel(id="command", title="Command")
                    yield TextPanel(id="deepspeed", title="deepspeed.json", indent=0)

    def _panel(self, name: str) -> TextPanel:
        return self.query_one(f"#{name}", TextPanel)

    @property
    def starting(self) -> bool:
        """Whether a start is under way."""
        return self.start is not None and self.start.failure is None

    def _set_stale(self, stale: bool) -> None:
        self.stale = stale
        for name in _PANELS:
            self._panel(name).set_state(State.STALE if stale else State.LIVE)

    # showing

    def _show_rows(self) -> None:
        self._panel("checks").set_title("Before the start", "checking …")
        self._panel("checks").set_lines(check_lines(list(self._rows.values())) or [(("checking …", "dim"),)])

    def _show(self) -> None:
        self.set_class(self.start is not None and self.start.failure is not None, "-failed")
        if self.start is not None:
            self._show_start()
        form, found = self.form, self.review
        if form is None or found is None:
            return
        if self.start is None and not self.reviewing:
            word = "stale: r reviews again" if self.stale else "blocked" if found.blocked else "ready"
            role = "warn" if self.stale else "bad" if found.blocked else "good"
            self.set_frame(subject=say.document_name(form), badge=word, badge_role=role)
            note = "configuration or data changed" if self.stale else self.machine.label if self.machine else ""
            self._panel("checks").set_title("Before the start", note)
            self._panel("checks").set_lines(check_lines(found.rows))
        budget = self._panel("budget")
        self._budget_width = budget.inner[0]
        figures, width = found.figures, max(0, self._budget_width - 2)
        budget.set_title("Budget", f"computed, time {figures['basis']['time']}" if figures else "")
        known = budget_text.summary_lines(figures, width) + budget_text.detail_lines(figures, width) if figures else []
        budget.set_lines(known or [(("not known before the errors are mended", "dim"),)])
        findings = self._panel("findings")
        findings.set_title(f"Findings  {say.count_words(found.findings)}")
        findings.set_lines(say.finding_lines(found.findings, self.finding))
        ranks = shlex.join(found.in_force.ranks) or found.in_force.reason
        self._panel("command").set_lines([((command(found.arguments), "text"),), ((f"ranks: {ranks}", "dim"),)])
        changes = form.changes()
        self._panel("diff").set_title(f"{len(changes)} differences from {say.base_name(form)}")
        self._panel("diff").set_lines(say.diff_lines(changes, say.base_name(form)))
        self._panel("deepspeed").set_lines([((line, "text"),) for line in found.in_force.deepspeed.splitlines()])
        self.refresh_keys()

    def _show_start(self) -> None:
        start = self.start
        if start is None:
            return
        checks = self._panel("checks")
        if start.failure is None:
            checks.set_title("Starting", start.progress.waiting_for)
            checks.set_lines(progress_lines(start))
        else:
            checks.set_title("The start failed", start.failure.step)
            checks.set_lines(failure_lines(start.failure, start.progress))
