"""A program for tests: train a tiny model in several modes, one after the other, and print {mode: [losses]} as JSON (rank 0).

    python losses.py DATA.jsonl '{"mode": {config overrides}, …}'      also under torch.distributed.run

The global batch must be the same in all modes for their losses to be comparable.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from lumina_engine.config.schema import Config
from lumina_engine.data.store import open_data
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.model.transformer import DeepSeekTransformer
from lumina_engine.monitoring.record import Step
from lumina_engine.training.comm import Comm
from lumina_engine.training.trainer import EnhancedConversationTrainer

TINY = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 96,
    "seq_length": 64,
    "num_experts": 4,
    "moe_top_k": 2,
    "moe_dropless": True,
    "tokenizer": "lumina-1k",
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "max_steps": 20,
    "precision": "fp32",
    "num_workers": 0,
    "eval_interval": 0,
    "eval_split": 0.0,
    "expert_log_interval": 5,
    "rope_theta": 10000.0,
}


def write_conversations(path: Path) -> Path:
    """120 short conversations of uneven length, so that padding differs between rows and ranks."""
    draw = random.Random(7)
    words = ["red", "green", "blue", "one", "two", "three", "sun", "moon", "river", "stone", "bird", "tree"]
    with path.open("w") as stream:
        for _ in range(120):
            asked = " ".join(draw.choices(words, k=draw.randint(1, 9)))
            told = " ".join(reversed(asked.split()))
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
            stream.write(json.dumps({"messages": turns}) + "\n")
    return path


class Records(list):
    """A logger that keeps every record."""

    def emit(self, record: Any) -> None:
        self.append(record)


def train(data: str, cache: Path, overrides: dict[str, Any]) -> Records:
    config = Config(**{**TINY, "train_data_path": data, "data_cache_dir": str(cache), **overrides})
    tokenizer = ConversationTokenizer(config.tokenizer)
    store = open_data(config, tokenizer).train
    records = Records()
    comm = Comm.start("gloo")
    model = DeepSeekTransformer(config)
    EnhancedConversationTrainer(model, tokenizer, config, records, comm=comm).train(store)
    return records


def main() -> None:
    data, modes = sys.argv[1], json.loads(sys.argv[2])
    out = {}
    for mode, overrides in modes.items():
        steps = [r for r in train(data, Path(data).parent / "cache", overrides) if isinstance(r, Step)]
        out[mode] = [[r.loss, r.aux_loss, r.grad_norm, r.tokens] for r in steps]
    if Comm.start("gloo").rank == 0:
        print("LOSSES " + json.dumps(out), flush=True)


if __name__ == "__main__":
    main()
