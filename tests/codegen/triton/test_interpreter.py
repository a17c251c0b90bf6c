"""Every kernel against its float64 reference, in Triton's interpreter: NaN in unused slots, odd heads, empty splits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("interpreted.py")
BOUND = {"float32": 1e-5, "float16": 1e-3}


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """Relative error of every case, from one run of the script."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


GROUPS = ("mla_decode_d1", "mla_decode_d2", "mla_decode_d3", "gqa", "streaming", "routed", "shared", "prefill")


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_equal_their_references(group: str, errors: dict[str, float]) -> None:
    cases = {name: error for name, error in errors.items() if name.split()[0] == group}
    assert cases
    wrong = {n: e for n, e in cases.items() if not e < BOUND["float16" if "float16" in n else "float32"]}
    assert not wrong  # NaN is wrong, too


def test_every_case_belongs_to_a_group(errors: dict[str, float]) -> None:
    assert {name.split()[0] for name in errors} == set(GROUPS)
