"""What the Data screen says about a source: rows of the list, findings with file and line, lengths, sampled rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import paint
from .data_sources import BUILT_IN, Settings, Source, Sources
from .jobs import Job, JobState
from .talking import Severity
from .widgets.table import Cell, Column, Row
from .widgets.text_panel import Line

COLUMNS = (
    Column("name", "source", 14, grow=True, rank=0),
    Column("use", "use", 8, rank=6),
    Column("format", "format", 8, rank=4),
    Column("size", "size", 7, "right", rank=3),
    Column("conversations", "convers.", 8, "right", rank=2),
    Column("tokens", "tokens", 8, "right", rank=1),
    Column("share", "share", 5, "right", rank=5),
    Column("state", "state", 14, rank=0),
)
DOING = {"validate": "checking", "convert": "converting", "prepare": "preparing", "preview": "sampling"}
NOTHING = "a adds a file or folder; alpaca, sharegpt and messages are recognised"
_BAR = 18  # cells of the longest bar
_SHOWN, _REPEATS = 50, 5  # problems and repeats with their places
_GUESS = "~"


def guessed(text: str, basis: str) -> str:
    """A number marked as guessed where it is."""
    return f"{_GUESS}{text}" if basis == "guessed" else text


def row(source: Source, sources: Sources) -> Row:
    """The line of a source in the list."""
    look, running = source.look, [job for job in source.running if verb(job) != "preview"]
    conversations, (tokens, basis) = source.conversations, source.tokens
    sofar = next((job.progress for job in running if job.progress), None)
    if sofar is not None and verb(running[0]) == "validate":  # counts grow while they are counted
        conversations, tokens, basis = sofar["conversations"], sofar.get("tokens"), "measured"
    share, how = sources.share(source)
    name = short(source.key) or "built-in"
    cells: tuple[Cell, ...] = (
        (name, "text"),
        (source.use, "dim"),
        ("-" if look is None else look.format or "-", "text"),
        (paint.size(look.bytes) if look is not None and look.stamp else "-", "text"),
        (paint.count(conversations), "text"),
        (guessed(paint.count(tokens), basis) if tokens is not None else "-", "text" if basis == "measured" else "dim"),
        ("-" if share is None else guessed(f"{100 * share:.0f} %", how), "text"),
        state(source),
    )
    return Row(source.key or "built-in", cells)


def key_of(row_key: str | None) -> str | None:
    """The source's key for a key of the table."""
    return BUILT_IN if row_key == "built-in" else row_key


def short(path: str) -> str:
    """The last two parts of a path: what tells sources apart."""
    parts = Path(path).parts if path else ()
    return path if len(parts) <= 2 else "…/" + "/".join(parts[-2:])


def verb(job: Job) -> str:
    """What a job does: validate, convert, prepare or preview."""
    return job.arguments[1]


def state(source: Source) -> Cell:
    """One or two words and their role."""
    for job in source.running:
        if verb(job) != "preview":
            return sofar_text(job), "accent"
    if source.look is None:
        return "…", "dim"
    if source.look.problem:
        return "unusable", "bad"
    if source.stale:
        return "changed since", "warn"
    failed = next((job for job in source.jobs.values() if job.error and verb(job) != "preview"), None)
    if failed is not None:
        return "failed", "bad"
    if source.check is None:
        return ("prepared", "good") if source.prepared else ("not checked", "dim")
    if source.problems:
        return _number(source.problems, "problem"), "bad"
    if source.check["duplicates"]["conversations"] or (source.check["overlap"] or {}).get("conversations"):
        return "repeats", "warn"
    return "clean", "good"


def sofar_text(job: Job) -> str:
    """checking 42 %, or the count so far where the whole is not known."""
    done, total = job.progress.get("bytes"), job.progress.get("total_bytes")
    word = DOING.get(verb(job), verb(job))
    if done is not None and total:
        return f"{word} {100 * done / total:.0f} %"
    return word


def findings(source: Source, settings: Settings) -> list[Line]:
    """Everything that is known of a source, problems first."""
    lines: list[Line] = [[(source.name, "title")]]
    look = source.look
    if look is not None and look.stamp:
        files = _number(len(look.stamp), "file")
        lines.append([(f"{look.format or 'unknown format'}, {files}, {paint.size(look.bytes)}", "dim")])
    lines += [_job_line(job) for job in source.running if verb(job) != "preview"]
    if look is not None and look.problem:
        return [*lines, [("! ", "bad"), (look.problem, "text")], *_other_data()]
    lines += [
        [("! ", "bad"), (f"{verb(job)}: {job.error}", "text")]
        for job in source.jobs.values()
        if job.error and verb(job) != "preview"
    ]
    if source.prepared is not None:
        lines += _prepared(source.prepared)
    if source.check is None:
        if not source.running:
            lines.append([("not checked yet: v validates", "dim")])
        return lines
    if source.stale:
        lines.append([("? ", "warn"), ("a file has changed since this check: v checks again", "warn")])
    return [*lines, *_checked(source, settings)]


