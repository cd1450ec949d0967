"""Documents fitted to a row of `seq_length` tokens: what is kept of those that are longer.

A conversation loses its oldest turns, at turn borders, and keeps the system prompt if that fits beside the last exchange.
The last answer always survives: if it does not fit together with its question, the question loses its beginning; if the
answer alone is too long, it is cut at its end and the question keeps at most half of the row. Plain text is cut into pieces
and loses nothing; packing may cut its last piece once more. The tokenizer never cuts anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .token_store import TokenStore

Ranges = list[tuple[int, int]]  # [start, stop) positions inside a document

TURNS, PROMPT, QUESTION, ANSWER = "oldest turns cut", "system prompt cut", "question cut at its start", "answer cut at its end"
UNTRAINED = "no trained answer left"  # beside the names above: the answers that are kept are all of weight 0


class Template:
    """Finds turns and their roles in ids."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.im_start = int(spec["im_start_id"])
        self.headers = {role: np.asarray(ids, dtype=np.int64) for role, ids in spec["headers"].items()}

    def turns(self, ids: np.ndarray) -> list[tuple[int, str]]:
        """(position, role) of each turn; empty for plain text. Text cannot produce the id that opens a turn."""
        found = []
        for at in np.flatnonzero(ids == self.im_start):
            role = next((r for r, h in self.headers.items() if np.array_equal(ids[at : at + len(h)], h)), "")
            found.append((int(at), role))
        return found


def cut_trained(ids: np.ndarray, trained: np.ndarray, limit: int, template: Template) -> tuple[Ranges, list[str]]:
    """`cut_conversation`, and whether that leaves anything to train on. `trained`: for each id whether it is in an answer
    that carries loss; at least one is."""
    ranges, done = cut_conversation(ids, limit, template)
    if not any(trained[start:stop].any() for start, stop in ranges):
        done = [*done, UNTRAINED]
    return ranges, done


def cut_conversation(ids: np.ndarray, limit: int, template: Template) -> tuple[Ranges, list[str]]:
    """What to keep of a conversation of more than `limit` tokens, and what was done (names above)."""
    turns = template.turns(ids)
    end = len(ids)
    head = turns[1][0] if len(turns) > 1 and turns[0][1] == "system" else 0
    rest = [turn for turn in turns if turn[0] >= head]
    answer = max((at for at, role in rest if role == "assistant"), default=rest[-1][0])
    starts = [at for at, role in rest if role == "user" and at < answer] or [rest[0][0]]
    for prompt in (head, 0) if head else (0,):
        for at in starts:
            if prompt + end - at <= limit:
                done = [TURNS] * (at > head) + [PROMPT] * (head > 0 and not prompt)
                return ([(0, prompt)] if prompt else []) + [(at, end)], done
    question = starts[-1]
    done = [TURNS] * (question > head)
    if end - answer <= limit:
        kept = _tail(rest, ids, question, answer, limit - (end - answer), template)
        return [*kept, (answer, end)], [*done, *[PROMPT] * (head > 0), QUESTION]
    return _cut_answer(rest, ids, head, question, answer, limit, template, done)


def _tail(rest: list[tuple[int, str]], ids: np.ndarray, start: int, stop: int, room: int, template: Template) -> Ranges:
    """The last `room` tokens of [start, stop), whole turns first; a question or tool result that is cut keeps its header."""
    begin = stop
    for at, role in reversed([turn for turn in rest if start <= turn[0] < stop]):
        if stop - at <= room:
            begin = at
            continue
        header = len(template.headers.get(role, ()))
        left = room - (stop - begin) - header
        if role in ("user", "tool") and left > 0:
            return [(at, at + header), (begin - left, stop)]
        break
    return [(begin, stop)] if begin < stop else []


def _cut_answer(
    rest: list[tuple[int, str]],
    ids: np.ndarray,
    head: int,
    question: int,
    answer: int,
    limit: int,
    template: Template,
    done: list[str],
) -> tuple[Ranges, list[str]]:
    """An answer that fills the row alone: as much of its beginning as the prompt and the question leave."""
    half = limit // 2
    if head and head + answer - question <= half:
        kept: Ranges = [(0, head), (question, answer)]
    else:
        done = [*done, *[PROMPT] * (head > 0)]
        kept = [(question, answer)] if answer > question else []
        if answer - question > half:
            kept, done = _tail(rest, ids, question, answer, half, template), [*done, QUESTION]
    used = sum(stop - start for start, stop in kept)
    return [*kept, (answer, answer + limit - used)], [*done, ANSWER]


