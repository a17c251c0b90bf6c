"""Text forms of a Program: a line per attention layer, or a line per equation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite

_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "b",
}


def short_print(program: Program) -> str:
    """The program in short: what it is, then one line per attention layer."""
    head = (
        f"{program.model_type}: {len(program.sites)} attention layers, {program.parameters:,} parameters, "
        f"{program.cached_numbers_per_token:,} cached numbers per token"
    )
    lines = [head, *(site_line(site) for site in program.site_list)]
    if program.history:
        lines.append("history: " + ",".join(entry.text for entry in program.history))
    return "\n".join(lines)


def site_line(site: AttentionSite) -> str:
    """One attention layer in one line."""
    heads = f"{site.heads} heads" if site.kind in ("mha", "mla") else f"{site.heads}/{site.kv_heads} heads"
    width = f"{site.d_qk}" if site.d_qk == site.d_v else f"{site.d_qk}+{site.d_v}"
    parts = [f"{heads} x {width}"]
    if site.latent is not None:
        parts.append(f"latent {site.latent.kv_lora_rank}+{site.latent.d_rope}" + (" lane" if site.latent.lane else ""))
    if site.rope is not None:
        scaled = "" if site.rope.rope_type == "default" else f" {site.rope.rope_type}"
        parts.append(f"rope {site.rope.dim} {site.rope.style}{scaled}")
    if site.q_norm or site.k_norm:
        parts.append("q/k norm")
    mask = site.mask
    parts.append("causal" if mask.causal else "bidirectional")
    parts += [f"window {mask.window}"] if mask.window else []
    parts += [f"softcap {mask.softcap:g}"] if mask.softcap else []
    parts += ["sinks"] if mask.sinks else []
    parts += ["bias"] if mask.bias else []
    parts += ["alibi"] if mask.alibi else []
    parts += ["padding"] if mask.padding else []
    parts.append(f"cache {site.cached_numbers_per_token}")
    return f"{site.layer:3d} {site.fqn}  {site.kind}  {', '.join(parts)}"


def long_print(program: Program) -> str:
    """The program in full: the short form, then every node as an equation, new nodes with the pass that made them."""
    ends = {site.nodes.attention: site.fqn for site in program.site_list}
    lines = [short_print(program), ""]
    for node in program.graph.nodes:
        lines.append(_equation(node) + (f"  # {ends[node.name]}" if node.name in ends else ""))
    return "\n".join(lines)


def _equation(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    left = f"%{node.name}{_type(node)}"
    made = node.meta.get("attnopt")
    origin = f"  # made by {made['pass']} for {made['site']}" if made else ""
    if node.op == "placeholder":
        return f"{left} = input{origin}"
    if node.op == "get_attr":
        return f"{left} = weight {node.target}{origin}"
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    return f"{left} = {_target(node.target)}({', '.join(arguments)}){origin}"


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))


def _type(node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    return f" : {_DTYPES.get(value.dtype, str(value.dtype))}[{_join(value.shape)}]"


def _join(items: Iterable[Any]) -> str:
    return ", ".join(str(item) for item in items)


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(item) for item in value)}]"
    return repr(value) if isinstance(value, str) else str(value)
