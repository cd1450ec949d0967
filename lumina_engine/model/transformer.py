"""Decoder-only transformer with dense or mixture-of-experts blocks.

Shapes: B batch, S new tokens, T cached and new tokens, D hidden size, V vocabulary, E experts, L expert layers.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lumina_engine.config.counts import forward_flops, kv_cache_bytes_per_token
from lumina_engine.config.memory import Layout, training_memory
from lumina_engine.config.schema import Config, DeepSeekConfig
from lumina_engine.model.attention import Attention, AttentionPlan, KVCache, cached_mask
from lumina_engine.model.attention_core import document_mask
from lumina_engine.model.exchange import ExpertGroup
from lumina_engine.model.latent import LatentAttention
from lumina_engine.model.layers import RMSNorm, SwiGLU
from lumina_engine.model.loss import IGNORED, cross_entropy_and_correct, cross_entropy_sum, shifted_targets
from lumina_engine.model.moe import LayerRoute, LayerStats, MoE, RouterStats
from lumina_engine.model.product import Linear, linear
from lumina_engine.model.rope import RotaryTables, inverse_frequencies
from lumina_engine.model.segments import DocumentLayout, Segments

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# On a GPU shorter rows take a mask: laying out documents reads their lengths back from the device.
_READ_FROM = 1024


class ModelOutput(NamedTuple):
    """What `forward(..., return_aux=True)` gives. Without labels the loss fields are None, with labels `logits` is.

    A tuple, because engines that split the weights look for tensors in a module's output to know when its backward begins.
    """

    logits: Tensor | None = None  # (B, S, V)
    loss_sum: Tensor | None = None  # sum over trained labels of weight · cross-entropy, nats, float32 scalar
    num_labels: Tensor | None = None  # trained labels, scalar
    weight_sum: Tensor | None = None  # sum of their weights; equals num_labels without weights
    num_correct: Tensor | None = None  # labels that are the most probable token; only without gradients (evaluation)
    router: RouterStats | None = None  # None for a dense model


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); dropout on both branches."""

    def __init__(self, config: DeepSeekConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = LatentAttention(config, layer) if config.attention == "mla" else Attention(config, layer)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn: MoE | SwiGLU
        if config.use_moe and layer >= config.num_dense_layers:
            self.ffn = MoE(config)
        else:
            width = config.dense_width
            self.ffn = SwiGLU(config.hidden_size, width)
        self.dropout = config.dropout
        self.selective = config.gradient_checkpointing == "selective"

    def forward(
        self,
        x_BSD: Tensor,
        plan: AttentionPlan,
        valid_BS: Tensor | None,
        cache: KVCache | None,
        routes: list[LayerRoute] | None = None,
    ) -> tuple[Tensor, LayerStats | None]:
        recompute = self.selective and cache is None and torch.is_grad_enabled()
        x_BSD = x_BSD + self._drop(self.attention(x_BSD, plan, cache, self.attention_norm, recompute))
        stats: LayerStats | None = None
        if isinstance(self.ffn, MoE):
            branch, stats = self.ffn(self.ffn_norm(x_BSD), valid_BS, routes, recompute)
        else:
            branch = self.ffn(x_BSD, self.ffn_norm, recompute)
        return x_BSD + self._drop(branch), stats

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training) if self.dropout else branch


