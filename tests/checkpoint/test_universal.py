"""Optimizer state by parameter name: whatever way it was cut when saved, any part of it comes back (C81)."""

from __future__ import annotations

import random

import pytest
import torch

from lumina_engine.checkpoint.commit import CheckpointError
from lumina_engine.checkpoint.universal import SavedState, Shard


def cut(whole: torch.Tensor, kind: str, ranks: int, draw: random.Random) -> list[Shard]:
    """The runs of each rank, some of them overlapping as with replicas, some ranks with none."""
    edges = sorted(draw.randint(0, whole.numel()) for _ in range(ranks - 1))
    shards = []
    for begin, end in zip([0, *edges], [*edges, whole.numel()], strict=True):
        begin = max(0, begin - draw.choice([0, 0, 3]))
        shards.append(Shard({f"{kind}.a.b": whole[begin:end]} if end > begin else {}, {"a.b": begin}))
    draw.shuffle(shards)
    return shards


@pytest.mark.parametrize("seed", range(30))
def test_c081_any_cut_gives_back_any_part(seed: int) -> None:
    draw = random.Random(seed)
    whole = torch.randn(draw.randint(1, 60), generator=torch.Generator().manual_seed(seed))
    own, *others = cut(whole, "optimizer.exp_avg", draw.randint(1, 6), draw)
    asked = 0

    def rest() -> list[Shard]:
        nonlocal asked
        asked += 1
        return others

    saved = SavedState(own, rest)
    for _ in range(20):
        begin = draw.randint(0, whole.numel() - 1)
        count = draw.randint(1, whole.numel() - begin)
        part = saved.part("optimizer.exp_avg", "a.b", begin, count)
        assert part is not None and torch.equal(part, whole[begin : begin + count])
    assert asked <= 1


def test_c081_own_part_needs_no_other_file() -> None:
    def forbidden() -> list[Shard]:
        raise AssertionError("read the files of other ranks")

    own = Shard({"master.w": torch.arange(4.0), "optimizer.step.w": torch.tensor(7.0)}, {"w": 10})
    saved = SavedState(own, forbidden)
    assert saved.part("optimizer.exp_avg", "v", 0, 9) is None  # a kind that no rank saves
    assert saved.master("w", 11, 2).tolist() == [1, 2] and float(saved.scalar("optimizer.step", "w") or 0) == 7


def test_c081_what_was_not_saved_is_named() -> None:
    saved = SavedState(Shard({"master.w": torch.arange(4.0)}), lambda: [Shard({"master.w": torch.arange(3.0)}, {"w": 6})])
    with pytest.raises(CheckpointError, match="lacks values 4 to 7 of master of w"):
        saved.part("master", "w", 2, 6)
    assert saved.part("optimizer.exp_avg", "w", 0, 4) is None
    with pytest.raises(CheckpointError, match="no values of v"):
        saved.master("v", 0, 1)


def test_c081_masters_stand_in_for_narrow_weights_and_weights_for_masters() -> None:
    master = torch.randn(2, 3)
    half = {"w": master.bfloat16(), "steps": torch.tensor(3), "other": master.bfloat16()}
    saved = SavedState(
        Shard({"master.w": master.reshape(-1)[:4]}), lambda: [Shard({"master.w": master.reshape(-1)[4:]}, {"w": 4})], half
    )
    wide = saved.whole_weights(torch.float32)
    assert torch.equal(wide["w"], master) and wide["other"] is half["other"] and wide["steps"] is half["steps"]
    assert saved.whole_weights(torch.bfloat16)["w"] is half["w"]
    assert torch.equal(saved.master("other", 1, 2), half["other"].reshape(-1)[1:3].float())
