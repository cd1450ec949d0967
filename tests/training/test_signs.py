"""C93: what the trainer itself notes of a run's health: parts of the model that stand still, batches that come again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lumina_engine.monitoring import record as rec
from lumina_engine.training.signs import LOOK, REMEMBERED, Movement, Repeats
from tests.faults.tiny import Tiny
from tests.monitoring.health.record_corpus import frozen, stuck


def model() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Module()
    layer.blocks = nn.ModuleList([nn.Linear(40, 40), nn.Linear(40, 40)])
    layer.head = nn.Linear(40, 400)
    layer.norm = nn.LayerNorm(40)
    return layer


def move(*parts: nn.Module) -> None:
    with torch.no_grad():
        for part in parts:
            for weight in part.parameters():
                weight += 1e-3


def test_c093_a_part_stands_still_only_where_others_move() -> None:
    net: Any = model()
    movement = Movement(net, 10)
    move(net.blocks[0], net.head)
    assert movement.look(10 + LOOK - 1) == [], "too early for a look"
    assert movement.look(10 + LOOK) == ["block 1"]
    assert movement.look(10 + 2 * LOOK) == [], "nothing moves: a rate of 0, or steps that are left out"
    move(net.blocks[0], net.blocks[1])
    assert movement.look(10 + 3 * LOOK) == ["head"]
    move(net.norm, net.head)
    assert movement.look(10 + 4 * LOOK) == ["block 0", "block 1"]


def test_c093_one_value_that_is_seen_is_enough_and_a_split_parameter_is_seen_by_its_part() -> None:
    net: Any = model()
    movement = Movement(net, 0)
    with torch.no_grad():
        net.blocks[1].weight[0, 0] += 1.0
    move(net.head)
    assert movement.look(LOOK) == ["block 0"]
    whole = nn.Parameter(torch.empty(0))
    whole.ds_tensor, whole.ds_shape = torch.zeros(50), torch.Size([10, 10])  # as ZeRO 3 leaves it
    split: Any = nn.Module()
    split.head, split.blocks = nn.Linear(4, 4), nn.ModuleList([nn.Module()])
    split.blocks[0].weight = whole
    movement = Movement(split, 0)
    move(split.head)
    assert movement.look(LOOK) == ["block 0"]
    whole.ds_tensor[-1] += 1  # type: ignore[attr-defined]
    move(split.head)
    assert movement.look(2 * LOOK) == []


def batch(*ids: int) -> Any:
    return SimpleNamespace(input_ids_BS=torch.tensor([ids, ids]))


def test_c093_a_batch_that_comes_again_in_its_epoch_is_known() -> None:
    repeats = Repeats()
    found = []
    for step, (ids, epoch) in enumerate([((1, 2), 0), ((2, 1), 0), ((1, 2), 0), ((1, 2), 0), ((1, 2), 1), ((2, 1), 1)], 1):
        repeats.take([batch(*ids)], epoch, step)
        found.append(repeats.found)
    assert found == [None, None, 1, 3, None, None]
    for step in range(REMEMBERED):
        repeats.take([batch(step + 10)], 1, 8 + step)
    repeats.take([batch(2, 1)], 1, 9_999)
    assert repeats.found is None and len(repeats._steps) == REMEMBERED
    for _ in range(2):
        repeats.take([SimpleNamespace(input_ids_BS=torch.tensor([[5, 6]]))], 1, 10_000)  # type: ignore[list-item]
    assert repeats.found is None, "one row may come again in the data"


STEPS = 3 * LOOK + 2


def test_c093_a_healthy_run_has_neither(tmp_path: Path) -> None:
    tiny = Tiny(tmp_path, documents=400, max_steps=STEPS, num_epochs=1000)
    tiny.train()
    steps = [record for record in tiny.records if isinstance(record, rec.Step)]
    assert len(steps) == STEPS and not any(step.frozen or step.repeats for step in steps)


def test_c093_a_frozen_block_and_data_that_come_again_are_in_the_records(tmp_path: Path) -> None:
    tiny = Tiny(tmp_path, documents=400, max_steps=STEPS, num_epochs=1000)
    frozen(tiny, 10)
    stuck(tiny, 20)
    tiny.train()
    steps = [record for record in tiny.records if isinstance(record, rec.Step)]
    assert [(step.step, step.frozen) for step in steps if step.frozen] == [(2 * LOOK, ["block 0"]), (3 * LOOK, ["block 0"])]
    assert [step.repeats for step in steps[19:23]] == [18, 19, 20, 21] and not any(step.repeats for step in steps[:19])
