"""A mixture of experts over several devices, in the style of Mixtral 8x7B: `python mixtral_style_moe.py chats.jsonl`."""

import sys

from lumina_engine import AdaptiveTrainingOrchestrator, ConfigPresets


def main(train: str | None, preset: str = "b7", **settings: object) -> dict:
    config = ConfigPresets.get(preset)
    config.experiment_name = "mixtral_style_moe"
    config.train_data_path = train
    config.moe_top_k = 2  # of 8 experts: 12.6 billion of b7's 46.4 billion parameters work on a token
    config.use_deepspeed = True
    config.zero_stage = 3
    config.cpu_offload = True
    config.batch_size = 4
    config.gradient_accumulation_steps = 16
    config.num_epochs = 3
    for key, value in settings.items():  # the test runs this file smaller
        setattr(config, key, value)
    orchestrator = AdaptiveTrainingOrchestrator(config)
    orchestrator.initialize_training()  # findings, budget, command; run_adaptive_training would call it
    return orchestrator.run_adaptive_training()


if __name__ == "__main__":
    print(main(sys.argv[1]))
