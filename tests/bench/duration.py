"""How long real runs take against their estimates: `python tests/bench/duration.py FOLDER`. Never run by pytest.

Three shapes on the CPU. *Guessed* is the budget before the start; *measured* is the budget from what the first steps of the run
measured. Times are from the first record of the run to its last step or save.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from training.peak import corpus

from lumina_engine.config.budget import budget
from lumina_engine.config.schema import Config
from lumina_engine.monitoring.hardware import detect
from lumina_engine.monitoring.log import read_records
from lumina_engine.monitoring.record import Step
from lumina_engine.monitoring.speed import measured_speed

STEPS = 45
EARLY = 24  # steps from which the rest is told
COMMON = f"max_steps={STEPS} eval_interval=15 eval_batches=2 save_interval=20 warmup_steps=2 packing=concat train_on=all"
SHAPES = {
    "debug": "batch_size=8",
    "wider": "hidden_size=256 num_layers=4 num_heads=4 num_kv_heads=2 intermediate_size=512 batch_size=4 use_deepspeed=false",
    "dense, vocabulary 16,384": "use_moe=false hidden_size=384 num_heads=6 num_layers=3 vocab_size=16384 batch_size=4",
}


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data = corpus(folder)
    engine = [sys.executable, "-m", "lumina_engine.cli"]
    print("| shape | actual | guessed p50 to p90 | measured p50 to p90 |\n|---|---|---|---|")
    for name, keys in SHAPES.items():
        run = "".join(c for c in name if c.isalnum())
        words = [*COMMON.split(), *keys.split(), f"train_data_path={data}"]
        argv = [*engine, "budget", "--preset", "debug", *words, "--json"]
        guess = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True, cwd=folder).stdout)["time"]
        subprocess.run([*engine, "train", "--run", run, "--fresh", *words], capture_output=True, check=True, cwd=folder)
        path = folder / "runs" / run
        records = list(read_records(path / "metrics.jsonl"))
        steps = [r for r in records if isinstance(r, Step)]
        actual = steps[-1].t - records[0].t
        config = Config.load(path / "config.yaml")
        early = records[: 1 + next(i for i, r in enumerate(records) if isinstance(r, Step) and r.step == EARLY)]
        found = budget(config, detect(), speed=measured_speed(early, run))["time"]
        spans = [f"{t['p50_h'] * 3600:.1f} to {t['p90_h'] * 3600:.1f} s" for t in (guess, found)]
        print(f"| {name} | {actual:.1f} s | {spans[0]} | {spans[1]} |", flush=True)


if __name__ == "__main__":
    main()
