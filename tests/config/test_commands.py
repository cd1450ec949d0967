"""C51: presets, config and budget on the command line: promised JSON keys, exit codes, only the result on stdout."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import types

import pytest

from lumina_engine.config.machine import GB, Machine
from lumina_engine.config.schema import ConfigError, fields_info


@pytest.fixture
def run(monkeypatch, capsys):
    module = types.ModuleType("lumina_engine.monitoring.hardware")
    module.detect = lambda: Machine([], 16 * GB, 4, 100 * GB)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lumina_engine.monitoring.hardware", module)

    def _run(*words: str):
        verb = importlib.import_module(f"lumina_engine.commands.{words[0]}")
        parser = argparse.ArgumentParser()
        verb.add_arguments(parser)
        code = verb.run(parser.parse_args(list(words[1:])))
        out = capsys.readouterr().out
        return code, json.loads(out) if "--json" in words else out

    return _run


def test_c048_presets_list(run) -> None:
    code, rows = run("presets", "list", "--json")
    assert code == 0 and [row["name"] for row in rows][:2] == ["debug", "b1"]
    promised = "name description active_parameters active_parameters_top2 total_parameters embedding_parameters "
    promised += "parameter_efficiency weights_bytes training_state_bytes kv_cache_bytes_per_token hardware nominal"
    assert all(set(promised.split()) <= set(row) for row in rows)
    assert rows[0]["active_parameters"] == 494_208 and rows[0]["total_parameters"] == 3_246_720
    code, text = run("presets", "list")
    assert code == 0 and "b300" in text and max(map(len, text.splitlines())) <= 120


def test_c049_presets_show_and_compare(run) -> None:
    assert "num_layers: 16" in run("presets", "show", "b1")[1]
    data = run("presets", "compare", "b1", "b7", "--json")[1]
    assert data["keys"]["num_layers"] == {"b1": 16, "b7": 32} and "num_experts" not in data["keys"]
    assert "6.98 B" in run("presets", "compare", "b1", "b7")[1]
    with pytest.raises(ConfigError, match="did you mean b100"):
        run("presets", "show", "b1000")
    with pytest.raises(Exception, match="two names"):
        run("presets", "compare", "b1")


def test_c051_config_check_exit_codes(run, tmp_path) -> None:
    assert run("config", "check", "--preset", "b7") == (0, "no problems\n")
    path = tmp_path / "my.yaml"
    path.write_text("batch_sise: 4\nseed: -1\n")
    code, data = run("config", "check", "--config", str(path), "--json", "moe_top_k=9")
    assert code == 1 and not data["ok"] and len(data["findings"]) == 3
    assert data["findings"][0]["where"] == f"{path}:1" and data["findings"][0]["fix"] == "did you mean batch_size?"
    code, text = run("config", "check", "--config", str(path))
    assert code == 1 and text.splitlines()[-1] == "2 errors, 0 warnings"
    assert run("config", "check", "rope_theta=100")[0] == 0
    assert run("config", "check", "--here", "train_data_path=missing.jsonl")[0] == 1
    with pytest.raises(ConfigError, match="no such file"):
        run("config", "check", "--config", str(tmp_path / "none.yaml"))


def test_c051_config_show(run, tmp_path) -> None:
    from lumina_engine.config.schema import Config

    code, text = run("config", "show", "--preset", "debug", "seed=4")
    assert code == 0
    (tmp_path / "shown.yaml").write_text(text)
    shown = Config.load(tmp_path / "shown.yaml")
    assert (shown.seed, shown.vocab_size, shown.zero_stage) == (4, 1024, 0)
    rows = run("config", "show", "--preset", "debug", "--origins", "seed=4")[1]
    assert any(line.split() == ["seed", "4", "cli", "command", "line"] for line in rows.splitlines())
    assert any(line.split() == ["vocab_size", "1024", "auto"] for line in rows.splitlines())
    assert json.loads(run("config", "show", "--preset", "debug", "--deepspeed")[1])["train_batch_size"] == 8
    with pytest.raises(ConfigError, match="no task is named"):
        run("config", "show", "multi_task=true")


def test_c051_config_schema(run) -> None:
    schema = run("config", "schema", "--json")[1]
    assert list(schema["properties"]) == [info.name for info in fields_info()]
    assert schema["additionalProperties"] is False
    seq = schema["properties"]["seq_length"]
    assert (seq["minimum"], seq["maximum"], seq["section"], seq["unit"]) == (16, 1_048_576, "model", "tokens")
    text = run("config", "schema", "--markdown")[1]
    assert sum(line.startswith("| `") for line in text.splitlines()) == len(fields_info()) and text.count("\n## ") == 8


def test_c139_budget(run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, data = run("budget", "--json", "max_steps=100")
    assert code == 0 and data["fits"] and data["steps"] == 100 and data["parameters"]["active"] == 494_208
    data = run("budget", "--preset", "b1", "--devices", "8x80GB", "--tokens", "1e9", "--json")[1]
    assert data["fits"] and data["resolved"]["world"] == 8 and data["steps"] == 5_723
    for count in ("0", "-5", "0.5"):
        with pytest.raises(SystemExit):
            run("budget", "--tokens", count)
    assert "DOES NOT FIT: too little device memory" in run("budget", "--preset", "b7", "--devices", "8x80GB")[1]
    (tmp_path / "data.jsonl").write_text("x" * 81_920)
    assert run("budget", "--json", "train_data_path=data.jsonl", "num_epochs=1")[1]["steps"] == 10
    text = run("budget")[1]
    assert "saving a checkpoint " in text and "saving a checkpoint" not in run("budget", "async_save=false")[1]
    assert "494 K active (computed)" in text and "guessed" in text and max(map(len, text.splitlines())) <= 200
    with pytest.raises(Exception, match="devices are written like 8x80GB"):
        run("budget", "--devices", "8 gpus")


def test_c051_help_costs_no_heavy_import() -> None:
    import subprocess

    code = (
        "import sys, argparse\nfor v in ('presets', 'config', 'budget'):\n"
        "    m = __import__('lumina_engine.commands.' + v, fromlist=['x']); p = argparse.ArgumentParser(); m.add_arguments(p)\n"
        "    assert m.HELP and p.format_help()\nassert not {'pydantic', 'yaml', 'torch', 'numpy', 'msgspec'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
