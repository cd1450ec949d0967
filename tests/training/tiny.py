"""A tiny model on short rows, for tests that train it in this process or on a few ranks."""

from __future__ import annotations

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
