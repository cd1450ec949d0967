"""C30, C31, 7.7: the quality rules, the score with its interval, the report and the filter."""

from __future__ import annotations

import json
import math
import random
import re
import tracemalloc
from xml.etree import ElementTree

import pytest

import lumina_engine
from lumina_engine.commands import data as command
from lumina_engine.data.conversation import Conversation, DataError, Message, TextDocument
from lumina_engine.data.formats import read_conversations
from lumina_engine.data.near import NearDuplicates
from lumina_engine.data.quality import FLAGS, RULES, Quality, Where, flags_of, wilson
from lumina_engine.data.report import create_data_summary_report, page, summary, validate_data_comprehensive
from lumina_engine.data.sample import conversations

WORDS = ["river", "stone", "cloud", "paper", "window", "garden", "yellow", "quiet", "morning", "letter", "distant", "copper"]


def talk(answer, question="What is it?"):
    return Conversation((Message("user", question), Message("assistant", answer)))


def prose(count, seed=0):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(count))


def broken(document, tokens=100, **options):
    return Quality(**options).judge(document, tokens, Where("f", 1))


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        ("cut_answer", prose(60) + " and the", prose(60) + "."),
        ("cut_answer", prose(60) + ",", "Short,"),
        ("repeated_lines", "the same line\n" * 8, "\n".join(prose(5, n) for n in range(8))),
        ("repeated_ngrams", " ".join(["one two three four five six"] * 20), prose(120)),
        ("symbols", "#$%&/()=?" * 10, "x = f(y[0], z) + {'a': 1}"),
        ("refusal", "I'm sorry, but I can't assist with that.", "I am an AI assistant called Lumina."),
        ("refusal", "As an AI language model, I do not have opinions.", "I can help with that."),
        ("special_tokens", "yes<|im_end|>\n<|im_start|>user", "a < b | c > d"),
        ("special_tokens", "[INST] hello [/INST]", "[1] an instruction"),
    ],
)
def test_77_rules_of_one_answer(rule, bad, good):
    assert rule in broken(talk(bad)) and rule not in broken(talk(good))
    if rule != "special_tokens":
        assert rule not in broken(talk("A fine answer.", question=bad)), "questions are not trained on"
    ignored = Conversation(
        (Message("user", "q"), Message("assistant", bad, 0.0), Message("user", "r"), Message("assistant", "b"))
    )
    assert rule == "special_tokens" or rule not in broken(ignored)


def test_77_length_languages_and_evaluation():
    assert "too_long" in broken(talk("a"), 101, seq_length=100) and "too_long" not in broken(talk("a"), 100, seq_length=100)
    assert "too_long" not in broken(TextDocument("a"), 101, seq_length=100), "plain text goes on in the next row"
    german = talk("Das Wetter ist heute sehr schön, und wir gehen am Nachmittag in den Park spazieren.")
    assert "language" in broken(german, languages=("en",)) and "language" not in broken(german, languages=("de", "en"))
    assert "language" not in broken(talk("12 + 4 = 16"), languages=("en",)), "too little text to tell"
    from lumina_engine.data.quality import normal_digest

    assert "eval_overlap" in broken(german, evaluation=frozenset([normal_digest(german)]))


def test_77_repeats_exact_and_near():
    quality, text = Quality(), prose(100)
    assert quality.judge(talk(text), 10, Where("f", 1)) == []
    assert quality.judge(talk(f"  {text.upper()}\n"), 10, Where("f", 2)) == ["duplicate"]
    changed = text.split()
    changed[50] = "another"
    assert quality.judge(talk(" ".join(changed)), 10, Where("f", 3)) == ["near_duplicate"]
    assert quality.judge(talk(prose(100, 1)), 10, Where("f", 4)) == []
    assert [(w.path, w.line) for w in quality.rules["near_duplicate"].places] == [("f", 3)]
    assert (quality.tokens, quality.good_tokens) == (40, 20)


@pytest.mark.parametrize(("overlap", "least", "most"), [(0.95, 0.98, 1.0), (0.4, 0.0, 0.02)])
def test_77_near_duplicates_follow_jaccard(overlap, least, most):
    """Pairs of made texts whose Jaccard similarity is known."""
    found = 0
    for seed in range(200):
        rng = random.Random(seed)
        words = [f"w{rng.randrange(10**9)}" for _ in range(400)]
        shared = round(400 * 2 * overlap / (1 + overlap))  # a common beginning: |A ∩ B| / |A ∪ B| = overlap
        other = words[:shared] + [f"v{rng.randrange(10**9)}" for _ in range(400 - shared)]
        near = NearDuplicates()
        assert not near.seen(" ".join(words))
        found += near.seen(" ".join(other))
    assert least <= found / 200 <= most


