"""What only `lumina` itself can tell about the terminal, as rows of the machine check. No widget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lumina_engine.doctor.row import Row
from lumina_engine.doctor.system import Output, System
from lumina_engine.doctor.system import call as call_program

from .terminal import Look

SAMPLES = {
    "braille": "⡇⣇⣧⣷⣿ ▁▂▃▄▅▆▇█ ░▒▓ ┌┬┐ ●✓✗‖×→",
    "block": "▀▄█ ▁▂▃▄▅▆▇█ ░▒▓ ┌┬┐",
    "ascii": "*|+- _.-=*#",
}
_TMUX_LIMIT = 2.0  # s
_HEAVY = 20.0  # KiB/s from which on a compressed line is worth a word
_LEAST_SECONDS = 5.0  # of sending, before a rate is told


@dataclass(frozen=True)
class Terminal:
    """What is looked at. `sent` counts bytes since `seconds` ago, None where they are not counted."""

    environ: Mapping[str, str]
    look: Look
    size: tuple[int, int]
    encoding: str
    sent: int | None = None
    seconds: float = 0.0
    call: Callable[[Sequence[str], float], Output] = call_program


def terminal_rows(terminal: Terminal) -> list[Row]:
    """All rows; asks tmux, so it may take a moment."""
    return [*_terminal(terminal), key_row(""), *_line(terminal)]


def _terminal(terminal: Terminal) -> Iterator[Row]:
    environ, look = terminal.environ, terminal.look
    program = environ.get("TERM_PROGRAM", "")
    yield Row("term", "terminal", "ok", f"TERM={environ.get('TERM', '-')}{f', {program}' if program else ''}")
    yield _colours(terminal)
    advice = "boxes or question marks there: start with --ascii, or choose another font"
    yield Row("glyphs", "terminal", "ok", f"{look.glyphs}: {SAMPLES[look.glyphs]}", advice if not look.ascii else "")
    width, height = terminal.size
    if width < 60 or height < 15:
        yield Row(
            "size", "terminal", "warn", f"{width}x{height}", "below 60x15 most screens only say what they need; enlarge it"
        )
    else:
        kind = "wide" if width >= 160 and height >= 45 else "compact" if width < 100 or height < 30 else "normal"
        yield Row("size", "terminal", "ok", f"{width}x{height}, {kind} layout")
    if "utf" in terminal.encoding.lower():
        yield Row("locale", "terminal", "ok", terminal.encoding)
    else:
        value = f"{terminal.encoding}: only ASCII is sent"
        yield Row("locale", "terminal", "warn", value, "export LC_ALL=C.UTF-8 (or a UTF-8 locale of yours) before lumina")


def _colours(terminal: Terminal) -> Row:
    environ, look = terminal.environ, terminal.look
    if "NO_COLOR" in environ:
        return Row("colours", "terminal", "ok", "none: NO_COLOR is set")
    if look.ansi:
        advice = "set TERM to the 256-colour name of your terminal, e.g. xterm-256color (in tmux: tmux-256color)"
        return Row("colours", "terminal", "warn", "16: charts and maps tell less apart", advice)
    direct = environ.get("COLORTERM", "").lower() in ("truecolor", "24bit")
    return Row("colours", "terminal", "ok", "RGB, shown from the 256 palette" if direct else "256")


def key_row(last: str) -> Row:
    """How keys arrive; `last` names the newest one that had no meaning here."""
    if last:
        return Row("keys", "terminal", "ok", f"the last one arrived as {last}")
    advice = "press any key that has no meaning here (ctrl+j, alt+x, F5): this row names what arrived"
    return Row("keys", "terminal", "ok", "none without a meaning was pressed yet", advice)


def sent_row(terminal: Terminal) -> Row:
    """What this program has sent to the terminal."""
    if terminal.sent is None:
        return Row("sent", "ssh", "skipped", "what is sent is not counted here")
    total = f"{terminal.sent / 1024:,.0f} KiB since the start"
    if terminal.seconds < _LEAST_SECONDS:
        return Row("sent", "ssh", "ok", total)
    rate = terminal.sent / 1024 / terminal.seconds
    remote = "SSH_CONNECTION" in terminal.environ
    advice = "ssh -C, or lumina --slow" if remote and rate > _HEAVY else ""
    return Row("sent", "ssh", "warn" if advice else "ok", f"{rate:.1f} KiB/s on average, {total}", advice)


def _line(terminal: Terminal) -> Iterator[Row]:
    from lumina_engine.doctor.network import ssh

    yield sent_row(terminal)
    yield _multiplexer(terminal)
    for result in ssh(_system(terminal)):
        yield Row("ssh", "ssh", result.status, result.value, result.fix)


def _system(terminal: Terminal) -> System:
    from dataclasses import replace

    return replace(System.here(), environ=terminal.environ)


def _multiplexer(terminal: Terminal) -> Row:
    environ = terminal.environ
    if "TMUX" in environ:
        advice = "set -g set-clipboard on in ~/.tmux.conf: without it copied text reaches only the file"
        try:
            answer = terminal.call(["tmux", "show-options", "-gv", "set-clipboard"], _TMUX_LIMIT)
        except OSError as error:
            return Row("tmux", "ssh", "warn", f"inside tmux, which cannot be asked: {error.strerror}", advice)
        clipboard = answer.out.strip()
        if answer.code != 0:
            return Row("tmux", "ssh", "warn", f"inside tmux, which cannot be asked: {answer.last_error}", advice)
        if clipboard != "on":
            return Row("tmux", "ssh", "warn", f"inside tmux, set-clipboard is {clipboard or 'not set'}", advice)
        return Row("tmux", "ssh", "ok", "inside tmux, set-clipboard is on")
    if "STY" in environ:
        advice = "screen passes no copied text on and has few colours; tmux does both"
        return Row("tmux", "ssh", "ok", "inside screen", advice)
    return Row("tmux", "ssh", "ok", "not inside tmux or screen")
