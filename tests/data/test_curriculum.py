"""Shorter rows of the curriculum: the same tokens in the same steps, cut documents stay right (C74)."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lumina_engine.data.batch import Batch, Position, TrainLoader, cut_rows
from lumina_engine.data.conversation import Conversation, Message
from lumina_engine.data.token_store import build_store

STEPS = 6


@pytest.fixture(scope="module")
def store(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    lengths = np.random.default_rng(3).integers(0, 70, 200).tolist()
    documents = [
        Conversation((Message("user", f"{i}" + "q" * n), Message("assistant", "a" * (n + 1))), str(i))
        for i, n in enumerate(lengths)
    ]
    return build_store(documents, tokenizer, tmp_path_factory.mktemp("store"), source_digest="ramp")


def loader(store: Any, settings: Any, curriculum: bool = True, **keys: Any) -> TrainLoader:
    ramp = {"curriculum_learning": curriculum, "min_seq_length": 32, "max_seq_length": "auto", "curriculum_steps": STEPS}
    more = {name: keys.pop(name) for name in list(keys) if name in ("packing", "train_on", "assistant_loss_weight")}
    config: SimpleNamespace = settings(
        seq_length=128, batch_size=4, gradient_accumulation_steps=2, num_epochs=2, **ramp, **more
    )
    return TrainLoader(store, config, **keys)


def tokens(batches: list[Batch]) -> Counter:
    return Counter(torch.cat([b.input_ids_BS[b.document_ids_BS > 0] for b in batches]).tolist())


@pytest.mark.parametrize("packing", ["fit", "concat", "none"])
def test_c074_every_step_has_the_tokens_of_the_run_without(store: Any, settings: Any, packing: str) -> None:
    plain = list(loader(store, settings, curriculum=False, packing=packing))
    ramp = list(loader(store, settings, packing=packing))
    assert len(ramp) == len(plain) > STEPS
    shapes = [tuple(step[0].input_ids_BS.shape) for step in ramp]
    assert shapes == [(16, 32)] * 3 + [(8, 64)] * 3 + [(4, 128)] * (len(plain) - STEPS)
    for long, short in zip(plain, ramp, strict=True):
        assert tokens(long) == tokens(short)
        assert [b.rows for b in long] == [b.rows for b in short]
        for a, b in zip(long, short, strict=True):
            assert torch.equal(a.input_ids_BS.flatten(), b.input_ids_BS.flatten())


def test_c074_what_a_cut_splits_is_a_document_of_its_own(store: Any, settings: Any) -> None:
    long = next(iter(loader(store, settings, curriculum=False, packing="concat")))[0]
    short = cut_rows(long, 32)
    for row in range(short.input_ids_BS.shape[0]):
        ids, documents, positions, labels = (
            t[row].tolist() for t in (short.input_ids_BS, short.document_ids_BS, short.position_ids_BS, short.labels_BS)
        )
        numbers = [d for d in documents if d]
        assert sorted(set(numbers)) == list(range(1, max(numbers, default=0) + 1)) and numbers == sorted(numbers)
        whole, at = divmod(row * 32, 128)
        for place, document in enumerate(documents):
            begins = place == 0 or documents[place - 1] != document
            assert positions[place] == (0 if begins or document == 0 else positions[place - 1] + 1)
            want = int(long.labels_BS[whole, at + place])
            assert labels[place] == (-100 if place == 0 else want)  # nothing comes before the first token of a row
            same = place > 0 and int(long.document_ids_BS[whole, at + place]) == int(
                long.document_ids_BS[whole, at + place - 1]
            )
            assert place == 0 or document == 0 or same != begins
            assert labels[place] in (-100, ids[place])


def test_c074_weights_follow_their_labels(store: Any, settings: Any) -> None:
    long = next(iter(loader(store, settings, curriculum=False, train_on="all", assistant_loss_weight=0.5)))[0]
    short = cut_rows(long, 32)
    assert short.weights_BS is not None and long.weights_BS is not None
    assert bool((short.weights_BS[:, 0] == 0).all()) and bool(
        (short.weights_BS[:, 1:] == long.weights_BS.view(-1, 32)[:, 1:]).all()
    )
    assert bool(((short.labels_BS >= 0) == (short.weights_BS > 0)).all())


@pytest.mark.parametrize("stop", [2, 3, 5, 7])
def test_c074_a_loader_started_in_mid_ramp_goes_on_with_the_next_rows(store: Any, settings: Any, stop: int) -> None:
    whole = list(loader(store, settings))
    first = loader(store, settings, rank=1, world=2)
    ends = [(step, first.position, first.steps_done) for step, _ in zip(first, range(stop), strict=False)]
    position, done = ends[-1][1:]
    assert done == stop and isinstance(position, Position)
    again = list(loader(store, settings, rank=1, world=2, start=position, steps_done=done))
    rest = list(loader(store, settings, rank=1, world=2))[stop:]
    assert len(again) == len(rest)
    for a, b in zip(again, rest, strict=True):
        assert all(torch.equal(x.input_ids_BS, y.input_ids_BS) for x, y in zip(a, b, strict=True))
    two = [list(loader(store, settings, rank=r, world=2)) for r in (0, 1)]
    assert sum((tokens(s) for r in two for s in r), Counter()) == sum((tokens(s) for s in whole), Counter())


def test_a_row_is_not_cut_into_unequal_parts(store: Any, settings: Any) -> None:
    batch = next(iter(loader(store, settings, curriculum=False)))[0]
    assert cut_rows(batch, 128) is batch
    with pytest.raises(ValueError, match="cannot be cut"):
        cut_rows(batch, 48)
