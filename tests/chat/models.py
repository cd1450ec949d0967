"""A tiny random model, as it is and as a committed checkpoint."""

from __future__ import annotations

from pathlib import Path

from lumina_engine.checkpoint.manager import CheckpointManager, Payload
from lumina_engine.config.schema import Config, DeepSeekConfig
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.model.transformer import DeepSeekTransformer


def make_model(tokenizer: ConversationTokenizer, **changes: object) -> DeepSeekTransformer:
    """Random but opinionated: large weights spread the logits, so that modes and seeds differ."""
    shape = {
        "vocab_size": tokenizer.padded_vocab_size,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 64,
        "num_experts": 4,
        "moe_top_k": 2,
        "seq_length": 128,
        "init_std": 0.3,
    }
    return DeepSeekTransformer(DeepSeekConfig.model_validate({**shape, **changes})).eval()


def save_model(model: DeepSeekTransformer, tokenizer: ConversationTokenizer, run: Path, step: int = 100) -> Path:
    """Commit the model as the best checkpoint of a run."""
    payload = Payload(
        step=step,
        epoch=0,
        tokens=1000,
        model=dict(model.state_dict()),
        model_config=model.config.to_dict(),
        tokenizer={"name": tokenizer.name, "digest": tokenizer.digest},
        global_state={},
        rank_state={},
        rank_tensors={},
        metrics={"eval_loss": 2.5},
        flags={},
    )
    [result] = CheckpointManager(Config(), run).save(payload, best=True)
    assert result.failed is None and result.path is not None
    return result.path
