"""What a legal Program is, as rules: a pattern, a predicate, a message. One list for every stage."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import fx

from attnopt.errors import VerificationError
from attnopt.rewriter.edit import weight_names
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite, Projection

Stage = Literal["captured", "transformed"]

#: Dialect ops that stand for a site's attention, and the kinds of site they may stand for.
ANCHORS: dict[str, frozenset[str]] = {
    "attnopt::attention": frozenset({"mha", "gqa", "mqa", "mla"}),
    "attnopt::shared_attention": frozenset({"mha", "gqa", "mqa"}),
    "attnopt::routed_attention": frozenset({"mha", "gqa", "mqa"}),
    "attnopt::latent_attention": frozenset({"mla"}),
}


@dataclass(frozen=True)
class Facts:
    """The program under examination, with look-ups the rules share."""

    program: Program
    nodes: dict[str, fx.Node]
    order: dict[fx.Node, int]
    anchored: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program) -> Facts:
        """Collect the look-ups."""
        order = {node: place for place, node in enumerate(program.graph.nodes)}
        anchored: dict[str, list[str]] = {}
        for site in program.site_list:
            anchored.setdefault(site.nodes.attention, []).append(site.fqn)
        return cls(program, {node.name: node for node in order}, order, anchored)

    def shape(self, weight: str) -> tuple[int, ...] | None:
        """Shape of a weight, None if there is no such weight."""
        return self.program.weights.meta(weight).shape if weight in self.program.weights else None


@dataclass(frozen=True)
class Rule:
    """A condition on every node, site or projection that a pattern picks, or on the program as a whole.

    Attributes:
        name: short name, for tests and messages.
        over: what it is about.
        when: picks the subjects; a rule without it is about all of them.
        holds: the condition.
        message: format string; `{x}` is the subject.
        stages: where it must hold.
    """

    name: str
    over: Literal["program", "node", "site", "projection"]
    holds: Callable[[Facts, Any], bool]
    message: str
    when: Callable[[Facts, Any], bool] = lambda facts, x: True
    stages: frozenset[str] = frozenset(get_args(Stage))


def _is_anchor(facts: Facts, node: fx.Node) -> bool:
    return _op_name(node) in ANCHORS


def _op_name(node: fx.Node) -> str:
    return node.target.name().split(".")[0] if isinstance(node.target, torch._ops.OpOverload) else ""


def _known_target(facts: Facts, node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace in ("aten", "attnopt", "prims")
    # Arithmetic on sizes, and the choice of one result of several.
    return getattr(node.target, "__module__", "") in ("_operator", "math", "torch") or node.target is operator.getitem


def _layer_argument(node: fx.Node) -> Any:
    schema = node.target._schema  # type: ignore[union-attr]  # only called on nodes whose target is an op
    names = [argument.name for argument in schema.arguments]
    if "layer" in node.kwargs:
        return node.kwargs["layer"]
    place = names.index("layer")
    return node.args[place] if place < len(node.args) else None


def _count(value: Any) -> int:
    return len(value) if isinstance(value, (list, tuple)) else 1


def _kind_fits(facts: Facts, site: AttentionSite) -> bool:
    if site.kind == "mla":
        return site.latent is not None and site.kv_heads == site.heads
    expected = "mha" if site.kv_heads == site.heads else "mqa" if site.kv_heads == 1 else "gqa"
    return site.latent is None and site.kind == expected


def _anchor_fits(facts: Facts, site: AttentionSite) -> bool:
    node = facts.nodes.get(site.nodes.attention)
    if node is None or site.kind not in ANCHORS.get(_op_name(node), frozenset()):
        return False
    takes_map = site.share is not None and site.share.edge == "map"
    return takes_map == (_op_name(node) == "attnopt::shared_attention")


def _heads_divide(facts: Facts, site: AttentionSite) -> bool:
    if not 0 < site.kv_heads <= site.heads:
        return False
    if not site.kv_of:
        return site.heads % site.kv_heads == 0
    fits = len(site.kv_of) == site.heads and sorted(set(site.kv_of)) == list(range(site.kv_heads))
    return fits and list(site.kv_of) == sorted(site.kv_of)


def _share_fits(facts: Facts, site: AttentionSite) -> bool:
    assert site.share is not None
    source = facts.program.sites.get(site.share.source)
    if source is None or source.layer >= site.layer or source.share is not None or source.latent is not None:
        return False
    same = ("heads", "kv_heads", "d_qk", "kv_of", *(("d_v",) if site.share.edge == "kv" else ()))
    return all(getattr(source, name) == getattr(site, name) for name in same)


def _route_fits(facts: Facts, site: AttentionSite) -> bool:
    assert site.route is not None
    route, units, width = site.route, len(site.routed_units), site.o.out_features
    shapes = {route.weight: (units, width), route.bias: (units,), route.fill: (units, width)}
    shapes |= {route.shared_weight: (len(route.shared), width), route.balance: (2, width)}
    legal = all(facts.shape(name) == shape for name, shape in shapes.items() if name is not None)
    weighted = route.gate == "weighted"
    legal &= (route.shared_weight is not None) == (weighted and len(route.shared) > 1)
    legal &= (route.balance is not None) == (weighted and bool(route.shared))
    legal &= not weighted or (route.router == "linear" and route.active > 0)
    heads = list(route.shared) == sorted(set(route.shared)) and all(0 <= h < site.heads for h in route.shared)
    return legal and heads and 0 <= route.active <= units and (route.router == "qnorm") == (route.weight is None)


def _in_order(facts: Facts, site: AttentionSite) -> bool:
    places = [facts.order[facts.nodes[name]] for name in (site.nodes.input, site.nodes.attention, site.nodes.output)]
    return places[0] < places[1] < places[2]


def _nodes_exist(facts: Facts, site: AttentionSite) -> bool:
    return all(name in facts.nodes for name in (site.nodes.input, site.nodes.attention, site.nodes.output))


def _widths_fit(facts: Facts, site: AttentionSite) -> bool:
    """q, k, v and o have as many channels as the heads need; for mla, so have the latent's parts."""
    wanted: list[tuple[Projection | None, int, int | None]] = [(site.o, site.o.out_features, site.heads * site.d_v)]
    if site.latent is None:
        edge = site.share.edge if site.share else None
        own = {"q": edge != "map", "k": edge is None, "v": edge != "kv"}
        for name, out in (
            ("q", site.heads * site.d_qk),
            ("k", site.kv_heads * site.d_qk),
            ("v", site.kv_heads * site.d_v),
        ):
            projection = getattr(site, name)
            if own[name]:
                wanted.append((projection, out, None))
            elif projection is not None:
                return False
    else:
        latent = site.latent
        queries = latent.q or latent.q_b
        wanted += [
            (latent.kv_a, latent.kv_lora_rank + latent.d_rope, None),
            (latent.kv_b, site.heads * (latent.d_nope + site.d_v), latent.kv_lora_rank),
        ]
        if latent.encoder == "hidden":
            wanted.append((queries, site.heads * site.d_qk, latent.q_a.out_features if latent.q_a else None))
    return all(
        p is not None and p.out_features == out and (inside is None or p.in_features == inside)
        for p, out, inside in wanted
    )


