"""One rank of the parity table: train a tiny model in several modes, one after the other, and print what came of each (rank 0).

    python rows.py DATA.jsonl '{"mode": {config overrides}, …}'      also under torch.distributed.run

Prints `ROWS {"mode": {"losses": […], "bias": […], "where": {…}}}`; `bias` are the routers' at the end, `where` is what the live
optimizer says of where its state is kept.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lumina_engine.config.schema import Config
from lumina_engine.data.store import open_data
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.monitoring.record import Step
from lumina_engine.training.comm import Comm
from lumina_engine.training.expert_parallel import build_model
from lumina_engine.training.trainer import EnhancedConversationTrainer

ROWS = 8  # of the global batch, in every mode
TINY = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 32,
    "intermediate_size": 48,
    "seq_length": 32,
    "num_experts": 4,
    "moe_top_k": 2,
    "moe_dropless": True,
    "tokenizer": "lumina-1k",
    "learning_rate": 2e-3,
    "lr_schedule": "constant",
    "warmup_steps": 0,
    "max_steps": 20,
    "precision": "fp32",
    "num_workers": 0,
    "eval_interval": 0,
    "eval_split": 0.0,
    "expert_log_interval": 50,
    "rope_theta": 10000.0,
    "allgather_bucket_size": 100_000,
    "reduce_bucket_size": 100_000,
    # nothing stays whole, so that at stage 3 every weight is gathered when it is used
    "stage3_param_persistence_threshold": 0,
}


class Records(list):
    """A logger that keeps every record."""

    def emit(self, record: Any) -> None:
        self.append(record)


def config_of(data: str, overrides: dict[str, Any]) -> Config:
    """The configuration of a mode."""
    cache = str(Path(data).parent / "cache")
    return Config(**{**TINY, "train_data_path": data, "data_cache_dir": cache, **overrides})


def store_of(config: Config) -> Any:
    """The rows that every mode trains on."""
    return open_data(config, ConversationTokenizer(config.tokenizer)).train


def train(data: str, overrides: dict[str, Any], comm: Comm) -> tuple[EnhancedConversationTrainer, Records]:
    """Train one mode to its end."""
    config = config_of(data, overrides)
    records = Records()
    trainer = EnhancedConversationTrainer(
        build_model(config, comm), ConversationTokenizer(config.tokenizer), config, records, comm=comm
    )
    trainer.train(store_of(config))
    return trainer, records


def where_kept(trainer: EnhancedConversationTrainer) -> dict[str, Any]:
    """What the live objects of this rank say of where state is kept; files are those of its own swap folder."""
    zero = trainer.engine.optimizer  # type: ignore[attr-defined]
    block = trainer.engine.engine.config["zero_optimization"]  # type: ignore[attr-defined]
    folders = {Path(b["nvme_path"]) for b in block.values() if isinstance(b, dict) and "nvme_path" in b}
    files = [p for folder in folders for p in folder.rglob("*.swp")]
    return {
        "optimizer": bool(getattr(zero, "offload_optimizer", getattr(zero, "cpu_offload", False))),
        "parameters": bool(getattr(zero, "offload_param", False)),
        "host_weights": sum(t.numel() for t in getattr(zero, "param_groups_fp16_flat_cpu_memory", [])),
        "files": {
            name: sum(p.stat().st_size for p in files if name in p.name) for name in ("exp_avg-", "_gradient_", "_param")
        },
        "in_memory": sum(t.numel() for t in getattr(zero, "fp32_partitioned_groups_flat", [])),
    }


def main() -> None:
    data, modes = sys.argv[1], json.loads(sys.argv[2])
    comm = Comm.start("gloo")
    out = {}
    for mode, overrides in modes.items():
        trainer, records = train(data, overrides, comm)
        where = comm.all_gather(where_kept(trainer)) if overrides.get("use_deepspeed", True) else []
        steps = [r for r in records if isinstance(r, Step)]
        out[mode] = {
            "losses": [r.loss for r in steps],
            "aux_loss": [r.aux_loss for r in steps],
            "grad_norm": [r.grad_norm for r in steps],
            "tokens": [r.tokens for r in steps],
            "bias": trainer.model.router_bias_LE.tolist(),
            "where": where,
        }
    if comm.rank == 0:
        print("ROWS " + json.dumps(out), flush=True)


if __name__ == "__main__":
    main()
