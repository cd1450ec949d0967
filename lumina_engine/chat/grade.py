"""Exact-match grading on the built-in corpus: unseen questions, asked as a user would ask them in chat, mode `precise`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .events import Message, ModelInfo
from .generate import LocalBackend, generate_batch
from .saved import write
from .session import ChatSession

if TYPE_CHECKING:
    from lumina_engine.data.sample import Question
    from lumina_engine.data.tokenizer import ConversationTokenizer
    from lumina_engine.model.transformer import DeepSeekTransformer

MODE = "precise"
SEED = 0
SPARE_TOKENS = 8  # a reply that is this much longer than every answer can only be wrong, so it is cut there


def grade_sample(
    model: DeepSeekTransformer,
    tokenizer: ConversationTokenizer,
    questions: Sequence[Question] | None = None,
    *,
    batch_size: int = 64,
    seed: int = SEED,
    progress: Callable[[int, int], None] | None = None,
    path: Path | None = None,
) -> dict[str, Any]:
    """Ask every question once and count exact matches: `{"overall": share, "skills": {name: {"asked": n, "correct": n}}}`.

    Prompts and sampling come from a `ChatSession` in mode `precise` with a fixed seed; several questions are answered at once,
    which gives the replies they get one by one.

    Args:
        questions: the held-out questions of the built-in corpus if None.
        progress: called with (answered, asked) after each batch.
        path: JSON file to write the result to as well; an existing one is replaced.

    Raises:
        ChatError: the model's output is not a number, memory ran out, or the file cannot be written.
    """
    from lumina_engine.data import sample

    asked = list(sample.questions() if questions is None else questions)
    backend = LocalBackend(model, tokenizer, ModelInfo(path="", context_limit=model.config.seq_length))
    longest = max((len(tokenizer.encode(question.answer)) for question in asked), default=0)
    session = ChatSession(backend, mode=MODE, seed=seed, overrides={"max_new_tokens": longest + SPARE_TOKENS})
    prompts = [messages_of(session, question) for question in asked]
    # neighbours of like length need little padding
    order = sorted(range(len(asked)), key=lambda index: (sum(len(turn["content"]) for turn in prompts[index]), index))
    correct = [False] * len(asked)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        replies = generate_batch(model, tokenizer, [prompts[row] for row in rows], session.sampling, [seed] * len(rows))
        for row, reply in zip(rows, replies, strict=True):
            correct[row] = sample.is_correct(asked[row], reply.text)
        if progress is not None:
            progress(start + len(rows), len(asked))
    result = _summary(asked, correct)
    if path is not None:
        write(path, result, replace=True)
    return result


def messages_of(session: ChatSession, question: Question) -> list[Message]:
    """What the session would send to the model for this question: its system prompt, its turns, the open question."""
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in question.conversation]
    session.clear()
    session.system_prompt = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
    session.history = turns
    return session.messages()


def _summary(asked: Sequence[Question], correct: Sequence[bool]) -> dict[str, Any]:
    skills: dict[str, dict[str, int]] = {}
    for question, right in zip(asked, correct, strict=True):
        counts = skills.setdefault(question.skill, {"asked": 0, "correct": 0})
        counts["asked"] += 1
        counts["correct"] += int(right)
    return {"overall": sum(correct) / len(asked) if asked else 0.0, "skills": skills}
