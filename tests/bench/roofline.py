"""The highest ratio over the peer that any implementation on this machine and these libraries could reach.

    python tests/bench/roofline.py --peer "python hf_step.py" [--precision fp32] [--vocab 8192] [--rounds 3] [--aged]

Each matrix product of a step of `bench train` (default shape) is timed at its own shape: forward, by its input's gradient and
by its weight's gradient, with `torch.mm` (MKL in fp32, oneDNN in bf16) and with oneDNN's own operator, in every layout of the
factors that needs no copy, the best of many; activations in the cache, weights and their gradients in memory, where a step
finds them. Added is what no implementation on torch's kernels can leave out: AdamW's bytes and those of the norm of the
gradients at the best bandwidth measured, and attention, SwiGLU, norms, additions, rotary positions, rows of the experts and the
softmax of the loss by the fastest of torch's kernels in the fewest passes, in the cache. The router, the embedding, zeroing and
Python count as nothing. Bound = the peer's step in the same run, the best of the rounds as all the rest, over that sum.

With `--aged` (fp32) products, AdamW and norm are timed as one pass over the weights of all products, their gradients and
moments, layer by layer as in a step, so that each is untouched about as long as there: some hosts of virtual machines let
memory cool within tenths of a second. Activations are shared by all products of a shape. The fastest of the passes counts.

Shapes: R rows, I inner, O columns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import subprocess
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina_engine.commands.bench import SHAPE
from lumina_engine.config.counts import parameter_counts
from lumina_engine.config.schema import Config, DeepSeekConfig
from lumina_engine.model.attention_core import block_attention
from lumina_engine.training.matmul_peak import Product, step_products
from lumina_engine.training.memory import keep_freed_memory

_REPEATS = 40
_COLD_BYTES = 256 << 20  # more than caches hold


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


def product_seconds(rows: int, inner: int, columns: int, dtype: torch.dtype, cold: str) -> float:
    """(R, I) @ (I, O) by the fastest of libraries and layouts, the transposed result included.

    `cold` lies in memory, as in a step, where each weight and each of its gradients is used once in every pass over all of
    them: the second factor ("weight") or the result ("gradient"). All else is in the cache.
    """
    x = torch.randn(rows, inner).to(dtype)
    kept = columns * (inner if cold == "weight" else rows) * x.element_size()
    count = -(-_COLD_BYTES // kept)
    ws = [torch.randn(columns, inner).to(dtype) for _ in range(count if cold == "weight" else 1)]
    outs = [torch.empty(columns, rows, dtype=dtype) for _ in range(count if cold == "gradient" else 0)]
    xs, turn = (x, x.t().contiguous().t()), itertools.count()
    calls: list[Callable[[], object]] = []
    for a in xs:
        for stored in (ws, [w.t().contiguous().t() for w in ws]):

            def weight(stored: list[torch.Tensor] = stored) -> torch.Tensor:
                return stored[next(turn) % len(stored)]

            if outs:
                calls.append(lambda a=a, w=weight: torch.mm(w(), a.t(), out=outs[next(turn) % count]))
                calls.append(lambda a=a, w=weight: torch.mm(a, w().t(), out=outs[next(turn) % count].t()))
            else:
                calls.append(lambda a=a, w=weight: torch.mm(a, w().t()))
                calls.append(lambda a=a, w=weight: torch.mm(w(), a.t()))
            calls.append(lambda a=a, w=weight: torch.ops.mkldnn._linear_pointwise(a, w(), None, "none", [], ""))
            calls.append(lambda a=a, w=weight: torch.ops.mkldnn._linear_pointwise(w(), a, None, "none", [], ""))
    return fastest(*calls, repeats=_REPEATS // 4)


Call = Callable[[Tensor], object]


class Pass:
    """Products, AdamW and norm of a step in fp32, each weight with memory of its own, each product by its fastest call.

    A weight (O, I) lies in the layout that serves forward and the gradient of the input best together. Gradients of weights by
    `torch.mm` only: oneDNN's operator cannot write to memory that is there.
    """

    def __init__(self, found: list[Product], layers: int) -> None:
        head = [p for p in found if p.count == 1]
        makers = [(self._prepared(p), round(p.count / layers)) for p in found if p.count != 1]
        self._parts = [make() for _ in range(layers) for make, count in makers for _ in range(count)]
        self._parts += [self._prepared(p)() for p in head]
        self._weights = [weight for _, _, weight, _ in self._parts]
        self._grads = [torch.zeros_like(weight) for weight in self._weights]
        self._moments = [[torch.zeros_like(weight) for weight in self._weights] for _ in range(2)]
        self._step = [torch.tensor(1.0) for _ in self._weights]

    def _prepared(self, p: Product) -> Callable[[], tuple[Call, Call, Tensor, Call]]:
        """Makes forward, gradient of the input, a weight and the gradient of the weight."""
        x, g = torch.randn(p.rows, p.inner), torch.randn(p.rows, p.columns)
        xs, gs = (x, x.t().contiguous().t()), (g, g.t().contiguous().t())
        count = -(-_COLD_BYTES // (4 * p.inner * p.columns))
        choices = []
        for turned in (False, True):
            ws = [_weight(p, turned) for _ in range(count)]
            forward = _best_call([(lambda w, call=call, x=x: call(x, w)) for call in _FORWARD for x in xs], ws)
            backward = _best_call([(lambda w, call=call, g=g: call(g, w.t())) for call in _FORWARD for g in gs], ws)
            choices.append((forward[0] + backward[0], forward[1], backward[1], turned))
        _, by_forward, by_input, turned = min(choices, key=lambda choice: choice[0])
        outs = [torch.empty_like(_weight(p, turned)) for _ in range(count)]
        pairs = list(itertools.product(xs, gs))
        calls: list[Call] = [lambda out, x=x, g=g: torch.mm(g.t(), x, out=out) for x, g in pairs]
        calls += [lambda out, x=x, g=g: torch.mm(x.t(), g, out=out.t()) for x, g in pairs]
        by_weight = _best_call(calls, outs)[1]
        return lambda: (by_forward, by_input, _weight(p, turned), by_weight)

    def seconds(self) -> tuple[float, float]:
        """Of the products, of AdamW and norm: one pass."""
        begin = time.perf_counter()
        for forward, _, weight, _ in self._parts:
            forward(weight)
        for (_, by_input, weight, by_weight), grad in reversed(list(zip(self._parts, self._grads, strict=True))):
            by_input(weight)
            by_weight(grad)
        middle = time.perf_counter()
        for grad in self._grads:
            torch.linalg.vector_norm(grad)
        adamw(self._weights, self._grads, *self._moments, self._step)
        return middle - begin, time.perf_counter() - middle


# x (R, I), w (O, I): x @ w.t() by either library, straight or as its transpose
_FORWARD: tuple[Callable[[Tensor, Tensor], object], ...] = (
    lambda x, w: torch.mm(x, w.t()),
    lambda x, w: torch.mm(w, x.t()),
    lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
    lambda x, w: torch.ops.mkldnn._linear_pointwise(w, x, None, "none", [], ""),
)


def _weight(p: Product, turned: bool) -> Tensor:
    return torch.randn(p.inner, p.columns).t() if turned else torch.randn(p.columns, p.inner)


def _best_call(calls: list[Call], tensors: list[Tensor]) -> tuple[float, Call]:
    """Seconds of the fastest call on one tensor after the other, and the call."""
    times = []
    for call in calls:
        turn = itertools.cycle(tensors)
        times.append(fastest(lambda call=call, turn=turn: call(next(turn)), repeats=_REPEATS // 4))
    best = min(range(len(calls)), key=times.__getitem__)
    return times[best], calls[best]


def aged_seconds(model: DeepSeekConfig, config: Config) -> tuple[float, float]:
    """Of all products, of AdamW and norm: the fastest of twelve passes."""
    whole = Pass(step_products(model, config.batch_size, config.seq_length), model.num_layers)
    passes = [whole.seconds() for _ in range(13)][1:]
    told = ", ".join(f"{1000 * (products + rest):.0f}" for products, rest in sorted(passes, key=sum))
    print(f"  passes, ms: {told}")
    return min(passes, key=sum)


def products(found: list[Product], dtype: torch.dtype) -> tuple[float, float]:
    """Seconds and operations of all products of a step: each forward one, and the two of its backward."""
    seconds, cache = 0.0, {}
    for p in found:
        forward, by_input, by_weight = (
            (p.rows, p.inner, p.columns, "weight"),
            (p.rows, p.columns, p.inner, "weight"),
            (p.columns, p.rows, p.inner, "gradient"),
        )
        for shape in (forward, by_input, by_weight):
            if shape not in cache:
                cache[shape] = product_seconds(*shape[:3], dtype, shape[3])
                rate = p.flops / p.count / cache[shape] / 1e9
                print(f"  {shape[0]:>6} x {shape[1]:>5} x {shape[2]:>6}  {rate:6.0f} GFLOP/s")
            seconds += p.count * cache[shape]
    return seconds, 3 * sum(p.flops for p in found)


def adamw(weights: list[Tensor], grads: list[Tensor], firsts: list[Tensor], seconds: list[Tensor], steps: list[Tensor]) -> None:
    """torch's fused update, once."""
    rates = {"lr": 1e-9, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.0, "eps": 1e-8}
    torch._fused_adamw_(weights, grads, firsts, seconds, [], steps, **rates, amsgrad=False, maximize=False)


