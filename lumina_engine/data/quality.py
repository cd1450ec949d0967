"""What lowers the worth of training text: rules over one conversation, repeats over many, and a score with its interval.

The score is the share of tokens in conversations that break no rule. Flags (personal data, insults) are counted beside it and
never lower it: patterns cannot tell an example address from a real one.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .conversation import Conversation, Document, TextDocument
from .near import NearDuplicates

RULES = {
    "cut_answer": "an answer stops in the middle of a sentence",
    "repeated_lines": "most lines of an answer stand there more than once",
    "repeated_ngrams": "most words of an answer lie in repeated runs of five",
    "symbols": "less than half of an answer is letters, digits and spaces",
    "too_long": "longer than seq_length: training cuts it (conversations; plain text is continued in the next row)",
    "language": "an answer is in none of the wanted languages",
    "refusal": "an answer is a ready-made refusal",
    "special_tokens": "text that looks like a tokenizer's control token",
    "duplicate": "the same text came before, but for case and white space",
    "near_duplicate": "nearly the same turns behind the system prompt came before (Jaccard of word 5-grams at least 0.8)",
    "eval_overlap": "stands in the evaluation data too",
}
FLAGS = {
    "email": "an e-mail address",
    "phone": "a telephone number",
    "card": "a payment card number with a right check digit",
    "ip": "an IP address",
    "key": "the shape of an access key",
    "insult": "an insult",
}
_WORST = 20  # conversations shown as examples
_EXCERPT = 400  # characters of each
_EXAMPLES = 100  # places kept for each rule; all are counted
_LEAST_WORDS = 50  # an answer of fewer is too short to call repetitive
_LEAST_LINES = 6
_LEAST_SIGNS = 40
_REFUSALS = re.compile(
    r"\bas an ai(?: language)? model,? i (?:cannot|can't|do(?:n't| not)|am (?:not|unable))"
    r"|\bi(?:'m| am) sorry,? but i (?:cannot|can't|am (?:not able|unable))"
    r"|\bi (?:cannot|can't|am unable to) (?:assist|help)(?: you)? with (?:that|this)",
    re.IGNORECASE,
)
_SPECIAL = re.compile(r"<\|[a-z0-9_]{2,40}\|>|\[/?INST\]|<</?SYS>>|</?s>(?=\s|$)|<(?:bos|eos|pad|unk)>", re.IGNORECASE)
_OPEN_END = re.compile(
    r"(?:[,;:(\[{‚„-]|\b(?:and|or|but|the|a|an|of|to|in|for|with|that|because|which|is|are))$", re.IGNORECASE
)
_EMAIL = re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{2,63})+\b")
_PHONE = re.compile(r"(?<![\w.])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\)|\d{2,4})[ .-]\d{3,4}[ .-]\d{3,4}(?![\w.])")
_CARD = re.compile(r"(?<!\d)(?:\d[ -]?){13,19}(?!\d)")
_IP = re.compile(r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])")
_KEY = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,}|AKIA[0-9A-Z]{16}|ghp_[A-Za-z0-9]{36}|xox[bap]-[A-Za-z0-9-]{10,})\b"
)
_INSULT = re.compile(
    r"\b(?:f[u*]ck(?:ing|er|ers|ed|s)?|sh[i*]t(?:head|ty)?|bitch(?:es)?|cunts?|assholes?|bastards?|motherf\w+|dickheads?"
    r"|retard(?:ed|s)?)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Where:
    """The place of a conversation."""

    path: str
    line: int


@dataclass(slots=True)
class Rule:
    """How often a rule was broken: conversations, their tokens, the first hundred places."""

    conversations: int = 0
    tokens: int = 0
    places: list[Where] = field(default_factory=list)

    def add(self, where: Where, tokens: int) -> None:
        self.conversations += 1
        self.tokens += tokens
        if len(self.places) < _EXAMPLES:
            self.places.append(where)

    def to_dict(self, what: str) -> dict[str, Any]:
        """For JSON."""
        places = [{"path": w.path, "line": w.line} for w in self.places]
        return {"what": what, "conversations": self.conversations, "tokens": self.tokens, "places": places}


@dataclass(frozen=True, slots=True)
class Worst:
    """One of the conversations that break most rules; `text` is its beginning where texts are wanted."""

    where: Where
    rules: tuple[str, ...]
    tokens: int
    text: str | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        told = {"path": self.where.path, "line": self.where.line, "rules": list(self.rules), "tokens": self.tokens}
        return told if self.text is None else told | {"text": self.text}


class Quality:
    """Judges conversations one after the other; a repeat is a repeat of one that came before.

    Args:
        seq_length: rows of training, in tokens; None leaves the rule out.
        languages: wanted language codes such as ("en", "de"); empty leaves the rule out.
        evaluation: digests of the evaluation data, see `normal_digest`; empty leaves the rule out.
        near: look for near duplicates, at about 3 KB and a fifth of a millisecond a conversation of 200 words.
        texts: keep the beginnings of the worst conversations, not only their places.
    """

    def __init__(
        self,
        seq_length: int | None = None,
        languages: Sequence[str] = (),
        evaluation: frozenset[bytes] = frozenset(),
        near: bool = True,
        texts: bool = False,
    ) -> None:
        self.texts = texts
        self._worst: list[tuple[int, int, int, Worst]] = []  # a heap by rules broken, tokens, the earlier one
        self.seq_length, self.languages, self.evaluation = seq_length, frozenset(languages), evaluation
        self.rules = {name: Rule() for name in RULES}
        self.flags = {name: Rule() for name in FLAGS}
        self.spoken: Counter[str] = Counter()
        self.conversations, self.tokens, self.good_tokens, self._squares = 0, 0, 0, 0
        self._digests: set[bytes] = set()
        self._near = NearDuplicates() if near else None
        self._identify: Callable[[str], tuple[str, float]] | None = None

    def judge(self, document: Document, tokens: int, where: Where) -> list[str]:
        """Names of the rules that a conversation of `tokens` tokens breaks; counts it."""
        broken = self._broken(document, tokens)
        for name in broken:
            self.rules[name].add(where, tokens)
        for name in flags_of(document):
            self.flags[name].add(where, tokens)
        if broken:
            self._keep(document, broken, tokens, where)
        self.conversations += 1
        self.tokens += tokens
        self._squares += tokens * tokens
        self.good_tokens += 0 if broken else tokens
        return broken

    def _keep(self, document: Document, broken: list[str], tokens: int, where: Where) -> None:
        rank = (len(broken), tokens, -self.conversations)
        if len(self._worst) == _WORST and rank < self._worst[0][:3]:
            return
        text = "\n".join(texts_of(document))[:_EXCERPT] if self.texts else None
        entry = (*rank, Worst(where, tuple(broken), tokens, text))
        (heapq.heappush if len(self._worst) < _WORST else heapq.heapreplace)(self._worst, entry)

    @property
    def worst(self) -> list[Worst]:
        """Up to twenty conversations: those that break most rules, of these the longest first."""
        return [entry[3] for entry in sorted(self._worst, reverse=True, key=lambda entry: entry[:3])]

    def _broken(self, document: Document, tokens: int) -> list[str]:
        answers = _answers(document)
        whole = "\n".join(texts_of(document))
        broken = {name for name, test in _ANSWER_RULES.items() if any(map(test, answers))}
        if _SPECIAL.search(whole):
            broken.add("special_tokens")
        if self.seq_length is not None and tokens > self.seq_length and isinstance(document, Conversation):
            broken.add("too_long")
        language = self._language(" ".join(answers))
        if language is not None:
            self.spoken[language] += 1
            if self.languages and language not in self.languages:
                broken.add("language")
        digest = normal_digest(document)
        if digest in self._digests:
            broken.add("duplicate")
        elif self._near is not None and self._near.seen("\n".join(_turns_of(document))):
            broken.add("near_duplicate")
        self._digests.add(digest)
        if digest in self.evaluation:
            broken.add("eval_overlap")
        return [name for name in RULES if name in broken]

    def _language(self, text: str) -> str | None:
        """The language of the answers; None where there is too little text to tell."""
        if sum(map(str.isalpha, text[:2000])) < _LEAST_SIGNS:
            return None
        if self._identify is None:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier

            self._identify = LanguageIdentifier.from_model_file(MODEL_FILE).classify
        return self._identify(text[:2000])[0]

    def score(self, malformed: int = 0) -> dict[str, Any]:
        """`score` from 0 to 1 with its 95 % interval (Wilson 1927, of the effective number of conversations, Kish 1965).

        Each of `malformed` records counts as a failing conversation of mean length. None without a conversation.
        """
        if not self.tokens:
            return {"score": None, "low": None, "high": None}
        mean = self.tokens / self.conversations
        total = self.tokens + malformed * mean
        share = self.good_tokens / total
        low, high = wilson(share, total * total / (self._squares + malformed * mean * mean))
        return {"score": share, "low": low, "high": high}

    def to_dict(self, malformed: int = 0) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.score(malformed),
            "conversations": self.conversations,
            "rules": {name: rule.to_dict(RULES[name]) for name, rule in self.rules.items()},
            "flags": {name: rule.to_dict(FLAGS[name]) for name, rule in self.flags.items()},
            "languages": dict(self.spoken.most_common()),
            "worst": [worst.to_dict() for worst in self.worst],
        }


def wilson(share: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a share seen in `count` independent draws."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def texts_of(document: Document) -> list[str]:
    """Every text of a document, in order."""
    return [document.text] if isinstance(document, TextDocument) else [message.content for message in document.messages]


def _turns_of(document: Document) -> list[str]:
    """The texts behind the system prompt, which holds the tools too: many conversations share a long one and are not alike."""
    if isinstance(document, Conversation):
        return [message.content for message in document.messages if message.role != "system"]
    return [document.text]


def _answers(document: Document) -> list[str]:
    """What is trained on."""
    if isinstance(document, Conversation):
        return [m.content for m in document.messages if m.role == "assistant" and m.weight != 0]
    return [document.text]


def normal_digest(document: Document) -> bytes:
    """Digest of the text without case, composition and white space."""
    text = " ".join(" ".join(texts_of(document)).split())
    return hashlib.sha256(unicodedata.normalize("NFKC", text).casefold().encode("utf-8", "surrogatepass")).digest()[:16]


def flags_of(document: Document) -> list[str]:
    """Names of the flags that a document raises."""
    text = "\n".join(texts_of(document))
    found = [
        ("email", _EMAIL.search(text)),
        ("phone", _PHONE.search(_CARD.sub(" ", text))),
        ("card", any(_luhn(match[0]) for match in _CARD.finditer(text))),
        ("ip", _IP.search(text)),
        ("key", _KEY.search(text)),
        ("insult", _INSULT.search(text)),
    ]
    return [name for name, raised in found if raised]


def _luhn(text: str) -> bool:
    """Whether the digits end on the check digit of a card number (ISO/IEC 7812-1)."""
    digits = [int(sign) for sign in text if sign.isdecimal()]
    if len(set(digits)) < 2:
        return False
    doubled = [d * 2 - 9 * (d > 4) if place % 2 else d for place, d in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def _cut_answer(text: str) -> bool:
    """Long prose that ends on a comma, an open bracket or a word that cannot end a sentence."""
    return len(text) >= 200 and _OPEN_END.search(text.rstrip()[-20:]) is not None


def _repeated_lines(text: str) -> bool:
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 3]
    if len(lines) < _LEAST_LINES:
        return False
    counts = Counter(lines)
    return sum(count for count in counts.values() if count > 1) > 0.5 * len(lines)


def _repeated_ngrams(text: str, size: int = 5) -> bool:
    words = text.casefold().split()
    if len(words) < _LEAST_WORDS:
        return False
    grams = Counter(zip(*(words[start:] for start in range(size)), strict=False))
    covered = bytearray(len(words))
    for place, gram in enumerate(zip(*(words[start:] for start in range(size)), strict=False)):
        if grams[gram] > 1:
            covered[place : place + size] = b"\1" * size
    return sum(covered) > 0.6 * len(words)


def _symbols(text: str) -> bool:
    if len(text) < _LEAST_SIGNS:
        return False
    plain = sum(1 for sign in text if sign.isalnum() or sign.isspace() or unicodedata.category(sign) in ("Mn", "Mc"))
    return plain < 0.5 * len(text)


def _refusal(text: str) -> bool:
    """A short answer that is mostly a refusal; a long one that mentions one is not."""
    return len(text) < 600 and _REFUSALS.search(text[:200]) is not None


_ANSWER_RULES: dict[str, Callable[[str], bool]] = {
    "cut_answer": _cut_answer,
    "repeated_lines": _repeated_lines,
    "repeated_ngrams": _repeated_ngrams,
    "symbols": _symbols,
    "refusal": _refusal,
}
