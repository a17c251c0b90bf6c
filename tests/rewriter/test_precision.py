"""Quick products are quick only where asked for, and exact ones stay exact inside."""

from __future__ import annotations

import pytest
import torch

from attnopt.rewriter.precision import exact_products, quick_now, quick_products


def error() -> float:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    return float((a @ b - (a.double() @ b.double())).abs().max())


def test_precision_is_what_is_asked_for_and_restored() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert error() < 1e-3
    with quick_products("cpu"):
        quick = quick_now(torch.zeros(1))
        assert quick == getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
        assert (error() > 1e-2) == quick
        with exact_products():
            assert error() < 1e-3
    assert error() < 1e-3
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_it_is_restored_after_an_error() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ValueError, match="stop"), quick_products("cpu"):
        raise ValueError("stop")
    assert torch.backends.mkldnn.matmul.fp32_precision == before
