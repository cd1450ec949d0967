"""A small conversation model from Open Assistant trees: `python small_conversation_model.py oasst.jsonl`."""

import sys

from lumina_engine import AdaptiveTrainingOrchestrator, ConfigPresets, process_oasst_data


def main(source: str, train: str = "data/oasst_train.jsonl", **settings: object) -> dict:
    print(f"{process_oasst_data(source, train)} conversations")
    config = ConfigPresets.debug()
    config.experiment_name = "small_conversation_model"
    config.train_data_path = train
    config.num_epochs = 5
    config.learning_rate = 1e-3
    for key, value in settings.items():  # the test runs this file smaller
        setattr(config, key, value)
    return AdaptiveTrainingOrchestrator(config).run_adaptive_training()


if __name__ == "__main__":
    print(main(sys.argv[1]))
