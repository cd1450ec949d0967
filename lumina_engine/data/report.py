"""What a data set is worth, as one document: the figures of `check_files` with the quality rules, in JSON or as a page."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..monitoring.html import Markup, document, table, tag
from ..monitoring.svg import bars_svg
from .check import Judged, Lost, Sofar, check_files, readable
from .conversation import DataError
from .files import Paths
from .quality import Quality, normal_digest
from .remote import local_output

FORMAT = 1
SAMPLE = 10_000  # conversations that a report tokenises and judges unless told otherwise
_LANGUAGES = 12  # that are drawn
_TITLE = "Data report"
_PLACES = 5  # of each rule on the page


def validate_data_comprehensive(data_path: Paths, tokenizer: Any, sample_size: int = 1000) -> dict[str, Any]:
    """Check a data set: every record is read, `sample_size` conversations are tokenised and judged (0 = all).

    Returns a dictionary with, among others, `total_conversations` (of all files), `avg_tokens` (of the sample),
    `quality_score` (share of the sample's tokens in conversations that break no rule), `duplicates`, `problems` and `quality`.
    Raises `DataError` for paths that name nothing.
    """
    if sample_size < 0:
        raise ValueError(f"sample_size is {sample_size}; give 0 for all, or how many")
    limit = getattr(tokenizer, "max_context_length", None)
    found = check_files(data_path, tokenizer=tokenizer, sample=sample_size, seq_length=limit, quality=Quality(limit))
    return {"avg_tokens": None, **found.to_dict()}


def create_data_summary_report(data_path: Paths, output_path: str | os.PathLike[str]) -> Path:
    """Write the report of a data set to `output_path`, a page for .html, figures for .json; folders are made, a file of that
    name is replaced.

    Counts tokens with the tokenizer of `ConversationTokenizer()`. Returns the path. Raises `DataError`.
    """
    from .tokenizer import ConversationTokenizer

    target = require_suffix(output_path)
    return write_report(summary(data_path, ConversationTokenizer()), target)


def summary(
    paths: Paths | None,
    tokenizer: Any,
    *,
    format: str = "auto",
    sample: int = SAMPLE,
    seq_length: int | None = None,
    languages: Sequence[str] = (),
    against: Paths | None = None,
    texts: bool = False,
    judged: Judged | None = None,
    lost: Lost | None = None,
    progress: Callable[[Sofar], None] | None = None,
) -> dict[str, Any]:
    """The report as plain values; see `check_files` and `Quality` for what they mean. `paths` None: the built-in corpus.

    With `texts` the worst conversations are quoted, not only named.
    """
    limit = seq_length if seq_length is not None else getattr(tokenizer, "max_context_length", None)
    evaluation = frozenset(map(normal_digest, readable(against))) if against is not None else frozenset()
    found = check_files(
        paths,
        format,
        tokenizer,
        sample=sample,
        seq_length=limit,
        against=against,
        quality=Quality(limit, languages, evaluation, texts=texts),
        judged=judged,
        lost=lost,
        progress=progress,
    )
    return {
        "format": FORMAT,
        "made": time.time(),
        "tokenizer": getattr(tokenizer, "name", type(tokenizer).__name__),
        "seq_length": limit,
        **found.to_dict(),
    }


def write_report(found: Mapping[str, Any], output: str | os.PathLike[str]) -> Path:
    """Write a summary as a page or as JSON, by suffix; the file appears whole and replaces one of that name."""
    target = require_suffix(output)
    text = json.dumps(found, ensure_ascii=False, indent=1) + "\n" if target.suffix.lower() == ".json" else page(found)
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            staging.write_text(text, encoding="utf-8", errors="backslashreplace")
            staging.replace(target)
        finally:
            staging.unlink(missing_ok=True)
    except OSError as error:
        cause = f"cannot be written ({error.strerror or error})"
        raise DataError(cause, path=target, fix="check the folder and the free space", exit_code=2) from None
    return target


def require_suffix(output: str | os.PathLike[str]) -> Path:
    """The path of a report. Raises `DataError` for a URL, and for a suffix that no report has."""
    target = local_output(output)
    if target.suffix.lower() not in (".html", ".htm", ".json"):
        raise DataError(f"a report is .html or .json, not {target.suffix!r}", path=target, fix="name it so", exit_code=2)
    return target


def is_report(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a report that `write_report` wrote."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    return head.startswith(f'{{\n "format": {FORMAT},\n "made": '.encode()) or (
        head.startswith(b"<!DOCTYPE html>") and f"<title>{_TITLE}</title>".encode() in head
    )


def page(found: Mapping[str, Any]) -> str:
    """The page of a summary."""
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(found["made"]))
    files = len(found["files"])
    lead = f"{found['total_conversations']:,} conversations in {files:,} file{'s' * (files != 1)}. Report of {made}."
    parts = [tag("h1", _TITLE), tag("p", lead), _cards(found), _files(found), _lengths(found), _quality(found)]
    return document(_TITLE, [*parts, _problems(found)])


def _cards(found: Mapping[str, Any]) -> Markup:
    """The figures that decide."""
    score = found["quality"]
    cards = [("quality", _interval(score["score"], score["low"], score["high"]))]
    if "tokens" in found:
        cards += [
            (f"tokens ({found['tokens_basis']})", f"{found['tokens']:,}"),
            ("trained", f"{found['trained_share']:.1%}"),
            ("tokens a conversation", f"{found['avg_tokens']:,.0f}"),
        ]
        if found["packing"]:
            cards.append((f"padding at {found['seq_length']:,}", f"{found['packing']['padding_share']:.1%}"))
        if found["cut"]:
            cut = found["cut"]
            cards.append(("cut off", f"{cut['lost_tokens']:,} tokens of {cut['conversations']:,} conversations"))
    cards.append(("exact repeats", f"{found['duplicates']['conversations']:,}"))
    if found["overlap"] is not None:
        cards.append(("also in the evaluation data", f"{found['overlap']['conversations']:,}"))
    cards.append(("records with a problem", f"{sum(found['problem_counts'].values()):,}"))
    return tag("div", *[tag("div", tag("span", name, class_="dim"), tag("b", value)) for name, value in cards], class_="cards")


def _interval(share: float | None, low: float | None, high: float | None) -> str:
    return "-" if share is None or low is None or high is None else f"{share:.1%} ({low:.1%} to {high:.1%})"


def _files(found: Mapping[str, Any]) -> Markup:
    rows = [
        (entry["path"], entry["format"] or "?", _bytes(entry.get("bytes")), f"{entry['conversations']:,}")
        for entry in found["files"]
    ]
    roles = ", ".join(f"{count:,} {role}" for role, count in sorted(found["messages"].items())) or "none"
    return Markup(
        tag("h2", "Files") + table(("file", "layout", "size", "conversations"), rows, (2, 3)) + tag("p", f"messages: {roles}")
    )


def _bytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.1f} MB"


def _lengths(found: Mapping[str, Any]) -> Markup:
    """The histogram, drawn and as a table."""
    if "lengths" not in found:
        return Markup("")
    lengths = found["lengths"]
    edges = list(zip(lengths["edges"], lengths["edges"][1:], strict=False))
    rows = [(f"{low + 1:,} to {high:,}", f"{count:,}") for (low, high), count in zip(edges, lengths["counts"], strict=True)]
    words = f"median {lengths['median']:,.0f}, 95 % below {lengths['p95']:,.0f}, longest {lengths['longest']:,} tokens"
    basis = f" ({found['sampled_conversations']:,} conversations, tokenizer {found['tokenizer']})"
    drawn = bars_svg([f"≤ {high:,}" for _, high in edges], lengths["counts"], title="conversations by length", x_label="tokens")
    return Markup(tag("h2", "Lengths") + tag("p", words + basis) + drawn + table(("tokens", "conversations"), rows, (1,)))


def _quality(found: Mapping[str, Any]) -> Markup:
    """Rules and flags with their first places, languages."""
    quality = found["quality"]
    parts = [tag("h2", "Quality"), tag("p", f"{quality['conversations']:,} conversations judged by these rules:")]
    parts.append(_rules(quality["rules"]))
    broken = {name: rule["conversations"] for name, rule in quality["rules"].items() if rule["conversations"]}
    if broken:
        parts.append(Markup(bars_svg(list(broken), list(broken.values()), title="conversations that break each rule")))
    parts.append(tag("p", "Flags, which do not lower the score:"))
    parts.append(_rules(quality["flags"]))
    parts.append(_worst(quality["worst"]))
    spoken = list(quality["languages"].items())[:_LANGUAGES]
    told = ", ".join(f"{code} {count:,}" for code, count in spoken)
    parts.append(tag("p", f"languages of the answers, where there is enough text to tell: {told or 'none'}"))
    if spoken:
        names, counts = zip(*spoken, strict=True)
        parts.append(Markup(bars_svg(names, counts, title="conversations by language of the answers")))
    return Markup("".join(parts))


def _worst(worst: Sequence[Mapping[str, Any]]) -> Markup:
    """The conversations that break most rules."""
    if not worst:
        return Markup("")
    columns = ["place", "rules that it breaks", "tokens", *(["its beginning"] if "text" in worst[0] else [])]
    rows = [
        [f"{w['path']}:{w['line']}", ", ".join(w["rules"]), f"{w['tokens']:,}", *([w["text"]] if "text" in w else [])]
        for w in worst
    ]
    return Markup(tag("h2", "Worst conversations") + table(columns, rows, (2,)))


def _rules(rules: Mapping[str, Any]) -> Markup:
    rows = [
        (
            name,
            rule["what"],
            f"{rule['conversations']:,}",
            f"{rule['tokens']:,}",
            ", ".join(f"{Path(p['path']).name}:{p['line']}" for p in rule["places"][:_PLACES]),
        )
        for name, rule in rules.items()
    ]
    return table(("rule", "what it means", "conversations", "tokens", "first places"), rows, (2, 3))


def _problems(found: Mapping[str, Any]) -> Markup:
    if not found["problem_counts"]:
        return Markup("")
    counts = sorted(found["problem_counts"].items(), key=lambda item: -item[1])
    first = [(f"{p['path']}:{p['line'] or '-'}", p["message"], p["fix"]) for p in found["problems"][:100]]
    return Markup(
        tag("h2", "Problems")
        + table(("reason", "records"), [(reason, f"{count:,}") for reason, count in counts], (1,))
        + tag("p", "the first hundred:")
        + table(("place", "what is wrong", "what to do"), first)
    )
