"""The grader asks through the chat path, several questions at once, and counts exact matches (C144, R10)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lumina_engine.chat.events import ModelInfo
from lumina_engine.chat.generate import LocalBackend
from lumina_engine.chat.grade import MODE, SEED, grade_sample, messages_of
from lumina_engine.chat.modes import MODES
from lumina_engine.chat.session import ChatSession
from lumina_engine.data.sample import Question, questions
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.model.transformer import DeepSeekTransformer
from tests.chat.models import make_model


@pytest.fixture(scope="module")
def tokenizer() -> ConversationTokenizer:
    return ConversationTokenizer("lumina-1k")


@pytest.fixture(scope="module")
def model(tokenizer: ConversationTokenizer) -> DeepSeekTransformer:
    return make_model(tokenizer)


@pytest.fixture(autouse=True)
def short_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model hardly ever ends its turn: let one token in six end it."""
    monkeypatch.setattr("lumina_engine.chat.generate.stop_ids", lambda tokenizer: frozenset(range(0, 1024, 6)))


def alone(model: DeepSeekTransformer, tokenizer: ConversationTokenizer, question: Question) -> str:
    """The reply that a user gets in a session of his own."""
    backend = LocalBackend(model, tokenizer, ModelInfo(path="", context_limit=model.config.seq_length))
    session = ChatSession(backend, mode=MODE, seed=SEED)
    turns = list(question.conversation)
    if turns[0]["role"] == "system":
        session.system_prompt = turns.pop(0)["content"]
    session.history = turns[:-1]
    for _ in session.send(turns[-1]["content"]):
        pass
    return session.history[-1]["content"]


def test_c144_questions_asked_at_once_get_the_replies_of_a_session_of_their_own(
    model: DeepSeekTransformer, tokenizer: ConversationTokenizer
) -> None:
    asked = questions()[::29]
    assert any(question.conversation[0]["role"] == "system" for question in asked)
    assert any(len(question.conversation) > 2 for question in asked)
    replies = [alone(model, tokenizer, question) for question in asked]
    assert len(set(replies)) > len(replies) // 2
    own = [
        Question(question.skill, question.conversation, reply.strip()) for question, reply in zip(asked, replies, strict=True)
    ]
    for batch_size in (1, 4, 64):
        result = grade_sample(model, tokenizer, own, batch_size=batch_size)
        assert result["overall"] == 1.0
        assert all(counts["correct"] == counts["asked"] for counts in result["skills"].values())


def test_c144_counts_per_skill_progress_and_file(
    model: DeepSeekTransformer, tokenizer: ConversationTokenizer, tmp_path: Path
) -> None:
    ask = ({"role": "user", "content": "hi"},)
    right = alone(model, tokenizer, Question("a", ask, "")).strip()
    asked = [Question("a", ask, right), Question("a", ask, right + "x"), Question("b", ask, "no"), Question("a", ask, right)]
    seen: list[tuple[int, int]] = []
    path = tmp_path / "reports" / "sample_eval.json"
    result = grade_sample(
        model, tokenizer, asked, batch_size=3, progress=lambda done, total: seen.append((done, total)), path=path
    )
    assert result == {"overall": 0.5, "skills": {"a": {"asked": 3, "correct": 2}, "b": {"asked": 1, "correct": 0}}}
    assert json.loads(path.read_text()) == result and seen == [(3, 4), (4, 4)]
    assert grade_sample(model, tokenizer, []) == {"overall": 0.0, "skills": {}}


def test_c144_the_built_in_questions_are_the_default(
    model: DeepSeekTransformer, tokenizer: ConversationTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lumina_engine.data.sample.QUESTIONS_PER_SKILL", 2)
    result = grade_sample(model, tokenizer)
    assert len(result["skills"]) >= 10 and all(counts["asked"] == 2 for counts in result["skills"].values())


def test_c144_a_question_is_asked_as_the_session_would(model: DeepSeekTransformer, tokenizer: ConversationTokenizer) -> None:
    session = ChatSession(LocalBackend(model, tokenizer, ModelInfo(path="")), mode=MODE)
    turns = (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    )
    assert messages_of(session, Question("x", turns, "d")) == list(turns)
    assert messages_of(session, Question("x", turns[1:2], "d")) == list(turns[1:2])  # nothing is left of the one before
    assert session.sampling == MODES["precise"]
