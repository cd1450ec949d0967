"""How fast a model of a shape answers: replies to random prompts by the function that chat uses, token by token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..monitoring.hardware import process_memory
from .events import Token
from .generate import generate
from .modes import DEFAULT_MODE, MODES


def measure(config: Any, numbers: dict[str, int], precision: str, each: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Answer `warmup + steps` prompts of `prompt_tokens` random tokens with `new_tokens` each; medians behind the warm-up.

    Prefill counts the prompt's tokens up to the first new one, decoding those after it. Random weights in `precision`, which is
    fp32, bf16 or fp16; `each` gets the times of every reply (seconds) as it ends.
    """
    from ..data.tokenizer import ConversationTokenizer
    from ..model.transformer import DeepSeekTransformer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision.removeprefix("mixed_")]
    tokenizer = ConversationTokenizer(config.tokenizer)
    model = DeepSeekTransformer(config).to(device=device, dtype=dtype).eval()
    sampling = replace(MODES[DEFAULT_MODE], max_new_tokens=numbers["new_tokens"])
    random = torch.Generator().manual_seed(config.seed)
    replies = []
    for number in range(1, numbers["warmup"] + numbers["steps"] + 1):
        ids = torch.randint(0, tokenizer.get_vocab_size(), (numbers["prompt_tokens"],), generator=random).tolist()
        begin, moments = time.perf_counter(), []
        for event in generate(model, tokenizer, ids, sampling, number, stop=()):
            if isinstance(event, Token):
                moments.append(time.perf_counter())
        replies.append({"reply": number, "prefill_s": moments[0] - begin, "decode_s": moments[-1] - moments[0]})
        each(replies[-1])
    return _figures(replies[numbers["warmup"] :], numbers, model, device, precision)


def _figures(
    replies: list[dict[str, Any]], numbers: dict[str, int], model: Any, device: torch.device, precision: str
) -> dict[str, Any]:
    decode = [(numbers["new_tokens"] - 1) / reply["decode_s"] for reply in replies]
    prefill = [numbers["prompt_tokens"] / reply["prefill_s"] for reply in replies]
    rate = statistics.median(decode)
    peak = process_memory("VmHWM") if device.type == "cpu" else torch.cuda.max_memory_allocated(device)
    return {
        "tokens_per_s": rate,
        "tokens_per_s_min": min(decode),
        "tokens_per_s_max": max(decode),
        "spread": (max(decode) - min(decode)) / rate,
        "prefill_tokens_per_s": statistics.median(prefill),
        "first_token_s": statistics.median(reply["prefill_s"] for reply in replies),
        "steps": len(replies),
        "prompt_tokens": numbers["prompt_tokens"],
        "new_tokens": numbers["new_tokens"],
        "peak_memory_bytes": peak,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": precision,
        "threads": torch.get_num_threads(),
    }
