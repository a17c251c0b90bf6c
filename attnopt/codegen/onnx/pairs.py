"""Complex numbers as pairs of real ones: ONNX has no complex type that runtimes compute with.

DeepSeek V2 rotates by complex factors e^{i theta}. Here every complex tensor [...] becomes a real one
[..., 2] of real and imaginary parts, and what is done to it becomes the same in real arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

_ATEN = torch.ops.aten


def polar(magnitude: Tensor, angle: Tensor) -> Tensor:
    """[..., 2] of numbers magnitude * e^{i angle}."""
    return torch.stack([magnitude * angle.cos(), magnitude * angle.sin()], dim=-1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """[..., 2], the product of complex a and b, each [..., 2]."""
    (x, y), (u, v) = a.unbind(-1), b.unbind(-1)
    return torch.stack([x * u - y * v, x * v + y * u], dim=-1)


def scaled(a: Tensor, factor: Tensor | float) -> Tensor:
    """[..., 2], complex a [..., 2] times a real tensor [...] or number."""
    return a * (factor[..., None] if isinstance(factor, Tensor) else factor)


def unsqueezed(a: Tensor, dim: int) -> Tensor:
    """`torch.unsqueeze` of complex a [..., 2]."""
    return a.unsqueeze(dim if dim >= 0 else dim - 1)


def same(a: Tensor) -> Tensor:
    """A tensor [..., 2] seen as complex, and a complex one seen as [..., 2], are the same pairs."""
    return a


#: What stands for an operation that reads or makes complex numbers; products are told apart by their factors.
_PAIRS: dict[Any, Callable[..., Tensor]] = {
    _ATEN.polar.default: polar,
    _ATEN.unsqueeze.default: unsqueezed,
    _ATEN.view_as_complex.default: same,
    _ATEN.view_as_real.default: same,
}


def complex_to_pairs(graph: fx.Graph) -> None:
    """Let the graph compute with pairs, in place. An operation without a counterpart here stays as it is."""
    complexes = {node for node in graph.nodes if _is_complex(node)}
    for node in graph.nodes:
        if node not in complexes and complexes.isdisjoint(node.all_input_nodes):
            continue
        if node.target is _ATEN.mul.Tensor:
            left, right = node.args
            if left in complexes and right in complexes:
                node.target = product
            else:
                node.target, node.args = scaled, (left, right) if left in complexes else (right, left)
        else:
            node.target = _PAIRS.get(node.target, node.target)


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()
