"""Programs of tests on one or several ranks of this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

LIMIT_S = 900  # a program that takes longer hangs


def launch(program: Path, ranks: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program on that many ranks of this machine, each with one thread."""
    words = [sys.executable]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        words += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    root = str(Path(__file__).resolve().parents[1])
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))}
    return subprocess.run(
        [*words, str(program), *arguments], capture_output=True, text=True, env=env | environment, timeout=LIMIT_S
    )


def last_line(done: subprocess.CompletedProcess[str], mark: str) -> Any:
    """The JSON behind the last line of stdout that begins with `mark`."""
    lines = [line for line in done.stdout.splitlines() if line.startswith(mark)]
    assert lines, "\n".join(line for line in done.stderr.splitlines() if line.startswith("[rank")) or done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix(mark))
