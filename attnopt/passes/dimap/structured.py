"""Removes hidden channels of MLPs for good: rows of the maps into them, columns of the map out of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from attnopt.passes.common.lower import copy_call
from attnopt.passes.common.weights import pick
from attnopt.passes.dimap.modules import Mlp
from attnopt.rewriter.edit import Editor
from attnopt.rewriter.program import Program
from attnopt.rewriter.projections import LinearMap
from attnopt.rewriter.weights import Derived, Value

_ATEN = torch.ops.aten


def channel_norms(program: Program, mlp: Mlp) -> Tensor:
    """Norm of all weights of each hidden channel, [channels] float64."""
    total = torch.zeros(mlp.out.in_features, dtype=torch.float64)
    for one in mlp.into:
        weight = program.weights.get(one.weight).double()
        total += weight.pow(2).sum(0 if one.layout == "conv1d" else 1)
    weight = program.weights.get(mlp.out.weight).double()
    total += weight.pow(2).sum(1 if mlp.out.layout == "conv1d" else 0)
    return total.sqrt()


def shrink(editor: Editor, program: Program, mlp: Mlp, kept: Sequence[int]) -> None:
    """Give an MLP only some of its hidden channels.

    Args:
        editor: of the program.
        program: before the edit.
        mlp: which.
        kept: channels that stay, ascending.
    """
    end = editor.node(mlp.out.node.name)
    with editor.at(mlp.site, before=end):
        new: dict[fx.Node, fx.Node] = {}
        for one in mlp.into:
            new[editor.node(one.node.name)] = _linear(editor, program, mlp.site, one, kept, None)
        for node in mlp.pointwise:
            old = editor.node(node.name)
            new[old] = copy_call(editor, old, new, lambda args: _resized(args, mlp.out.in_features, len(kept)))
        operand = new[editor.node(mlp.pointwise[-1].name)] if mlp.pointwise else next(iter(new.values()))
        editor.redirect(end, _linear(editor, program, mlp.site, mlp.out, kept, operand))


def _linear(
    editor: Editor, program: Program, site: str, one: LinearMap, kept: Sequence[int], x: fx.Node | None
) -> fx.Node:
    """The map into (x None) or out of the hidden channels, with those kept."""
    store = program.weights
    value: Value = store[one.weight]
    if one.layout == "conv1d":
        value = Derived.of("transpose", value, dim0=0, dim1=1)
    weight = editor.weight(_set(editor, site, one.weight, pick(value, kept, 0 if x is None else 1)))
    bias = None
    if one.bias is not None:
        bias_value = pick(store[one.bias], kept, 0) if x is None else store[one.bias]
        bias = editor.weight(_set(editor, site, one.bias, bias_value)) if x is None else editor.weight(one.bias)
    source = x if x is not None else editor.node(one.x.name)
    if source.meta["val"].ndim == 2 and one.node.meta["val"].ndim == 3:
        source = editor.node(one.x.name)
    result = editor.call(_ATEN.linear.default, source, weight, bias)
    if one.node.meta["val"].ndim < result.meta["val"].ndim:  # it worked on flattened tokens
        return editor.call(_ATEN.reshape.default, result, [-1, result.meta["val"].shape[-1]])
    return result


def _set(editor: Editor, site: str, name: str, value: Value) -> str:
    """Define the shrunk form of a weight, under a name that tells which it is."""
    fresh = editor.fresh_name(name)
    with editor.at(site):
        editor.set_weight(fresh, value)
    return fresh


def _resized(args: tuple[object, ...], before: int, after: int) -> tuple[object, ...]:
    """Arguments with the number of channels, where it is spelled out as a size, replaced."""
    return tuple(
        [after if a == before and type(a) is int else a for a in arg] if isinstance(arg, list) else arg for arg in args
    )
