"""How exactly float32 matrices are multiplied.

Hardware multiplies 16-bit floats several times faster than 32-bit ones. Sending calibration text through a model does
not need more (SmolLM2 at half the cache: ln of the perplexity ratio 0.0660 with bfloat16 products, 0.0663 with float32
ones, three times faster); sums of products that are solved with do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def multiplies_bfloat16(device: torch.device | str) -> bool:
    """Whether the device has instructions that multiply bfloat16 matrices."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _processor_has("avx512_bf16")


@contextmanager
def quick_products(device: torch.device | str) -> Iterator[None]:
    """Products of float32 matrices from bfloat16 (CPU) or TF32 (CUDA) factors, summed in float32, where it is fast."""
    if torch.device(device).type == "cuda":
        with _precision(torch.backends.cuda.matmul, "tf32"):
            yield
    elif _processor_has("amx_bf16"):  # elsewhere the libraries take float32 factors all the same
        with _precision(torch.backends.mkldnn.matmul, "bf16"):  # type: ignore[attr-defined]
            yield
    else:
        yield


def _processor_has(feature: str) -> bool:
    """What torch says of the processor; torch 2.10 says nothing, and products stay exact there."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get(feature))


def quick_now(tensor: torch.Tensor) -> bool:
    """Whether products of this tensor are quick ones now: float32, inside `quick_products`, without a backward pass."""
    backend = torch.backends.cuda.matmul if tensor.is_cuda else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    quick = tensor.dtype == torch.float32 and backend.fp32_precision in ("bf16", "tf32")
    return quick and not (torch.is_grad_enabled() and tensor.requires_grad)


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 matrices from float32 factors, inside `quick_products` too."""
    cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _precision(torch.backends.cuda.matmul, "ieee"), _precision(cpu, "ieee"):
        yield


@contextmanager
def _precision(backend: Any, value: str) -> Iterator[None]:
    before = backend.fp32_precision
    backend.fp32_precision = value
    try:
        yield
    finally:
        backend.fp32_precision = before
