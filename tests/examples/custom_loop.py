"""A plain script: own model, own data, health watched as it trains: `python custom_loop.py chats.jsonl`."""

import sys

from lumina_engine import (
    Config,
    ConversationDataset,
    ConversationTokenizer,
    DeepSeekConfig,
    DeepSeekTransformer,
    EnhancedConversationTrainer,
    TrainingHealthMonitor,
)


def main(
    train: str | None,
    tokenizer_name: str = "gpt-4",
    report: str = "reports/health.json",
    shape: dict | None = None,
    **settings: object,
) -> dict:
    tokenizer = ConversationTokenizer(model_name=tokenizer_name)
    model_config = DeepSeekConfig(
        **{  # the test runs this file smaller
            "vocab_size": tokenizer.padded_vocab_size,
            "hidden_size": 1024,
            "num_layers": 24,
            "num_heads": 16,
            "num_kv_heads": 4,
            "seq_length": 2048,
            "num_experts": 8,
            "moe_top_k": 2,
        }
        | (shape or {})
    )
    values = {"batch_size": 8, "gradient_accumulation_steps": 4, "zero_stage": 2, "seq_length": model_config.seq_length}
    config = Config(**values | settings)
    model = DeepSeekTransformer(model_config)
    dataset = ConversationDataset(data_path=train, tokenizer=tokenizer, config=config)
    monitor = TrainingHealthMonitor(log_dir="monitoring")
    trainer = EnhancedConversationTrainer(model, tokenizer, config, monitor)
    summary = trainer.train(dataset)
    print(monitor.get_health_summary())
    monitor.save_health_report(report)
    return summary


if __name__ == "__main__":
    print(main(sys.argv[1]))
