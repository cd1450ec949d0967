"""The built-in corpus: always the same, nothing held out in training, an exact grader, a vocabulary that can be made again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lumina_engine.data import sample
from lumina_engine.data.conversation import Conversation, parse_conversation
from lumina_engine.data.sample import SKILLS, Question, conversations, is_correct, questions, write_sample
from lumina_engine.data.sample_words import LETTER_WORDS, OPPOSITES
from lumina_engine.data.tokenizer import ConversationTokenizer

# skills whose held-out part is known facts in unseen phrasings (or forms); of all others the content itself is unseen
PHRASED = {"calendar", "facts", "opposites", "form"}


@pytest.fixture(scope="module")
def train() -> list[Conversation]:
    return list(conversations("train"))


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return questions()


def normal(text: str) -> str:
    """Lower case, words, numbers and operators only, each between spaces."""
    return " ".join(["", *re.findall(r"[a-z]+|\d+|[+=-]", text.lower()), ""])


def test_c144_size_skills_and_shape(train: list[Conversation], asked: list[Question]) -> None:
    assert len(train) >= 20_000 and len(SKILLS) >= 10
    assert len({c.id for c in train}) == len(train)
    for conversation in train:
        roles = [m.role for m in conversation.messages if m.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert [m.role for m in conversation.messages].count("system") <= (conversation.messages[0].role == "system")
        assert all(m.content == m.content.strip() and m.content for m in conversation.messages)
    per_skill = Counter(question.skill for question in asked)
    assert set(per_skill) == set(SKILLS) and min(per_skill.values()) >= 30
    assert {c.task for c in train} <= {*SKILLS, "mixed"}


def test_c144_always_the_same(train: list[Conversation], asked: list[Question]) -> None:
    script = """
import hashlib, json
from lumina_engine.data.sample import conversations, questions
digest = hashlib.sha256()
for conversation in conversations("train"):
    digest.update(json.dumps(conversation.to_record()).encode())
for question in questions():
    digest.update(repr(question).encode())
print(digest.hexdigest())
"""
    digest = hashlib.sha256()
    for conversation in train:
        digest.update(json.dumps(conversation.to_record()).encode())
    for question in asked:
        digest.update(repr(question).encode())
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest.hexdigest()


def test_c144_no_held_out_question_is_in_training(train: list[Conversation], asked: list[Question]) -> None:
    text = "\n".join("|".join(normal(m.content) for m in c.messages if m.role != "system") for c in train)
    seen_under: set[tuple[str, str]] = set()
    for conversation in train:
        if conversation.messages[0].role == "system":
            system = conversation.messages[0].content
            seen_under |= {(system, normal(m.content)) for m in conversation.messages if m.role == "user"}
    for question in asked:
        if question.skill == "form":
            system, user = (m["content"] for m in question.conversation)
            assert (system, normal(user)) not in seen_under, question
        else:
            assert "|".join(normal(m["content"]) for m in question.conversation) not in text, question


def test_c144_unseen_content_in_no_phrasing(train: list[Conversation], asked: list[Question]) -> None:
    """Words and operands of held-out questions never meet in a training question, however it is put."""
    training_words = {word for c in train for m in c.messages for word in re.findall(r"\b[A-Z]{3,}\b", m.content)}
    sums = {sum_ for c in train for m in c.messages for sum_ in re.findall(r"\d+ [+-] \d+ = \d+", m.content)}
    compared = {tuple(sorted(re.findall(r"\d+", m.content))) for c in train for m in c.messages if " or " in m.content}
    for question in asked:
        user = question.conversation[-1]["content"]
        numbers = tuple(sorted(re.findall(r"\d+", user)))
        if question.skill in ("spelling", "reversing", "letters"):
            assert not set(re.findall(r"\b[A-Z]{3,}\b", user)) & training_words, question
        elif question.skill in ("addition", "subtraction"):
            left, sign, right, _, total = question.answer.split()
            assert question.answer not in sums, question
            assert sign == "-" or f"{right} + {left} = {total}" not in sums, question
        elif question.skill == "comparing":
            assert numbers not in compared, question


def test_c144_the_answer_of_a_known_fact_was_taught(train: list[Conversation], asked: list[Question]) -> None:
    answers = {m.content for c in train for m in c.messages if m.role == "assistant"}
    for question in asked:
        if question.skill in PHRASED - {"form"}:
            assert question.answer in answers, question


@pytest.mark.parametrize("skill", SKILLS)
def test_c144_answers_are_right(skill: str) -> None:
    """Recomputed from the question's text alone, where a rule says what is right."""
    for question in questions([skill]):
        user, answer = question.conversation[-1]["content"], question.answer
        digits = re.findall(r"\d+", user)
        if skill in ("addition", "subtraction"):
            left, sign, right, total = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", answer).groups()  # type: ignore[union-attr]
            assert sorted((left, right)) == sorted(digits)
            assert int(total) == (int(left) + int(right) if sign == "+" else int(left) - int(right))
        elif skill == "comparing":
            assert answer.split()[0] == str((max if "larger" in user else min)(map(int, digits)))
        elif skill == "sorting":
            down = "largest" in user or "downwards" in user or "to small" in user
            assert answer.split() == sorted(digits, reverse=down)
        elif skill == "parity":
            assert answer == f"{digits[0]} is {'odd' if int(digits[0]) % 2 else 'even'}."
        elif skill in ("spelling", "reversing"):
            word = re.findall(r"\b[A-Z]{3,}\b", user)[0]
            assert answer == "-".join(word if skill == "spelling" else word[::-1])
        elif skill == "opposites":
            word, contrary = re.fullmatch(r"The opposite of (\w+) is (\w+)\.", answer).groups()  # type: ignore[union-attr]
            assert word in user and OPPOSITES[word] == contrary
        elif skill == "copying":
            assert answer.removeprefix("You said: ").rstrip(".") in user
        assert is_correct(question, f"\n {answer} ")


