"""Skills with numbers: what is held out are the operands, in all phrasings."""

from __future__ import annotations

from random import Random

from lumina_engine.data.sample_item import KNOWN, Item, pick

_ADD = (
    "What is {a} + {b}?",
    "Add {a} and {b}.",
    "How much is {a} plus {b}?",
    "Please work out {a} + {b}.",
    "Can you add {b} to {a}?",
    "Tell me the sum of {a} and {b}.",
)
_SUBTRACT = (
    "What is {a} - {b}?",
    "Take {b} away from {a}.",
    "How much is {a} minus {b}?",
    "Please work out {a} - {b}.",
    "Can you subtract {b} from {a}?",
    "Tell me what is left of {a} without {b}.",
)


def sum_content(a: int, b: int) -> str:
    """3 + 14 and 14 + 3 are the same content; sums of two digits are known facts."""
    return f"sum {min(a, b)} {max(a, b)}" if max(a, b) > 9 else KNOWN


def _two_numbers(rng: Random) -> tuple[int, int]:
    """Mostly a number of two digits and a digit, else two digits."""
    return (rng.randrange(10, 100) if rng.random() < 0.75 else rng.randrange(10)), rng.randrange(10)


def addition(rng: Random) -> Item:
    """A digit is added to a number below 100."""
    a, b = _two_numbers(rng)
    text = pick(rng, _ADD)[1].format(a=a, b=b)
    return Item((sum_content(a, b),), (text, f"{a} + {b} = {a + b}"), str(a + b))


def subtraction(rng: Random) -> Item:
    """A digit is taken from a number below 100, never below 0."""
    a, b = _two_numbers(rng)
    if b > a:
        a, b = b, a
    text = pick(rng, _SUBTRACT)[1].format(a=a, b=b)
    return Item((f"difference {a} {b}" if a > 9 else KNOWN,), (text, f"{a} - {b} = {a - b}"), str(a - b))


_COMPARE = (
    "Which number is {word}, {a} or {b}?",
    "What is {word}: {a} or {b}?",
    "Is {a} or {b} {word}?",
    "Pick the {word} number of {a} and {b}.",
)


def comparing(rng: Random) -> Item:
    """The larger or smaller of two numbers of two digits."""
    a, b = rng.sample(range(10, 100), 2)
    word = rng.choice(("larger", "smaller"))
    core = str(max(a, b) if word == "larger" else min(a, b))
    question = pick(rng, _COMPARE)[1].format(word=word, a=a, b=b)
    return Item((f"compare {min(a, b)} {max(a, b)}",), (question, f"{core} is {word}."), core)


AFTER = (
    "What number comes after {n}?",
    "Which number follows {n}?",
    "Count one up from {n}.",
    "What is the next number after {n}?",
)
_BEFORE = (
    "What number comes before {n}?",
    "Which number precedes {n}?",
    "Count one down from {n}.",
    "What number is just before {n}?",
)


def neighbours(rng: Random) -> Item:
    """The number before or after one below 500."""
    n = rng.randrange(1, 500)
    if rng.random() < 0.5:
        return Item((f"neighbour {n}",), (pick(rng, AFTER)[1].format(n=n), f"{n + 1} comes after {n}."), str(n + 1))
    return Item((f"neighbour {n}",), (pick(rng, _BEFORE)[1].format(n=n), f"{n - 1} comes before {n}."), str(n - 1))


_PARITY = (
    "Is {n} odd or even?",
    "Is the number {n} even or odd?",
    "Tell me if {n} is odd or even.",
    "Odd or even: {n}?",
)


def parity(rng: Random) -> Item:
    """Odd or even, below 1,000."""
    n = rng.randrange(1000)
    core = "odd" if n % 2 else "even"
    return Item((f"parity {n}",), (pick(rng, _PARITY)[1].format(n=n), f"{n} is {core}."), core)


_SORT_UP = ("Sort these numbers: {x}.", "Put {x} in order, smallest first.", "Order {x} from small to large.")
_SORT_DOWN = ("Sort these numbers downwards: {x}.", "Put {x} in order, largest first.", "Order {x} from large to small.")


def sorting(rng: Random) -> Item:
    """Three or four different digits, up or down; held out by the first three."""
    digits = rng.sample(range(10), rng.choice((3, 4)))
    down = rng.random() < 0.3
    question = pick(rng, _SORT_DOWN if down else _SORT_UP)[1].format(x=" ".join(map(str, digits)))
    core = " ".join(map(str, sorted(digits, reverse=down)))
    return Item((f"digits {' '.join(map(str, digits[:3]))}",), (question, core), core)


_UNITS = (
    ("metres", "centimetres", 100), ("kilometres", "metres", 1000), ("kilograms", "grams", 1000),
    ("litres", "millilitres", 1000), ("centimetres", "millimetres", 10), ("dollars", "cents", 100),
    ("centuries", "years", 100), ("decades", "years", 10),
)  # fmt: skip
_HOW_MANY = (
    "How many {small} are in {n} {big}?",
    "How many {small} make {n} {big}?",
    "Change {n} {big} into {small}.",
    "What is {n} {big} in {small}?",
)


def units(rng: Random) -> Item:
    """2 to 99 of a unit in the next smaller one."""
    big, small, factor = rng.choice(_UNITS)
    n = rng.randrange(2, 100)
    core = f"{n * factor} {small}"
    text = pick(rng, _HOW_MANY)[1].format(small=small, big=big, n=n)
    return Item((f"units {n} {big}",), (text, f"{n} {big} = {core}"), core)


_ADD_MORE = ("Now add {c}.", "Add {c} more to that.", "And plus {c}?")
_OTHER_ONE = ("And which one is {word}?", "And the {word} one?", "Which of the two is {word}?")
_AND_THEN = ("And after that?", "And the next one?", "What comes then?")


def followup(rng: Random) -> Item:
    """A second question that means nothing without the first."""
    kind = rng.randrange(3)
    if kind == 0:
        first = addition(rng)
        total, c = int(first.core), rng.randrange(1, 10)
        contents = (*first.contents, sum_content(total, c), f"sum {first.turns[1]} then {c}")
        return Item(contents, (*first.turns, pick(rng, _ADD_MORE)[1].format(c=c), f"{total} + {c} = {total + c}"))
    if kind == 1:
        first = comparing(rng)
        low, high = first.contents[0].split()[1:]
        core, word = (low, "smaller") if first.core == high else (high, "larger")
        return Item(first.contents, (*first.turns, pick(rng, _OTHER_ONE)[1].format(word=word), f"{core} is {word}."))
    n = rng.randrange(1, 500)
    asked = (pick(rng, AFTER)[1].format(n=n), f"{n + 1} comes after {n}.", pick(rng, _AND_THEN)[1])
    return Item((f"neighbour {n}", f"neighbour {n + 1}"), (*asked, f"{n + 2} comes after {n + 1}."))
