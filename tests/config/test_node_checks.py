"""R23: several machines need a list of them, or one start on each."""

from __future__ import annotations

from typing import Any

import pytest

from lumina_engine.config.checks import check, resume_findings
from lumina_engine.config.machine import GB, Machine
from lumina_engine.config.resolve import resolve
from lumina_engine.config.schema import Config

SOUND = [
    {"num_nodes": 2, "hostfile": "hosts"},
    {"num_nodes": 2, "hostfile": "hosts", "launcher": "deepspeed"},
    {"num_nodes": 2, "launcher": "srun"},
    {"num_nodes": 2, "node_rank": 1, "master_addr": "10.0.0.1"},
    {"num_nodes": 2, "node_rank": 0, "master_addr": "10.0.0.1", "launcher": "torchrun"},
    {"node_rank": 0},
]
WRONG = [
    ({"num_nodes": 2}, "nothing says which machines"),
    ({"num_nodes": 2, "launcher": "deepspeed"}, "nothing says which machines"),
    ({"num_nodes": 2, "launcher": "none", "hostfile": "hosts"}, "on this machine only"),
    ({"num_nodes": 2, "launcher": "torchrun", "master_addr": "a"}, "must know its number"),
    ({"num_nodes": 2, "node_rank": 2, "master_addr": "a"}, "go from 0 to 1"),
    ({"num_nodes": 2, "node_rank": 1}, "cannot know where the first one is"),
    ({"num_nodes": 2, "node_rank": 1, "launcher": "srun"}, "one start serves all machines"),
    ({"node_rank": 1}, "there is no such machine"),
    ({"num_nodes": 2, "hostfile": "hosts", "master_addr": "127.0.0.1"}, "no other machine reaches it"),
]


def found(keys: dict[str, Any], severity: str) -> list[str]:
    return [f.message for f in check(Config(**keys)) if f.code == "nodes" and f.severity == severity]


@pytest.mark.parametrize("keys", SOUND)
def test_r23_what_can_be_started(keys: dict[str, Any]) -> None:
    assert found(keys, "error") == []


@pytest.mark.parametrize(("keys", "words"), WRONG)
def test_r23_what_cannot_be_started_and_what_to_set(keys: dict[str, Any], words: str) -> None:
    (message,) = found(keys, "error")
    assert words in message


@pytest.mark.parametrize(
    "keys",
    [
        {"hostfile": "hosts"},
        {"launcher": "torchrun"},
        {"num_nodes": 2, "launcher": "srun", "hostfile": "hosts"},
        {"num_nodes": 2, "node_rank": 1, "master_addr": "a", "hostfile": "hosts"},
    ],
)
def test_r23_what_has_no_effect_is_said(keys: dict[str, Any]) -> None:
    assert len(found(keys, "info")) == 1


@pytest.mark.parametrize(
    ("keys", "launcher"),
    [({}, "none"), ({"hostfile": "h", "num_nodes": 2}, "deepspeed"), ({"num_nodes": 2, "node_rank": 0}, "torchrun")],
)
def test_c061_auto_is_what_the_other_keys_mean(keys: dict[str, Any], launcher: str) -> None:
    config = resolve(Config(**keys), Machine([], 16 * GB, 2, None), tokenizer_vocab=1024)
    assert config.launcher == launcher
    assert config.master_addr == ("127.0.0.1" if launcher == "none" else "auto")


def test_c061_a_resumed_run_may_move_its_ranks_to_other_machines() -> None:
    old, new = Config(num_nodes=2, num_gpus=1), Config(num_nodes=1, num_gpus=2)
    assert resume_findings(old, new, 2, 2) == []
