"""Every kernel against its float64 reference, in Triton's interpreter: NaN in unused slots, odd heads, empty splits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6", reason="the kernels need Triton 3.6 or newer")

SCRIPT = Path(__file__).with_name("interpreted.py")
BOUND = {"float32": 1e-5, "float16": 1e-3}


#: One case or two of every kernel; the whole list is slow.
FEW = (
    "mla_decode_d1 H9 sq1 R144 P48 float32",
    "mla_decode_d1 empty and single",
    "mla_decode_d2 H7 sq4 R128 P64 float16",
    "mla_decode_d3 more parts than blocks",
    "gqa H9 G3 sq1 D64 DV64 float16",
    "gqa contiguous",
    "streaming",
    "routed streaming",
    "shared owner and consumer",
    "prefill mla",
    "prefill window",
)


def errors(names: Sequence[str]) -> dict[str, float]:
    """Relative error of cases, from one run of the script; none for all."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("names", [FEW, pytest.param((), marks=pytest.mark.slow)], ids=["few", "all"])
def test_kernels_equal_their_references(names: Sequence[str]) -> None:
    found = errors(names)
    assert len(found) >= len(FEW)
    wrong = {n: e for n, e in found.items() if not e < BOUND["float16" if "float16" in n else "float32"]}
    assert not wrong  # NaN is wrong, too
