"""Rewrites the attention of a Dynamo graph and hands the graph on to inductor, or to eager where nothing compiles."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import fx

from attnopt.codegen.backend import ops
from attnopt.codegen.backend.calls import Call, find_calls, nearest_miss, value_of
from attnopt.codegen.backend.options import Options
from attnopt.errors import UnsupportedError

log = logging.getLogger("attnopt.backend")

#: What computes and reshapes queries and keys in stock models, without effects.
_PURE = frozenset(
    {
        "reshape",
        "contiguous",
        "expand",
        "view",
        "transpose",
        operator.getitem,
        torch.reshape,
        torch.nn.functional.linear,
    }
)
#: Queries up to which a call counts as decoding.
DECODE_TOKENS = 4


def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Rewrite and compile one graph.

    Raises:
        UnsupportedError: the plan asks for something that this graph cannot do; a wrong answer is never the fallback.
    """
    calls, odd = find_calls(gm.graph)
    report = [_record(node, place, "left as it is", reason) for place, (node, reason) in enumerate(odd)]
    training = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)
    planned = set(options.plan.dead_heads) | set(options.plan.shared_maps) | set(options.plan.shared_maps.values())
    if not calls:
        reason = nearest_miss(gm.graph)
        if not odd:
            log.info("no attention in this graph: %s", reason)
    elif planned and max(planned) >= len(calls) + len(odd):
        raise UnsupportedError(
            f"the plan names layer {max(planned)}, but this graph has {len(calls) + len(odd)} attention calls",
            "count layers from 0, and compile with fullgraph=True so that the model is one graph",
        )
    maps: dict[int, fx.Node] = {}
    by_layer = {call.layer: call for call in calls}
    for layer in planned - set(by_layer) if calls else set():
        raise UnsupportedError(f"the plan names layer {layer}, whose attention cannot be read", "leave it out")
    for call in calls:
        form, reason = _lower(gm.graph, call, options, training, maps, by_layer)
        report.append(_record(call.node, call.layer, form, reason))
    for record in report:
        if record["reason"]:
            log.info("attention call %s: %s (%s)", record["layer"], record["form"], record["reason"])
    if options.report is not None:
        options.report(sorted(report, key=lambda r: r["layer"]))
    gm.graph.lint()
    gm.recompile()
    return _hand_on(gm, example_inputs, options)


def _record(node: fx.Node, layer: int, form: str, reason: str) -> dict[str, Any]:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return {"layer": layer, "module": path, "node": node.name, "form": form, "reason": reason}


