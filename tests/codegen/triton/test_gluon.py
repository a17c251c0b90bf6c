"""D4 without a GPU: its source, run in order on torch tensors; and that it is picked only where it was seen to work."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", minversion="3.6", reason="the kernels need Triton 3.6 or newer")

from attnopt.codegen.triton.runtime import designs, launch, reference, tune
from attnopt.codegen.triton.runtime.schedule import Schedule
from attnopt.codegen.triton.runtime.select import D4, PAGE, Config, mla_decode_candidates, mla_decode_config
from attnopt.codegen.triton.runtime.trial import Requests, difference
from attnopt.codegen.triton.runtime.tune import Finding, Latent, Trial
from tests.codegen.triton.gluon_emulator import Race, kernel

#: (BN, STAGES): rings with look-ahead, the least of them, and a pair without.
TILES = ((32, 4), (64, 4), (32, 3), (64, 2), (32, 2))
CPU = torch.device("cpu")


def _merge(
    partial: Tensor, lse2: Tensor, work: Schedule, rows: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    first = work.first_item.tolist()
    parts = [slice(*pair) for pair in pairwise(first)]
    outs, sums = zip(*(reference.combine(partial[part], lse2[part]) for part in parts), strict=True)
    return torch.stack(outs).to(dtype), torch.stack(sums)


def run(
    monkeypatch: pytest.MonkeyPatch, heads: int, tokens: int, rank: int, rope: int, tile: tuple[int, int],
    dtype: torch.dtype, parts: int, edits: tuple[tuple[str, str], ...] = (),
) -> tuple[float, float]:  # fmt: skip
    """Errors of output and log-sum-exp."""
    monkeypatch.setattr(launch, "latent_kernel", lambda config: kernel(edits))
    monkeypatch.setattr(launch, "_merge", _merge)
    requests = Requests(dtype, CPU, [tokens, 64, 65, 300, 0, 31 + tokens])
    cache = requests.cache(PAGE, rank + rope)
    q = requests.normal(len(requests.lengths), tokens, heads, rank + rope)
    rest = (requests.table, requests.lengths, rank, 0.1)
    out, lse2 = launch.latent_decode(q, cache, *rest, Config(D4, 64, tile[0], 8, tile[1]), parts)
    want, want_lse2 = reference.latent_decode(q.double(), cache.double(), *rest)
    assert torch.equal(lse2.isinf(), want_lse2.isinf())
    finite = ~want_lse2.isinf()
    return difference(out, want), difference(lse2[finite], want_lse2[finite])


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("parts", [1, 3, 40])
def test_the_source_computes_attention(tile: tuple[int, int], parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where only the logic can be wrong: two row tiles, the second one not full, ranks that are padded."""
    errors = run(monkeypatch, 40, 2, 24, 8, tile, torch.float32, parts)
    assert max(errors) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_weights_stays_small(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = run(monkeypatch, 64, 1, 128, 64, (32, 4), dtype, 2)
    assert max(errors) < (2e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize(
    ("tile", "edit"),
    [
        ((32, 4), ("_arrived(STAGES - 3)", "_arrived(STAGES - 2)")),  # scores of a block that is still under way
        ((64, 2), ("_arrived(STAGES - 2)\n                s =", "_arrived(STAGES - 1)\n                s =")),
        ((32, 4), ("latents.index(behind)", "latents.index(here)")),  # a block is overwritten before its values count
        ((32, 4), ("keys.index(behind)", "keys.index(ahead)")),
        ((32, 4), ("warpgroup_mma_wait(0, deps=[acc, s_next])", "warpgroup_mma_wait(1, deps=[acc, s_next])")),
        ((64, 2), ("(n < count)[:, None]", "(n < BN)[:, None]".replace("BN", "64"))),  # unseen rows are NaN
        ((32, 4), ("limit = length - TOKENS + h // H + 1", "limit = length + 0 * h")),
        ((32, 4), ("load + 1, last_page", "load, last_page")),
        ((32, 4), ("length - block * BN, 0", "length - block * BN + 1, 0")),  # 0 * NaN
        ((32, 4), ("total * alpha[:, None] + p", "total + p")),
    ],
)
def test_the_emulator_sees_mistakes(
    tile: tuple[int, int], edit: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        errors = run(monkeypatch, 20, 2, 24, 8, tile, torch.float32, 2, (edit,))
    except (Race, AssertionError):
        return
    assert not max(errors) < 1e-4


def test_without_gluon_the_design_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, package: str) -> None:
        raise ImportError("cannot import name 'gluon'")

    monkeypatch.setattr(designs.importlib, "import_module", missing)
    designs.gluon_obstacle.cache_clear()
    try:
        assert "cannot import name 'gluon'" in str(designs.gluon_obstacle())
        with pytest.raises(ValueError, match="lacks the Gluon that D4 is written in"):
            designs.latent_kernel(Config(D4, 64, 32, 8, 4))
        assert designs.latent_kernel(Config("mla_decode_d3", 64, 32, 8, 2)).__name__ == "mla_decode_d3"
    finally:
        designs.gluon_obstacle.cache_clear()


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that says it is an H100, and where its picks are written."""
    monkeypatch.setattr(launch, "device_facts", lambda index: ("sm90", 232_448, 132))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "H100")
    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    launch.tuned.cache_clear()
    return tmp_path / "sm90.json"


SHAPE = Latent(64, 512, 64, "bfloat16", 0.07)
DEFAULT = mla_decode_config(64, 512, 64, 2, "sm90", 232_448)
RING, PAIR = mla_decode_candidates(64, 512, 64, 2, "sm90", 232_448)[1:]


def picked() -> Config:
    launch.tuned.cache_clear()
    return launch.tuned("sm90", 0).get("mla_decode", SHAPE.key, DEFAULT)


def test_the_fastest_design_that_is_right_is_picked_on_this_device_alone(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = (Finding(DEFAULT, 1e-3, 30.0), Finding(RING, 1e-3, 20.0), Finding(PAIR, 0.5), Finding(PAIR, reason="x"))
    tune.write({SHAPE.key: Trial(findings)}, CPU)
    assert picked() == RING
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "H200")
    assert picked() == DEFAULT
    monkeypatch.undo()
    document = json.loads(gpu.read_text())
    assert document["passed"]["mla_decode"][SHAPE.key] == [asdict(DEFAULT), asdict(RING)]


def test_a_pick_of_d4_that_did_not_pass_is_not_used(gpu: Path) -> None:
    wrong = Finding(RING, float("nan"), 10.0)
    tune.write({SHAPE.key: Trial((Finding(DEFAULT, 1e-3, 30.0), wrong))}, CPU)
    assert picked() == DEFAULT
    document = json.loads(gpu.read_text())
    document["kernels"]["mla_decode"][SHAPE.key] = asdict(RING)  # by hand
    gpu.write_text(json.dumps(document))
    assert picked() == DEFAULT


def test_tuning_again_keeps_other_picks(gpu: Path) -> None:
    other = Latent(128, 512, 64, "bfloat16", 0.07)
    tune.write({other.key: Trial((Finding(PAIR, 1e-3, 5.0),))}, CPU)
    document = json.loads(gpu.read_text())
    document["kernels"]["prefill"] = {"DN64": asdict(DEFAULT)}
    gpu.write_text(json.dumps(document))
    tune.write({SHAPE.key: Trial((Finding(RING, 1e-3, 5.0),))}, CPU)
    document = json.loads(gpu.read_text())
    assert set(document["kernels"]["mla_decode"]) == set(document["passed"]["mla_decode"]) == {SHAPE.key, other.key}
    assert "prefill" in document["kernels"]
    assert not list(gpu.parent.glob("*.part"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what fails here works there")
def test_a_check_that_dies_costs_only_itself() -> None:
    """The check's own process does run, and what it dies of, having no GPU, is the reason."""
    found = tune._isolated(SHAPE, RING, torch.device("cuda"))
    assert found.error is None
    assert "CUDA" in found.reason or "NVIDIA" in found.reason
    assert not found.right