def bandwidth() -> float:
    """Bytes/s that memory gives at most: the best of a copy, and of AdamW itself, over 400 MB."""
    count = 25_000_000
    tensors = [torch.randn(count).abs() for _ in range(4)]
    weights, grads, *moments = ([tensor] for tensor in tensors)
    steps = [torch.tensor(1.0)]
    copied = 8 * count / fastest(lambda: tensors[0].copy_(tensors[1]), repeats=8)
    return max(copied, 28 * count / fastest(lambda: adamw(weights, grads, *moments, steps), repeats=8))


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
    """SwiGLU of one expert layer's choices: silu forward and backward, and the product with `up` and its two gradients."""
    rows = tokens * model.moe_top_k // model.num_experts
    gate, up, grad = (torch.randn(rows, model.expert_width).to(dtype) for _ in range(3))
    out = torch.empty_like(gate)
    silu = fastest(lambda: torch.ops.aten.silu.out(gate, out=out))
    backward = fastest(lambda: torch.ops.aten.silu_backward(grad, gate, grad_input=out))
    times = fastest(lambda: torch.mul(gate, up, out=out))
    return model.num_experts * (silu + backward + 3 * times)


def passes_seconds(model: DeepSeekConfig, tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """What is left, by the fastest of torch's kernels, everything in the cache, each operation once in the fewest passes that
    those kernels allow: RMSNorm 2 and 4, an addition 1, rotary positions 1 and 1 for queries and keys, rows of the experts'
    tokens gathered 1 and 2 times and added back 1 and 1, the softmax of the loss.
    """
    x, y, chosen = (torch.randn(count, model.hidden_size).to(dtype) for count in (tokens, tokens, tokens * model.moe_top_k))
    row_N = torch.arange(tokens).repeat_interleave(model.moe_top_k)[torch.randperm(len(chosen))]
    add, norm = fastest(lambda: torch.add(x, y, out=y)), fastest(lambda: torch.linalg.vector_norm(x, dim=-1))
    gather = fastest(lambda: torch.index_select(x, 0, row_N, out=chosen))
    scatter = fastest(lambda: y.index_add_(0, row_N, chosen))
    logits = torch.randn(tokens, model.vocab_rows).to(dtype)
    softmax = fastest(lambda: torch.softmax(logits, -1), repeats=_REPEATS // 4)
    layers = model.num_layers
    rotary = add * (1 + model.num_kv_heads / model.num_heads)
    return {
        "norms": (2 * layers + 1) * (norm + 5 * add),
        "additions": 4 * layers * add,
        "rotary": 2 * layers * rotary,
        "experts_rows": model.expert_layers * (3 * gather + 2 * scatter),
        "softmax_of_loss": softmax,
    }


def bounds(config: Config, precision: str, bytes_s: float, aged: bool) -> dict[str, float]:
    """Seconds of each part of a step at its best."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = DeepSeekConfig.from_config(config).resolved()
    if aged:
        seconds, update = aged_seconds(model, config)
        flops = 3 * sum(p.flops for p in step_products(model, config.batch_size, config.seq_length))
    else:
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
        "adamw_and_norm": update if aged else count * each / bytes_s,
        **passes_seconds(model, tokens, dtype),
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
    parser.add_argument("--aged", action="store_true", help="products, AdamW and norm in the order of a step (fp32)")
    options = parser.parse_args()
    if options.aged and options.precision != "fp32":
        parser.error("--aged is of fp32")
    config = Config(**{**SHAPE, "vocab_size": options.vocab})
    tokens = config.batch_size * config.seq_length
    command = f"{options.peer} --dtype {options.precision} --vocab_size {options.vocab}"
    keep_freed_memory()  # as training does: a result is no new page
    peers = [peer_step(command, tokens) for _ in range(options.rounds)]  # first, while nothing here keeps threads
    bytes_s = bandwidth()
    parts = bounds(config, options.precision, bytes_s, options.aged)
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
