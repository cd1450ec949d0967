"""The highest ratio over the peer that any implementation on this machine and these libraries could reach.

    python tests/bench/roofline.py --peer "python hf_step.py" [--precision fp32] [--vocab 8192] [--rounds 3]

Each matrix product of a step of `bench train` (default shape) is timed at its own shape: forward, by its input's gradient and
by its weight's gradient, with `torch.mm` (MKL in fp32, oneDNN in bf16) and with oneDNN's own operator, in every layout of the
factors that needs no copy, factors and result in the cache, the best of many. Added is what no implementation can leave out:
AdamW's bytes and those of the norm of the gradients at the best bandwidth measured, and attention and activation by the fastest
of torch's kernels. The rest (norms, router, softmax of the loss, gathering) counts as nothing. Bound = the peer's step in the
same run, the best of the rounds as all the rest, over that sum.

Shapes: R rows, I inner, O columns.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from lumina_engine.commands.bench import SHAPE
from lumina_engine.config.counts import parameter_counts
from lumina_engine.config.schema import Config, DeepSeekConfig
from lumina_engine.model.attention_core import block_attention
from lumina_engine.training.matmul_peak import Product, step_products

_REPEATS = 40


def fastest(*calls: Callable[[], object], repeats: int = _REPEATS) -> float:
    """Seconds of the fastest call, the best of many; what cannot run here does not count."""
    best = float("inf")
    for call in calls:
        try:
            call()
        except (RuntimeError, NotImplementedError):
            continue
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - begin)
    return best


def product_seconds(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """(R, I) @ (I, O) by the fastest of libraries and layouts, the transposed result included."""
    x, w = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    xs, ws = (x, x.t().contiguous().t()), (w, w.t().contiguous().t())
    calls: list[Callable[[], object]] = []
    for a in xs:
        for b in ws:
            calls.append(lambda a=a, b=b: torch.mm(a, b.t()))
            calls.append(lambda a=a, b=b: torch.mm(b, a.t()))
            calls.append(lambda a=a, b=b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
            calls.append(lambda a=a, b=b: torch.ops.mkldnn._linear_pointwise(b, a, None, "none", [], ""))
    return fastest(*calls, repeats=_REPEATS // 4)


def products(found: list[Product], dtype: torch.dtype) -> tuple[float, float]:
    """Seconds and operations of all products of a step: each forward one, and the two of its backward."""
    seconds, cache = 0.0, {}
    for p in found:
        for shape in ((p.rows, p.inner, p.columns), (p.rows, p.columns, p.inner), (p.columns, p.rows, p.inner)):
            if shape not in cache:
                cache[shape] = product_seconds(*shape, dtype)
                rate = p.flops / p.count / cache[shape] / 1e9
                print(f"  {shape[0]:>6} x {shape[1]:>5} x {shape[2]:>6}  {rate:6.0f} GFLOP/s")
            seconds += p.count * cache[shape]
    return seconds, 3 * sum(p.flops for p in found)


def bandwidth() -> float:
    """Bytes/s that memory gives at most: the best of a copy, and of AdamW itself, over 400 MB."""
    count = 25_000_000
    tensors = [torch.randn(count).abs() for _ in range(4)]
    step = torch.tensor(1.0)

    def adamw() -> None:
        torch._fused_adamw_(
            *([tensor] for tensor in tensors),
            [],
            [step],
            lr=1e-9,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    copied = 8 * count / fastest(lambda: tensors[0].copy_(tensors[1]), repeats=8)
    return max(copied, 28 * count / fastest(adamw, repeats=8))


def attention_seconds(model: DeepSeekConfig, batch: int, length: int, dtype: torch.dtype) -> float:
    """Forward and backward of one layer by the faster of torch's kernel and the model's blocks."""
    shapes = [(batch, heads, length, model.head_size) for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)]
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    grad = torch.randn(shapes[0]).to(dtype)

    def whole(attend: Callable[..., torch.Tensor]) -> None:
        torch.autograd.grad(attend(), inputs, grad)

    return fastest(
        lambda: whole(lambda: F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)),
        lambda: whole(lambda: block_attention(*inputs)),
        repeats=15,
    )


def activation_seconds(model: DeepSeekConfig, tokens: int, dtype: torch.dtype) -> float:
    """silu forward and backward of one expert layer's choices: the exponentials, and nothing of what surrounds them."""
    rows = tokens * model.moe_top_k // model.num_experts
    gate, grad = torch.randn(rows, model.expert_width).to(dtype), torch.randn(rows, model.expert_width).to(dtype)
    forward = fastest(lambda: F.silu(gate))
    return model.num_experts * (forward + fastest(lambda: torch.ops.aten.silu_backward(grad, gate)))


def bounds(config: Config, precision: str, bytes_s: float) -> dict[str, float]:
    """Seconds of each part of a step at its best."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = DeepSeekConfig.from_config(config).resolved()
    seconds, flops = products(step_products(model, config.batch_size, config.seq_length), dtype)
    count, tokens = parameter_counts(model).stored, config.batch_size * config.seq_length
    # fp32: gradient, weight and two moments read, three written, the gradient read for its norm. bf16: the same with gradients
    # of two bytes and fp32 masters, and the weight written.
    each = 4 + 28 if precision == "fp32" else 2 + 28 - 2 + 2
    print(f"  products: {flops / 1e9:.0f} GFLOP at {flops / seconds / 1e9:.0f} GFLOP/s")
    return {
        "products": seconds,
        "attention": model.num_layers * attention_seconds(model, config.batch_size, config.seq_length, dtype),
        "activation": model.expert_layers * activation_seconds(model, tokens, dtype),
        "adamw_and_norm": count * each / bytes_s,
    }


def peer_step(command: str, tokens: int) -> float:
    """Seconds of one step of the peer."""
    out = subprocess.run(shlex.split(command), capture_output=True, text=True, check=True).stdout
    figures = json.loads([line for line in out.splitlines() if line.startswith("{")][-1])
    return tokens / float(figures["tokens_per_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="command of hf_step.py; --dtype and --vocab_size are added")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--vocab", type=int, default=SHAPE["vocab_size"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    config = Config(**{**SHAPE, "vocab_size": options.vocab})
    tokens = config.batch_size * config.seq_length
    command = f"{options.peer} --dtype {options.precision} --vocab_size {options.vocab}"
    peers = [peer_step(command, tokens) for _ in range(options.rounds)]  # first, while nothing here keeps threads
    bytes_s = bandwidth()
    parts = bounds(config, options.precision, bytes_s)
    peer, least = min(peers), sum(parts.values())
    for name, seconds in parts.items():
        print(f"  {name:<16}{1000 * seconds:7.1f} ms")
    print(f"  {'sum':<16}{1000 * least:7.1f} ms, memory {bytes_s / 1e9:.0f} GB/s")
    print(f"  {'peer':<16}{1000 * peer:7.1f} ms (to {1000 * max(peers):.0f})")
    print(
        json.dumps(
            {"precision": options.precision, "vocab": options.vocab, "least_s": least, "peer_s": peer, "bound": peer / least}
        )
    )


if __name__ == "__main__":
    main()
