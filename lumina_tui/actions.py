"""Every action of the program, declared once. Bindings, footer, palette, help and the printed key list come from here.

An action `home.resume` belongs to scope `home` and calls `action_resume()` of the node that has that scope (a screen with
`scope = "home"`, a panel with `scope = "chart"`, or the app for `app`). Scopes: `app`, one per screen, one per kind of panel.
A node that cannot do it now says why in `why_not(action_id)`; the user sees the reason, in a notice and in the palette.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from textual.binding import Binding


@dataclass(frozen=True)
class Action:
    """One thing a user can do.

    `keys` are Textual key names or single characters; `footer` > 0 puts it in the last line (lowest first, at most 6);
    `danger` makes the palette show it as such; `method` and `args` replace the default `action_<name>()`; `short` is the
    footer's text where the title is too long. `changes`: it changes a run, starts a process or writes a file, so `--readonly`
    refuses it.
    """

    id: str
    title: str
    help: str
    keys: tuple[str, ...]
    footer: int = 0
    danger: bool = False
    method: str = ""
    args: tuple[object, ...] = ()
    short: str = ""
    changes: bool = False

    @property
    def scope(self) -> str:
        return self.id.rpartition(".")[0]

    @property
    def call(self) -> str:
        return "action_" + (self.method or self.id.rpartition(".")[2])


def finding(scope: str) -> tuple[Action, ...]:
    """`n` and `N` for a panel with the mixin `Finds`."""
    return (
        Action(f"{scope}.next_match", "Next match", "The next match of the search or filter", ("n",)),
        Action(f"{scope}.previous_match", "Match before", "The match before", ("N",)),
    )


APP = (
    Action("app.back", "Back", "Leave the top layer, else go to the screen before", ("escape",)),
    Action("app.help", "Help", "Keys and signs of this screen", ("?", "f1"), footer=99, short="help"),
    Action("app.palette", "Palette", "Find any action, screen or run by name", ("ctrl+p", ":")),
    Action("app.notices", "Notices", "What was said so far", ("!",)),
    Action("app.next_panel", "Next panel", "Move to the next panel or field", ("tab",)),
    Action("app.previous_panel", "Previous panel", "Move to the panel or field before", ("shift+tab",)),
    Action("app.jump", "Jump", "A letter on every panel and field; it moves there", ("ctrl+o",)),
    Action("app.maximise", "Maximise", "The focused panel alone, and back", ("m",), footer=5, short="maximise"),
    Action("app.leave", "Quit", "Leave lumina; runs go on", ("q", "ctrl+q")),
    Action("app.interrupt", "Quit", "Says how to leave: ctrl+c stops nothing here", ("ctrl+c",)),
)

# number, title and help of each screen; the key is the number
SCREENS = (
    (1, "Home", "All runs"),
    (2, "Presets", "Built-in and own configurations"),
    (3, "Config", "Edit a configuration"),
    (4, "Launch", "Review and start a run"),
    (5, "Monitor", "Watch a run"),
    (6, "Compare", "Lay runs over each other"),
    (7, "Chat", "Talk to a checkpoint"),
    (8, "Data", "Sources, checks, preparation"),
    (9, "Doctor", "Check this machine"),
)
NUMBERS = tuple(
    Action(f"app.screen_{number}", title, help_, (str(number),), method="screen", args=(number,))
    for number, title, help_ in SCREENS
)

TABLE = (
    Action("table.down", "Down", "Next row", ("j", "down")),
    Action("table.up", "Up", "Row before", ("k", "up")),
    Action("table.top", "First", "First row", ("g", "home")),
    Action("table.bottom", "Last", "Last row", ("G", "end")),
    Action("table.page_down", "Page down", "A page further", ("ctrl+d", "pagedown")),
    Action("table.page_up", "Page up", "A page back", ("ctrl+u", "pageup")),
    Action("table.choose", "Open", "Open the chosen row", ("enter",), footer=1, short="open"),
    *finding("table"),
)

CHART = (
    Action("chart.crosshair", "Crosshair", "Values at one point; h and l move it", ("c",), footer=50, short="crosshair"),
    Action("chart.left", "Left", "Crosshair one column left (without one: scroll)", ("h", "left")),
    Action("chart.right", "Right", "Crosshair one column right (without one: scroll)", ("l", "right")),
    Action("chart.far_left", "Far left", "Ten columns left", ("H", "shift+left")),
    Action("chart.far_right", "Far right", "Ten columns right", ("L", "shift+right")),
    Action("chart.first", "First", "To the first point", ("0", "home")),
    Action("chart.last", "Last", "To the newest point", ("$", "end")),
    Action("chart.event_back", "Event before", "Crosshair to the event before", ("{",)),
    Action("chart.event_next", "Next event", "Crosshair to the next event", ("}",)),
    Action("chart.pin", "Pin", "Keep this point and show the difference to it", ("enter",)),
    Action("chart.zoom_in", "Zoom in", "Half the range, about the crosshair", ("+", "=")),
    Action("chart.zoom_out", "Zoom out", "Twice the range", ("-",)),
    Action("chart.follow", "Follow", "Whole range, following the newest point", ("f",)),
    Action("chart.smoothing", "Smoothing", "Next weight of the smoothed line", ("s",)),
    Action("chart.outliers", "5-95 range", "Y range of the middle 90 % (of 100 values or more) or of everything", ("i",)),
    Action("chart.log_y", "Log Y", "Logarithmic Y axis", ("v",)),
    Action("chart.log_x", "Log X", "Logarithmic X axis", ("V",)),
    Action("chart.base", "X base", "X axis in steps, tokens, hours or clock time", ("b",)),
    Action("chart.next_metric", "Next metric", "Show the next metric", ("]",)),
    Action("chart.previous_metric", "Metric before", "Show the metric before", ("[",)),
    Action("chart.abandoned", "Abandoned tails", "Show what a rewind cut off", ("~",)),
    Action("chart.next_run", "Next run", "Of several runs the next one: it lies on top, the read-out is its", ("j", "down")),
    Action("chart.previous_run", "Run before", "Of several runs the one before", ("k", "up")),
    Action("chart.export", "Export", "The full series as CSV, SVG or text", ("e",), changes=True),
)

MAP = (
    Action("map.down", "Down", "Next layer", ("j", "down")),
    Action("map.up", "Up", "Layer before", ("k", "up")),
    Action("map.left", "Left", "Expert before", ("h", "left")),
    Action("map.right", "Right", "Next expert", ("l", "right")),
    Action("map.over_time", "Over time", "This layer over the whole run, and back", ("enter",), footer=1, short="over time"),
    Action("map.figure", "Figures", "The next figure of the layers over time: balance, entropy, dead …", ("]",)),
    Action("map.export", "Export", "Write what is known of the experts as a table", ("e",), changes=True),
)

LOG = (
    Action("log.down", "Down", "Next line", ("j", "down")),
    Action("log.up", "Up", "Line before", ("k", "up")),
    Action("log.top", "First", "First line", ("g", "home")),
    Action("log.bottom", "Last", "Last line", ("G", "end")),
    Action("log.page_down", "Page down", "A page further", ("ctrl+d", "pagedown")),
    Action("log.page_up", "Page up", "A page back", ("ctrl+u", "pageup")),
    Action("log.follow", "Follow", "Follow the newest line", ("f",)),
    Action("log.left", "Left", "To the beginning of long lines", ("h", "left")),
    Action("log.right", "Right", "Further in long lines", ("l", "right")),
    Action("log.filter", "Filter", "Only lines with these words; n and N go through them", ("/",), footer=1, short="filter"),
    Action("log.only", "Around", "All lines again, the matches marked, and back", ("&",)),
    Action("log.export", "Export", "Write the lines that are shown", ("e",), changes=True),
    *finding("log"),
)

FACTS = (Action("facts.export", "Export", "Write what this panel shows as text", ("e",), changes=True),)

HOME = (
    Action("home.new", "New run", "Start a run from a preset", ("a",), footer=2, short="new"),
    Action(
        "home.resume",
        "Resume",
        "Continue the chosen run from its newest checkpoint",
        ("R",),
        footer=3,
        short="resume",
        changes=True,
    ),
    Action(
        "home.stop",
        "Stop",
        "Stop the chosen run; in the list of chat servers: unload the chosen one",
        ("X",),
        footer=4,
        danger=True,
        short="stop",
        changes=True,
    ),
    Action("home.chat", "Chat", "Talk to the best checkpoint of the chosen run", ("T",), footer=5, short="chat"),
    Action("home.mark", "Mark", "Mark to compare with others", ("space",), footer=7, short="mark"),
    Action("home.compare", "Compare", "Lay the marked runs over each other", ("=",), footer=6, short="compare"),
    Action("home.sort", "Sort", "Sort by age, name, state, loss or alerts", ("o",)),
    Action("home.filter", "Filter", "Only runs with these words; state:failed, preset:b1", ("/",)),
    Action("home.export", "Export", "Write the list as CSV or JSON", ("e",), changes=True),
    Action("home.copy", "Copy path", "Copy the path of the chosen run", ("y",)),
    Action("home.reload", "Reload", "Read the runs again", ("r",)),
)

MONITOR = (
    Action(
        "monitor.checkpoint",
        "Checkpoint now",
        "Save at the next step boundary",
        ("C",),
        footer=1,
        short="checkpoint",
        changes=True,
    ),
    Action(
        "monitor.pause",
        "Pause or resume",
        "Hold the run at a step boundary, or let it go on",
        ("P",),
        footer=2,
        short="pause",
        changes=True,
    ),
    Action(
        "monitor.stop",
        "Stop",
        "Save and stop, or stop without saving",
        ("X",),
        footer=3,
        danger=True,
        short="stop",
        changes=True,
    ),
    Action(
        "monitor.set_lr",
        "Set learning rate",
        "Change the learning rate from the next step",
        ("S",),
        footer=4,
        short="set lr",
        changes=True,
    ),
    Action("monitor.log", "Log", "Show or hide engine.log", ("t",), footer=6, short="log"),
    Action("monitor.chat", "Chat", "Talk to the best checkpoint of this run", ("T",)),
    Action("monitor.alerts", "Alerts", "All alerts with what to do; Enter goes to the step of one", ("A",)),
    Action("monitor.devices", "Devices", "Show or hide devices, host and ranks", ("d",)),
    Action("monitor.copy", "Copy path", "Copy the path of the run", ("y",)),
    Action("monitor.command", "Copy command", "Copy the command that started this run", ("Y",)),
    Action("monitor.reload", "Reload", "Read the run's files again", ("r",)),
)

COMPARE = (
    Action("compare.hide", "Hide or mark", "Hide the chosen run, or show it again; in the list: mark", ("space",), footer=1),
    Action("compare.baseline", "Baseline", "Count differences from the chosen run", ("B",), footer=2, short="baseline"),
    Action("compare.diff", "Differences", "Differing configuration keys and results, and back", ("d",), footer=3, short="diff"),
    Action("compare.choose", "Choose runs", "Compare other runs", ("a",), footer=4, short="runs"),
    Action("compare.reload", "Reload", "Read the runs again", ("r",)),
)

TRANSCRIPT = (
    Action("transcript.down", "Down", "Next line", ("j", "down")),
    Action("transcript.up", "Up", "Line before", ("k", "up")),
    Action("transcript.top", "First", "First line", ("g", "home")),
    Action("transcript.bottom", "Newest", "Newest line, and follow it", ("G", "end")),
    Action("transcript.page_down", "Page down", "A page further", ("ctrl+d", "pagedown")),
    Action("transcript.page_up", "Page up", "A page back", ("ctrl+u", "pageup")),
    *finding("transcript"),
)

TOKENS = (
    Action("tokens.left", "Token before", "One token back", ("h", "left"), footer=2, short="before"),
    Action("tokens.right", "Next token", "One token on", ("l", "right"), footer=1, short="next token"),
    Action("tokens.far_left", "Far left", "Ten tokens back", ("H", "shift+left")),
    Action("tokens.far_right", "Far right", "Ten tokens on", ("L", "shift+right")),
    Action("tokens.first", "First token", "To the first token", ("0", "home")),
    Action("tokens.last", "Last token", "To the last token", ("$", "end")),
    Action("tokens.unlikely", "Next unlikely token", "To the next token with less than 10 %", ("u",), 3, short="unlikely"),
    Action("tokens.down", "Layers down", "Further layers of experts", ("j", "down")),
    Action("tokens.up", "Layers up", "Layers of experts before", ("k", "up")),
    Action("tokens.reply_before", "Reply before", "The tokens of the reply before", ("{",)),
    Action("tokens.next_reply", "Next reply", "The tokens of the next reply", ("}",)),
)

CHAT = (
    Action("chat.write", "Write", "Go to the message field; Esc leaves it", ("i",), footer=1, short="write"),
    Action("chat.again", "Again", "Answer the last message again; the answer stays as a version", (".",), 2, short="again"),
    Action("chat.split", "Split", "Two checkpoints side by side, same prompt and seed, or one again", ("S",), 3, short="split"),
    Action("chat.tokens", "Tokens", "The last reply token by token: probability, experts", ("x",), 4, short="tokens"),
    Action("chat.new", "New conversation", "Begin another; this one is saved, the system prompt stays", ("a",), 6, short="new"),
    Action("chat.mode", "Mode", "Next mode: standard, creative, analytical, precise", ("M",), 7, short="mode"),
    Action("chat.conversations", "Conversations", "The saved conversations; Enter continues one", ("c",)),
    Action("chat.rename", "Rename", "Another name for the chosen conversation", ("R",), changes=True),
    Action("chat.delete", "Delete", "Delete the chosen conversation", ("D",), danger=True, changes=True),
    Action("chat.checkpoints", "Checkpoints", "Choose another checkpoint for this pane", ("o",)),
    Action("chat.version_next", "Next version", "The next version of the last answer", ("]",)),
    Action("chat.version_before", "Version before", "The version of the last answer before", ("[",)),
    Action("chat.find", "Find", "Lines of this pane with these words", ("/",)),
    Action("chat.raw", "Raw or laid out", "Markdown as it was written, or laid out", ("v",)),
    Action("chat.settings", "Settings", "Temperature, top-p, top-k, penalty, length, seed, trace", (",",)),
    Action(
        "chat.reload",
        "Reload",
        "Start the server again, load a newer checkpoint, or read the list again",
        ("r",),
    ),
    Action("chat.copy", "Copy reply", "Copy the last reply", ("y",)),
    Action("chat.export", "Export", "Write the conversation as JSON or Markdown", ("e",), changes=True),
)

PRESETS = (
    Action("presets.start", "Start", "Review and start the chosen one as it is", ("a",), footer=2, short="start"),
    Action("presets.mark", "Mark", "Mark to compare with another", ("space",), footer=3, short="mark"),
    Action("presets.diff", "Diff", "Keys in which two marked ones differ, or the chosen one and the marked", ("d",), footer=4),
    Action("presets.pretend", "Pretend hardware", "Plan for other devices: 8x80GB", ("p",), footer=5, short="pretend hardware"),
    Action("presets.sort", "Sort", "Sort by size, by name, or what fits first", ("o",)),
    Action("presets.filter", "Filter", "Only those with these words", ("/",)),
    Action("presets.command", "Copy command", "Copy the command that starts the chosen one", ("Y",)),
    Action("presets.reload", "Reload", "Read own files and this machine again", ("r",)),
)

FIELDS = (
    Action("fields.down", "Down", "Next field", ("j", "down")),
    Action("fields.up", "Up", "Field before", ("k", "up")),
    Action("fields.top", "First", "First field", ("g", "home")),
    Action("fields.bottom", "Last", "Last field", ("G", "end")),
    Action("fields.page_down", "Page down", "A page further", ("ctrl+d", "pagedown")),
    Action("fields.page_up", "Page up", "A page back", ("ctrl+u", "pageup")),
    Action(
        "fields.edit", "Edit", "Change the value; Enter takes it, Esc leaves it as it was", ("enter",), footer=1, short="edit"
    ),
    Action("fields.more", "Next choice", "The next of the possible values", ("l", "right", "space")),
    Action("fields.less", "Choice before", "The possible value before", ("h", "left")),
    *finding("fields"),
)

FIELD = (
    Action("field.take", "Take", "Take the value over", ("enter",), footer=1, short="take"),
    Action("field.cancel", "Leave", "Leave the field, its value as it was", ("escape",), footer=2, short="as it was"),
)

CONFIG = (
    Action("config.undo", "Undo", "Take the last change back", ("u",), footer=2, short="undo"),
    Action("config.redo", "Redo", "Make an undone change again", ("ctrl+r",)),
    Action("config.diff", "Diff", "Everything that differs from the preset", ("d",), footer=3, short="diff"),
    Action("config.write", "Write", "Write the configuration to a file", ("w",), footer=4, short="write", changes=True),
    Action("config.start", "Start", "Review and start (the same as 4)", ("a",), footer=5, short="start"),
    Action("config.reset", "Field back to preset", "The preset's value for this field", ("D",)),
    Action("config.next_problem", "Next problem", "To the field of the next finding", ("]",)),
    Action("config.previous_problem", "Problem before", "To the field of the finding before", ("[",)),
    Action("config.search", "Search", "Find a field in all sections; n and N go through what matched", ("/",)),
    Action("config.budget", "Budget", "Memory by component, disk, steps and time, and what would make it fit", ("b",)),
    Action("config.preview", "Preview", "The exact command, and the JSON that DeepSpeed gets", ("p",)),
    Action("config.save_preset", "Save as preset", "Keep it under a name, listed in 2 Presets", ("W",), changes=True),
    Action("config.yaml", "Edit as YAML", "The whole configuration as text, with the same checks", ("E",)),
    Action("config.copy", "Copy command", "Copy the command that starts it", ("Y",)),
    Action("config.reload", "Reload", "Read the file again", ("r",)),
)

YAML = (Action("yaml.leave", "Take over", "Take the text over and go back to the fields", ("escape",), footer=1),)

TEXT = (
    Action("text.down", "Down", "Next line", ("j", "down")),
    Action("text.up", "Up", "Line before", ("k", "up")),
    Action("text.page_down", "Page down", "A page further", ("ctrl+d", "pagedown")),
    Action("text.page_up", "Page up", "A page back", ("ctrl+u", "pageup")),
)

LAUNCH = (
    Action("launch.start", "Launch", "Start the run as reviewed", ("enter",), footer=1, short="launch", changes=True),
    Action("launch.diff", "Diff", "Everything that differs from the preset", ("d",), footer=2, short="diff"),
    Action("launch.edit", "Edit", "Back to the fields", ("E",), footer=3, short="edit"),
    Action("launch.copy", "Copy command", "Copy the command, for use without lumina", ("Y",), footer=4, short="copy command"),
    Action("launch.write", "Write", "Write the configuration to a file", ("w",), footer=5, short="write", changes=True),
    Action("launch.next_finding", "Next finding", "The next finding", ("]",)),
    Action("launch.previous_finding", "Finding before", "The finding before", ("[",)),
    Action("launch.reload", "Review again", "Check configuration, data and machine again", ("r",)),
)

# layers over a screen: nothing below one gets a key
LAYER = (Action("layer.leave", "Back", "Close this layer", ("escape",)),)
SHEET = (
    Action("sheet.leave", "Back", "Close this text", ("escape", "q", "?", "!", "f1", "enter")),
    Action("sheet.down", "Down", "Next line", ("j", "down")),
    Action("sheet.up", "Up", "Line before", ("k", "up")),
    Action("sheet.top", "First", "First line", ("g", "home")),
    Action("sheet.bottom", "Last", "Last line", ("G", "end")),
    Action("sheet.page_down", "Page down", "A page further", ("ctrl+d", "pagedown", "space")),
    Action("sheet.page_up", "Page up", "A page back", ("ctrl+u", "pageup")),
    Action("sheet.find", "Find", "Lines with these words", ("/",)),
    *finding("sheet"),
    Action("sheet.copy", "Copy", "Copy this text", ("y",)),
)
ALERTS = (
    Action("alerts.leave", "Back", "Close the list", ("escape", "q", "A")),
    Action("alerts.copy", "Copy", "Copy the chosen alert with what to do", ("y",)),
)
PALETTE = (
    Action("palette.leave", "Back", "Close the palette", ("escape",)),
    Action("palette.down", "Down", "Next row", ("down", "ctrl+n")),
    Action("palette.up", "Up", "Row before", ("up", "ctrl+p")),
    Action("palette.page_down", "Page down", "A page further", ("pagedown",)),
    Action("palette.page_up", "Page up", "A page back", ("pageup",)),
)

DATA = (
    Action("data.add", "Add a source", "Add a file, a folder or a pattern; it is remembered", ("a",), footer=2, short="add"),
    Action(
        "data.validate", "Validate", "Check the chosen source: problems, lengths, repeats", ("v",), footer=3, short="validate"
    ),
    Action(
        "data.prepare",
        "Prepare",
        "Tokenise and store it now, as a run would at its start",
        ("p",),
        footer=4,
        short="prepare",
        changes=True,
    ),
    Action("data.convert", "Convert", "Write the chosen source as conversation JSON Lines", ("V",), changes=True),
    Action("data.next", "Next sample", "The next row as training sees it", (">",)),
    Action("data.previous", "Sample before", "The row before", ("<",)),
    Action("data.report", "Export", "Write what is known of the chosen source as JSON", ("e",), changes=True),
    Action("data.cancel", "Cancel", "End what runs for the chosen source", ("X",), footer=1, short="cancel", danger=True),
    Action("data.forget", "Remove", "Take an added path out of the list; the files stay", ("D",)),
    Action("data.find", "Find", "Go to a source by its name; n and N go on", ("/",)),
    Action("data.copy", "Copy path", "Copy the path of the chosen source", ("y",)),
    Action("data.command", "Copy command", "Copy the last command for the chosen source, for use without lumina", ("Y",)),
    Action("data.reload", "Reload", "Look at the files and fetch the sample again", ("r",)),
)
PATH = (
    Action("path.leave", "Back", "Leave without a path", ("escape",)),
    Action("path.complete", "Complete", "Complete the path as far as it is certain", ("tab",)),
)

DOCTOR = (
    Action("doctor.reload", "Check again", "Check terminal and machine again", ("r",), footer=2, short="again"),
    Action("doctor.skip", "Skip", "Do without the chosen check, or the slowest one, while it runs", ("X",), 3, short="skip"),
    Action("doctor.filter", "Filter", "Only rows with these words: fail, group:disk, torch", ("/",), 4, short="filter"),
    Action("doctor.export", "Save", "Write the rows as JSON, for a bug report", ("e",), footer=5, short="save", changes=True),
    Action("doctor.copy", "Copy", "Copy the chosen row", ("y",)),
    Action("doctor.command", "Copy command", "Copy the command that does the same without lumina", ("Y",)),
)

# Append the block of your screen here: NAME = (Action("name.verb", …), …), then add it to ACTIONS.

ACTIONS: tuple[Action, ...] = (
    *APP,
    *NUMBERS,
    *TABLE,
    *CHART,
    *MAP,
    *LOG,
    *FACTS,
    *HOME,
    *MONITOR,
    *COMPARE,
    *TRANSCRIPT,
    *TOKENS,
    *CHAT,
    *PRESETS,
    *FIELDS,
    *FIELD,
    *CONFIG,
    *YAML,
    *TEXT,
    *LAUNCH,
    *DATA,
    *DOCTOR,
    *PATH,
    *LAYER,
    *SHEET,
    *ALERTS,
    *PALETTE,
)

# kinds of panel that stand on a screen: their keys must not clash with the screen's
PANELS: dict[str, tuple[str, ...]] = {
    "home": ("table",),
    "monitor": ("chart", "map", "log", "facts", "table"),
    "compare": ("chart", "table", "text"),
    "chat": ("table", "transcript", "tokens"),
    "presets": ("table",),
    "config": ("fields", "table", "text"),
    "launch": ("text",),
    "data": ("table", "text"),
    "doctor": ("table",),
}


# keys that must not be bound, and why
FORBIDDEN_KEYS: Mapping[str, str] = {
    "ctrl+i": "arrives as Tab",
    "ctrl+m": "arrives as Enter",
    "ctrl+h": "arrives as Backspace",
    "ctrl+s": "stops the output of many terminals (flow control)",
    "ctrl+a": "is the command key of screen",
    "ctrl+b": "is the command key of tmux",
    "shift+enter": "is not sent without the kitty protocol",
    "ctrl+enter": "is not sent without the kitty protocol",
    "alt+enter": "arrives as plain Enter",
    **{f"alt+{digit}": "arrives as a stray character" for digit in range(10)},
}


def together() -> list[tuple[str, ...]]:
    """Groups of scopes that can be alive at the same time: in each group every key must be unique."""
    screens = [title.lower() for _, title, _ in SCREENS]
    groups: list[tuple[str, ...]] = [("app", screen, panel) for screen in screens for panel in PANELS.get(screen, ())]
    groups += [("app", screen) for screen in screens if not PANELS.get(screen)]
    met = {scope for group in groups for scope in group}
    return [*groups, *((scope,) for scope in sorted({action.scope for action in ACTIONS} - met))]


def by_id() -> Mapping[str, Action]:
    """All actions by id."""
    return {action.id: action for action in ACTIONS}


def of_scope(scope: str) -> list[Action]:
    """The actions of a scope in the order of their declaration."""
    return [action for action in ACTIONS if action.scope == scope]


def plain_key(key: str) -> str:
    """A key as Textual names it: `question_mark` for `?`."""
    return next(iter(Binding.make_bindings([Binding("comma" if key == "," else key, "")]))).key


def bindings(scope: str) -> list[Binding]:
    """Textual bindings for a scope; each carries its action's id, so a user keymap can replace the keys."""
    return [
        Binding(
            ",".join("comma" if key == "," else key for key in action.keys),
            f"do('{action.id}')",
            action.title,
            show=False,
            id=action.id,
            system=True,
        )
        for action in of_scope(scope)
    ]


_KEY_NAMES = {
    "escape": "Esc",
    "enter": "Enter",
    "space": "Space",
    "tab": "Tab",
    "up": "Up",
    "down": "Down",
    "left": "Left",
    "right": "Right",
    "home": "Home",
    "end": "End",
    "pageup": "PgUp",
    "pagedown": "PgDn",
    "f1": "F1",
}


def key_text(key: str) -> str:
    """A key as a person writes it: Enter, ctrl+p, ?"""
    return _KEY_NAMES.get(key, key)