def _other_data() -> list[Line]:
    return [
        [],
        [("recognised: messages, alpaca, sharegpt, plain text as JSON, JSON Lines or text", "dim")],
        [("not available yet: OASST trees, Parquet, packed files, near duplicates, a quality score", "dim")],
    ]


def sampling(job: Job) -> str:
    """What a preview is doing."""
    done = job.progress.get("conversations")
    return "tokenising the first conversations …" + (f" {done:,} so far" if done else "")


def ended(source: Source, job: Job) -> tuple[str, Severity]:
    """How a job ended, and how grave that is."""
    what = f"{verb(job)} {short(source.name)}"
    if job.state is JobState.CANCELLED:
        return f"{what}: cancelled after {paint.duration(job.seconds)}", "warning"
    if job.state is JobState.FAILED:
        return f"{what}: {job.error}", "error"
    if verb(job) == "convert":
        lost = sum(job.result["dropped"].values())
        text = f"{job.result['written']:,} of {job.result['read']:,} conversations written to {job.arguments[-1]}"
        return (f"{text}, {lost:,} dropped", "warning") if lost else (text, "information")
    if verb(job) == "prepare":
        tokens = sum(store["tokens"] for store in job.result["stores"].values())
        return f"{what}: {tokens:,} tokens in {paint.duration(job.seconds)}", "information"
    words, role = state(source)
    return f"{what}: {words}", "warning" if role in ("bad", "warn") else "information"


def _job_line(job: Job) -> Line:
    parts = [sofar_text(job)]
    if "conversations" in job.progress:
        parts.append(f"{job.progress['conversations']:,} conversations")
    if job.progress.get("tokens"):
        parts.append(f"{job.progress['tokens']:,} tokens")
    if job.progress.get("problems"):
        parts.append(f"{job.progress['problems']:,} problems")
    sofar = " so far" if len(parts) > 1 else ""
    return [("… ", "accent"), (f"{', '.join(parts)}{sofar}, {paint.duration(job.seconds)}", "accent"), (" (X cancels)", "dim")]


def _prepared(answer: dict[str, Any]) -> list[Line]:
    lines: list[Line] = []
    for part, store in answer["stores"].items():
        text = f"{part}: {store['conversations']:,} conversations, {store['tokens']:,} tokens (measured)"
        lines.append([("prepared ", "good"), (f"{text}, {store['trained_tokens']:,} trained", "text")])
    return lines + [[("  ", "dim"), (note, "dim")] for note in answer["notes"]]


def _checked(source: Source, settings: Settings) -> list[Line]:
    check = source.check
    assert check is not None
    tokenizer, seq_length = source.checked_with
    clock = time.strftime("%H:%M", time.localtime(source.checked_at))
    roles = ", ".join(f"{count:,} {role}" for role, count in sorted(check["messages"].items()))
    lines: list[Line] = [
        [(f"checked at {clock}, tokenizer {tokenizer}, seq_length {seq_length:,}", "dim")],
        [(_number(check["total_conversations"], "conversation"), "text"), (f"  {roles}", "dim")],
    ]
    if (tokenizer, seq_length) != (settings.config.tokenizer, settings.config.seq_length):
        lines.append([("? ", "warn"), (f"the configuration now has {settings.config.tokenizer} and ", "warn")])
        lines[-1] = [*lines[-1], (f"{settings.config.seq_length:,}: v counts again", "warn")]
    if "tokens" in check:
        lines += _tokens(check)
    lines += _problems(check)
    lines += _repeats(check["duplicates"], "repeat an earlier one")
    if check["overlap"] is None:
        lines.append([("no evaluation data named: eval_data_path is not set", "dim")])
    else:
        lines += _repeats(check["overlap"], "are also in the evaluation data: it would flatter the model")
    if not source.problems and not check["duplicates"]["conversations"]:
        lines.append([("ok ", "good"), ("no problems, no exact repeats", "text")])
    if "lengths" in check:
        lines += [[], *histogram(check["lengths"], seq_length)]
    return lines