class DeepSeekTransformer(nn.Module):
    """The language model. `config` is a `DeepSeekConfig`, or a `Config` of which it takes the model sections and the seed.

    `vocab_size` must be a number by then (ValueError otherwise). Weights are initialised from the seed (0 for a
    DeepSeekConfig), except on the meta device: call `to_empty` and `init_weights(seed)`, or load a state dict, afterwards.
    """

    def __init__(self, config: DeepSeekConfig | Config) -> None:
        super().__init__()
        seed = config.seed if isinstance(config, Config) else 0
        shape = DeepSeekConfig.from_config(config) if isinstance(config, Config) else config
        self.config = shape.resolved()
        self._check()
        self.embedding = nn.Embedding(self.config.vocab_rows, self.config.hidden_size)
        self.blocks = nn.ModuleList(Block(self.config, layer) for layer in range(self.config.num_layers))
        self.norm = RMSNorm(self.config.hidden_size, self.config.norm_eps)
        if not self.config.tie_word_embeddings:
            self.head = Linear(self.config.hidden_size, self.config.vocab_rows)
        for module in self.modules():
            if isinstance(module, Linear):
                module.repeated = self.config.gradient_checkpointing == "selective"
        self.rotary = _rotary_tables(self.config)
        if not self.embedding.weight.is_meta:
            self.init_weights(seed)

    def _check(self) -> None:
        if self.config.attention == "mla" and self.config.qk_norm:
            raise ValueError("qk_norm=True: latent attention norms its latents instead; set qk_norm=False")

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal(0, init_std); projections that write to the residual stream are divided by sqrt(2 · layers); norms are 1.

        Each tensor has its own random stream, from the seed and its name, drawn on the CPU in float32: the same seed gives the
        same weights on any device, in any precision, and for a layer whatever stands around it.
        """
        for name, parameter in self.named_parameters():
            parameter.copy_(self.first_weight(name, seed))
        for name, buffer in self.named_buffers():
            if name.endswith((".router.bias", ".router.log2_multiplicity")):
                buffer.zero_()

    def first_weight(self, name: str, seed: int) -> Tensor:
        """What `init_weights` puts into the parameter of that name, which may be on `meta`: float32 on the CPU."""
        parameter = self.get_parameter(name)
        if "norm" in name:
            return torch.ones(parameter.shape, device="cpu")
        std = self.config.init_std
        if name.endswith((".out.weight", ".down.weight", ".w2")):
            std /= (2 * self.config.num_layers) ** 0.5
        stream = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(stream, "little") >> 1)
        group = self.expert_group
        group = group if group is not None and name in self.expert_weights else None
        shape = parameter.shape if group is None else (self.config.num_experts, *parameter.shape[1:])
        drawn = torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)
        return drawn if group is None else group.own(drawn)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (V, D): the embedding when tied."""
        return self.embedding.weight if self.config.tie_word_embeddings else self.head.weight

    @property
    def expert_layers(self) -> list[MoE]:
        """The expert layers, first layer first."""
        return [block.ffn for block in self.blocks if isinstance(block, Block) and isinstance(block.ffn, MoE)]

    @property
    def expert_weights(self) -> dict[str, nn.Parameter]:
        """The stacked weights of the routed experts by name; their first dimension counts experts."""
        layers = {layer: name for name, layer in self.named_modules() if isinstance(layer, MoE)}
        return {f"{name}.{part}": getattr(layer, part) for layer, name in layers.items() for part in ("w13", "w2")}

    @property
    def expert_group(self) -> ExpertGroup | None:
        """The ranks that the experts are spread over; None while every rank has all of them."""
        return next((layer.group for layer in self.expert_layers), None)

    def spread_experts(self, group: ExpertGroup) -> None:
        """Keep the experts of this rank only (expert parallelism). From then on every rank of the group must call `forward`
        together, and `state_dict` has this rank's experts. Raises ValueError if the ranks do not divide the experts."""
        for layer in self.expert_layers:
            layer.spread(group)

    @property
    def expert_layer_numbers(self) -> list[int]:
        """Which of all layers, counted from 0, the expert layers are."""
        return [number for number, block in enumerate(self.blocks) if isinstance(block, Block) and isinstance(block.ffn, MoE)]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        return_aux: bool = False,
        routes: list[LayerRoute] | None = None,
        layout: DocumentLayout | None = None,
    ) -> Tensor | ModelOutput:
        """Logits (B, S, V); with `labels` the mean loss; with `return_aux` a `ModelOutput`.

        `input_ids` (B, S). `attention_mask` (B, S): 0 marks padding, on either side; behind a cache it covers the new tokens.
        `document_ids` (B, S): tokens attend within their document, 0 is padding. Tokens of a document follow each other: an id
        that comes back names another document. With a cache a row is one document, and only 0 counts. `position_ids` (B, S)
        default to counting the real tokens of each document from 0, behind a cache onwards. `labels` (B, S) lie on their own
        token, -100 carries no loss; `weights` (B, S) multiply them (the mean is then the weighted mean). `logits_to_keep` > 0
        gives the logits of that many last positions only. Evaluation mode never drops a token for capacity. `routes`, a list,
        receives what the routers chose, an entry per expert layer, first layer first; not together with full checkpointing,
        which runs layers twice.
        `layout` is that of `document_ids`, where it is known; `position_ids` are below S then.
        """
        if document_ids is None and attention_mask is not None:
            document_ids = attention_mask[:, -input_ids.shape[1] :].long()
        hidden, stats, valid = self._hidden(input_ids, document_ids, position_ids, cache, routes, layout)
        if labels is None:
            if logits_to_keep:
                hidden = hidden[:, -logits_to_keep:]
            output = ModelOutput(logits=linear(self.norm(hidden), self.head_weight))
        else:
            output = self._loss(self.norm(hidden), shifted_targets(labels, document_ids), weights)
        if return_aux:
            return output._replace(router=self._router_stats(stats, input_ids, valid))
        if output.logits is not None:
            return output.logits
        assert output.loss_sum is not None and output.weight_sum is not None
        return output.loss_sum / output.weight_sum.clamp(min=1e-20)

    def _loss(self, normed: Tensor, targets: Tensor, weights: Tensor | None) -> ModelOutput:
        if weights is not None:
            weights = torch.cat((weights[:, 1:], weights.new_zeros(len(weights), 1)), dim=1)
        arguments = (normed, self.head_weight, targets, weights, self.config.loss_chunk_size)
        correct = None
        if torch.is_grad_enabled():
            loss_sum = cross_entropy_sum(*arguments)
        else:
            loss_sum, correct = cross_entropy_and_correct(*arguments)
        trained = targets != IGNORED
        count = trained.sum()
        return ModelOutput(
            loss_sum=loss_sum,
            num_labels=count,
            weight_sum=count if weights is None else (weights * trained).sum(),
            num_correct=correct,
        )

    def _hidden(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
        routes: list[LayerRoute] | None = None,
        layout: DocumentLayout | None = None,
    ) -> tuple[Tensor, list[LayerStats], Tensor | None]:
        """Hidden states before the final norm, statistics of the expert layers, and which tokens are real (None = all)."""
        valid = None if document_ids is None else document_ids > 0
        if layout is not None:
            valid = None if layout.full else valid
        elif valid is not None and valid.device.type == "cpu" and bool(valid.all()):
            valid = None
        x = self.embedding(input_ids)
        plan = self._plan(x, input_ids, document_ids, position_ids, cache, layout)
        stats: list[LayerStats] = []
        recompute = self.config.gradient_checkpointing is True and torch.is_grad_enabled() and cache is None
        for block in self.blocks:
            if recompute:
                x, layer_stats = checkpoint(block, x, plan, valid, cache, use_reentrant=False)
            else:
                x, layer_stats = block(x, plan, valid, cache, routes)
            if layer_stats is not None:
                stats.append(layer_stats)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return x, stats, valid

    def _plan(
        self,
        x: Tensor,
        input_ids: Tensor,
        document_ids: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
        layout: DocumentLayout | None = None,
    ) -> AttentionPlan:
        batch, new = input_ids.shape
        device = input_ids.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else x.dtype
        past = 0 if cache is None else cache.length
        window = self.config.sliding_window
        first = 0
        mask: Tensor | None = None
        segments: Segments | None = None
        if cache is not None:
            cache.reserve(batch, new)
            if document_ids is not None:
                cache.mark(document_ids > 0)
            if window is not None and cache.valid_BT is None:  # among padding a window reaches back over more slots than tokens
                first = max(0, past - window + 1)
            if (past and new > 1) or cache.valid_BT is not None:
                mask = cached_mask(cache, new, dtype, window, first)
        elif document_ids is not None:
            known = layout
            if known is None and (device.type == "cpu" or new >= _READ_FROM):
                known = DocumentLayout.of(document_ids)
            if known is not None and self.config.use_flash_attention:
                segments = known.segments
            elif known is None or known.segments is not None:
                mask = document_mask(document_ids, dtype, window)
        padded = cache is not None and cache.valid_BT is not None
        if position_ids is None and (document_ids is not None or padded):
            position_ids = _positions(torch.ones_like(input_ids) if document_ids is None else document_ids, cache)
        if position_ids is None:
            cos, sin = self.rotary.span(past, past + new, device)
        else:
            cos, sin = self.rotary.at(position_ids, self._highest(position_ids, layout))
        if segments is not None:
            cos, sin = (segments.pack(table.expand(batch, new, -1).flatten(0, 1)) for table in (cos, sin))
        return AttentionPlan(cos, sin, mask, mask is None and new > 1, segments, first)

    def _highest(self, position_ids: Tensor, layout: DocumentLayout | None) -> int:
        """A bound on positions that costs no wait for a device."""
        if layout is not None:
            return position_ids.shape[1] - 1
        return int(position_ids.max()) if position_ids.device.type == "cpu" else self.rotary.length

    def _router_stats(self, stats: list[LayerStats], input_ids: Tensor, valid: Tensor | None) -> RouterStats | None:
        if not stats:
            return None
        tokens = torch.tensor(float(input_ids.numel())) if valid is None else valid.sum().float()
        return RouterStats.stack(stats, tokens.to(input_ids.device))

    def estimate_flops(self, seq_len: int, batch_size: int = 1) -> dict[str, int]:
        """Operations of one forward pass, by part, in total and per token; one multiply-add is two, attention is causal."""
        return forward_flops(self.config, seq_len, batch_size)

    def get_memory_footprint(self, batch_size: int = 1, seq_length: int | None = None) -> dict[str, float]:
        """Bytes of plain AdamW training at a shape (default: one row of the full length) in the precision of the weights.

        Parameters, gradients, optimizer, buffers, activations (with the loss); `total` is the peak, at which not all of these
        are there at once, but temporaries are; `kv_cache_per_token` is for chat. Of a model whose experts are spread over ranks
        these are the bytes of one rank.

        Raises:
            ValueError: the weights have a type that nothing here trains in.
        """
        dtype = self.embedding.weight.dtype
        if dtype not in _PRECISIONS:
            known = ", ".join(str(name) for name in _PRECISIONS)
            raise ValueError(f"get_memory_footprint: the weights are {dtype}, and training is known in {known}")
        world = 1 if self.expert_group is None else self.expert_group.size
        length = seq_length or self.config.seq_length
        layout = Layout(batch_size, length, _PRECISIONS[dtype], world=world, use_deepspeed=False)
        memory = training_memory(self.config, layout)
        parts = {
            "parameters": memory.weights,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "buffers": sum(buffer.nbytes for buffer in self.buffers()),
            "activations": memory.activations + memory.logits,
        }
        per_token = kv_cache_bytes_per_token(self.config, self.embedding.weight.element_size())
        return {name: float(value) for name, value in parts.items()} | {
            "total": float(memory.total + parts["buffers"]),
            "kv_cache_per_token": float(per_token),
        }

    @property
    def router_bias_LE(self) -> Tensor | None:
        """The selection biases of all expert layers; None for a dense model."""
        return torch.stack([layer.router.bias for layer in self.expert_layers]) if self.expert_layers else None

    @torch.no_grad()
    def update_router_bias(self, counts_LE: Tensor, rate: float) -> None:
        """Moves each router's bias by `rate` towards the experts that had fewer choices than the mean (arXiv:2408.15664).

        `counts_LE` are the choices of the global batch, once per optimizer step; the change is centred, so the biases keep
        their sum.
        """
        direction_LE = torch.sign(counts_LE.mean(-1, keepdim=True) - counts_LE) * rate
        direction_LE -= direction_LE.mean(-1, keepdim=True)
        for layer, direction_E in zip(self.expert_layers, direction_LE, strict=True):
            layer.router.bias += direction_E.to(layer.router.bias)


def _rotary_tables(config: DeepSeekConfig) -> RotaryTables:
    latent = config.attention == "mla"
    frequencies, magnitude = inverse_frequencies(
        config.qk_rope_head_dim if latent else config.head_size,
        config.rope_theta,
        config.rope_scaling,
        config.rope_scaling_factor,
        config.rope_original_length or round(config.seq_length / config.rope_scaling_factor),
    )
    return RotaryTables(frequencies, 1.0 if latent else magnitude, config.seq_length)  # see latent.attention_scale


def _positions(document_ids: Tensor, cache: KVCache | None) -> Tensor:
    """Positions that count the real tokens of each document from 0; behind a cache, on from the real tokens in it."""
    valid = document_ids > 0
    if cache is not None:
        past = cache.length if cache.valid_BT is None else cache.valid_BT[:, : cache.length].sum(-1, keepdim=True)
        return (valid.cumsum(-1) - 1 + past).clamp(min=0)
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.zeros_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(-1).values
