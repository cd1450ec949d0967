"""Peak memory of the loss, measured as the largest resident size of a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

VOCABULARY = 100_352
Shape = tuple[int, int, int]  # rows, hidden size, rows of a chunk
SHAPE: Shape = (4096, 64, 1024)
WIDE: Shape = (64, 512, 32)  # here the gradient of the head is what counts, as in large models

SCRIPT = f"""
import sys, torch
from lumina_engine.model.loss import cross_entropy_and_correct, cross_entropy_sum
from pathlib import Path
def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
how, dtype, (rows, width, chunk) = sys.argv[1], getattr(torch, sys.argv[2]), map(int, sys.argv[3:])
def run(rows, vocabulary):
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    head = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows,))
    before = memory("VmRSS")
    if how == "chunked":
        (cross_entropy_sum(hidden[None], head, targets[None], chunk=chunk) * 0.3).backward()
    elif how == "evaluation":
        cross_entropy_and_correct(hidden[None], head, targets[None], chunk=chunk)
    else:
        torch.nn.functional.cross_entropy(hidden @ head.t(), targets, reduction="sum").backward()
    return memory("VmHWM") - before
run(16, 64)  # what libraries take once
print(run(rows, {VOCABULARY}))
"""


def peak(how: str, shape: Shape, dtype: str = "float32") -> int:
    command = [sys.executable, "-c", SCRIPT, how, dtype, *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def held(shape: Shape, value: int, exact: int) -> int:
    """The logits of one chunk and the gradients of hidden states and head, the latter with its sum of `exact` bytes a value."""
    rows, width, chunk = shape
    return value * (chunk * VOCABULARY + width * rows) + (exact or value) * width * VOCABULARY


def test_c077_the_loss_holds_one_chunk_and_the_gradients():
    """At 100,352 ids and 4,096 tokens at most 1.3 x (the logits of one chunk, and the gradients of head and hidden states)."""
    assert peak("chunked", SHAPE) <= 1.3 * held(SHAPE, 4, 4)
    assert peak("full", SHAPE) > 5 * held(SHAPE, 4, 4)  # logits of all rows would be seen


def test_r38_the_gradient_of_a_wide_head_is_there_once():
    assert peak("chunked", WIDE) <= 1.3 * held(WIDE, 4, 4)


def test_r38_in_bf16_the_gradient_of_the_head_is_there_as_its_sum_in_fp32_and_rounded():
    assert peak("chunked", WIDE, "bfloat16") <= 1.3 * held(WIDE, 2, 4 + 2)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "value"), [("float32", 4), ("bfloat16", 2)])
def test_c077_evaluation_holds_one_chunk(dtype, value):
    """At most 1.3 x its logits, and less than training, which has them and the gradients."""
    evaluation = peak("evaluation", SHAPE, dtype)
    assert evaluation <= 1.3 * value * SHAPE[2] * VOCABULARY
    assert evaluation < peak("chunked", SHAPE, dtype)
