"""Peak memory of the loss, measured as the largest resident size of a process of its own."""

from __future__ import annotations

import subprocess
import sys

ROWS, HIDDEN, VOCABULARY, CHUNK = 4096, 64, 100_352, 1024

SCRIPT = f"""
import sys, torch
from lumina_engine.model.loss import cross_entropy_sum
from pathlib import Path
def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
hidden = torch.randn({ROWS}, {HIDDEN}, requires_grad=True)
head = torch.randn({VOCABULARY}, {HIDDEN}, requires_grad=True)
targets = torch.randint(0, {VOCABULARY}, ({ROWS},))
before = memory("VmRSS")
if sys.argv[1] == "chunked":
    cross_entropy_sum(hidden[None], head, targets[None], chunk={CHUNK}).backward()
else:
    torch.nn.functional.cross_entropy(hidden @ head.t(), targets, reduction="sum").backward()
print(memory("VmHWM") - before)
"""


def peak(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_c077_the_loss_holds_one_chunk_and_the_gradients():
    """At 100,352 ids and 4,096 tokens at most 1.3 x (the logits of one chunk, and the gradients of head and hidden states)."""
    held = 4 * CHUNK * VOCABULARY + 4 * HIDDEN * (ROWS + VOCABULARY)
    assert peak("chunked") <= 1.3 * held
    assert peak("full") > 5 * held  # logits of all rows would be seen
