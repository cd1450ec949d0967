"""Lumina's engine: train, watch and talk to mixture-of-experts language models.

Public names load on first use (PEP 562), so `import lumina_engine` imports neither torch nor pydantic.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "Config": "lumina_engine.config.schema",
    "ConfigError": "lumina_engine.config.schema",
    "DeepSeekConfig": "lumina_engine.config.schema",
    "Finding": "lumina_engine.config.schema",
    "ConfigPresets": "lumina_engine.config.presets",
    "ConversationTokenizer": "lumina_engine.data.tokenizer",
    "ConversationDataset": "lumina_engine.data.batch",
    "convert_to_conversation_format": "lumina_engine.data.formats",
    "process_oasst_data": "lumina_engine.data.formats",
    "validate_data_comprehensive": "lumina_engine.data.report",
    "create_data_summary_report": "lumina_engine.data.report",
    "DeepSeekTransformer": "lumina_engine.model.transformer",
    "EnhancedConversationTrainer": "lumina_engine.training.trainer",
    "AdaptiveTrainingOrchestrator": "lumina_engine.training.orchestrator",
    "AdaptiveHyperparameterOptimizer": "lumina_engine.monitoring.hyperparameters",
    "ArchitectureEvolution": "lumina_engine.monitoring.growth",
    "CheckpointManager": "lumina_engine.checkpoint.manager",
    "MoEOptimizationManager": "lumina_engine.monitoring.moe",
    "load_model": "lumina_engine.checkpoint.manager",
    "generate": "lumina_engine.chat.generate",
    "validate_environment": "lumina_engine.doctor.run",
    "estimate_training_time": "lumina_engine.doctor.estimate",
    "TrainingHealthMonitor": "lumina_engine.monitoring.health.monitor",
    "optimize_cuda_settings": "lumina_engine.training.cuda",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> object:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'lumina_engine' has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
