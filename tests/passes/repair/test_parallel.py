"""Two processes (gloo) give what one gives: statistics to rounding, the distillation's curve within noise."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.passes.repair.job import results


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """(results of one process, of two)."""
    file = tmp_path_factory.mktemp("parallel") / "results.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parents[3]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.passes.repair.job", str(file)]
    started = [
        subprocess.Popen(
            command, cwd=here, env={**shared, "RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    alone = results()
    said = [process.communicate(timeout=280)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    return alone, torch.load(file)


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / one.norm())


@pytest.mark.parametrize("name", ["closed", "sizes", "ridge"])
def test_statistics_add_up(both: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    assert distance(both[0][name], both[1][name]) < 5e-3  # 16-bit products, summed in another order


def test_the_curve_is_the_same(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = (result["curve"] for result in both)
    for kind in ("loss", "held_out"):
        assert [p[0] for p in one[kind]] == [p[0] for p in two[kind]]
        assert [p[1] for p in one[kind]] == pytest.approx([p[1] for p in two[kind]], rel=0.02)
    assert distance(both[0]["distill"], both[1]["distill"]) < 0.02
    assert min(loss for _, loss, _ in two["held_out"]) < two["held_out"][0][1]


def test_a_run_of_two_is_resumed(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert both[1]["resumed"] == both[1]["curve"]


def test_a_refit_of_two_fits_too(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    # Two processes step on two examples at once: half as many steps, so not the same weights.
    assert distance(both[1]["closed"], both[1]["refit"]) > 0
    assert distance(both[0]["refit"], both[1]["refit"]) < 0.2
