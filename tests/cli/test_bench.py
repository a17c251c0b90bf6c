"""`attnopt bench`, in processes of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import hostile
from tests.cli.helpers import Run


def test_bench_beside_an_original(cli: Run, tiny: Path) -> None:
    told = cli("bench", tiny, "--against", tiny, "--context", "8,16", "--steps", "2", "--runs", "1", "--json")
    assert told.code == 0, told.err
    document = json.loads(told.out)
    assert document["schema"] == "attnopt.bench/1"
    assert list(document["models"]) == ["original", "converted"]
    assert all(model["peak_bytes"] > 0 for model in document["models"].values())
    assert [case["context"] for case in document["cases"]] == [8, 16]
    assert {case["ratio"]["cache_bytes"] for case in document["cases"]} == {1.0}
    assert {case["ratio"]["predicted_decode_speed"] for case in document["cases"]} == {1.0}


@pytest.mark.slow
def test_bench_alone_prints_a_table(cli: Run, tiny: Path) -> None:
    told = cli("bench", tiny, "--context", "8", "--steps", "1", "--runs", "1")
    assert told.code == 0, told.err
    assert "tokens per second" in told.out
    assert "ratio" not in told.out


def test_bench_refuses(cli: Run, tiny: Path, tmp_path: Path) -> None:
    assert cli("bench", tiny, "--context", "many").code == 1
    missing = cli("bench", "nowhere", "--context", "8")
    assert missing.code == 1
    assert "there is no nowhere" in missing.err
    damaged = cli("bench", hostile.make("truncated", tmp_path / "model"), "--context", "8")
    assert damaged.code == 1
    assert "model.safetensors is truncated" in damaged.err
