"""Training written out by hand in plain PyTorch on one rank, in fp32: what every mode of the engine must equal.

Where the router is balanced by a bias, it is moved once per step by its formula (arXiv:2408.15664), from the choices of the
whole step.

It shares the model and the rows with the engine, and nothing of the engine itself.

Shapes: B batch, S sequence, L expert layers, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumina_engine.config.schema import Config
from lumina_engine.data.batch import TrainLoader
from lumina_engine.model.transformer import DeepSeekTransformer


def plain_losses(config: Config, store: Any, rows: int, accumulation: int) -> list[float]:
    """Mean loss per trained token of each step; a step takes `rows` rows in `accumulation` parts, at a constant rate."""
    return plain_training(config, store, rows, accumulation)[0]


def plain_training(config: Config, store: Any, rows: int, accumulation: int) -> tuple[list[float], list[list[float]]]:
    """The losses of `plain_losses`, and the biases of the routers at the end."""
    model = DeepSeekTransformer(config).train()
    optimizer = _adamw(model, config)
    losses = []
    loader = TrainLoader(store, config, micro_batch=rows // accumulation, accumulation=accumulation)
    for _, parts in zip(range(config.max_steps), loader, strict=False):
        loss, counts_LE = _gradients(model, parts, config)
        losses.append(loss)
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if config.router_bias_rate:
            for layer, counts_E in zip(model.expert_layers, counts_LE, strict=True):
                move_E = torch.sign(counts_E.mean() - counts_E) * config.router_bias_rate
                layer.router.bias += move_E - move_E.mean()
    return losses, [layer.router.bias.tolist() for layer in model.expert_layers]


def _adamw(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    decay: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        decay[parameter.ndim > 1 and "embedding" not in name and "router" not in name].append(parameter)
    groups = [
        {"params": decay[True], "weight_decay": config.weight_decay},
        {"params": decay[False], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_eps, foreach=False)


def _gradients(model: DeepSeekTransformer, parts: list[Any], config: Config) -> tuple[float, Tensor]:
    """Adds up the gradients of all parts of one step and returns its loss and the choices of each expert."""
    labels = sum(int((part.labels_BS >= 0).sum()) for part in parts)
    tokens = sum(int((part.document_ids_BS > 0).sum()) for part in parts)
    total = 0.0
    counts_LE = torch.zeros(len(model.expert_layers), config.num_experts)
    seen = 0.0
    for part in parts:
        out = model(
            part.input_ids_BS,
            labels=part.labels_BS,
            document_ids=part.document_ids_BS,
            position_ids=part.position_ids_BS,
            return_aux=True,
        )
        counts_LE = counts_LE + out.router.counts_LE.detach()  # of this part and those before it
        seen += float(out.router.tokens)
        probabilities_LE = out.router.prob_sum_LE / tokens
        balance = (counts_LE / seen * probabilities_LE).sum(1).mean() * config.num_experts / config.moe_top_k
        z = out.router.z_sum_L.mean() / tokens
        loss = out.loss_sum / labels + config.load_balancing_weight * balance + config.router_z_loss_weight * z
        loss.backward()
        total += float(out.loss_sum.detach())
    return total / labels, counts_LE
