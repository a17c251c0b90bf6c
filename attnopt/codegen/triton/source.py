"""Prints a lowered graph as the Python source of a model, a line an operation, a paragraph a module."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from attnopt.codegen.decoding import Decoding, token_positions
from attnopt.codegen.triton.runtime import ops
from attnopt.errors import UnsupportedError
from attnopt.rewriter.segments import module_paths

_HEAD = '''"""{title}

Written by attnopt; a line is an operation of the captured model. `w` maps names to weights, `c` names to cache buffers.
Caches are written in place. Imports only torch and, through `ops`, triton.
"""

import operator

import torch
from torch.ops import aten

from . import ops

CACHE = {cache}


def forward(w, c, input_ids, past_length):
    """Logits [B, S, vocabulary] of tokens [B, S] that follow `past_length` [B] cached ones."""
'''

#: Operations that the runtime does itself, in the weights' type.
_OWN: Mapping[Any, str] = {
    torch.ops.aten.linear.default: "ops.linear",
    torch.ops.aten.embedding.default: "ops.embedding",
    torch.ops.attnopt.cache_write.default: "ops.cache_write",
    ops.rope: "ops.rope",
    ops.attend_latent: "ops.attend_latent",
    ops.attend_grouped: "ops.attend_grouped",
    ops.attend_owner: "ops.attend_owner",
    ops.attend_map: "ops.attend_map",
    ops.attend_reference: "ops.attend_reference",
    token_positions: "ops.token_positions",
    torch.ops.attnopt.expert_linear.default: "ops.expert_linear",
}


def model_source(decoding: Decoding, title: str) -> str:
    """The source of a module `model` with a function `forward`.

    Raises:
        UnsupportedError: the graph holds something that is neither ATen nor the runtime's.
    """
    cache = {tensor.past.replace(".", "_"): (tensor.heads, tensor.width) for tensor in decoding.cache}
    lines = [_HEAD.format(title=title, cache=repr(cache)).rstrip("\n")]
    module = None
    for node in decoding.graph.nodes:
        path = next(reversed(list(module_paths(node))), None)
        if node.op == "call_function" and path is not None and path != module:
            lines += ["", f"    # {path}"]
            module = path
        line = _line(node)
        if line:
            lines.append("    " + line)
    return "\n".join(lines) + "\n"


def _line(node: fx.Node) -> str:
    if node.op == "placeholder":
        name = str(node.target)
        return "" if name in ("input_ids", "past_length") else f"{node.name} = c[{name!r}]"
    if node.op == "get_attr":
        return f"{node.name} = w[{str(node.target)!r}]"
    if node.op == "output":
        return f"return {node.args[0][0].name}"  # type: ignore[union-attr, index]
    target = node.target
    if target is torch.ops.aten.sym_size.int:
        return f"{node.name} = {_text(node.args[0])}.shape[{node.args[1]}]"
    arguments = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
    return f"{node.name} = {_function(target)}({', '.join(arguments)})"


def _function(target: Any) -> str:
    if target in _OWN:
        return _OWN[target]
    if target is torch.ops.aten.view.default:
        return "aten.reshape.default"  # strides differ from those seen at capture
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target)
    name = str(getattr(target, "__name__", ""))
    if target in (torch.cat, torch.sym_float):
        return f"torch.{name}"
    if getattr(operator, name, None) is target:
        return f"operator.{name}"
    raise UnsupportedError(f"the graph holds {target}, which a generated model cannot call", "open an issue")


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_text(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
    if isinstance(value, float):
        return repr(value) if value == value and abs(value) != float("inf") else f"float('{value}')"
    if isinstance(value, torch.device):
        return "input_ids.device"  # constants are made where the tokens are
    return repr(value)
