"""`compile=true`: each block of the model through torch.compile, never silently without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# shapes of one piece of code: lengths of a curriculum, blocks with and without experts, with and without gradients
_SHAPES = 64


class CompileFailed(RuntimeError):
    """torch.compile could not do it: a matter of the machine or the configuration, told before the first step."""

    exit_code = 2


def compile_blocks(model: Any) -> int:
    """Have every block compiled at its first call, for each shape anew; the number of blocks.

    What loops over parts whose sizes follow the data (experts on a CPU, attention inside packed documents) stays as it is
    inside. A block that meets more shapes than torch keeps is an error instead of running uncompiled. These settings of
    torch.compile are those of the whole process.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = _SHAPES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in model.blocks:
        block.compile(dynamic=False)
    return len(model.blocks)


@contextmanager
def explained() -> Iterator[None]:
    """Turns an error of the compiler into one line that says why and what to do.

    Raises:
        CompileFailed: torch.compile failed within.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = " ".join(str(error).split())
        fix = "install g++ and put it on PATH, or set compile=false" if "C++ compiler" in reason else "set compile=false"
        raise CompileFailed(f"compile=true: torch.compile failed: {reason[:300]}; {fix}") from error
