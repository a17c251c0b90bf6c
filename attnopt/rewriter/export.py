"""One torch.export of a skeleton, cleaned: functional ATen, weights as `get_attr` nodes, no bookkeeping nodes.

Composite ops stay whole (`linear`, `matmul`, `scaled_dot_product_attention`), as recognition and its readers want them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from attnopt.errors import UnsupportedError
from attnopt.rewriter.functional import make_functional

aten = torch.ops.aten

# Batch and length used while tracing: different from each other, and from 0 and 1, which torch.export specialises.
BATCH, LENGTH = 3, 7


@dataclass(frozen=True)
class RawGraph:
    """The result of `export_graph`.

    Attributes:
        graph: as in `Program.graph`.
        constants: tensors that are not parameters (buffers, lifted constants), by the name `get_attr` nodes use.
        inputs, outputs: names.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def example_inputs(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs to trace with, and which of their dimensions are dynamic.

    Decoders get explicit position_ids. Encoders make their own positions; they get an explicit padding mask. Image
    models are dynamic in the batch only.

    Raises:
        UnsupportedError: if the model takes neither input_ids nor pixel_values.
    """
    accepted = inspect.signature(model.forward).parameters
    dynamic = torch.export.Dim.DYNAMIC
    if model.main_input_name == "pixel_values":
        config = model.config.get_text_config()
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.zeros(BATCH, config.num_channels, height, width)
        return {"pixel_values": pixels}, {"pixel_values": {0: dynamic}}
    if model.main_input_name != "input_ids" or "input_ids" not in accepted:
        raise UnsupportedError(
            f"{type(model).__name__} reads {model.main_input_name!r}; attnopt captures models of text (input_ids) and "
            "of images (pixel_values)"
        )
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    inputs = {"input_ids": ids}
    if is_decoder(model):
        if "position_ids" in accepted:
            inputs["position_ids"] = torch.arange(LENGTH).repeat(BATCH, 1)
    elif "token_type_ids" in accepted:
        inputs["token_type_ids"] = ids.clone()
    if "attention_mask" in accepted:
        inputs["attention_mask"] = torch.ones_like(ids)
    return inputs, {name: {0: dynamic, 1: dynamic} for name in inputs}


def is_decoder(model: nn.Module) -> bool:
    """Whether any attention module of the model says that it is causal."""
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def export_graph(model: PreTrainedModel) -> RawGraph:
    """Trace a skeleton whose attention is anchored (see `anchor.anchored`).

    Args:
        model: parameters may be fake; buffers are real.

    Raises:
        UnsupportedError: if torch.export cannot trace the model; the message carries its reason.
    """
    inputs, shapes = example_inputs(model)
    accepted = inspect.signature(model.forward).parameters
    fixed = {name: False for name in ("use_cache",) if name in accepted}
    fixed |= {"return_dict": True} if "return_dict" in accepted else {}
    try:
        with torch.no_grad():
            exported = torch.export.export(
                model,
                (),
                {**inputs, **fixed},
                dynamic_shapes={**shapes, **dict.fromkeys(fixed)},
            )
            program = exported
            if not make_functional(exported.graph):
                exported.graph_module.recompile()
                program = exported.run_decompositions({})
    except UnsupportedError:
        raise
    except Exception as problem:
        reason = str(problem).strip().splitlines()
        raise UnsupportedError(
            f"{type(model).__name__} cannot be traced: {reason[0] if reason else type(problem).__name__}",
            "attnopt needs a forward pass without control flow that depends on the data",
        ) from problem
    spec = exported.module_call_graph[0].signature.out_spec
    return _clean(program, _output_names(spec), set(inputs))


def _output_names(spec: Any) -> dict[str, int]:
    """Name of each output tensor -> its place among the flattened outputs."""
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    if isinstance(tree, Mapping):
        return {name: place for name, place in tree.items() if isinstance(place, int)}
    return {f"output_{i}": place for i, place in enumerate(pytree.tree_leaves(tree))}


def _clean(program: torch.export.ExportedProgram, outputs: dict[str, int], inputs: set[str]) -> RawGraph:
    signature = program.graph_signature
    names: dict[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants: dict[str, Tensor] = {}
    for lifted, target in signature.inputs_to_lifted_tensor_constants.items():
        names[lifted] = f"constant.{target}"
        constants[names[lifted]] = _real(program.constants[target])
    for target in signature.inputs_to_buffers.values():
        value = program.state_dict[target] if target in program.state_dict else program.constants[target]
        constants[target] = _real(value)

    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    kept_inputs: list[str] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in names:
                if node.users:
                    env[node] = graph.create_node("get_attr", names[node.name], name=node.name)
                    env[node].meta = {**_meta(node), "buffer": names[node.name] in constants}
            elif str(node.target) in inputs:
                env[node] = graph.placeholder(str(node.target))
                env[node].meta = _meta(node)
                kept_inputs.append(str(node.target))
            continue
        if node.op == "output":
            flat = [arg for arg, spec in zip(node.args[0], signature.output_specs, strict=True) if _is_user(spec)]
            graph.output(tuple(env[flat[place]] for place in outputs.values()))
            continue
        replacement = _without_effect(node)
        if replacement is not None:
            if replacement is not node:
                env[node] = env[replacement]
            continue
        if node.op != "call_function":
            raise UnsupportedError(f"the traced graph holds a {node.op} node ({node.target}), which attnopt cannot run")
        if node.target in _CASTS:
            dtype = node.meta["val"].dtype
            env[node] = graph.create_node(
                "call_function", aten._to_copy.default, (env[node.args[0]],), {"dtype": dtype}, name=node.name
            )
        elif node.target is aten.broadcast_to.default:  # another name of expand, for readers to know one
            env[node] = graph.node_copy(node, lambda n: env[n])
            env[node].target = aten.expand.default
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
        env[node].meta = _meta(node)
    _share_sizes(graph)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users:
            kept_inputs.remove(node.target)
            graph.erase_node(node)
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return RawGraph(
        graph, {name: t for name, t in constants.items() if name in used}, tuple(kept_inputs), tuple(outputs)
    )


def _share_sizes(graph: fx.Graph) -> None:
    """Take equal sizes from the first input that has them, so that no input is needed for its shape alone."""
    first: dict[Any, tuple[fx.Node, int]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            for dim, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt):
                    first.setdefault(size.node.expr, (node, dim))
        elif node.target is aten.sym_size.int and isinstance(node.meta.get("val"), torch.SymInt):
            place = first.get(node.meta["val"].node.expr)
            if place is not None:
                node.args = place


def _is_user(spec: Any) -> bool:
    return spec.kind.name == "USER_OUTPUT"


def _real(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _meta(node: fx.Node) -> dict[str, Any]:
    keep = ("val", "nn_module_stack")
    return {key: node.meta[key] for key in keep if key in node.meta}


_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}
# Programs hold float32 on one device, so a cast changes the element type or nothing.
_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other}
_BIG = 2**63 - 1


def _without_effect(node: fx.Node) -> fx.Node | None:
    """What stands for a node that computes nothing: its operand, or the node itself if it can simply go; else None."""
    target = node.target
    if target in _CHECKS:
        return node
    if target in (operator.ge, operator.le, operator.gt, operator.lt, operator.eq) and not _feeds_values(node):
        return node
    operand = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if target in (aten.dropout.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default):
        if target is aten.dropout.default and node.args[2]:
            return None
        return operand
    if target in _CASTS and operand is not None and operand.meta["val"].dtype == node.meta["val"].dtype:
        return operand
    if target is aten.slice.Tensor:
        bounds: list[Any] = [None, None, 1]
        bounds[: len(node.args) - 2] = node.args[2:]
        start, stop, step = bounds
        if not start and (stop is None or stop == _BIG) and step == 1:
            return operand
    return None


def _feeds_values(node: fx.Node) -> bool:
    return any(user.target not in _CHECKS for user in node.users)
