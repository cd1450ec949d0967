"""Replies from a model: prompt through the cache, tokens sampled one at a time, text streamed by whole characters.

Shapes: B batch, S prompt (padded on the left), V vocabulary rows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lumina_engine.data.tokenizer import ConversationTokenizer, StreamDecoder

from .context import Prompt, fit_prompt
from .events import TRACE_ALTERNATIVES, Alternative, Done, Event, Message, ModelInfo, Route, Routed, Start, StopReason, Token
from .modes import DEFAULT_MODE, MODES, ChatError, Sampling
from .sampling import Sampler, chance

if TYPE_CHECKING:
    from lumina_engine.model.moe import LayerRoute
    from lumina_engine.model.transformer import DeepSeekTransformer

PREFILL_CHUNK = 1024  # prompt tokens per forward: bounds the attention mask and the expert buffers of a long prompt


@dataclass(frozen=True)
class Reply:
    """A finished reply: sampled ids without the end-of-turn token, their text, and why it ended."""

    ids: list[int]
    text: str
    reason: StopReason


@dataclass(frozen=True)
class _Step:
    """What one decoding step sampled: ids (B,), and the raw logits (B, V) they came from.

    With a trace, `chances` (B,) are those of the draw, and `routes` are those of the token of the step before, which this step
    has read. The last step of a reply that ends by its length has no ids: it only tells these routes.
    """

    ids: list[int]
    logits_BV: Tensor
    chances: list[float] | None = None
    routes: list[LayerRoute] | None = None


def stop_ids(tokenizer: ConversationTokenizer) -> frozenset[int]:
    """Tokens that end a reply: the end of the turn, the end of the document."""
    return frozenset({tokenizer.im_end_id, tokenizer.eot_id})


def banned_ids(tokenizer: ConversationTokenizer, vocab_rows: int) -> frozenset[int]:
    """Ids that no reply contains: those without meaning, rows above the vocabulary, and special tokens that end nothing."""
    beyond = range(tokenizer.get_vocab_size(), vocab_rows)
    banned = tokenizer.unused_ids | tokenizer.special_ids | frozenset(beyond)
    return frozenset(token for token in banned if token < vocab_rows) - stop_ids(tokenizer)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropless and without dropout, whatever mode the model was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.inference_mode()
def _prefill(model: DeepSeekTransformer, prompts: list[list[int]], cache: object, pad_id: int) -> Tensor:
    """Feed the prompts, padded on the left to one length; returns the logits (B, V) behind their last tokens."""
    longest = max(map(len, prompts))
    device = next(model.parameters()).device
    ids_BS = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask_BS = None
    if any(len(prompt) < longest for prompt in prompts):
        lengths_B1 = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
        mask_BS = torch.arange(longest, device=device)[None, :] >= longest - lengths_B1
    for start in range(0, longest, PREFILL_CHUNK):
        chunk = slice(start, start + PREFILL_CHUNK)
        mask = mask_BS[:, chunk] if mask_BS is not None else None
        logits_BV = model(ids_BS[:, chunk], mask, cache=cache, logits_to_keep=1)[:, -1]
    return logits_BV


@torch.inference_mode()
def _feed(model: DeepSeekTransformer, ids_B: Tensor, cache: object, routes: list[LayerRoute] | None) -> Tensor:
    """Feed one token per row; returns the logits (B, V) behind it, and fills `routes`."""
    return model(ids_B[:, None], cache=cache, routes=routes)[:, -1]


def _steps(
    model: DeepSeekTransformer,
    tokenizer: ConversationTokenizer,
    prompts: list[list[int]],
    sampling: Sampling,
    seeds: list[int],
    most: int,
    trace: bool = False,
) -> Iterator[_Step]:
    """Sample up to `most` tokens for every row. Ending a row early is the caller's business. For `trace` see `_Step`.

    Raises:
        ChatError: the logits hold no number.
    """
    from lumina_engine.model.attention import KVCache

    weight = next(model.parameters())
    longest = max(map(len, prompts))
    cache = KVCache(model.config, len(prompts), longest + most, dtype=weight.dtype, device=weight.device)
    logits_BV = _prefill(model, prompts, cache, tokenizer.pad_id)
    rows = logits_BV.shape[-1]
    sampler = Sampler(
        sampling,
        prompts,
        seeds,
        vocab_rows=rows,
        banned=banned_ids(tokenizer, rows),
        spared=tokenizer.special_ids,
        device=weight.device,
    )
    routes: list[LayerRoute] | None = None
    for number in range(most):
        if bool(torch.isnan(logits_BV).any()):
            raise ChatError(
                "the model's output is not a number: this checkpoint is damaged or diverged; choose an earlier one", 65
            )
        adjusted_BV = sampler.adjust(logits_BV)
        ids_B = sampler.draw(adjusted_BV)
        chances = chance(adjusted_BV, sampling, ids_B).tolist() if trace else None
        yield _Step(ids_B.tolist(), logits_BV, chances, routes)
        if number + 1 < most or trace:
            routes = [] if trace else None
            logits_BV = _feed(model, ids_B, cache, routes)
    if trace:
        yield _Step([], logits_BV, None, routes)


def _token(tokenizer: ConversationTokenizer, text: str, step: _Step, alternatives: int) -> Token:
    """The event of one token; with `alternatives`, the model's own probabilities of it and of the likeliest ones."""
    token = step.ids[0]
    if not alternatives:
        return Token(text=text, token=token)
    logp_V = step.logits_BV[0].float().log_softmax(-1)
    best = logp_V.topk(min(alternatives, logp_V.shape[-1]))
    others = [
        Alternative(tokenizer.decode([index]), index, probability)
        for index, probability in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
    ]
    own = None if step.chances is None else step.chances[0]
    return Token(text=text, token=token, probability=float(logp_V[token].exp()), chance=own, alternatives=others)


