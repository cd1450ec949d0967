"""Every kind of attention, as changes to the tiny model, and measures of what it keeps in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LATENT = {"attention": "mla", "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
KINDS: dict[str, dict] = {
    "gqa": {},
    "gqa window": {"sliding_window": 16},
    "mla": LATENT,
    "mla compressed queries": LATENT | {"q_lora_rank": 40},
    "mla wide values, yarn": LATENT | {"v_head_dim": 40, "rope_scaling": "yarn", "rope_scaling_factor": 4.0},
    "mla window": LATENT | {"sliding_window": 16, "v_head_dim": 24},
}


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def peak_bytes(action: Callable[[], object]) -> int:
    """The most that torch's CPU allocator held at once during an action, beyond what it held before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