def test_c144_the_grader_forgives_only_white_space(asked: list[Question]) -> None:
    for question in asked:
        answer = question.answer
        assert is_correct(question, answer) and is_correct(question, f" {answer}\n")
        for wrong in ("", answer + ".", answer.swapcase() + "x", answer[:-1], f"{answer} {answer}", f"Answer: {answer}"):
            assert not is_correct(question, wrong), (question, wrong)


def test_c144_eval_conversations_are_the_questions(asked: list[Question]) -> None:
    rows = list(conversations("eval"))
    assert len(rows) == len(asked)
    for row, question in zip(rows, asked, strict=True):
        assert [{"role": m.role, "content": m.content} for m in row.messages[:-1]] == list(question.conversation)
        assert (row.messages[-1].content, row.task) == (question.answer, question.skill)


def test_c144_written_files_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "eval.jsonl"
    assert write_sample(path, "eval", ["spelling", "units"]) == 2 * sample.QUESTIONS_PER_SKILL
    lines = path.read_text(encoding="utf-8").splitlines()
    read = [parse_conversation(json.loads(line), str(path), number) for number, line in enumerate(lines, start=1)]
    assert read == list(conversations("eval", ["spelling", "units"]))
    assert {conversation.task for conversation in read} == {"spelling", "units"}


def test_c144_a_choice_of_skills_trains_only_these() -> None:
    rows = [c for _, c in zip(range(300), conversations("train", ["parity", "form"]), strict=False)]
    assert {c.task for c in rows} == {"parity", "form"}
    with pytest.raises(ValueError, match="skill 'poetry' is unknown; choose from addition"):
        conversations("train", ["poetry"])
    with pytest.raises(ValueError, match="split 'test' is unknown; choose train or eval"):
        conversations("test")


def test_c144_fits_the_debug_preset(train: list[Conversation]) -> None:
    tokenizer = ConversationTokenizer("lumina-1k")
    lengths = [len(tokenizer.encode_conversation(conversation)) for conversation in train]
    assert sum(length > 256 for length in lengths) <= len(lengths) // 1000
    assert 1_500_000 < sum(lengths) < 4_000_000


def test_letter_words_have_no_letter_twice() -> None:
    assert len(set(LETTER_WORDS)) == len(LETTER_WORDS)
    assert all(len(set(word)) == len(word) and 3 <= len(word) <= 5 for word in LETTER_WORDS)


def test_r07_the_small_vocabulary_is_made_again_bit_for_bit() -> None:
    from lumina_engine.data.bpe import lumina_1k_file
    from lumina_engine.data.vocabulary import _package_data

    assert lumina_1k_file() == _package_data("lumina-1k.tiktoken")