def _routed(model: DeepSeekTransformer, index: int, routes: list[LayerRoute]) -> Routed:
    """Where a token went; one transfer from the device for all layers."""
    experts_LK = torch.stack([route.experts_BSK[0, -1] for route in routes]).tolist()
    gates_LK = torch.stack([route.gates_BSK[0, -1] for route in routes]).tolist()
    layers = zip(model.expert_layer_numbers, experts_LK, gates_LK, strict=True)
    found = [Route(layer, experts, [round(gate, 6) for gate in gates]) for layer, experts, gates in layers]
    return Routed(index=index, experts=model.config.num_experts, routes=found)


def generate(
    model: DeepSeekTransformer,
    tokenizer: ConversationTokenizer,
    prompt: Sequence[int] | Sequence[Message],
    sampling: Sampling | None = None,
    seed: int = 0,
    *,
    stop: Iterable[int] | None = None,
    alternatives: int = 0,
    trace: bool = False,
    cancelled: Callable[[], bool] | None = None,
) -> Generator[Event, None, None]:
    """Stream one reply: `Start`, a `Token` for each sampled token, `Done`. Same prompt, sampling and seed: same text.

    Args:
        prompt: token ids as they are, or a conversation (list of `{"role", "content"}`), to which the template and an open
            assistant header are added and whose oldest pairs go if it does not fit the model's `seq_length`.
        sampling: mode `standard` if None.
        stop: ids that end the reply; `<|im_end|>` and `<|endoftext|>` if None.
        alternatives: number of likeliest tokens reported with each token.
        trace: also tell with which chance each token was drawn and, in a `Routed` after it, the experts that it was routed to;
            `alternatives` is then at least `TRACE_ALTERNATIVES`.
        cancelled: asked before each token; true ends the reply.

    Raises:
        ChatError: the prompt is empty or too long, the model's output is not a number, or memory ran out.
    """
    sampling = sampling or MODES[DEFAULT_MODE]
    began = time.monotonic()
    limit = model.config.seq_length
    fitted = _fitted(tokenizer, prompt, limit, sampling.max_new_tokens)
    ends = stop_ids(tokenizer) if stop is None else frozenset(stop)
    decoder = StreamDecoder(tokenizer)
    reason: StopReason = "length" if fitted.room == sampling.max_new_tokens else "context"
    count, first = 0, None
    if trace:
        alternatives = max(alternatives, TRACE_ALTERNATIVES)
    yield Start(prompt_tokens=len(fitted.ids), context_limit=limit, dropped=fitted.dropped)
    with _evaluating(model), _one_line_errors():
        for step in _steps(model, tokenizer, [fitted.ids], sampling, [seed], fitted.room, trace):
            if step.routes:
                yield _routed(model, count - 1, step.routes)
            if not step.ids:
                break
            token = step.ids[0]
            if cancelled is not None and cancelled():
                reason = "cancelled"
                break
            if token in ends:
                reason = "stop"
                break
            count += 1
            if first is None:
                first = time.monotonic() - began
            yield _token(tokenizer, decoder.push(token), step, alternatives)
    seconds = time.monotonic() - began
    yield Done(reason=reason, tokens=count, seconds=seconds, first_token_s=first, seed=seed, tail=decoder.flush())


