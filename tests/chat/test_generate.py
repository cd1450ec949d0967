"""Sampling and decoding on a tiny random model (capabilities 5.1, 5.5, R13, C44)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lumina_engine.chat.events import Done, Message, ModelInfo, Start, Token
from lumina_engine.chat.generate import LocalBackend, banned_ids, generate, generate_batch, stop_ids
from lumina_engine.chat.modes import MODES, ChatError, Sampling
from lumina_engine.chat.sampling import Sampler, choose, nucleus, penalise
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.model.transformer import DeepSeekTransformer
from tests.chat.models import make_model

TALK: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 7 + 8?"},
    {"role": "assistant", "content": "15"},
    {"role": "user", "content": "And one more?"},
]
SHORT: list[Message] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer() -> ConversationTokenizer:
    return ConversationTokenizer("lumina-1k")


@pytest.fixture(scope="module")
def model(tokenizer: ConversationTokenizer) -> DeepSeekTransformer:
    return make_model(tokenizer)


def reply(model: DeepSeekTransformer, tokenizer: ConversationTokenizer, sampling: Sampling, seed: int = 0) -> list[int]:
    return [event.token for event in generate(model, tokenizer, TALK, sampling, seed) if isinstance(event, Token)]


# the order of sampling, by hand


def test_c105_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_c105_temperature_then_top_k_then_top_p() -> None:
    # after temperature 0.5 the weights are e^(2x): 16, 8, 4, 2, 1 times a constant
    logits = torch.tensor([[1.0, 16.0, 4.0, 2.0, 8.0]]).log() / 2
    probabilities, ids = nucleus(logits, Sampling(temperature=0.5, top_k=3, top_p=1.0))
    assert ids.tolist() == [[1, 4, 2]]
    assert probabilities[0].tolist() == pytest.approx([16 / 28, 8 / 28, 4 / 28])
    # of these three, 16/28 = 0.571 and 24/28 = 0.857: top-p is measured after top-k (before it, 24/31 = 0.774 would need three)
    probabilities, _ = nucleus(logits, Sampling(temperature=0.5, top_k=3, top_p=0.85))
    assert probabilities[0].tolist() == pytest.approx([16 / 24, 8 / 24, 0.0])
    probabilities, _ = nucleus(logits, Sampling(temperature=0.5, top_k=3, top_p=0.5))
    assert probabilities[0].tolist() == [1.0, 0.0, 0.0]
    # temperature comes before top-p: at 1 the weights are 4, 2.83, 2, 1.41, 1
    probabilities, _ = nucleus(logits, Sampling(temperature=1.0, top_k=0, top_p=0.5))
    assert probabilities[0].tolist() == pytest.approx([4 / (4 + 8**0.5), 8**0.5 / (4 + 8**0.5), 0, 0, 0])


def test_c105_the_draw_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0)
    drawn = [
        int(choose(logits, sampling, torch.tensor([u], dtype=torch.float64))) for u in (0.0, 0.49, 0.51, 0.79, 0.81, 1 - 1e-12)
    ]
    assert drawn == [0, 0, 1, 1, 2, 2]
    cut = Sampling(temperature=1.0, top_k=0, top_p=0.6)
    assert int(choose(logits, cut, torch.tensor([1 - 1e-12], dtype=torch.float64))) == 1
    assert int(choose(logits, Sampling(temperature=0), torch.tensor([0.99], dtype=torch.float64))) == 0


def test_c105_the_sampler_masks_before_it_penalises_before_it_cuts() -> None:
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=4.0), [[0]], [0], vocab_rows=4, banned=[3], spared=[1])
    logits = torch.tensor([[3.0, 1.0, 1.5, 9.0]])
    assert sampler(logits).tolist() == [2]  # 3 is banned, 0 was in the prompt: 3 / 4 < 1.5
    assert sampler(logits).tolist() == [1]  # now 2 is seen as well: 1.5 / 4 < 1
    assert sampler(logits).tolist() == [1]  # 1 is spared


def test_c105_drawn_shares_follow_the_distribution() -> None:
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    sampler = Sampler(Sampling(temperature=1.0, top_k=0, top_p=1.0), [[]], [5], vocab_rows=3, banned=[])
    counts = [0, 0, 0]
    for _ in range(2000):
        counts[int(sampler(logits))] += 1
    assert [count / 2000 for count in counts] == pytest.approx([0.6, 0.3, 0.1], abs=0.04)


# modes and seeds


@pytest.mark.parametrize("mode", list(MODES))
def test_c105_each_mode_repeats_itself_at_a_fixed_seed(
    model: DeepSeekTransformer, tokenizer: ConversationTokenizer, mode: str
) -> None:
    sampling = replace(MODES[mode], max_new_tokens=40)
    first = reply(model, tokenizer, sampling, seed=3)
    torch.rand(100)  # the global generator plays no part
    assert reply(model, tokenizer, sampling, seed=3) == first


def test_c105_modes_and_seeds_differ(model: DeepSeekTransformer, tokenizer: ConversationTokenizer) -> None:
    creative, precise = replace(MODES["creative"], max_new_tokens=20), replace(MODES["precise"], max_new_tokens=20)
    assert reply(model, tokenizer, creative, 1) != reply(model, tokenizer, creative, 2)
    assert reply(model, tokenizer, creative, 1) != reply(model, tokenizer, precise, 1)
    greedy = Sampling(temperature=0, max_new_tokens=20)
    assert reply(model, tokenizer, greedy, 1) == reply(model, tokenizer, greedy, 2)


# cache, batch, padding


@pytest.mark.parametrize("top_k", [1, 2])
def test_r13_cached_decoding_equals_the_full_forward(tokenizer: ConversationTokenizer, top_k: int) -> None:
    model = make_model(tokenizer, moe_top_k=top_k)
    ids = tokenizer.encode_conversation(TALK, add_generation_prompt=True)
    cached = reply(model, tokenizer, Sampling(temperature=0, max_new_tokens=30))
    banned = list(banned_ids(tokenizer, tokenizer.padded_vocab_size))
    full: list[int] = []
    while len(full) < 30:
        logits = model(torch.tensor([ids + full]))[0, -1]
        logits[banned] = -math.inf
        token = int(logits.argmax())
        if token in stop_ids(tokenizer):
            break
        full.append(token)
    assert cached == full and len(full) >= 5


def test_r13_a_batch_of_four_gives_the_replies_of_one_by_one(
    model: DeepSeekTransformer, tokenizer: ConversationTokenizer
) -> None:
    prompts = [SHORT, TALK, TALK[:2], [{"role": "user", "content": "spell lantern, slowly"}]]
    sampling = Sampling(temperature=0.9, top_p=0.95, top_k=100, repetition_penalty=1.2, max_new_tokens=40)
    batch = generate_batch(model, tokenizer, prompts, sampling, [4, 5, 6, 7])
    for prompt, seed, answer in zip(prompts, [4, 5, 6, 7], batch, strict=True):
        events = list(generate(model, tokenizer, prompt, sampling, seed))
        assert [event.token for event in events if isinstance(event, Token)] == answer.ids
        done = events[-1]
        assert isinstance(done, Done) and done.reason == answer.reason
        assert "".join(event.text for event in events if isinstance(event, Token)) + done.tail == answer.text
    assert len({tuple(answer.ids) for answer in batch}) == 4
    alone = generate_batch(model, tokenizer, [prompts[0]], sampling, [4])
    assert alone[0] == batch[0]
    assert generate_batch(model, tokenizer, []) == []


def test_r13_a_long_prompt_in_chunks_equals_the_whole(
    model: DeepSeekTransformer, tokenizer: ConversationTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [TALK, SHORT]
    sampling = Sampling(temperature=0, max_new_tokens=10)
    whole = generate_batch(model, tokenizer, prompts, sampling)
    monkeypatch.setattr("lumina_engine.chat.generate.PREFILL_CHUNK", 7)
    assert generate_batch(model, tokenizer, prompts, sampling) == whole


def test_r13_the_model_answers_dropless_and_gets_its_mode_back(tokenizer: ConversationTokenizer) -> None:
    model = make_model(tokenizer, capacity_factor=0.1, dropout=0.5)
    expected = reply(model, tokenizer, Sampling(temperature=0, max_new_tokens=8))
    model.train()
    assert reply(model, tokenizer, Sampling(temperature=0, max_new_tokens=8)) == expected
    assert model.training


# what may be sampled


def test_c44_ids_without_meaning_are_never_sampled(tokenizer: ConversationTokenizer) -> None:
    rows = tokenizer.padded_vocab_size + 256
    model = make_model(tokenizer, vocab_size=rows, seq_length=512)
    banned = banned_ids(tokenizer, rows)
    assert tokenizer.pad_id in banned and tokenizer.im_start_id in banned and rows - 1 in banned
    assert not banned & stop_ids(tokenizer)
    sampling = Sampling(temperature=10.0, top_p=1.0, top_k=0, max_new_tokens=400)
    ids = [event.token for event in generate(model, tokenizer, SHORT, sampling, 1, stop=[]) if isinstance(event, Token)]
    assert len(ids) == 400 and len(set(ids)) > 200
    assert not set(ids) & banned


def test_c44_characters_arrive_whole(tokenizer: ConversationTokenizer, model: DeepSeekTransformer) -> None:
    sampling = Sampling(temperature=10.0, top_p=1.0, top_k=0, max_new_tokens=100)
    events = list(generate(model, tokenizer, SHORT, sampling, 2, stop=[]))
    tokens = [event for event in events if isinstance(event, Token)]
    done = events[-1]
    assert isinstance(done, Done)
    assert "".join(event.text for event in tokens) + done.tail == tokenizer.decode([event.token for event in tokens])


def test_c136_alternatives_carry_the_models_own_probabilities(
    model: DeepSeekTransformer, tokenizer: ConversationTokenizer
) -> None:
    ids = tokenizer.encode_conversation(SHORT, add_generation_prompt=True)
    events = list(generate(model, tokenizer, ids, Sampling(temperature=0, max_new_tokens=1), 0, alternatives=3, stop=[]))
    token = events[1]
    assert isinstance(token, Token) and len(token.alternatives) == 3
    expected = model(torch.tensor([ids]))[0, -1].detach().softmax(-1)
    assert token.probability == pytest.approx(float(expected[token.token]), rel=1e-4)
    best = expected.topk(3)
    assert [other.id for other in token.alternatives] == best.indices.tolist()
    assert [other.probability for other in token.alternatives] == pytest.approx(best.values.tolist(), rel=1e-4)
    plain = list(generate(model, tokenizer, ids, Sampling(temperature=0, max_new_tokens=1), 0, stop=[]))[1]
    assert isinstance(plain, Token) and plain.probability is None and plain.alternatives == []


# ends


def test_r10_the_reply_stops_at_the_end_of_the_turn(tokenizer: ConversationTokenizer) -> None:
    model = make_model(tokenizer)
    first = reply(model, tokenizer, Sampling(temperature=0, max_new_tokens=1))[0]
    events = list(generate(model, tokenizer, TALK, Sampling(temperature=0), stop=[first]))
    assert isinstance(events[0], Start) and isinstance(events[1], Done)
    assert (events[1].reason, events[1].tokens, events[1].first_token_s) == ("stop", 0, None)
    assert stop_ids(tokenizer) == {tokenizer.im_end_id, tokenizer.eot_id}


def test_c110_length_context_and_cancel_are_told_apart(model: DeepSeekTransformer, tokenizer: ConversationTokenizer) -> None:
    def end(sampling: Sampling, **options: object) -> Done:
        done = list(generate(model, tokenizer, SHORT, sampling, 0, stop=[], **options))[-1]  # type: ignore[arg-type]
        assert isinstance(done, Done)
        return done

    assert (end(Sampling(max_new_tokens=5)).reason, end(Sampling(max_new_tokens=5)).tokens) == ("length", 5)
    prompt = len(tokenizer.encode_conversation(SHORT, add_generation_prompt=True))
    full = end(Sampling(max_new_tokens=500))
    assert (full.reason, full.tokens) == ("context", 128 - prompt)
    calls = iter(range(100))
    assert end(Sampling(), cancelled=lambda: next(calls) >= 3).reason == "cancelled"


def test_c110_the_oldest_pairs_go_when_the_context_is_full(
    model: DeepSeekTransformer, tokenizer: ConversationTokenizer
) -> None:
    long: list[Message] = [TALK[0]]
    for number in range(12):
        long += [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "yes"}]
    long.append({"role": "user", "content": "last"})
    events = list(generate(model, tokenizer, long, Sampling(temperature=0, max_new_tokens=8)))
    start = events[0]
    assert isinstance(start, Start) and start.dropped > 0 and start.dropped % 2 == 0
    assert start.prompt_tokens + 8 <= 128
    kept = [long[0], *long[1 + start.dropped :]]
    again = list(generate(model, tokenizer, kept, Sampling(temperature=0, max_new_tokens=8)))
    assert [event.token for event in events if isinstance(event, Token)] == [
        event.token for event in again if isinstance(event, Token)
    ]
    with pytest.raises(ChatError, match="shorten it"):
        next(generate(model, tokenizer, [1] * 128))
    with pytest.raises(ChatError, match="shorten it"):
        next(generate(model, tokenizer, [{"role": "user", "content": "x" * 999}]))
    with pytest.raises(ChatError, match="empty"):
        next(generate(model, tokenizer, []))


def test_c110_a_diverged_model_is_named(tokenizer: ConversationTokenizer) -> None:
    model = make_model(tokenizer)
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    with pytest.raises(ChatError, match="not a number"):
        list(generate(model, tokenizer, SHORT))


def test_c110_out_of_memory_is_one_line(
    model: DeepSeekTransformer, tokenizer: ConversationTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate …")

    monkeypatch.setattr("lumina_engine.chat.generate._prefill", full)
    with pytest.raises(ChatError, match="out of memory while answering: lower") as error:
        list(generate(model, tokenizer, SHORT))
    assert "\n" not in str(error.value)


def test_c110_cancel_from_another_thread_ends_the_reply(model: DeepSeekTransformer, tokenizer: ConversationTokenizer) -> None:
    backend = LocalBackend(model, tokenizer, ModelInfo(path="x", context_limit=128))
    events = []
    for event in backend.generate(SHORT, Sampling(), 0):
        events.append(event)
        if isinstance(event, Token):
            backend.cancel()
    assert isinstance(events[-1], Done) and events[-1].reason == "cancelled" and events[-1].tokens == 1
    assert isinstance(list(backend.generate(SHORT, Sampling(max_new_tokens=2), 0))[-1], Done)  # the next one is not affected
