"""Muon is torch's, but for the type that it multiplies in where the hardware multiplies no bfloat16."""

from __future__ import annotations

import pytest
import torch

from attnopt.passes.common import muon
from attnopt.passes.common.muon import SIZE, Muon, orthogonalised

SHAPES = [(12, 30), (30, 12), (16, 16), (1, 9), (9, 1)]


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the hardware is taken to multiply bfloat16."""
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda device: request.param)
    return bool(request.param)


def descended(kind: str, shape: tuple[int, int], steps: int = 4) -> torch.Tensor:
    """A matrix after some steps on fixed gradients, by torch's optimiser or ours."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(*shape, generator=generator).requires_grad_()
    if kind == "torch":
        theirs = {"weight_decay": 0.0, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
        optimizer: torch.optim.Optimizer = torch.optim.Muon([{"params": [matrix]}], lr=0.1, **theirs)
    else:
        optimizer = Muon([{"params": [matrix]}], lr=0.1)
    for _ in range(steps):
        matrix.grad = torch.randn(*shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()
    return matrix.detach()


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_torch(shape: tuple[int, int], native: bool) -> None:
    ours, theirs = descended("ours", shape), descended("torch", shape)
    moved = float((theirs - descended("torch", shape, 0)).norm())
    assert moved > 0.1
    assert float((ours - theirs).norm()) <= (1e-6 if native else 0.03) * moved


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, int], native: bool) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalised(matrix)
    assert found.dtype == matrix.dtype
    values = torch.linalg.svdvals(found)
    assert 0.4 < float(values.min()) <= float(values.max()) < 1.4
    assert float((found * matrix).sum()) > 0


def test_an_update_has_the_size_of_adams(native: bool) -> None:
    matrix = torch.zeros(40, 60).requires_grad_()
    matrix.grad = torch.randn(40, 60, generator=torch.Generator().manual_seed(2))
    Muon([matrix], lr=1.0).step()
    assert float(matrix.detach().pow(2).mean().sqrt()) == pytest.approx(SIZE, rel=0.25)


def test_without_a_gradient_nothing_moves_and_zeros_stay_finite(native: bool) -> None:
    still, zero = torch.ones(3, 4).requires_grad_(), torch.ones(3, 4).requires_grad_()
    zero.grad = torch.zeros(3, 4)
    Muon([still, zero], lr=1.0).step()
    assert torch.equal(still.detach(), torch.ones(3, 4))
    assert torch.equal(zero.detach(), torch.ones(3, 4))


def test_products_are_float32_where_bfloat16_is_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda x, *rest, **how: seen.append(x.dtype) or addmm(x, *rest, **how))
    for native, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(muon, "multiplies_bfloat16", lambda device, native=native: native)
        seen.clear()
        orthogonalised(torch.randn(4, 6))
        assert set(seen) == {dtype}