class Samples:
    """The documents of a store as pieces of at most `limit` tokens each; `limit` None keeps them whole.

    A sample is one document, or one piece of a long plain text; the last piece, which is shorter, packing may cut once more
    (`loose`, `cut_again`). Sample i consists of one or more ranges of the store (`segments`); `lengths` has their sums.
    `shortened` counts conversations by what was cut from them.
    """

    def __init__(self, store: TokenStore, limit: int | None) -> None:
        self.store = store
        self.limit = limit
        self.shortened: Counter[str] = Counter()
        self.cut_documents = 0
        self.lost_tokens = 0
        lengths = np.diff(store.offsets.astype(np.int64))
        long = np.flatnonzero(lengths > limit) if limit is not None else np.empty(0, dtype=np.int64)
        self.lengths = lengths
        self._starts = store.offsets[:-1]
        self._first: np.ndarray | None = None  # first segment of each sample; None: one segment each
        self.loose: np.ndarray | None = None  # bool: the last, short pieces of long texts; None: there are none
        if len(long):
            self._cut(lengths, long)

    def __len__(self) -> int:
        return len(self.lengths)

    def _cut(self, lengths: np.ndarray, long: np.ndarray) -> None:
        """Build the segment table where some documents are longer than the limit."""
        assert self.limit is not None
        template = Template(self.store.meta["template"])
        offsets = self.store.offsets.astype(np.int64)
        texts = long[self.store.tokens[offsets[long]] != template.im_start]
        conversations = {int(document): self._shortened(int(document), template) for document in np.setdiff1d(long, texts)}
        is_text = np.zeros(len(lengths), dtype=bool)
        is_text[texts] = True
        count = np.ones(len(lengths), dtype=np.int64)  # segments of each document
        count[texts] = -(-lengths[texts] // self.limit)
        for document, ranges in conversations.items():
            count[document] = len(ranges)
        first = np.cumsum(count) - count
        owner = np.repeat(np.arange(len(lengths)), count)
        shift = np.where(is_text[owner], (np.arange(len(owner)) - first[owner]) * self.limit, 0)
        self._starts = offsets[owner] + shift
        self._sizes = np.minimum(lengths[owner] - shift, self.limit)
        for document, ranges in conversations.items():
            place = slice(first[document], first[document] + len(ranges))
            begins, ends = np.array(ranges, dtype=np.int64).T
            self._starts[place], self._sizes[place] = offsets[document] + begins, ends - begins
        # each piece of a text is a sample, a conversation is one of all its segments
        of_sample = np.repeat(np.where(is_text, 1, count), np.where(is_text, count, 1))
        self._first = np.concatenate([[0], np.cumsum(of_sample)])
        self.lengths = np.add.reduceat(self._sizes, self._first[:-1])
        self.loose = is_text[owner[self._first[:-1]]] & (self.lengths < self.limit)

    def cut_again(self, cuts: Mapping[int, Sequence[int]]) -> None:
        """Cut `loose` samples into parts of these lengths. The first keeps its number, the others follow the last sample."""
        if not cuts:
            return
        assert self._first is not None
        starts, sizes = [], []
        for sample, parts in cuts.items():
            segment = self._first[sample]
            assert sum(parts) == self._sizes[segment]
            ends = np.cumsum(parts)
            starts.append(self._starts[segment] + ends[:-1])
            sizes.append(np.asarray(parts[1:], dtype=np.int64))
            self._sizes[segment] = self.lengths[sample] = parts[0]
        more = np.concatenate(sizes)
        self._first = np.concatenate([self._first, self._first[-1] + 1 + np.arange(len(more))])
        self._starts, self._sizes = np.concatenate([self._starts, *starts]), np.concatenate([self._sizes, more])
        self.lengths = np.concatenate([self.lengths, more])
        self.loose = None

    def _shortened(self, document: int, template: Template) -> Ranges:
        """What is kept of one long conversation."""
        assert self.limit is not None
        ids, mask = self.store.document(document)
        trained = np.asarray(self.store.meta["weights"])[mask] > 0
        ranges, done = cut_trained(np.asarray(ids), trained, self.limit, template)
        self.cut_documents += 1
        self.shortened.update(done)
        self.lost_tokens += len(ids) - sum(stop - start for start, stop in ranges)
        return ranges

    def segments(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(start in the store, tokens, index into `samples`) of every range of `samples`, in order; all int64."""
        if self._first is None:
            return self._starts[samples].astype(np.int64), self.lengths[samples], np.arange(len(samples))
        first, count = self._first[samples], self._first[samples + 1] - self._first[samples]
        owner = np.repeat(np.arange(len(samples)), count)
        index = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(int(count.sum()))
        return self._starts[index].astype(np.int64), self._sizes[index], owner

    def note(self, name: str) -> str | None:
        """One line about what was cut, or None."""
        if not self.cut_documents:
            return None
        what = ", ".join(f"{kind} in {n:,}" for kind, n in sorted(self.shortened.items()))
        longest = int(self.store.meta["longest"])
        return (
            f"{name}: {self.cut_documents:,} of {len(self.store):,} conversations are longer than seq_length {self.limit:,} "
            f"and were shortened, {self.lost_tokens:,} tokens in all ({what}); seq_length={longest:,} keeps everything"
        )
