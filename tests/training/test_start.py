"""C63: at ZeRO stage 3 no rank ever holds the whole model, and it begins with the weights that one process builds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.launch import last_line, launch

PROGRAM = Path(__file__).with_name("start.py")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel does not reset the largest memory")
def test_c063_a_start_at_stage_3_never_holds_the_whole_model(tmp_path: Path) -> None:
    own = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = last_line(launch(PROGRAM, 2, str(tmp_path), **own), "START ")
    print(found)
    assert found["equal"]
    assert found["whole"] > 150e6
    for rank in found["ranks"]:
        # half of the weights in bf16 are a quarter of a whole copy in fp32; the largest parameter comes on top
        assert rank["split"] < 0.45 * found["whole"]
        assert rank["ready"] < 1.15 * found["budget"]
