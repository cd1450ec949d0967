"""The plain parts of the Chat tab: wrapping, Markdown, traces, conversations, settings (terminal.md 2.7, 8). No Textual."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from lumina_engine.chat.events import Alternative, Route, Routed, Token
from lumina_engine.chat.modes import ChatError
from lumina_engine.config.counts import parameter_counts
from lumina_engine.config.schema import DeepSeekConfig
from lumina_tui.chat_settings import ChatSettings
from lumina_tui.checkpoints import Choice, Room, list_choices, memory_needed
from lumina_tui.conversations import Conversations
from lumina_tui.markdown import Markdown, Plain
from lumina_tui.memory import Memory
from lumina_tui.traces import KEPT, Trace, Traces, level, row_of, strip_rows
from lumina_tui.wrapping import Line, spans, wrap_parts

SAMPLE = """# Heading with *em*

A paragraph with **bold**, `code`, a [link](http://x.y/z) and <b>html</b>
second line&#27;[2J and ![picture](file:///etc/passwd).

1. one
2. two that is long and wraps around the whole width of it
   - nested

     more of it
3. three

> quoted

| name | value |
|------|-------|
| a    | 1     |

---

```python
def f():
\treturn "**not bold**"


print(f())
```
the end
"""
ESCAPES = "\x1b]0;owned\x07 \x1b[2J \x9b31m \r \u202egnp \u2028 \x00 &#27;[3J &#x9b;31m [/x] [@click=app.quit]x[/]"
ODD = st.text(alphabet="ab *_`~#>-1.|[]()\\&;\n\t\x1b\x9b漢e\u0301👍\u200d\ufe0f\u202e", max_size=200)


def text_of(lines: list[Line]) -> str:
    return "\n".join("".join(text for text, _ in line) for line in lines)


# Markdown


def test_c136_markdown_is_laid_out_and_nothing_in_it_is_obeyed() -> None:
    lines = Markdown().lines(SAMPLE, 60, finished=True)
    text = text_of(lines)
    for shown in (
        "# Heading with em",
        "A paragraph with bold, `code`, a [link](http://x.y/z) and",
        "![picture](file:///etc/passwd)",
        "<b>html</b>",
        "2. two that is long and wraps around the whole width of it",
        "   - nested",
        "> quoted",
        "name │ value",
        "a    │ 1",
        "│ python",
        '│     return "**not bold**"',
    ):
        assert shown in text, shown
    roles = {part for line in lines for part in line}
    assert ("bold", "title") in roles and ("em", "title") not in roles and ("`code`", "accent") in roles
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [1, 7, 20, 60])
def test_c136_a_growing_reply_shows_each_word_once_and_ends_as_the_whole(width: int) -> None:
    grown = Markdown()
    for end in range(len(SAMPLE) + 1):
        lines = grown.lines(SAMPLE[:end], width)
        assert all(cell_len("".join(text for text, _ in line)) <= max(width, 2) for line in lines) or width < 20
    assert text_of(lines).replace("\n", "").count("print(f())") == 1 or width < 12
    assert grown.lines(SAMPLE, width, finished=True) == Markdown().lines(SAMPLE, width, finished=True)
    plain = Plain()
    for end in range(len(SAMPLE) + 1):
        lines = plain.lines(SAMPLE[:end], width)
    assert lines == Plain().lines(SAMPLE, width)


@settings(max_examples=200, deadline=None)
@given(ODD, st.integers(4, 40))
@example(" 1111\u0301\t111漢", 4)  # a wide character behind a word that moved to a line of its own
def test_se01_any_text_in_any_layout_is_safe_and_fits(text: str, width: int) -> None:
    for lines in (
        Markdown().lines(text, width, finished=True),
        Markdown().lines(text, width),
        Plain().lines(text, width),
    ):
        for line in lines:
            whole = "".join(part for part, _ in line)
            assert whole.replace("\u200d", "").isprintable(), repr(whole)
            assert cell_len(whole) <= width


def test_se02_a_sequence_cut_over_every_pair_of_tokens_stays_dead() -> None:
    for cut in range(len(ESCAPES)):
        grown = Markdown()
        for part in (ESCAPES[:cut], ESCAPES):
            text = text_of(grown.lines(part, 400))
            assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r", "\x00", "\u2028"} & set(text)
    assert "[@click=app.quit]x[/]" in text_of(Markdown().lines(ESCAPES, 400, finished=True))


def test_c136_code_lines_are_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An open block costs its new line only: nothing is parsed again, however long it is."""
    parsed: list[int] = []
    import lumina_tui.markdown as module

    real = module._parse
    monkeypatch.setattr(module, "_parse", lambda text: parsed.append(len(text)) or real(text))
    code = "Here:\n```\n" + "".join(f"line {number}\n" for number in range(400))
    grown = Markdown()
    for end in range(0, len(code), 25):
        grown.lines(code[:end], 70)
    assert sum(parsed) < 100  # characters
    lines = grown.lines(code + "```\n", 70, finished=True)
    assert len([line for line in lines if line and line[-1][0].startswith("line ")]) == 400
    assert sum(parsed) < 2 * len(code)


def test_c136_a_line_of_ten_thousand_letters_and_nesting_without_end() -> None:
    for text in ("x" * 10_000, "*" * 10_000, "[" * 10_000, ">" * 3_000, "- " * 3_000, "|a" * 3_000 + "\n" + "|-" * 3_000):
        lines = Markdown().lines(text, 40, finished=True)
        assert all(cell_len("".join(part for part, _ in line)) <= 40 for line in lines), text[:10]
    long = Markdown()
    for end in range(0, 10_000, 500):
        assert text_of(long.lines("x" * end, 40)).count("x") == end


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab  漢e\u0301", max_size=60), st.integers(1, 12))
def test_wrapping_loses_only_spaces(text: str, width: int) -> None:
    found = spans(text, width)
    assert "".join(text[a:b] for a, b in found).replace(" ", "") == text.replace(" ", "")
    assert all(b <= c for (_, b), (c, _) in itertools.pairwise(found))
    styled = wrap_parts([(text[:7], "a"), (text[7:], "b")], width)
    assert text_of(styled) == "\n".join(text[a:b] for a, b in found)


# traces


def trace_of(*texts: str) -> Trace:
    trace = Trace()
    for index, text in enumerate(texts):
        trace.add(Token(text=text, token=index, probability=0.4, alternatives=[Alternative(text, index, 0.4)]))
    return trace


def test_c136_tokens_stand_in_rows_and_know_their_place() -> None:
    trace = trace_of("Trees", " stop", "\n", "", "a\nb", "漢字", " feeding")
    rows = strip_rows(trace, 10)
    assert ["".join(cell.text for cell in row) for row in rows] == ["Trees stop", "↵", "·a↵", "b漢字 feed", "ing"]
    assert [row_of(rows, index) for index in range(7)] == [0, 0, 1, 2, 2, 3, 3]
    assert all(sum(cell_len(cell.text) for cell in row) <= 10 for row in rows)
    assert strip_rows(trace, 0) == [] and strip_rows(Trace(), 5) == [[]]


@pytest.mark.parametrize("width", [1, 2, 3, 9])
def test_c136_no_token_is_lost_at_any_width(width: int) -> None:
    texts = ["漢", "ab", " ", "\x1b[2J", "\n\n", "long token indeed", "e\u0301"]
    shown = "".join(cell.text for row in strip_rows(trace_of(*texts), width) for cell in row)
    assert "long token indeed".replace(" ", "") in shown.replace(" ", "") and "\x1b" not in shown


def test_c136_routing_goes_to_its_token_and_unknown_is_unknown() -> None:
    trace = trace_of("a", "b")
    routed = Routed(index=1, experts=4, routes=[Route(0, [3], [0.9])])
    trace.add(routed)
    trace.add(Routed(index=7, experts=4, routes=[]))
    assert [traced.routed for traced in trace.tokens] == [None, routed]
    assert level(None) == ("dim", " ") and level(0.95)[1] == " " and level(0.001)[1] == "!"
    assert len({level(p)[1] for p in (0.95, 0.6, 0.2, 0.05, 0.001)}) == 5  # not by colour only
    kept = Traces()
    for turn in range(KEPT + 3):
        kept.begin((turn, 0)).add(Token(text="x"))
    assert kept.get((2, 0)) is None and kept.get((3, 0)) is not None


# conversations


def saved_chat(folder: Path, name: str, first: str = "hi", when: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    turns = [{"role": "user", "content": first}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps({"name": name, "conversation": turns, "checkpoint": {"path": "c", "step": 7}}))
    os.utime(path, (when, when))
    return path


def test_c136_conversations_are_listed_renamed_and_deleted(tmp_path: Path) -> None:
    known = Conversations(tmp_path / "chats")
    assert known.list() == ()
    old, new = saved_chat(tmp_path / "chats", "old", "first words", 1), saved_chat(tmp_path / "chats", "new", when=2)
    (tmp_path / "chats/broken.json").write_text("{")
    (tmp_path / "chats/link.json").symlink_to("/etc/passwd")
    found = known.list()
    assert {summary.name for summary in found} == {"old", "new", "broken"}
    by_name = {summary.name: summary for summary in found}
    assert by_name["old"].first == "first words" and by_name["old"].step == 7 and by_name["old"].messages == 2
    assert "no JSON" in by_name["broken"].problem
    with pytest.raises(ChatError, match="exists already"):
        known.rename(old, "new")
    with pytest.raises(ChatError, match="without a folder"):
        known.rename(old, "../away")
    moved = known.rename(old, "kept")
    assert moved.exists() and not old.exists() and new.exists()
    known.delete(moved)
    known.delete(moved)  # twice is once
    assert {summary.name for summary in known.list()} == {"new", "broken"}


# settings


def test_c104_settings_are_checked_and_remembered(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "session.json")
    chosen = ChatSettings(mode="creative")
    for wrong in ("temperature=hot", "top_p=2", "seed=-1", "trace=maybe", "colour=red", "top_k=1.5"):
        assert chosen.wrong(wrong), wrong
        with pytest.raises(ChatError):
            chosen.apply_text(wrong)
    assert chosen == ChatSettings(mode="creative")
    chosen.apply_text("temperature=0.5 top_k=100 max_new_tokens=9 seed=7 trace=off")
    assert chosen.overrides == {"temperature": 0.5, "max_new_tokens": 9} and chosen.seed == 7 and not chosen.trace
    chosen.remember(memory)
    assert ChatSettings.remembered(memory) == chosen
    again = ChatSettings(mode="creative")
    again.apply_text(chosen.text())
    assert again == chosen
    memory.set("chat.mode", "wild")
    memory.set("chat.settings", "nonsense=1")
    assert ChatSettings.remembered(memory) == ChatSettings()
    assert any("seed" in row and "7" in row for row in chosen.table())


# checkpoints


def test_c136_what_fits_is_computed_from_the_shape(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    assert memory_needed(tmp_path, 4) is None
    shape = {"vocab_size": 256, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "seq_length": 64}
    config = DeepSeekConfig.model_validate(shape)
    (model / "config.json").write_text(json.dumps(config.to_dict()))
    needed = memory_needed(tmp_path, 4)
    cache = 2 * 2 * 32 * 4 * 64  # keys and values, layers, one head of 32, bytes, tokens
    assert needed == parameter_counts(config.resolved()).total * 4 + cache
    (model / "config.json").write_text('{"hidden_size": "x"}')
    assert memory_needed(tmp_path, 4) is None
    assert list_choices(tmp_path / "none") == []
    for free, word in ((1000, "yes"), (950, "tight"), (899, "no"), (None, "-")):
        assert Choice(None, 900, Room("cpu", 4, free)).fits == word  # type: ignore[arg-type]
