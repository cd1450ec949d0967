"""The built-in corpus: generated conversations that half a million active parameters can learn, and unseen questions.

Everything is a pure function of this code. A question is held out by its content (operands, word, list, story), so that no
phrasing of it is in training; a look-up fact (opposites, facts, calendar) cannot be known without being seen, so there the
pair of fact and phrasing is held out: the fact is known from other phrasings. Under a system prompt (`form`) the pair of form
and question is held out. Addition and subtraction of one digit and another are always taught and not asked by themselves.
An answer is right if it equals the expected text, but for white space around it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from lumina_engine.data import sample_language as language
from lumina_engine.data import sample_numbers as numbers
from lumina_engine.data.conversation import Conversation, Message
from lumina_engine.data.sample_item import Item, Maker
from lumina_engine.data.sample_words import SMALL_TALK

NUM_TRAIN = 24_000  # conversations
QUESTIONS_PER_SKILL = 36
SPLITS = ("train", "eval")
_SMALL_TALK_SHARE = 0.02  # of exchanges

# skill -> how it is made, its share in training
_SKILLS: dict[str, tuple[Maker, float]] = {
    "addition": (numbers.addition, 2.5),
    "subtraction": (numbers.subtraction, 2.5),
    "comparing": (numbers.comparing, 1.0),
    "neighbours": (numbers.neighbours, 1.0),
    "parity": (numbers.parity, 0.7),
    "sorting": (numbers.sorting, 1.5),
    "units": (numbers.units, 1.0),
    "counting": (language.counting, 1.5),
    "spelling": (language.spelling, 1.0),
    "reversing": (language.reversing, 1.5),
    "letters": (language.letters, 1.0),
    "copying": (language.copying, 1.5),
    "calendar": (language.calendar, 2.0),
    "facts": (language.facts, 1.5),
    "opposites": (language.opposites, 1.0),
    "memory": (language.memory, 2.5),
    "followup": (numbers.followup, 1.5),
    "form": (language.form, 2.0),
}
SKILLS = tuple(_SKILLS)


@dataclass(frozen=True, slots=True)
class Question:
    """An unseen question: the messages (`role`, `content`) up to and with the user's last, and the one right answer."""

    skill: str
    conversation: tuple[dict[str, str], ...]
    answer: str


def conversations(split: str = "train", skills: Sequence[str] | None = None) -> Iterator[Conversation]:
    """The conversations of `split` ("train", "eval"), always the same; `skills` limits them (None or empty = all).

    Training conversations hold 2 to 5 exchanges, mostly of several skills (`task` "mixed", else the skill); those of "eval" are
    the held-out questions with their answers. Raises ValueError for an unknown split or skill.
    """
    chosen = _checked(skills)
    if split == "train":
        return _training(chosen)
    if split == "eval":
        return _evaluation(chosen)
    raise ValueError(f"split {split!r} is unknown; choose train or eval")


def questions(skills: Sequence[str] | None = None) -> list[Question]:
    """The held-out questions, `QUESTIONS_PER_SKILL` of each skill (None or empty = all)."""
    found: list[Question] = []
    for skill in _checked(skills):
        rng = Random(f"lumina questions {skill}")
        asked: set[str] = set()
        while len(asked) < QUESTIONS_PER_SKILL:
            item = _draw(_SKILLS[skill][0], rng, held_out=True)
            messages = _messages(item)
            text = json.dumps(messages[:-1])
            if text not in asked:
                asked.add(text)
                found.append(Question(skill, tuple(messages[:-1]), messages[-1]["content"]))
    return found


def is_correct(question: Question, reply: str) -> bool:
    """True if `reply` is the answer, letter by letter; only white space around it is forgiven."""
    return reply.strip() == question.answer


def write_sample(path: str | Path, split: str = "train", skills: Sequence[str] | None = None) -> int:
    """Write `conversations(split, skills)` as JSON Lines to `path` (folders are made) and return how many."""
    rows = conversations(split, skills)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with target.open("w", encoding="utf-8", newline="\n") as file:
        for conversation in rows:
            file.write(json.dumps(conversation.to_record(), ensure_ascii=False) + "\n")
            count += 1
    return count


def _checked(skills: Sequence[str] | None) -> tuple[str, ...]:
    unknown = [skill for skill in skills or () if skill not in _SKILLS]
    if unknown:
        raise ValueError(f"skill {unknown[0]!r} is unknown; choose from {', '.join(SKILLS)}")
    return tuple(skill for skill in SKILLS if not skills or skill in skills)


def _training(skills: tuple[str, ...]) -> Iterator[Conversation]:
    rng = Random("lumina training conversations")
    shares = [_SKILLS[skill][1] for skill in skills]
    for number in range(NUM_TRAIN):
        length = rng.randrange(2, 6)
        chosen = rng.choices(skills, shares, k=length)
        if chosen[0] == "form":
            # a system prompt holds for its whole conversation
            maker = partial(language.form, prompt=language.any_form(rng))
            items = [_draw(maker, rng, held_out=False) for _ in range(length)]
            task = "form"
        else:
            rest = [skill for skill in chosen if skill != "form"]
            items = [_draw(_SKILLS[skill][0], rng, held_out=False) for skill in rest]
            task = rest[0] if len(set(rest)) == 1 else "mixed"
            if rng.random() < _SMALL_TALK_SHARE * length:
                items.insert(rng.choice((0, len(items))), Item((), rng.choice(SMALL_TALK)))
        messages = [message for item in items for message in _messages(item)]
        kept = [m for n, m in enumerate(messages) if n == 0 or m["role"] != "system"]
        yield Conversation(tuple(Message(m["role"], m["content"]) for m in kept), f"sample-train-{number}", task)


def _evaluation(skills: tuple[str, ...]) -> Iterator[Conversation]:
    for number, question in enumerate(questions(skills)):
        messages = (*question.conversation, {"role": "assistant", "content": question.answer})
        yield Conversation(tuple(Message(m["role"], m["content"]) for m in messages), f"sample-eval-{number}", question.skill)


def _draw(maker: Maker, rng: Random, held_out: bool) -> Item:
    while True:
        item = maker(rng)
        if item.held_out == held_out:
            return item


def _messages(item: Item) -> list[dict[str, str]]:
    system = [{"role": "system", "content": item.system}] if item.system else []
    turns = [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(item.turns)]
    return system + turns
