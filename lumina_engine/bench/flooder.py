"""The rank of `bench supervise`: writes records of 16 metrics as fast as it can, or at a pace, and times each `emit`.

`python -m lumina_engine.bench.flooder RUN_DIR SECONDS RATE` (RATE records a second; 0: no pause). Leaves flood.json.
"""

from __future__ import annotations

import json
import sys
import time
from array import array
from pathlib import Path

from ..monitoring import record as rec
from ..monitoring.log import MetricLog
from ..run.rank import RankChannel

RESULT = "flood.json"


def step(number: int) -> rec.Step:
    """A record with 16 numbers."""
    return rec.Step(
        step=number, tokens=number * 4096, loss=2.345678, aux_loss=1.0123, z_loss=0.5678, lr=3e-4, grad_norm=0.98765, mfu=0.41,
        step_time=0.012345, tokens_per_s=331_776.5, seq_length=1024, batch=4, data_time=0.001, forward_time=0.004,
        backward_time=0.006, optimizer_time=0.001,
    )  # fmt: skip


def main() -> int:
    folder, seconds, rate = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    channel = RankChannel.from_environment()
    log = MetricLog(folder / "metrics.jsonl", 1)
    log.emit(rec.Run(state="running"))
    took = array("d")
    begin = now = time.perf_counter()
    number = 0
    while now - begin < seconds:
        number += 1
        channel.report(number, "step")
        record = step(number)
        before = time.perf_counter()
        log.emit(record)
        now = time.perf_counter()
        took.append(now - before)
        if rate:
            time.sleep(max(0.0, begin + number / rate - now))
    log.emit(rec.Run(state="finished", exit_code=0))
    ordered = sorted(took)
    figures = {
        "records": number,
        "records_per_s": number / (now - begin),
        "emit_p50_us": 1e6 * ordered[len(ordered) // 2],
        "emit_p99_us": 1e6 * ordered[int(0.99 * len(ordered))],
        "emit_max_ms": 1e3 * ordered[-1],
        "lost": log.lost,
    }
    (folder / RESULT).write_text(json.dumps(figures))
    log.close()
    channel.leave(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