def _rope_fits(facts: Facts, site: AttentionSite) -> bool:
    rope = site.rope
    if rope is None:
        return True
    room = site.latent.d_rope if site.latent is not None else site.d_qk
    return 0 < rope.dim <= room and rope.offset + rope.dim <= site.d_qk


def _cache_fits(facts: Facts, site: AttentionSite) -> bool:
    widths = {entry.name: entry.heads * entry.width for entry in site.cache.entries}
    if site.share is not None and site.latent is None:
        values = {} if site.share.edge == "kv" or not site.mask.causal else {"value": site.kv_heads * site.d_v}
        return widths == values
    if not widths:
        return not site.mask.causal
    if site.latent is not None:
        return widths.get("latent") == site.latent.kv_lora_rank and widths.get("key_rope", 0) == site.latent.d_rope
    return widths.get("key", 0) in (0, site.kv_heads * site.d_qk) and widths.get("value") == site.kv_heads * site.d_v


def _matrix_fits(facts: Facts, projection: Projection) -> bool:
    shape = facts.shape(projection.weight)
    if shape is None or len(shape) != 2:
        return False
    out, inside = shape if projection.layout == "linear" else shape[::-1]
    return inside == projection.in_features and all(0 <= start < stop <= out for start, stop in projection.rows)


