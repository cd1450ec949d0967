"""What the proof of a resume calls changed."""

from __future__ import annotations

from types import SimpleNamespace

from lumina_engine.training.proof import _changed


def test_a_value_that_was_left_on_auto_is_no_change_once_it_is_settled():
    trainer = SimpleNamespace(train_data=SimpleNamespace(fingerprint="f"), comm=SimpleNamespace(world_size=2))
    then = {"warmup_steps": "auto", "max_steps": 60, "zero_stage": 1, "task": ["a"]}
    loaded = SimpleNamespace(global_state={"data_fingerprint": "f"}, config=then, manifest={"world": 1})
    values = {"warmup_steps": 3, "max_steps": 70, "zero_stage": 1, "task": ("a",)}
    assert _changed(trainer, loaded, values) == {"max_steps": (60, 70), "ranks": (1, 2)}


def test_a_key_that_the_checkpoint_does_not_know_had_its_default():
    trainer = SimpleNamespace(train_data=SimpleNamespace(fingerprint="f"), comm=SimpleNamespace(world_size=1))
    loaded = SimpleNamespace(global_state={"data_fingerprint": "f"}, config={"max_steps": 60}, manifest={"world": 1})
    values = {"max_steps": 60, "early_stopping_gain": 0.02, "early_stopping_patience": 0, "warmup_steps": 3}
    assert _changed(trainer, loaded, values) == {"early_stopping_gain": (0.0, 0.02)}
