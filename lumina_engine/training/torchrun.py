"""torchrun, ending as its ranks did: `python -m lumina_engine.training.torchrun OPTIONS -m MODULE …`.

torchrun itself says 1 whatever became of a rank. A rank that was told to leave (TERM) before it listened is no crash, so where
such a rank was the first to fail, or where torchrun itself was told, this process ends by TERM as well.
"""

from __future__ import annotations

import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from ..run.process import end_as


def main(argv: list[str] | None = None) -> int:
    """Run torchrun with its own options; the exit code, -SIGTERM as said above.

    Raises:
        ChildFailedError: a rank failed otherwise.
        SignalException: another signal than TERM.
    """
    try:
        torchrun(argv)
    except ChildFailedError as error:
        _, first = error.get_first_failure()  # those that torchrun ended itself come after it
        if first.exitcode != -signal.SIGTERM:
            raise
    except SignalException as error:
        if error.sigval != signal.SIGTERM:
            raise
    else:
        return 0
    return -signal.SIGTERM


if __name__ == "__main__":
    end_as(main(sys.argv[1:]))
