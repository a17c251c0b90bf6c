"""Which sites get Triton kernels on a target, and what stands in a generated model where attention was."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from attnopt.codegen.decoding import LATENT, ROUTED, SHARED, SiteCall
from attnopt.codegen.target import Claim, Refusal, Target, Verdict
from attnopt.codegen.triton.runtime import ops
from attnopt.codegen.triton.runtime.select import gqa_decode_config, mla_decode_config
from attnopt.rewriter.absorb import obstacle
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite

#: Widest latent whose accumulator fits the registers of a thread block; FlashMLA's shape is the largest in use.
WIDEST_LATENT = 512
#: Widest head of the other kernels.
WIDEST_HEAD = 256


def arch_of(target: Target) -> str:
    """The target's name as the runtime spells it ("sm90", "gfx942")."""
    return target.name.replace("_", "")


def claim(program: Program, site: AttentionSite, target: Target, itemsize: int) -> Verdict:
    """Whether the kernels compute a site on a target, and with which design."""
    anchor = program.node(site.nodes.attention)
    if not target.is_gpu:
        return Refusal(site.fqn, f"Triton does not compile for {target.name}")
    if not site.mask.causal:
        return Refusal(site.fqn, "the kernels decode, and an encoder has no cache")
    if site.mask.sinks or site.mask.bias or site.mask.alibi:
        what = "learned sinks" if site.mask.sinks else "an additive bias"
        return Refusal(site.fqn, f"no kernel adds {what} to the scores")
    arch = arch_of(target)
    if site.latent is not None:
        reason = obstacle(program, site)
        if reason is not None:
            return Refusal(site.fqn, f"it is MLA that cannot be absorbed: {reason}")
        if site.mask.window or site.mask.softcap:
            return Refusal(site.fqn, "no MLA kernel has a window or a soft cap")
        if site.latent.kv_lora_rank > WIDEST_LATENT:
            return Refusal(site.fqn, f"its latent of {site.latent.kv_lora_rank} numbers is wider than {WIDEST_LATENT}")
        spec = site.latent
        config = mla_decode_config(site.heads, spec.kv_lora_rank, spec.d_rope, itemsize, arch, target.shared_memory)
        return Claim(site.fqn, config.kernel)
    if max(site.d_qk, site.d_v) > WIDEST_HEAD:
        return Refusal(site.fqn, f"its heads are wider than {WIDEST_HEAD}")
    if anchor.target is SHARED:
        if site.mask.window:
            return Claim(site.fqn, "gqa_decode", "its map has a window and is computed again from the owner's keys")
        return Claim(site.fqn, "map_decode")
    rows = site.heads // site.kv_heads
    config = gqa_decode_config(rows, site.d_qk, site.d_v, itemsize, arch, target.shared_memory)
    return Claim(site.fqn, config.kernel + (" routed" if anchor.target is ROUTED else ""))


class TritonLane:
    """Puts calls of the runtime where attention was; see `decoding.Lane`.

    Args:
        verdicts: by fqn. A refused site is computed in plain torch.
        owners: layers whose map others use.
    """

    def __init__(self, verdicts: dict[str, Verdict], owners: frozenset[int] = frozenset()) -> None:
        self.verdicts = verdicts
        self.owners = owners

    def attention(self, graph: fx.Graph, call: SiteCall) -> tuple[fx.Node, Any]:
        """See `decoding.Lane.attention`; what is kept is the map."""
        a, node = call.args, graph.call_function
        past, limits = call.past_length, (a["window"], a["softcap"])
        refused = isinstance(self.verdicts[call.site.fqn], Refusal)
        if call.op is LATENT:
            parts = (a["q_nope"], a["q_rope"], a["w_uk"], a["w_uv"], call.cache["latent"], past, a["scale"])
            return node(ops.attend_latent, (*parts, *limits, True) if refused else parts), None
        read = (a["q"], call.cache["key"], call.cache["value"])
        gates = (a["gates"],) if call.op is ROUTED else ()
        if refused:
            plain = (*read, a["bias"], past, a["scale"], *limits, a["sinks"], *gates)
            return node(ops.attend_reference, plain), None
        if call.op is SHARED:
            return node(ops.attend_map, (call.owner, *read, past, a["scale"], *limits)), None
        if call.site.layer in self.owners and not a["window"]:
            both = node(ops.attend_owner, (*read, past, a["scale"], a["softcap"]))
            return node(operator.getitem, (both, 0)), node(operator.getitem, (both, 1))
        return node(ops.attend_grouped, (*read, past, a["scale"], *limits, *gates)), None

    def rope(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """The runtime's own."""
        return graph.call_function(ops.rope, node.args)
