"""R08: what is kept of a document that is longer than a row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_engine.data.check import Lengths
from lumina_engine.data.conversation import Conversation, Message, TextDocument
from lumina_engine.data.cut import ANSWER, PROMPT, QUESTION, TURNS, UNTRAINED, Samples, Template, cut_conversation
from lumina_engine.data.store_writer import template_of
from lumina_engine.data.token_store import build_store


def messages(*pairs):
    return [{"role": role, "content": text} for role, text in pairs]


def kept(tokenizer, turns, limit):
    ids = np.array(tokenizer.encode_conversation(messages(*turns)))
    ranges, done = cut_conversation(ids, limit, Template(template_of(tokenizer)))
    assert sum(b - a for a, b in ranges) <= limit
    return tokenizer.decode([i for a, b in ranges for i in ids[a:b].tolist()]), done


# the template of the byte tokenizer: a user turn costs 8 tokens beside its text, system 10, assistant 13, tool 8
def turn(role, text):
    return f"<S>{role}\n{text}<E>\n"


def test_r08_oldest_turns_go_at_turn_borders(tokenizer):
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    last = turn("user", "q2") + turn("assistant", "a2")
    assert kept(tokenizer, turns, 49) == (last, [TURNS])
    assert kept(tokenizer, turns, 25) == (last, [TURNS])


def test_r08_system_prompt_stays_if_it_fits_beside_the_last_exchange(tokenizer):
    turns = [("system", "sys"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    last = turn("user", "q2") + turn("assistant", "a2")
    assert kept(tokenizer, turns, 38) == (turn("system", "sys") + last, [TURNS])
    assert kept(tokenizer, turns, 37) == (last, [TURNS, PROMPT])


def test_r08_a_long_question_loses_its_beginning_and_keeps_its_header(tokenizer):
    turns = [("user", "abcdefghijkl"), ("assistant", "a2")]
    assert kept(tokenizer, turns, 30) == ("<S>user\nfghijkl<E>\n" + turn("assistant", "a2"), [QUESTION])
    assert kept(tokenizer, turns, 15) == (turn("assistant", "a2"), [QUESTION])


def test_r08_a_single_long_answer_is_cut_at_its_end(tokenizer):
    turns = [("user", "q"), ("assistant", "0123456789" * 5)]
    assert kept(tokenizer, turns, 30) == (turn("user", "q") + "<S>assistant\n0123456789", [ANSWER])
    both = [("system", "s"), *turns]
    assert kept(tokenizer, both, 60)[0].startswith(turn("system", "s") + turn("user", "q") + "<S>assistant\n0123")
    assert kept(tokenizer, both, 30)[1] == [PROMPT, ANSWER]


def test_r08_long_question_and_long_answer_share_the_row(tokenizer):
    text, done = kept(tokenizer, [("user", "q" * 50 + "?"), ("assistant", "a" * 50)], 40)
    assert text == "<S>user\n" + "q" * 11 + "?<E>\n" + "<S>assistant\n" + "a" * 9
    assert done == [QUESTION, ANSWER]


def test_r08_tool_results_keep_their_tail(tokenizer):
    turns = [("user", "q"), ("assistant", "call"), ("tool", "0123456789" * 9), ("assistant", "a")]
    assert kept(tokenizer, turns, 40) == ("<S>tool\n" + ("0123456789" * 9)[-18:] + "<E>\n" + turn("assistant", "a"), [QUESTION])


@given(
    turns=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.booleans()), min_size=1, max_size=6),
    system=st.integers(0, 40),
    limit=st.integers(24, 80),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_r08_the_last_answer_survives(tokenizer, turns, system, limit):
    """Whatever is cut: the row is not overrun, the last answer's beginning is there, and all of it if it fits at all."""
    pairs = [("system", "s" * system)] if system else []
    for number, (question, answer, tool) in enumerate(turns):
        pairs += [("user", f"{number}" + "q" * question)]
        if tool:
            pairs += [("assistant", "call"), ("tool", "t" * question)]
        pairs += [("assistant", f"{number}" + "a" * answer)]
    ids = np.array(tokenizer.encode_conversation(messages(*pairs)))
    if len(ids) <= limit:
        return
    ranges, done = cut_conversation(ids, limit, Template(template_of(tokenizer)))
    flat = [i for a, b in ranges for i in range(a, b)]
    assert len(flat) <= limit and flat == sorted(set(flat)) and done
    assert all(a < b for a, b in ranges) and flat[-1] < len(ids)
    text = tokenizer.decode(ids[flat].tolist())
    whole = turn("assistant", pairs[-1][1])
    if len(tokenizer.encode_conversation(messages(pairs[-1]))) <= limit:
        assert text.endswith(whole)
    else:
        start = text.rindex("<S>assistant\n")
        assert whole.startswith(text[start:]) and len(flat) == limit and len(text[start:]) > len("<S>assistant\n")
    assert text.startswith("<S>")


