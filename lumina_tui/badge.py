"""What the first line says about a feed: where records come from, and whether they should be coming."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from lumina_engine.text import safe_text

from .paint import duration

if TYPE_CHECKING:
    from .feed import Feed


class Mode(Enum):
    """Where the records come from."""

    LOADING = "loading"
    LIVE = "live"
    FILE = "file"
    DEAD = "dead"


@dataclass(frozen=True)
class Badge:
    """What the first line says about the feed; `why` is the longer story behind it."""

    text: str
    role: str
    why: str = ""


def badge_of(feed: Feed) -> Badge:
    """The state of a feed in a few words."""
    store = feed.store
    if feed.mode is Mode.LOADING:
        return Badge(f"LOADING {100 * feed.progress:.0f} %", "accent", f"reading {feed.reader.path}")
    if feed.mode is Mode.DEAD:
        return Badge("DEAD", "bad", "nobody holds the run's lock although it never ended: it was killed")
    if feed.mode is Mode.FILE:
        why = f"the run is {store.state}" if store.final else feed.why or "no connection to the run's supervisor"
        return Badge("FILE", "dim", why + "; the file is read each second")
    if store.state in ("preparing", "compiling", "stopping"):
        since = feed.clock() - store.state_since if store.state_since else feed.silence()
        return Badge(f"BUSY {store.state} {duration(max(0.0, since))}", "accent", store.reason or "")
    if feed.quiet:
        why = f"the supervisor lives, but nothing came after {store.newest} (record {store.seq})"
        why += f"; engine.log ends with: {safe_text(feed.log_end)}" if feed.log_end else "; engine.log is empty"
        return Badge(f"QUIET {duration(feed.silence())}", "warn", why)
    return Badge(f"LIVE {feed.hz:g} Hz", "good", "records arrive as they are written")
