"""C26, C47-C49, R05, R39: presets, and what is computed about them."""

from __future__ import annotations

import importlib

import pytest

from lumina_engine.config.presets import NAMES, ConfigPresets, preset_path, presets_folder
from lumina_engine.config.schema import Config

# capabilities 4.2: weights, training state (bytes), 80 GB GPUs, the same with the optimizer on the host, its GB, KiB a token
MEMORY = {
    "debug": (6.8e6, 54e6, 1, 1, None, 0.5),
    "b1": (15.0e9, 120e9, 2, 1, 90, 32),
    "b7": (93.7e9, 750e9, 10, 3, 562, 128),
    "b14": (190e9, 1.52e12, 19, 5, 1_139, 160),
    "b50": (665e9, 5.32e12, 67, 17, 3_991, 256),
    "b100": (1.24e12, 9.91e12, 124, 31, 7_432, 320),
    "b200": (2.41e12, 19.3e12, 242, 61, 14_475, 400),
    "b300": (3.33e12, 26.6e12, 333, 84, 19_956, 480),
}
GEOMETRY = {  # capabilities 4.1
    "debug": (128, 2, 2, 1, 512, 256, 1e4, 1e-3, 8, 1),
    "b1": (1536, 16, 12, 4, 12288, 2048, 5e5, 3e-4, 4, 8),
    "b7": (4096, 32, 32, 8, 14336, 4096, 5e5, 1e-4, 1, 16),
    "b14": (5120, 40, 40, 8, 18688, 4096, 5e5, 8e-5, 1, 32),
    "b50": (8192, 64, 64, 8, 25600, 128_000, 1e7, 6e-5, 1, 64),
    "b100": (12288, 80, 96, 8, 25088, 200_000, 2e7, 5e-5, 1, 64),
    "b200": (16384, 100, 128, 8, 29184, 1_000_000, 3e8, 4e-5, 1, 64),
    "b300": (20480, 120, 160, 8, 26368, 204_800, 2e7, 3e-5, 1, 64),
}
KEYS = "hidden_size num_layers num_heads num_kv_heads intermediate_size seq_length rope_theta learning_rate batch_size"


@pytest.mark.parametrize("name", NAMES)
def test_c047_geometry_and_fixed_values(name: str) -> None:
    config = getattr(ConfigPresets, name)()
    keys = [*KEYS.split(), "gradient_accumulation_steps"]
    assert tuple(getattr(config, key) for key in keys) == GEOMETRY[name]
    assert (config.num_experts, config.moe_top_k, config.capacity_factor, config.load_balancing_weight) == (8, 1, 1.25, 0.01)
    assert config.tie_word_embeddings and config.precision == config.zero_stage == config.vocab_size == "auto"
    assert config.tokenizer == ("lumina-1k" if name == "debug" else "gpt-4")
    assert config.validate() == [], "a preset gives no error and no warning"


def test_c047_fresh_each_time_and_default_config_is_sound() -> None:
    ConfigPresets.b7().seed = 5
    assert ConfigPresets.b7().seed == 0
    assert ConfigPresets.names() == list(NAMES) and Config().validate() == []


@pytest.mark.parametrize("name", NAMES)
def test_c048_memory_as_in_the_table(name: str) -> None:
    row = ConfigPresets.compare_presets()[name]
    weights, state, zero3, on_host, host_gb, cache = MEMORY[name]
    digits = 2 if name == "debug" else 3
    assert float(f"{row['weights_bytes']:.{digits}g}") == weights
    assert float(f"{row['training_state_bytes']:.{digits}g}") == state
    assert (row["gpus_80gb_zero3"], row["gpus_80gb_optimizer_on_host"]) == (zero3, on_host)
    assert host_gb is None or round(row["host_bytes_optimizer"] / 1e9) == host_gb
    assert row["kv_cache_bytes_per_token"] == cache * 1024


def test_c026_shares_are_computed_and_claims_are_only_nominal() -> None:
    info = ConfigPresets.get_preset_info()
    shares = [entry["active_parameters"] / entry["total_parameters"] for entry in info.values()]
    assert (round(min(shares), 3), round(max(shares), 3)) == (0.137, 0.181)
    assert info["b7"]["nominal"]["total"] == "56B" and "56" not in info["b7"]["active_params"]
    assert info["b7"]["active_params"] == "6.98 B of 46.4 B"


def test_c048_text_and_numbers() -> None:
    info = ConfigPresets.get_preset_info()
    assert list(info) == list(NAMES)
    for entry in info.values():
        assert all(
            isinstance(entry[key], str) and entry[key] for key in ("description", "active_params", "hardware", "memory_usage")
        )
        assert entry["active_parameters"] < entry["active_parameters_top2"] < entry["total_parameters"]
    rows = ConfigPresets.compare_presets()
    assert rows["b1"]["parameter_efficiency"] == "13.7% active (total/active 7.30)"
    numbers = ("active_parameters", "total_parameters", "embedding_parameters", "weights_bytes")
    assert all(rows[n][key] == info[n][key] for n in NAMES for key in numbers)


def test_c047_found_in_a_checkout_and_in_a_wheel(tmp_path, monkeypatch) -> None:
    assert presets_folder().name == "presets" and preset_path("b1").is_file()
    module = importlib.import_module("lumina_engine.config.presets")
    package = tmp_path / "site" / "lumina_engine"
    for folder in (package / "presets", package / "config"):
        folder.mkdir(parents=True)
    (package / "presets" / "debug.yaml").write_text("seed: 1\n")
    monkeypatch.setattr(module, "__file__", str(package / "config" / "presets.py"))
    presets_folder.cache_clear()
    try:
        assert presets_folder() == package / "presets"
    finally:
        presets_folder.cache_clear()


def test_c047_no_shipped_yaml_without_a_preset() -> None:
    assert sorted(p.stem for p in presets_folder().glob("*.yaml")) == sorted(NAMES)
