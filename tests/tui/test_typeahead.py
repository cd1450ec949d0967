"""Keys that arrive all at once, as a slow line delivers them."""

from __future__ import annotations

from textual import events
from textual.widgets import Input

from lumina_tui.application import LuminaApp
from lumina_tui.screens.config import ConfigScreen

from .helpers import screen_text, until


def typed(app: LuminaApp, keys: str) -> None:
    """All keys in the queue before the first one is handled."""
    names = {"\r": "enter", "/": "slash", "-": "minus", "_": "underscore", ":": "colon", "\x15": "ctrl+u"}
    for key in keys:
        app.post_message(events.Key(names.get(key, key), key if key.isprintable() else None))


async def test_c129_a_burst_reaches_the_field_that_it_opens(tmp_path):
    app = LuminaApp(tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        app.open_config(preset="debug")
        await until(pilot, lambda: isinstance(app.screen, ConfigScreen) and app.screen.form is not None)
        form = app.screen.form
        typed(app, "/warmup_steps\r\r\x1535\r")
        await until(pilot, lambda: form.edit_text("warmup_steps") == "35")
        assert isinstance(app.screen, ConfigScreen), "no letter went to the screen"
        assert "1 change" in screen_text(app)


async def test_c138_a_burst_into_the_palette_and_out(tmp_path):
    app = LuminaApp(tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        typed(app, ":q")
        await until(pilot, lambda: any(field.value == "q" for field in app.screen.query(Input)))
        assert app.is_running


async def test_a_node_that_is_busy_does_not_swallow_the_keyboard(tmp_path, monkeypatch):
    monkeypatch.setattr("lumina_tui.typeahead.PATIENCE", 0.01)
    app = LuminaApp(tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        monkeypatch.setattr(app.screen, "call_later", lambda *_: True)  # never comes back
        typed(app, "23")
        await until(pilot, lambda: getattr(app.screen, "number", 0) == 3)