def _bias_fits(facts: Facts, projection: Projection) -> bool:
    shape = facts.shape(projection.bias or "")
    return shape is not None and len(shape) == 1 and all(stop <= shape[0] for _, stop in projection.rows)


def _rows_disjoint(facts: Facts, projection: Projection) -> bool:
    ordered = sorted(projection.rows)
    return all(a[1] <= b[0] for a, b in pairwise(ordered))


RULES: tuple[Rule, ...] = (
    Rule(
        "node kinds",
        "node",
        lambda f, n: n.op in ("placeholder", "get_attr", "call_function", "output"),
        "node {x.name} is a {x.op}; only inputs, weights, calls of ops and the output are allowed",
    ),
    Rule(
        "known ops",
        "node",
        _known_target,
        "node {x.name} calls {x.target}, which is neither an ATen nor a dialect op",
        when=lambda f, n: n.op == "call_function",
    ),
    Rule(
        "functional",
        "node",
        lambda f, n: not n.target._schema.is_mutable,
        "node {x.name} calls {x.target}, which writes into its arguments",
        when=lambda f, n: n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload),
    ),
    Rule(
        "weights exist",
        "node",
        lambda f, n: n.target in f.program.weights,
        "node {x.name} reads the weight {x.target}, which does not exist",
        when=lambda f, n: n.op == "get_attr",
    ),
    Rule(
        "weight shapes",
        "node",
        lambda f, n: tuple(n.meta["val"].shape) == f.shape(n.target),
        "node {x.name} stands for another shape than the weight {x.target} has",
        when=lambda f, n: n.op == "get_attr" and "val" in n.meta and n.target in f.program.weights,
    ),
    Rule(
        "defined before use",
        "node",
        lambda f, n: all(f.order.get(source, math.inf) < f.order[n] for source in n.all_input_nodes),
        "node {x.name} reads a node that comes after it",
    ),
    Rule(
        "anchors belong to sites",
        "node",
        lambda f, n: len(f.anchored.get(n.name, [])) == 1,
        "attention node {x.name} belongs to no site or to several",
        when=_is_anchor,
    ),
    Rule(
        "provenance",
        "node",
        lambda f, n: set(n.meta["attnopt"]) == {"pass", "site"} and n.meta["attnopt"]["site"] in f.program.sites,
        "node {x.name} was made for a site that does not exist",
        when=lambda f, n: "attnopt" in n.meta,
    ),
    Rule(
        "inputs",
        "program",
        lambda f, p: tuple(n.target for n in f.order if n.op == "placeholder") == tuple(p.inputs),
        "the inputs {x.inputs} are not the graph's",
    ),
    Rule(
        "outputs",
        "program",
        lambda f, p: [_count(n.args[0]) for n in f.order if n.op == "output"] == [len(p.outputs)],
        "the outputs {x.outputs} are not the graph's",
    ),
    Rule(
        "layer order",
        "program",
        lambda f, p: [s.layer for s in p.site_list] == list(range(len(p.sites))),
        "layer numbers do not count up from 0",
    ),
    Rule(
        "site names",
        "program",
        lambda f, p: all(name == site.fqn for name, site in p.sites.items()),
        "a site is filed under another name than its own",
    ),
    Rule("nodes exist", "site", _nodes_exist, "{x.fqn} names a node that is not in the graph: {x.nodes}"),
    Rule(
        "nodes in order",
        "site",
        _in_order,
        "{x.fqn}: input, attention and output are not in this order: {x.nodes}",
        when=_nodes_exist,
    ),
    Rule("anchor", "site", _anchor_fits, "{x.fqn}: node {x.nodes.attention} is no attention of kind {x.kind}"),
    Rule(
        "anchor layer",
        "site",
        lambda f, s: _layer_argument(f.nodes[s.nodes.attention]) == s.layer,
        "{x.fqn}: node {x.nodes.attention} carries another layer number than {x.layer}",
        when=_anchor_fits,
    ),
    Rule("kind", "site", _kind_fits, "{x.fqn}: {x.heads}/{x.kv_heads} heads do not make a {x.kind}"),
    Rule(
        "heads divide",
        "site",
        _heads_divide,
        "{x.fqn}: {x.heads} query heads cannot share {x.kv_heads} key/value heads",
    ),
    Rule("widths", "site", _widths_fit, "{x.fqn}: a projection's width does not agree with the heads"),
    Rule("rope", "site", _rope_fits, "{x.fqn}: the rotary dims do not fit into the head"),
    Rule("cache", "site", _cache_fits, "{x.fqn}: the cache is not what its heads need: {x.cache}"),
    Rule(
        "sharing",
        "site",
        _share_fits,
        "{x.fqn}: what it shares ({x.share}) does not exist, comes later, or has other heads",
        when=lambda f, s: s.share is not None,
    ),
    Rule(
        "route",
        "site",
        _route_fits,
        "{x.fqn}: the router does not fit its heads: {x.route}",
        when=lambda f, s: s.route is not None,
    ),
    Rule(
        "head ids",
        "site",
        lambda f, s: not s.head_ids or len(set(s.head_ids)) == len(s.head_ids) == s.heads,
        "{x.fqn}: the numbers of its heads in the original model are not one for each head: {x.head_ids}",
    ),
    Rule(
        "scale",
        "site",
        lambda f, s: math.isfinite(s.scale) and s.scale > 0,
        "{x.fqn}: the scale {x.scale} is not a positive number",
    ),
    Rule(
        "latent heads",
        "site",
        lambda f, s: s.latent.d_nope + s.latent.d_rope == s.d_qk,
        "{x.fqn}: unrotated and rotated widths do not add up to {x.d_qk}",
        when=lambda f, s: s.latent is not None,
    ),
    Rule(
        "site weights exist",
        "site",
        lambda f, s: all(name in f.program.weights for name in weight_names(s)),
        "{x.fqn} speaks of a weight that does not exist",
    ),
    Rule("matrix", "projection", _matrix_fits, "projection {x.weight} is no matrix with these rows and inputs"),
    Rule(
        "bias",
        "projection",
        _bias_fits,
        "projection {x.weight}: the bias {x.bias} does not fit",
        when=lambda f, p: p.bias is not None,
    ),
    Rule("rows", "projection", _rows_disjoint, "projection {x.weight} uses a row twice: {x.rows}"),
)


def projections(site: AttentionSite) -> Iterator[Projection]:
    """All projections of an attention layer."""
    parts = [site.q, site.k, site.v, site.o]
    if site.latent is not None:
        parts += [site.latent.kv_a, site.latent.kv_b, site.latent.q, site.latent.q_a, site.latent.q_b]
    yield from (part for part in parts if part is not None)


def violations(program: Program, stage: Stage = "transformed") -> list[str]:
    """Broken rules, one line each; empty for a legal program."""
    facts = Facts.of(program)
    subjects: dict[str, list[Any]] = {
        "program": [program],
        "node": list(facts.order),
        "site": list(program.site_list),
        "projection": [p for site in program.site_list for p in projections(site)],
    }
    return [
        f"[{rule.name}] {rule.message.format(x=subject)}"
        for rule in RULES
        if stage in rule.stages
        for subject in subjects[rule.over]
        if rule.when(facts, subject) and not rule.holds(facts, subject)
    ]


def verify(program: Program, stage: Stage = "transformed") -> None:
    """Check that a program is legal.

    Raises:
        VerificationError: with every broken rule.
    """
    broken = violations(program, stage)
    if broken:
        raise VerificationError(broken)