def test_77_a_shared_system_prompt_makes_no_near_duplicates():
    """200 conversations of one long prompt, then each of the first ten again with one word changed."""
    rng = random.Random(0)

    def words(count):
        return [f"w{rng.randrange(10**9)}" for _ in range(count)]

    def prompted(question, answer):
        turns = Message("user", " ".join(question)), Message("assistant", " ".join(answer))
        return Conversation((Message("system", prompt), *turns))

    prompt, quality = " ".join(words(500)), Quality()
    pairs = [(words(20), words(40)) for _ in range(200)]
    for number, (question, answer) in enumerate(pairs):
        assert quality.judge(prompted(question, answer), 600, Where("f", number)) == []
    for question, answer in pairs[:10]:
        assert quality.judge(prompted(question, [*answer[:-1], "other"]), 600, Where("f", 0)) == ["near_duplicate"]


def test_77_texts_with_a_common_passage_are_compared_with_a_bounded_number_of_others():
    """Texts that share 150 of 210 words: comparisons stop growing, and the one that is changed a little is found."""
    rng = random.Random(0)
    passage = [f"w{rng.randrange(10**9)}" for _ in range(150)]
    texts = [passage + [f"w{rng.randrange(10**9)}" for _ in range(60)] for _ in range(1200)]
    near, each = NearDuplicates(), []
    for text in texts:
        before = near.compared
        assert not near.seen(" ".join(text))
        each.append(near.compared - before)
    assert sum(each[800:]) <= 1.2 * sum(each[400:800]) and max(each) <= 16 * 64
    found = sum(near.seen(" ".join([*text[:-2], "changed", *text[-1:]])) for text in texts[::10])
    assert found >= 0.95 * len(texts[::10])