def test_r08_samples_count_what_was_cut(tokenizer, talk, tmp_path):
    documents = [talk("q", "a"), talk("q1", "a1", "q2", "a2"), TextDocument("x" * 70), talk("q", "b" * 100)]
    store = build_store(documents, tokenizer, tmp_path, source_digest="1")
    samples = Samples(store, 30)
    assert len(samples) == 3 + 3  # the text of 71 tokens is three pieces, nothing lost
    assert samples.lengths.tolist() == [23, 25, 30, 30, 11, 30]
    assert samples.cut_documents == 2 and samples.shortened == {TURNS: 1, ANSWER: 1}
    assert samples.lost_tokens == 25 + (122 - 30)
    assert "2 of 4 conversations are longer than seq_length 30" in samples.note("training")
    assert Samples(store, 122).note("training") is None and len(Samples(store, None)) == 4
    _, length, owner = samples.segments(np.array([5, 0, 2]))
    assert length.sum() == 30 + 23 + 30 and owner.tolist() == sorted(owner.tolist())


def test_r08_a_row_that_keeps_no_trained_answer_is_counted(tokenizer, talk, tmp_path):
    """The last answer is kept even if its weight is 0; what is then left to train on is told by the store and by the check."""
    documents = [
        talk("q1", "a1", "q2", "a2", weights={3: 0.0}),
        talk("q1", "a1", "q2", "a2", weights={1: 0.0}),
        talk("q1", "a1", "q2", "b" * 100, weights={3: 0.0, 1: 0.5}),
        talk("q", "a"),
    ]
    samples = Samples(build_store(documents, tokenizer, tmp_path, source_digest="1"), 30)
    assert samples.shortened == {TURNS: 3, ANSWER: 1, UNTRAINED: 2}
    assert "no trained answer left in 2" in samples.note("training")
    lengths = Lengths(tokenizer, 30)
    for document in documents:
        lengths.add(document)
    assert lengths.cut.how == samples.shortened


def test_samples_cut_again_lose_nothing(tokenizer, talk, tmp_path):
    documents = [TextDocument("x" * 70), talk("q", "a"), TextDocument("y" * 50), TextDocument("z" * 9), talk("q", "b" * 100)]
    store = build_store(documents, tokenizer, tmp_path, source_digest="1")
    samples = Samples(store, 30)
    assert samples.lengths.tolist() == [30, 30, 11, 23, 30, 21, 10, 30]
    assert samples.loose.tolist() == [False, False, True, False, False, True, False, False]
    before = _tokens(samples, range(8))
    samples.cut_again({5: [4, 10, 7], 2: [6, 5]})
    assert samples.lengths.tolist() == [30, 30, 6, 23, 30, 4, 10, 30, 10, 7, 5]
    assert _tokens(samples, [0, 1, 2, 10, 3, 4, 5, 8, 9, 6, 7]) == before


def _tokens(samples, which):
    start, length, _ = samples.segments(np.array(which))
    return [int(token) for a, n in zip(start, length, strict=True) for token in samples.store.tokens[a : a + n]]


@pytest.mark.parametrize("limit", [30, 200])
def test_samples_give_the_tokens_of_the_store(tokenizer, talk, tmp_path, limit):
    documents = [talk("q" * i, "a" * i) for i in range(1, 30)]
    store = build_store(documents, tokenizer, tmp_path, source_digest="1")
    samples = Samples(store, limit)
    for index in range(len(samples)):
        start, length, _ = samples.segments(np.array([index]))
        ids = np.concatenate([store.tokens[a : a + n] for a, n in zip(start, length, strict=True)])
        assert len(ids) == samples.lengths[index] <= limit
        if limit == 200:
            assert ids.tolist() == tokenizer.encode_conversation(documents[index])


def test_a_message_with_a_weight_keeps_its_place(tokenizer):
    conversation = Conversation((Message("user", "q"), Message("assistant", "a", 0.5)))
    assert tokenizer.encode_conversation(conversation) == tokenizer.encode_conversation(
        messages(("user", "q"), ("assistant", "a"))
    )
