"""Finds the normalisation between a projection and the scores, and checks its formula on numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from attnopt.rewriter.probe import Mismatch, Probe, between
from attnopt.rewriter.program import walk_back
from attnopt.rewriter.site import NormSpec

aten = torch.ops.aten

_CASTS = {aten._to_copy.default, aten.to.dtype}
_EXPONENT = {aten.pow.Tensor_Scalar}


@dataclass(frozen=True)
class NormMatch:
    """A normalisation in a graph.

    Attributes:
        spec: what it is.
        x, y: operand and result, of equal shape.
    """

    spec: NormSpec
    x: fx.Node
    y: fx.Node


def find_norm(start: fx.Node, end: fx.Node, probe: Probe, heads: int | None) -> NormMatch | None:
    """The normalisation on the way from `start` to `end`, or None if there is none.

    Args:
        heads: number of head vectors in `end`; None if it is not split into heads.

    Raises:
        Mismatch: if there are several, or one whose formula is not RMSNorm or LayerNorm.
    """
    nodes = between(start, end)
    matches = [m for m in (_match(node, nodes, heads) for node in nodes) if m is not None]
    if not matches:
        return None
    if len(matches) > 1:
        raise Mismatch(f"{len(matches)} norms lie between a projection and the scores", *(m.y for m in matches))
    _verify(matches[0], probe)
    return matches[0]


def _match(node: fx.Node, nodes: set[fx.Node], heads: int | None) -> NormMatch | None:
    if node.target is aten.layer_norm.default:
        x, _, weight, bias, eps = (*node.args, *(None, None, None, None, 1e-5)[len(node.args) :])[:5]
        return _affine("layer", node, x, node, weight, bias, eps, heads, False)
    if node.target is aten.rms_norm.default:
        x, _, weight, eps = (*node.args, *(None, None, None, None)[len(node.args) :])[:4]
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        return _affine("rms", node, x, node, weight, None, eps, heads, False)
    if node.target is aten.rsqrt.default or (node.target is aten.pow.Tensor_Scalar and node.args[1] == -0.5):
        return _spelled_rms(node, nodes, heads)
    return None


def _affine(
    kind: str,
    node: fx.Node,
    x: object,
    y: fx.Node,
    weight: object,
    bias: object,
    eps: object,
    heads: int | None,
    unit_offset: bool,
) -> NormMatch:
    if not isinstance(x, fx.Node) or not isinstance(eps, float):
        raise Mismatch("a norm has an operand or epsilon that is not constant", node)
    names = []
    for part in (weight, bias):
        if isinstance(part, fx.Node) and part.op != "get_attr":
            raise Mismatch("a norm's gain is computed, not stored", node)
        names.append(str(part.target) if isinstance(part, fx.Node) else None)
    scope = "all" if heads is not None and x.meta["val"].ndim == 3 and heads > 1 else "head"
    spec = NormSpec(
        "rms" if kind == "rms" else "layer", names[0], names[1], eps, "all" if scope == "all" else "head", unit_offset
    )
    return NormMatch(spec, x, y)


def _spelled_rms(node: fx.Node, nodes: set[fx.Node], heads: int | None) -> NormMatch | None:
    """x * rsqrt(mean(x^2) + eps) [* gain], as written out in most models."""
    add = node.args[0]
    if not isinstance(add, fx.Node) or add.target is not aten.add.Tensor:
        return None
    mean, eps = add.args[:2]
    if not isinstance(mean, fx.Node) or mean.target is not aten.mean.dim or not isinstance(eps, float):
        return None
    square = mean.args[0]
    if not isinstance(square, fx.Node) or square.target not in (aten.pow.Tensor_Scalar, aten.mul.Tensor):
        return None
    x = square.args[0]
    products = [user for user in node.users if user.target is aten.mul.Tensor and x in user.all_input_nodes]
    if not isinstance(x, fx.Node) or len(products) != 1:
        return None
    y = products[0]
    while x.target in _CASTS and isinstance(x.args[0], fx.Node) and x.args[0] in nodes:
        x = x.args[0]
    weight: fx.Node | None = None
    unit_offset = False
    current = y
    while len(current.users) == 1:
        user = next(iter(current.users))
        if user not in nodes:
            break
        if user.target in _CASTS:
            current = user
            continue
        if user.target is not aten.mul.Tensor:
            break
        gains = [n for n in user.args if isinstance(n, fx.Node) and n is not current]
        sources = [n for n in walk_back(gains[0]) if n.op in ("get_attr", "placeholder")] if gains else []
        if len(sources) != 1 or sources[0].op != "get_attr" or sources[0].meta.get("buffer"):
            break
        weight = sources[0]
        unit_offset = any(n.target is aten.add.Tensor for n in walk_back(gains[0]))
        y = user
        break
    if weight is None:
        y = current
    return _affine("rms", node, x, y, weight, None, eps, heads, unit_offset)


def apply_norm(spec: NormSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The formula a NormSpec stands for, on the last dimension.

    Args:
        x: [..., d].
        weight, bias: values of `spec.weight` and `spec.bias`, [d] each.
    """
    if spec.kind == "layer":
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, spec.eps)
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + spec.eps)
    if weight is None:
        return y
    return y * (1.0 + weight) if spec.unit_offset else y * weight


def _verify(match: NormMatch, probe: Probe) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = probe.shape(match.x, 2, 3)
    x = torch.randn(shape, generator=generator)
    values = {
        name: torch.randn(shape[-1], generator=generator)
        for name in (match.spec.weight, match.spec.bias)
        if name is not None
    }
    (found,) = probe.evaluate([match.y], {match.x: x}, 2, 3, weight=values.__getitem__)
    spec = match.spec
    expected = apply_norm(spec, x, values.get(spec.weight or ""), values.get(spec.bias or ""))
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
        raise Mismatch(f"a norm is not the {spec.kind} norm it looks like", match.y)
