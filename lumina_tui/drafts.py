"""The draft of the config editor: kept after each edit, so that a lost line or a closed terminal loses nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lumina_engine.config.finding import Finding
from lumina_engine.config.loading import text_layer
from lumina_engine.config.presets import NAMES

from .form import INFOS, Content, Document, Form, Stamp, check_value, content_of, edit_text, reference_values, same
from .places import state_dir

MAX_BYTES = 2 << 20
_ORIGINS = ("default", "preset", "file", "cli", "you")


def draft_path() -> Path:
    """Where the draft lies: the user's state folder."""
    return state_dir() / "draft.json"


def save_draft(form: Form, path: Path | None = None) -> None:
    """Keep what is edited: values as text, origins, the file and how it was, text of the YAML view. Raises OSError."""
    target = path or draft_path()
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    content, base = form.content, reference_values(form.preset)
    saved = content.document.saved
    draft = {
        "preset": form.preset,
        "path": None if form.path is None else str(form.path),
        "stamp": content.document.stamp,
        "values": {name: form.edit_text(name) for name in INFOS if form.changed(name)},
        "saved": {n: edit_text(INFOS[n], saved[n]) for n in saved if not same(saved[n], base[n])} if saved else None,
        "origins": {name: form.origin(name) for name in INFOS if form.origin(name) != "default"},
        "text": form.text,
        "pending": form.pending,
    }
    part = target.with_name(target.name + ".part")
    part.write_text(json.dumps(draft))
    part.chmod(0o600)
    part.replace(target)


def drop_draft(path: Path | None = None) -> None:
    """Forget the draft."""
    (path or draft_path()).unlink(missing_ok=True)


def load_draft(path: Path | None = None) -> Form | None:
    """The kept draft, None if there is none that can be read. Unknown keys and presets in it are left out."""
    target = path or draft_path()
    try:
        if target.stat().st_size > MAX_BYTES:
            return None
        data = json.loads(target.read_text())
        values = {str(n): str(t) for n, t in data["values"].items() if n in INFOS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    preset = data.get("preset") if data.get("preset") in NAMES else None
    text = data.get("text") if isinstance(data.get("text"), str) else None
    if text is not None:  # the fields follow from the text
        content = content_of(text_layer(text, "draft"), preset, text)
    else:
        content = _content(values, preset, data.get("origins"))
    saved = _saved(data.get("saved"), preset) or content.values
    file = Path(data["path"]) if isinstance(data.get("path"), str) and data["path"] else None
    form = Form(replace(content, document=Document(file, saved, _stamp(data.get("stamp")))))
    form.pending = data.get("pending") if isinstance(data.get("pending"), str) else None
    return form


def _content(texts: Mapping[str, str], preset: str | None, origins: Any) -> Content:
    values: dict[str, Any] = dict(reference_values(preset))
    bad: dict[str, Finding] = {}
    given = origins if isinstance(origins, dict) else {}
    plain = reference_values(None)
    found = {n: "preset" if preset and values[n] != plain[n] else "default" for n in values}
    for name, text in texts.items():
        value, problem = check_value(INFOS[name], text, preset)
        values[name], found[name] = value, "you"
        if problem:
            bad[name] = problem
    found |= {n: o for n, o in given.items() if n in found and o in _ORIGINS}
    return Content(values, found, bad, preset)


def _saved(texts: Any, preset: str | None) -> dict[str, Any] | None:
    """The values as the file had them; None if the draft does not say."""
    if not isinstance(texts, dict):
        return None
    known = {n: check_value(INFOS[n], t)[0] for n, t in texts.items() if n in INFOS and isinstance(t, str)}
    return dict(reference_values(preset)) | known


def _stamp(value: Any) -> Stamp | None:
    whole = isinstance(value, list) and len(value) == 3 and all(type(part) is int for part in value)
    return (value[0], value[1], value[2]) if whole else None
