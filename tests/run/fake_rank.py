"""One rank of fake_launcher.py, for launchers that start ranks themselves."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from fake_launcher import rank

if __name__ == "__main__":
    sys.exit(rank(Path(sys.argv[1])))
