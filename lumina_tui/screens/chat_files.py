"""The conversations of the Chat screen as files: list, continue, rename, delete, export."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

from lumina_engine.chat import saved
from lumina_engine.chat.modes import ChatError

from ..chatting import Phase
from ..conversations import Summary
from ..paint import clean
from ..widgets.chat_conversations import ConversationTable
from .chat_keys import WRITING, ConversationKeys
from .dialogs import Choice

if TYPE_CHECKING:
    from ..widgets.chat_pane import Pane


class ConversationFiles(ConversationKeys):
    """The part of the Chat screen that works on files."""

    def refresh_conversations(self) -> None:
        """Read the folder again."""
        self.lumina.spawn(self._list_conversations())

    def on_pane_kept(self) -> None:
        self._refresh_if_shown()

    def on_resize(self) -> None:
        self.call_after_refresh(self._refresh_if_shown)

    def _refresh_if_shown(self) -> None:
        if self.has_class("-wide") or self.has_class("-listing"):
            self.refresh_conversations()

    async def _list_conversations(self) -> None:
        found = await asyncio.to_thread(self.conversations.list)
        self.query_one(ConversationTable).show(found, self._current)

    @property
    def _current(self) -> Path | None:
        """The file of the open conversation."""
        session = self.left.session
        return self.conversations.folder / f"{session.name}.json" if session is not None and session.name else None

    def chosen_conversation(self) -> Path | None:
        """The one under the cursor of the list, if the list has the focus, else the open one."""
        table = self.query_one(ConversationTable)
        if table.has_focus and table.cursor_key is not None:
            return Path(table.cursor_key)
        return self._current

    def action_conversations(self) -> None:
        self.remove_class("-choosing")
        if not self.has_class("-wide"):
            self.toggle_class("-listing")
        if self.has_class("-wide") or self.has_class("-listing"):
            self.query_one(ConversationTable).focus()
            self.refresh_conversations()
        else:
            self.back_to_talk()

    def action_new(self, note: str = "") -> None:
        """An empty conversation; the one before stays in its file."""
        for pane in (self.left, self.right):
            pane.forget()
        self.back_to_talk()
        session = self.left.session
        kept = "; the system prompt stays" if session is not None and session.system_prompt else ""
        self.pane.say("note", note or f"new conversation{kept}")
        self.query_one("#field").focus()
        self.refresh_conversations()

    def open_conversation(self, path: Path) -> None:
        """Continue a saved conversation, with its own checkpoints where they are still there."""
        if any(pane.link.phase is Phase.REPLYING for pane in self.panes):
            self.lumina.notice(WRITING, "warning")
            return
        try:
            chat = saved.read(path)
        except ChatError as error:
            self.lumina.notice(str(error), "error")
            return
        self._continue(self.left, chat)
        assert self.left.session is not None
        self.left.session.name = path.stem if path.parent.resolve() == self.conversations.folder.resolve() else None
        self.set_class(chat.second is not None, "-split")
        if chat.second is not None:
            self._continue(self.right, chat.second)
            self.left.session.second = self.right.session
        else:
            self.right.leave()
            self.right.forget()
            self.left.session.second = None
        self.settings.take_from(self.left.session)
        self.use_settings()
        self.back_to_talk()
        self.pane.say("note", f"{len(chat.conversation)} messages loaded, mode {chat.mode}")
        self.query_one("#field").focus()
        self.refresh_conversations()

    def _continue(self, pane: Pane, chat: saved.SavedChat) -> None:
        """Put a saved conversation into a pane and see to a checkpoint for it."""
        pane.restore(chat)
        own = str(chat.checkpoint.get("path") or "")
        loaded = pane.link.path if pane.link.phase in (Phase.READY, Phase.CONNECTING) else None
        if own and loaded is not None and Path(own).resolve() == loaded.resolve():
            return
        if own and Path(own).is_dir():
            pane.open(own)
        elif loaded is not None:
            pane.say(
                "note", f"it was with another checkpoint (step {chat.checkpoint.get('step', '-')}), which is not there now"
            )
        else:
            pane.stay_without(f"its checkpoint {own or '-'} is not there")

    def action_rename(self) -> None:
        path = self.chosen_conversation()
        assert path is not None  # `why_not`

        def wrong(name: str) -> str | None:
            try:
                saved.check_name(name)
            except ChatError as error:
                return str(error)
            return f"{name} exists already" if name != path.stem and path.with_name(f"{name}.json").exists() else None

        def rename(name: str) -> None:
            if name == path.stem:
                return
            current = self._current
            try:
                self.conversations.rename(path, name)
            except ChatError as error:
                self.lumina.notice(str(error), "error")
            else:
                if current == path and self.left.session is not None:
                    self.left.session.name = name
            self.refresh_conversations()

        self.lumina.prompt(f"Rename {path.stem}", rename, value=path.stem, check=wrong)

    def action_delete(self) -> None:
        path = self.chosen_conversation()
        assert path is not None  # `why_not`
        summary = self.query_one(ConversationTable).summary(str(path))
        lines = [_said(summary)] if summary is not None else []
        current = self._current

        def delete(_: str) -> None:
            try:
                self.conversations.delete(path)
            except ChatError as error:
                self.lumina.notice(str(error), "error")
            else:
                self.lumina.notice(f"{path.name} is deleted")
                if current == path:
                    self.action_new()
            self.refresh_conversations()

        self.lumina.ask(f"Delete {path.stem} for good?", [Choice("d", "delete the file", "delete")], delete, lines)

    # export

    def action_export(self) -> None:
        choices = [Choice("m", "Markdown, to read", "md"), Choice("j", "JSON, to load again", "json")]
        self.lumina.ask("Export the conversation", choices, self._export)

    def _export(self, suffix: str) -> None:
        session = self.left.session
        assert session is not None  # `why_not`
        content = session.document(session.name or "chat")
        text = saved.markdown(content) if suffix == "md" else json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        try:
            self.lumina.save_export(session.name or "chat", suffix, text)
        except OSError as error:
            self.lumina.notice(f"not exported: {error}", "error")


def _said(summary: Summary) -> str:
    return f"{summary.messages} messages, begins: {clean(summary.first)[:60]}"
