"""What one machine of a run says of itself: `python -m lumina_engine.doctor.probe`, a JSON object in, one out.

In: `config` (flat keys), `token` (a file that must be visible here). Out: host, time, versions, folder (whether the token is
there), data (the digest of the training data) or data_error.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..config.task_checks import train_paths
from ..data.conversation import DataError
from ..data.size import content_digest, data_bytes
from ..run.launch import versions

_DIGESTED = 1_000_000_000  # bytes of data up to which all of it is read; beyond, sizes are compared


def probe(order: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of this machine."""
    told: dict[str, Any] = {"host": socket.gethostname(), "versions": versions(), "folder": Path(order["token"]).exists()}
    config = Config(**order["config"])
    size = sum(data_bytes(value) for value in train_paths(config).values())
    try:
        told["data"] = content_digest(config) if size <= _DIGESTED else f"{size} bytes"
    except (DataError, OSError) as error:
        told["data_error"] = str(error)
    return told | {"time": time.time()}


def main() -> int:
    order = json.loads(sys.stdin.readline())
    print(json.dumps(probe(order)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