def _lower(
    graph: fx.Graph, call: Call, options: Options, training: bool, maps: dict[int, fx.Node], calls: dict[int, Call]
) -> tuple[str, str]:
    """Replace one call; returns the form and, where the best form was not possible, why."""
    plan = options.plan
    owner = plan.shared_maps.get(call.layer)
    dead = plan.dead_heads.get(call.layer, ())
    if call.dropout and (owner is not None or dead or call.layer in plan.shared_maps.values()):
        raise UnsupportedError(
            f"layer {call.layer} of the plan has attention dropout {call.dropout}", "compile in eval mode"
        )
    if call.dropout:
        return "left as it is", f"it has dropout {call.dropout}"
    with graph.inserting_before(call.node):
        if owner is not None or call.layer in plan.shared_maps.values():
            new, form, reason = _mapped(graph, call, owner, maps, calls)
        else:
            new, form, reason = _plain(graph, call, options, training, dead)
    if new is call.node:
        return form, reason
    new.meta = dict(call.node.meta)
    call.node.replace_all_uses_with(new)
    _erase(graph, call.node)
    return form, reason


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node, and what only it read, as far as these certainly have no effects.

    `eliminate_dead_code` would go further: a Dynamo graph writes in place, and it takes some of that for dead.
    """
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        if not source.users and source.target in _PURE:
            _erase(graph, source)


def _mapped(
    graph: fx.Graph, call: Call, owner: int | None, maps: dict[int, fx.Node], calls: dict[int, Call]
) -> tuple[fx.Node, str, str]:
    if owner is None:
        maps[call.layer] = graph.call_function(ops.attention_map, (call.q, call.k, call.mask, call.causal, call.scale))
        return graph.call_function(ops.apply_map, (maps[call.layer], call.v)), "map owner", ""
    first = calls[owner]
    alike = (first.mask, first.causal) == (call.mask, call.causal)
    if first.heads != call.heads or not alike:
        raise UnsupportedError(
            f"layer {call.layer} cannot use the map of layer {owner}: "
            + ("they differ in heads" if alike else "they do not see the same keys"),
            "share maps of layers that are alike",
        )
    return graph.call_function(ops.apply_map, (maps[owner], call.v)), f"map of layer {owner}", ""


def _plain(
    graph: fx.Graph, call: Call, options: Options, training: bool, dead: Sequence[int]
) -> tuple[fx.Node, str, str]:
    q, k, v = call.q, call.k, call.v
    if dead:
        if dead[-1] >= call.heads:
            raise UnsupportedError(
                f"layer {call.layer} has {call.heads} heads, not a head {dead[-1]}", "correct the plan"
            )
        live = [h for h in range(call.heads) if h not in dead]
        if not live:
            raise UnsupportedError(f"the plan leaves no head in layer {call.layer}", "keep one")
        size = call.heads // call.groups
        q = graph.call_function(ops.live_heads, (q, live))
        k, v = (graph.call_function(ops.live_heads, (x, [h // size for h in live])) for x in (k, v))
        mask = call.mask
        if mask is not None and value_of(mask).shape[1] != 1:  # type: ignore[union-attr]
            mask = graph.call_function(ops.live_heads, (mask, live))
        out = graph.call_function(ops.grouped_sdpa, (q, k, v, mask, call.causal, call.scale))
        new = graph.call_function(ops.with_dead_heads, (out, live, call.heads))
        return new, f"{len(live)} of {call.heads} heads", ""
    reason = _no_kernel(call, options, training)
    if reason is None:
        return graph.call_function(torch.ops.attnopt.decode_attention.default, (q, k, v, call.scale)), "gqa_decode", ""
    if call.groups == call.heads and not _repeated(call):
        return call.node, "left as it is", reason
    arguments = (q, k, v, call.mask, call.causal, call.scale)
    return graph.call_function(ops.grouped_sdpa, arguments), "grouped", reason


def _repeated(call: Call) -> bool:
    return call.k is not call.node.args[1] if len(call.node.args) > 1 else True


def _no_kernel(call: Call, options: Options, training: bool) -> str | None:
    """Why the decoding kernel cannot be used for a call, or None if it can."""
    q, k, v = (value_of(x) for x in (call.q, call.k, call.v))
    assert q is not None
    assert k is not None
    assert v is not None
    device = q.device.type
    if options.kernels == "reference":
        return "kernels='reference'"
    if options.kernels == "auto" and device != "cuda":
        return f"the tensors are on {device}"
    if options.target is not None and not options.target.is_gpu:
        return f"the target is {options.target.name}"
    if training:
        return "gradients are needed"
    if not isinstance(q.shape[2], int) or q.shape[2] > DECODE_TOKENS:
        return "it reads a prompt, for which SDPA has fused kernels"
    if call.mask is not None:
        return "it has a mask"
    if call.causal and q.shape[2] != 1:
        return "its causal mask is aligned to the first key"
    if q.shape[2] != 1:
        return "several queries see all keys"
    if call.causal:
        return "one query with a causal mask sees only the first key"
    if max(q.shape[3], v.shape[3]) > 256:
        return "its heads are wider than 256"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"its type is {q.dtype}"
    return None


@lru_cache
def has_compiler(device: str) -> bool:
    """Whether inductor can compile for a device here."""
    if device == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception:  # inductor's own way of saying that it found none
        return False
    return True


def _hand_on(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    devices = {x.device.type for x in example_inputs if isinstance(x, torch.Tensor)}
    device = "cuda" if "cuda" in devices else "cpu"
    if not has_compiler(device):
        log.warning("no compiler for %s here: the rewritten graph runs eagerly", device)
        return gm.forward
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(options.mode) if options.mode and options.mode != "default" else {}
    return cast(Callable[..., Any], compile_fx(gm, list(example_inputs), config_patches=patches or None))
