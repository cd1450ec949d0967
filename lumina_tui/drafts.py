"""The draft of the config editor: kept after each edit, so that a lost line or a closed terminal loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

from lumina_engine.config.presets import NAMES
from lumina_engine.config.schema import Config

from .form import INFOS, Content, Form, check_value, reference_values
from .places import state_dir

MAX_BYTES = 1 << 20


def draft_path() -> Path:
    """Where the draft lies: the user's state folder."""
    return state_dir() / "draft.json"


def save_draft(form: Form, path: Path | None = None) -> None:
    """Keep what differs from the preset, as text. Raises OSError."""
    target = path or draft_path()
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    values = {name: form.edit_text(name) for name in INFOS if form.changed(name)}
    file = None if form.path is None else str(form.path)
    part = target.with_name(target.name + ".part")
    part.write_text(json.dumps({"preset": form.preset, "path": file, "values": values}))
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
        texts = {str(n): str(t) for n, t in data["values"].items() if n in INFOS}
        preset = data.get("preset") if data.get("preset") in NAMES else None
        file = Path(data["path"]) if data.get("path") else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    values = dict(reference_values(preset))
    defaults = Config().to_dict(sectioned=False)
    origins = {n: "preset" if preset and values[n] != defaults[n] else "default" for n in values}
    bad = {}
    for name, text in texts.items():
        value, problem = check_value(INFOS[name], text)
        values[name], origins[name] = value, "you"
        if problem:
            bad[name] = problem
    return Form(Content(values, origins, bad, preset), file)