def _fitted(
    tokenizer: ConversationTokenizer, prompt: Sequence[int] | Sequence[Message], limit: int, max_new_tokens: int
) -> Prompt:
    """Ids as they are, or a conversation in the template."""
    ids = [item for item in prompt if isinstance(item, int)]
    if not ids:
        return fit_prompt(tokenizer, [item for item in prompt if not isinstance(item, int)], limit, max_new_tokens)
    if len(ids) >= limit:
        raise ChatError(f"the prompt has {len(ids):,} tokens, but the model's context holds {limit:,}: shorten it", 2)
    return Prompt(ids, 0, min(max_new_tokens, limit - len(ids)))


def generate_batch(
    model: DeepSeekTransformer,
    tokenizer: ConversationTokenizer,
    prompts: Sequence[Sequence[Message]],
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    *,
    stop: Iterable[int] | None = None,
) -> list[Reply]:
    """Answer several conversations at once, padded on the left. Each reply is the one that `generate` gives for it alone.

    Args:
        seeds: one per conversation; 0 for all if None.

    Raises:
        ChatError: as `generate`.
    """
    if not prompts:
        return []
    sampling = sampling or MODES[DEFAULT_MODE]
    fitted = [fit_prompt(tokenizer, prompt, model.config.seq_length, sampling.max_new_tokens) for prompt in prompts]
    ends = stop_ids(tokenizer) if stop is None else frozenset(stop)
    replies: list[list[int]] = [[] for _ in prompts]
    reasons: list[StopReason | None] = [None] * len(prompts)
    row_seeds = list(seeds) if seeds is not None else [0] * len(prompts)
    if len(row_seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(row_seeds)} seeds")
    with _evaluating(model), _one_line_errors():
        for step in _steps(model, tokenizer, [one.ids for one in fitted], sampling, row_seeds, max(one.room for one in fitted)):
            for row, token in enumerate(step.ids):
                if reasons[row] is not None:
                    continue
                if token in ends:
                    reasons[row] = "stop"
                    continue
                replies[row].append(token)
                if len(replies[row]) == fitted[row].room:
                    reasons[row] = "length" if fitted[row].room == sampling.max_new_tokens else "context"
            if all(reasons):
                break
    return [Reply(ids, tokenizer.decode(ids), reason or "length") for ids, reason in zip(replies, reasons, strict=True)]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Out of memory as one line with what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ChatError(_OUT_OF_MEMORY) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "not enough memory" in str(error):
            raise ChatError(_OUT_OF_MEMORY) from error
        raise


_OUT_OF_MEMORY = "out of memory while answering: lower --max-new-tokens, use --precision bf16, or --device cpu"


class LocalBackend:
    """Answers with a model in this process. One reply at a time; `cancel` works from any thread."""

    def __init__(self, model: DeepSeekTransformer, tokenizer: ConversationTokenizer, info: ModelInfo) -> None:
        self.model, self.tokenizer, self.info = model, tokenizer, info
        self._cancelled = threading.Event()

    def generate(
        self, messages: Sequence[Message], sampling: Sampling, seed: int, *, alternatives: int = 0, trace: bool = False
    ) -> Generator[Event, None, None]:
        """See `Backend`."""
        self._cancelled.clear()
        yield from generate(
            self.model,
            self.tokenizer,
            messages,
            sampling,
            seed,
            alternatives=alternatives,
            trace=trace,
            cancelled=self._cancelled.is_set,
        )

    def cancel(self) -> None:
        self._cancelled.set()

    def close(self) -> None:
        """Nothing to give back: the model goes with its last reference."""