def test_77_a_long_text_takes_a_bounded_part_of_its_size_more():
    text = " ".join(f"word{n}" for n in range(30_000))
    near = NearDuplicates()
    tracemalloc.start()
    try:
        near.seen(text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * len(text)


def test_77_flags_do_not_lower_the_score():
    cases = {
        "email": ("write to someone@example.org today", "a@b is no address"),
        "phone": ("call +49 171 555 1234 now", "version 1.2.3 of 2024"),
        "card": ("card 4111 1111 1111 1111", "number 4111 1111 1111 1112"),
        "ip": ("host 192.168.0.17 is up", "section 1.2.3.4.5"),
        "key": ("AKIAABCDEFGHIJKLMNOP", "AKIA"),
        "insult": ("you bastard", "the word bass"),
    }
    assert set(cases) == set(FLAGS)
    for flag, (raised, quiet) in cases.items():
        assert flags_of(talk(raised)) == [flag] and flags_of(talk(quiet)) == []
        assert broken(talk(raised)) == []


def test_77_wilson_by_hand():
    low, high = wilson(0.5, 100)
    assert (low, high) == (pytest.approx(0.4038315, abs=1e-6), pytest.approx(0.5961685, abs=1e-6))
    assert wilson(1.0, 10)[1] == pytest.approx(1.0) and wilson(1.0, 10)[0] == pytest.approx(10 / (10 + 1.959964**2))


def test_77_clean_data_scores_at_least_099_and_halves_agree():
    """The built-in corpus; then a set with one bad conversation in ten, judged in two halves."""
    quality = Quality(2048)
    for number, document in zip(range(2000), conversations("train"), strict=False):
        quality.judge(document, 60, Where("c", number))
    assert quality.score()["score"] >= 0.99
    halves = [Quality(near=False), Quality(near=False)]
    for number in range(600):
        text = "the same line\n" * 9 if random.Random(number).random() < 0.1 else prose(40, number) + "."
        halves[number % 2].judge(talk(text + str(number)), 50 + number % 7, Where("c", number))
    one, other = (half.score() for half in halves)
    assert 0.8 < one["score"] < 0.95 and one["low"] <= other["score"] <= one["high"]


def test_77_malformed_records_count_as_failing():
    quality = Quality()
    for number in range(9):
        quality.judge(talk(prose(10, number)), 10, Where("f", number))
    assert quality.score()["score"] == 1.0 and quality.score(malformed=1)["score"] == pytest.approx(0.9)
    assert Quality().score() == {"score": None, "low": None, "high": None}


@pytest.fixture
def planted(write):
    """Ten conversations with known faults, and a malformed record."""
    answers = [prose(30, n) + "." for n in range(7)] + [
        "the same line\n" * 8,
        "I'm sorry, but I can't help with that.",
        prose(30) + ".",
    ]
    rows = [
        {"messages": [{"role": "user", "content": f"q{n % 9}"}, {"role": "assistant", "content": a}]}
        for n, a in enumerate(answers)
    ]
    rows[9]["messages"][0]["content"] = "q0"
    return write("planted.jsonl", [*rows, {"messages": []}])


def test_c030_validate_names_counts_and_lines(planted, tokenizer):
    found = validate_data_comprehensive(str(planted), tokenizer, sample_size=0)
    assert found["total_conversations"] == 10 and found["sampled_conversations"] == 10
    lengths = [len(tokenizer.encode_conversation(c)) for c in read_conversations(planted, on_error=lambda e: None)]
    assert found["avg_tokens"] == sum(lengths) / 10
    rules = {name: [p["line"] for p in rule["places"]] for name, rule in found["quality"]["rules"].items() if rule["places"]}
    assert rules == {"repeated_lines": [8], "refusal": [9], "duplicate": [10]}
    good = sum(lengths[:7])
    assert found["quality_score"] == pytest.approx(good / (sum(lengths) + found["avg_tokens"]))
    assert found["problem_counts"] == {"no messages": 1}
    part = validate_data_comprehensive(str(planted), tokenizer, sample_size=4)
    assert part["total_conversations"] == 10 and part["quality"]["conversations"] == 4
    with pytest.raises(DataError):
        validate_data_comprehensive("nowhere.jsonl", tokenizer)
    with pytest.raises(ValueError, match="sample_size"):
        validate_data_comprehensive(str(planted), tokenizer, -1)


def test_c030_nothing_to_judge_is_no_score(write, tokenizer):
    found = validate_data_comprehensive(write("x.jsonl", "{\n"), tokenizer)
    assert found["total_conversations"] == 0 and found["quality_score"] is None and found["avg_tokens"] is None


def test_c031_report_is_one_page_and_its_figures_are_those_of_the_check(planted, tmp_path, tokenizer):
    assert lumina_engine.create_data_summary_report is create_data_summary_report
    page = create_data_summary_report(str(planted), tmp_path / "new" / "r.html").read_text()
    assert (
        "default-src 'none'" in page
        and "<script" not in page
        and "http:" not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    )
    for words in ("planted.jsonl:8", "repeated_lines", "no messages", "10 conversations in 1 file.", "padding at"):
        assert words in page, words
    figures = json.loads(create_data_summary_report(planted, tmp_path / "r.json").read_text())
    from lumina_engine.data.tokenizer import ConversationTokenizer

    again = summary(planted, ConversationTokenizer())
    assert {k: v for k, v in figures.items() if k != "made"} == json.loads(
        json.dumps({k: v for k, v in again.items() if k != "made"})
    )
    with pytest.raises(DataError, match=r"a report is \.html or \.json"):
        create_data_summary_report(planted, tmp_path / "r.pdf")


def test_c031_hostile_text_stays_text(write, tmp_path):
    bad = {"messages": [{"role": "<script>alert(1)</script>", "content": "x"}]}
    good = {"messages": [{"role": "user", "content": "<img src=x>"}, {"role": "assistant", "content": "\x1b[2J</table>"}]}
    page = create_data_summary_report(write("a<b>.jsonl", [good, bad]), tmp_path / "r.html").read_text()
    assert "<script" not in page and "<img" not in page and "\x1b" not in page and "a&lt;b&gt;.jsonl" in page


def test_c031_the_worst_conversations_come_first_and_are_quoted_on_request(write, tokenizer, tmp_path):
    rows = [talk(prose(60, n)) for n in range(30)]
    rows[7] = talk("I'm sorry, but I can't help with that.\n" + "<b>same</b>\n" * 9)
    rows[12] = rows[21] = talk("I'm sorry, but I can't help with that.")
    path = write("w.jsonl", [{"messages": [{"role": m.role, "content": m.content} for m in row.messages]} for row in rows])
    found = summary(path, tokenizer, sample=0)
    worst = found["quality"]["worst"]
    assert [(w["line"], w["rules"]) for w in worst] == [
        (8, ["repeated_lines", "refusal"]),
        (22, ["refusal", "duplicate"]),
        (13, ["refusal"]),
    ]
    assert all("text" not in w for w in worst) and "can't help" not in page(found)
    quoted = summary(path, tokenizer, sample=0, texts=True)
    assert [w.pop("text")[:12] for w in quoted["quality"]["worst"]] == ["What is it?\n"] * 3
    assert quoted["quality"]["worst"] == worst
    shown = page(summary(path, tokenizer, sample=0, texts=True))
    assert "w.jsonl:8" in shown and "&lt;b&gt;same&lt;/b&gt;" in shown and "<b>same" not in shown


def test_c031_no_more_than_twenty_worst_are_kept(tokenizer):
    quality = Quality(near=False)
    for n in range(50):
        quality.judge(talk(f"I'm sorry, but I can't help with that {n}."), 100 + n % 25, Where("x", n))
    worst = quality.worst
    assert [w.tokens for w in worst] == sorted((100 + n % 25 for n in range(50)), reverse=True)[:20]
    assert [w.where.line for w in worst[:4]] == [24, 49, 23, 48]


def test_c031_the_page_draws_lengths_rules_and_languages(planted, tokenizer):
    shown = page(summary(planted, tokenizer, seq_length=128, sample=0))
    drawn = ElementTree.fromstring(re.search(r"<svg.*?</svg>", shown, re.DOTALL)[0])
    found = summary(planted, tokenizer, seq_length=128, sample=0)
    bars = [r for r in drawn.iter("{http://www.w3.org/2000/svg}rect") if r.get("x")]
    counts = found["lengths"]["counts"]
    assert [round(float(bar.get("height")) * max(counts) / 212) for bar in bars] == counts  # 300 px without the margins
    assert shown.count("<svg") == 3 and "conversations that break each rule" in shown


def test_77_filter_writes_both_sides_and_they_add_up(planted, tmp_path, capsys, monkeypatch):
    import argparse

    monkeypatch.chdir(tmp_path)

    def run(*argv):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        return command.run(parser.parse_args(["report", str(planted), "--tokenizer", "lumina-1k", *argv]))

    assert run("--filter", "kept.jsonl", "dropped.jsonl", "--out", "r.json") == 0
    kept, dropped = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in ("kept.jsonl", "dropped.jsonl")
    )
    lost = [row for row in dropped if "message" in row]  # what is no conversation
    dropped = [row for row in dropped if "message" not in row]
    assert (len(kept), len(dropped), len(lost)) == (7, 3, 1)
    assert [row["rules"] for row in dropped] == [["repeated_lines"], ["refusal"], ["duplicate"]]
    assert lost[0]["path"] == str(planted) and lost[0]["line"] and lost[0]["rules"]
    originals = list(read_conversations(planted, on_error=lambda e: None))
    assert list(read_conversations("kept.jsonl")) == originals[:7]
    out = capsys.readouterr().out
    assert "quality " in out and "planted.jsonl:8" in out and "1 record with a problem" in out
    from lumina_engine.commands.common import UserError

    with pytest.raises(UserError, match="judges every conversation"):
        run("--filter", "a", "b", "--sample", "5")
    with pytest.raises(UserError, match=r"--filter: kept\.jsonl/a and b: cannot be written"):
        run("--filter", "kept.jsonl/a", "b")
    assert run("--filter", "new/folder/a", "b") == 0 and (tmp_path / "new" / "folder" / "a").read_text()
    assert not list(tmp_path.glob(".*tmp"))


def test_packing_share_is_that_of_the_rows(write, tokenizer):
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * (n % 50) + "."}]}
        for n in range(200)
    ]
    found = summary(write("m.jsonl", rows), tokenizer, seq_length=128, sample=0)
    from lumina_engine.data.rows import RowOptions, RowPlan
    from lumina_engine.data.token_store import build_store

    path = write("n.jsonl", rows)
    store = build_store(read_conversations(path), tokenizer, path.parent / "store", source_digest="x")
    plan = RowPlan(store, RowOptions(128))
    assert abs(found["packing"]["rows"] - plan.num_rows) <= math.ceil(0.02 * plan.num_rows)
    assert found["packing"]["padding_share"] == pytest.approx(1 - store.num_tokens / (found["packing"]["rows"] * 128))
    assert set(found["quality"]["rules"]) == set(RULES)