def _number(count: int, word: str) -> str:
    """A count with its noun."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def _tokens(check: dict[str, Any]) -> list[Line]:
    basis = check["tokens_basis"]
    how = "measured" if basis == "measured" else f"guessed from {check['sampled_conversations']:,} conversations"
    lines: list[Line] = [
        [
            (f"{check['tokens']:,} tokens", "text"),
            (f" ({how}), ", "dim"),
            (f"{100 * check['trained_share']:.1f} % trained", "text"),
            (f", {check['avg_tokens']:.0f} a conversation", "dim"),
        ]
    ]
    cut = check["cut"]
    if cut and cut["conversations"]:
        how = ", ".join(f"{kind} in {count:,}" for kind, count in sorted(cut["how"].items()))
        text = f"{cut['conversations']:,} longer than seq_length {cut['seq_length']:,}: {cut['lost_tokens']:,} tokens cut off"
        lines.append([("? ", "warn"), (text + (f" ({how})" if how else ""), "text")])
    return lines


def _problems(check: dict[str, Any]) -> list[Line]:
    lines: list[Line] = []
    total = sum(check["problem_counts"].values())
    if len(check["problem_counts"]) > 1:
        ordered = sorted(check["problem_counts"].items(), key=lambda item: -item[1])
        lines += [[("! ", "bad"), (f"{count:,} x {reason}", "text")] for reason, count in ordered]
    for problem in check["problems"][:_SHOWN]:
        lines.append([("! ", "bad"), (f"{_place(problem)} ", "accent"), (problem["message"], "text")])
        if problem["excerpt"]:
            before, bad = problem["excerpt"]
            lines.append([("    here  ", "dim"), (before, "text"), (bad or "(end)", "bad")])
        if problem["fix"]:
            lines.append([("    expected  ", "dim"), (problem["fix"], "dim")])
    if total > min(len(check["problems"]), _SHOWN):
        lines.append([(f"  … and {total - min(len(check['problems']), _SHOWN):,} more; e writes what is known", "dim")])
    return lines


def _place(item: dict[str, Any], which: str = "") -> str:
    path, line = item[f"{which}path"], item[f"{which}line"]
    return f"{Path(path).name}:{line}" if line is not None else Path(path).name


def _repeats(repeats: dict[str, Any], what: str) -> list[Line]:
    if not repeats["conversations"]:
        return []
    lines: list[Line] = [[("? ", "warn"), (f"{repeats['conversations']:,} {what}", "text")]]
    for item in repeats["examples"][:_REPEATS]:
        same = item["path"] == item["first_path"]
        first = f"line {item['first_line']}" if same else _place(item, "first_") if item["first_path"] else ""
        lines.append([("    ", "dim"), (_place(item), "accent"), (f" = {first}" if first else "", "dim")])
    more = repeats["conversations"] - min(_REPEATS, len(repeats["examples"]))
    return [*lines, [(f"    … and {more:,} more", "dim")]] if more else lines


def histogram(lengths: dict[str, Any], seq_length: int | None) -> list[Line]:
    """Bars of conversations by length in tokens; bars beyond `seq_length` say so."""
    edges, counts = lengths["edges"], lengths["counts"]
    most = max(counts)
    title = f"tokens a conversation: {lengths['shortest']:,} to {lengths['longest']:,}, half below {lengths['median']:,.0f}"
    lines: list[Line] = [[(title, "dim")]]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        over = seq_length is not None and low >= seq_length
        bar = "█" * max(1 if count else 0, round(_BAR * count / most)) if most else ""
        limit = "< seq_length" if high == seq_length else "over" if over and count else ""
        lines.append(
            [
                (f"{'to ' + f'{high:,}':>10} ", "dim"),
                (f"{bar:<{_BAR}}", "warn" if over else "accent"),
                (f" {count:>9,} ", "text"),
                (limit, "warn" if over else "dim"),
            ]
        )
    return lines


def sample_title(source: Source) -> tuple[str, str]:
    """Title of the sample panel, and what its row holds."""
    shown = source.rows.get(source.at_row)
    if shown is None or source.total_rows is None:
        return "Sample", ""
    size = shown["tokens"] + shown["padding"]
    share = 100 * shown["trained"] / size if size else 0.0
    return f"Sample row {source.at_row + 1:,} of {source.total_rows:,}", f"{size:,} tokens, {share:.0f} % trained"


def sample(source: Source) -> list[Line]:
    """A row as training sees it: `T` and underlined are trained, plain is context; padding is one line."""
    shown = source.rows.get(source.at_row)
    if shown is None:
        return []
    lines: list[Line] = [
        [("T", "good"), (" underlined: trained. Plain: context.", "dim")],
        [(f"{shown['tokens']:,} tokens, {shown['trained']:,} trained, {shown['padding']:,} padding", "dim")],
    ]
    document = 0
    for piece in shown["pieces"]:
        if piece["document"] and piece["document"] != document:
            document = piece["document"]
            lines.append([(f"-- document {document} of {shown['documents']} --", "dim")])
        lines += _piece(piece)
    return lines


def _piece(piece: dict[str, Any]) -> Sequence[Line]:
    if piece["kind"] == "padding":
        return [[("P ", "dim"), (f"padding, {piece['tokens']:,} tokens", "dim")]]
    trained = piece["kind"] == "trained"
    mark, role = ("T ", "trained") if trained else ("  ", "text")
    texts = piece["text"].split("\n")
    lines: list[Line] = [[(mark, "good" if trained else "dim"), (text, role)] for text in texts if text]
    if trained and not piece["ends_turn"]:
        lines.append([("T ", "good"), ("(cut: no end of turn)", "warn")])
    return lines
