"""Pictures of the screens for the README and for the eye: `python tests/bench/captures.py RUNS_ROOT RUN OUT [--svg]`.

Opens the real program without a terminal on runs that exist and walks through its screens by the same calls as the keys make;
writes one text file (and with --svg one SVG) for each screen and size. Nothing is invented: what is not in the runs is not in
the picture.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from textual.pilot import Pilot

from lumina_engine.run.directory import list_runs
from lumina_tui.application import LuminaApp
from lumina_tui.terminal import Look

SIZES = ((80, 24), (160, 45), (200, 60))
SETTLE = 40  # looks without a change before a screen counts as drawn


def screen_text(app: LuminaApp) -> str:
    return "\n".join(strip.text for strip in app.screen._compositor.render_strips())


def without_fonts(svg: str) -> str:
    """A picture that asks no other host for its letters."""
    return re.sub(r"@font-face\s*{[^}]*}", "", svg)


async def until(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    """Wait for something that takes as long as it takes: torch has to start, a reply to be written."""
    for _ in range(6000):
        if condition():
            return
        await pilot.pause(0.02)
    raise TimeoutError(screen_text(pilot.app))  # type: ignore[arg-type]


async def converse(app: LuminaApp, pilot: Pilot[None], prompt: str) -> None:
    """Ask the loaded checkpoint, then look at the tokens of its answer."""
    await until(pilot, lambda: "READY" in screen_text(app))
    screen: Any = app.screen
    screen.field.put(prompt)
    screen.field.focus()
    await pilot.press("enter")
    await until(pilot, lambda: " s, first token" in screen_text(app) or "tok/s" in screen_text(app))
    screen.action_tokens()
    await until(pilot, lambda: "by the model" in screen_text(app))


async def still(pilot: Pilot[None], app: LuminaApp) -> None:
    """Wait until the picture does not change any more."""
    before, same = "", 0
    for _ in range(3000):
        await pilot.pause(0.02)
        now = screen_text(app)
        same = same + 1 if now == before else 0
        before = now
        if same >= SETTLE:
            return


def stations(run: Path, others: list[Path]) -> dict[str, Callable[[LuminaApp], object]]:
    """How each screen is opened."""
    return {
        "home": lambda app: app.open_home(),
        "presets": lambda app: app.open_presets("b1"),
        "config": lambda app: app.open_config(preset="b1"),
        "launch": lambda app: app.open_launch(preset="debug"),
        "monitor": lambda app: app.open_monitor(run),
        "compare": lambda app: app.open_compare([run, *others]),
        "chat": lambda app: app.open_chat(run.name),
        "data": lambda app: app.open_screen(8),
        "doctor": lambda app: app.open_screen(9),
    }


async def walk(root: Path, run: str, out: Path, svg: bool, only: list[str], prompt: str) -> None:
    path = root / run
    others = [row.path for row in list_runs(root) if row.path.name != run][:2]
    for size in SIZES:
        app = LuminaApp(root, look=Look())
        async with app.run_test(size=size) as pilot:
            for name, visit in stations(path, others).items():
                if only and name not in only:
                    continue
                visit(app)
                if name == "chat":
                    await converse(app, pilot, prompt)
                await still(pilot, app)
                stem = f"{name}-{size[0]}x{size[1]}"
                (out / f"{stem}.txt").write_text(screen_text(app))
                if svg:
                    (out / f"{stem}.svg").write_text(without_fonts(app.export_screenshot(title=f"lumina: {name}")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("run")
    parser.add_argument("out", type=Path)
    parser.add_argument("--svg", action="store_true")
    parser.add_argument("--prompt", default="Count one up from 12.")
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as own:  # as a first-time user sees it
        os.environ.update(XDG_CONFIG_HOME=own, XDG_STATE_HOME=own, XDG_CACHE_HOME=own)
        asyncio.run(walk(args.root, args.run, args.out, args.svg, args.only, args.prompt))


if __name__ == "__main__":
    main()
