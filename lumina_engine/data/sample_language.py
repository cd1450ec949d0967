"""Skills with letters, words, facts and what was said before.

Of words, lists and stories the content is held out in all phrasings. A fact (a capital, an opposite, a day) must be seen to be
known: there the fact and the phrasing together are the content, so held out means a known fact that is asked in an unseen way.
"""

from __future__ import annotations

from random import Random

from lumina_engine.data import sample_words as words
from lumina_engine.data.sample_item import Item, pick
from lumina_engine.data.sample_numbers import comparing, neighbours, parity

_SPELL = ("Spell {w}.", "How do you spell {w}?", "Please spell the word {w}.", "Give me the letters of {w}.")
_REVERSE = (
    "Write {w} backwards.",
    "Turn {w} around.",
    "Please reverse the word {w}.",
    "What is {w} in reverse?",
)
_LETTER = ("What is the {which} letter of {w}?", "Tell me the {which} letter in {w}.", "Which letter is {which} in {w}?")
_WHICH = (("first", 0), ("second", 1), ("last", -1))


def spelling(rng: Random) -> Item:
    """The letters of a word in capitals."""
    word = rng.choice(words.LETTER_WORDS)
    core = "-".join(word)
    return Item((f"word {word}",), (pick(rng, _SPELL)[1].format(w=word), core), core)


def reversing(rng: Random) -> Item:
    """The letters from the end."""
    word = rng.choice(words.LETTER_WORDS)
    core = "-".join(reversed(word))
    return Item((f"word {word}",), (pick(rng, _REVERSE)[1].format(w=word), core), core)


def letters(rng: Random) -> Item:
    """The first, second or last letter."""
    word = rng.choice(words.LETTER_WORDS)
    which, at = rng.choice(_WHICH)
    text = pick(rng, _LETTER)[1].format(which=which, w=word)
    return Item((f"word {word}",), (text, f"The {which} letter is {word[at]}."), word[at])


def _some_words(rng: Random, least: int, most: int) -> tuple[str, list[str]]:
    """Different words, and their content: the first three."""
    chosen = rng.sample(words.LIST_WORDS, rng.randrange(least, most + 1))
    return f"words {' '.join(chosen[:3])}", chosen


_COUNT_LETTERS = ("How many letters are in {w}?", "Count the letters of {w}.", "How long is the word {w}?")
_COUNT_WORDS = ("How many words are these: {x}?", "Count these words: {x}.", "How many things are in the list {x}?")
_COUNT_DIGIT = ("How many times does {d} occur in {x}?", "Count the {d}s in {x}.", "How often do you see {d} in {x}?")


def counting(rng: Random) -> Item:
    """Letters of a word, words of a list, or how often a digit stands in a row of two digits (held out by its first three)."""
    kind = rng.randrange(3)
    if kind == 0:
        word = rng.choice(words.LETTER_WORDS)
        return Item((f"word {word}",), (pick(rng, _COUNT_LETTERS)[1].format(w=word), f"I count {len(word)}."))
    if kind == 1:
        content, chosen = _some_words(rng, 3, 6)
        return Item((content,), (pick(rng, _COUNT_WORDS)[1].format(x=", ".join(chosen)), f"I count {len(chosen)}."))
    pair = rng.sample(range(1, 10), 2)
    row = [rng.choice(pair) for _ in range(rng.randrange(3, 7))]
    text = " ".join(map(str, row))
    question = pick(rng, _COUNT_DIGIT)[1].format(d=pair[0], x=text)
    return Item((f"row {pair[0]} {text[:5]}",), (question, f"I count {row.count(pair[0])}."))


_REPEAT = ("Repeat after me: {x}.", "Say these words: {x}.", "Please copy this list: {x}.", "Write this again: {x}.")


def copying(rng: Random) -> Item:
    """Three to five words, again."""
    content, chosen = _some_words(rng, 3, 5)
    text = ", ".join(chosen)
    return Item((content,), (pick(rng, _REPEAT)[1].format(x=text), f"You said: {text}."))


_COLOUR_ASKED = ("What colour is the {}?", "Which colour does the {} have?", "And what is the colour of the {}?")
_PLACE_ASKED = ("Where is {}?", "Can you tell me where {} is?", "In which place is {}?")


def memory(rng: Random) -> Item:
    """Something told in one turn and asked for in the next."""
    kind = rng.randrange(3)
    if kind == 0:
        (c1, c2), (t1, t2) = rng.sample(words.COLOURS, 2), rng.sample(words.THINGS, 2)
        told = pick(rng, ("I have a {} {} and a {} {}.", "There is a {} {} and a {} {} here."))[1].format(c1, t1, c2, t2)
        thing, colour = rng.choice(((t1, c1), (t2, c2)))
        asked = (told, "I will remember that.", pick(rng, _COLOUR_ASKED)[1].format(thing))
        return Item((f"memory {c1} {t1} {c2} {t2}",), (*asked, f"The {thing} is {colour}."))
    n1, n2 = rng.sample(words.NAMES, 2)
    if kind == 1:
        p1, p2 = rng.sample(words.PLACES, 2)
        told = pick(rng, ("I know that {} is in the {} and {} is in the {}.", "I saw {} in the {} and {} in the {}."))[1]
        name, place = rng.choice(((n1, p1), (n2, p2)))
        asked = (told.format(n1, p1, n2, p2), "I will remember that.", pick(rng, _PLACE_ASKED)[1].format(name))
        return Item((f"memory {n1} {p1} {n2} {p2}",), (*asked, f"You can find {name} in the {place}."))
    told = pick(rng, ("My name is {} and my friend is {}.", "I am {} and this is my friend {}."))[1].format(n1, n2)
    question, reply = rng.choice((
        ("What is my name?", f"Your name is {n1}."),
        ("Who am I?", f"You are {n1}."),
        ("What is the name of my friend?", f"Your friend is {n2}."),
        ("Who is my friend?", f"Your friend is {n2}."),
    ))  # fmt: skip
    return Item((f"memory {n1} {n2}",), (told, "Nice to meet you both.", question, reply))


def calendar(rng: Random) -> Item:
    """Days, months and full hours, a few on or one back."""
    kind = rng.randrange(3)
    if kind == 2:
        hour, later = rng.randrange(1, 13), rng.randrange(2, 5)
        which, template = pick(rng, words.CLOCK)
        then = (hour + later - 1) % 12 + 1
        answer = f"{later} hours after {hour} o'clock is {then} o'clock."
        return Item((f"clock {hour} {later} {which}",), (template.format(h=hour, k=later), answer), str(then))
    names, asked = ((words.DAYS, words.DAY_ASKED), (words.MONTHS, words.MONTH_ASKED))[kind]
    at = rng.randrange(len(names))
    templates, step, answer = rng.choice(asked)
    which, template = pick(rng, templates)
    core = names[(at + step) % len(names)]
    content = f"calendar {names[at]} {step} {which}"
    return Item((content,), (template.format(d=names[at]), answer.format(d=names[at], c=core)), core)


def facts(rng: Random) -> Item:
    """Capitals, young animals, colours, legs."""
    kind = rng.choices(range(len(words.FACTS)), weights=[len(table) for table, _, _ in words.FACTS])[0]
    table, templates, answer = words.FACTS[kind]
    key = rng.choice(list(table))
    which, template = pick(rng, templates)
    text = template.format(k=key)
    reply = answer.format(k=key, v=table[key])
    return Item((f"fact {kind} {key} {which}",), (text[0].upper() + text[1:], reply), table[key])


_OPPOSITE = (
    "What is the opposite of {w}?", "Tell me the opposite of {w}.", "Which word means the opposite of {w}?",
    "Not {w}, but what?", "If it is not {w}, what is it?", "Give me a word that is the contrary of {w}.",
)  # fmt: skip


def opposites(rng: Random) -> Item:
    """The word that means the contrary."""
    word = rng.choice(list(words.OPPOSITES))
    which, template = pick(rng, _OPPOSITE)
    core = words.OPPOSITES[word]
    return Item((f"opposite {word} {which}",), (template.format(w=word), f"The opposite of {word} is {core}."), core)


_FORMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("{0}", ("Answer with the result only.", "Be brief: give only the result.")),
    ("[{0}]", ("Put the result in square brackets.", "Write only the result, in brackets.")),
    ("{0}!", ("Give only the result, with an exclamation mark.", "Shout the result.")),
    ("The answer is {0}.", ("Start with: The answer is", "Answer in a full sentence.")),
    ("{0} {0}", ("Say the result twice.", "Give each result two times.")),
)
_FORM_SKILLS = (comparing, neighbours, parity, opposites, facts)


def form(rng: Random, prompt: tuple[int, int] | None = None) -> Item:
    """A question under a system prompt that sets the answer's form; the content is the form and the question's content."""
    number, wording = prompt or (rng.randrange(len(_FORMS)), rng.randrange(2))
    shape, prompts = _FORMS[number]
    item = rng.choice(_FORM_SKILLS)(rng)
    contents = (*item.contents, f"form {number} {item.contents[0]}")
    return Item(contents, (item.turns[0], shape.format(item.core)), item.core, system=prompts[wording])


def any_form(rng: Random) -> tuple[int, int]:
    """A system prompt for `form`: its number and wording."""
    return rng.randrange(len(_FORMS)), rng.randrange(2)
