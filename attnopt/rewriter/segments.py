"""Cuts a Program's graph into prelude, one segment per attention layer, and head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of the graph that is run at once.

    Attributes:
        index: 0 for the prelude, then 1 ... L for the layers, L + 1 for the head.
        name: "prelude", "head" or the path of the layer's module, e.g. "model.layers.3".
        site: the layer's attention, None for prelude and head.
        live_in: names of the nodes computed before that this segment or a later one reads.
        live_out: the same after it.
        stream_in: name of the residual stream that enters it, None if there is no single candidate.
    """

    index: int
    name: str
    site: AttentionSite | None
    live_in: tuple[str, ...]
    live_out: tuple[str, ...]
    stream_in: str | None


def layer_path(fqn: str) -> str:
    """Path of the layer a module belongs to: up to and with its last number ("model.layers.3.self_attn" -> "...3")."""
    parts = fqn.split(".")
    for end in range(len(parts), 0, -1):
        if parts[end - 1].isdigit():
            return ".".join(parts[:end])
    return fqn


def module_paths(node: fx.Node) -> Iterator[str]:
    """Paths of the modules a node came from, outermost first."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        yield path.split("@")[0]


def assign_segments(program: Program) -> dict[fx.Node, int]:
    """Segment index of every node but weights and the output.

    A node belongs to the layer whose module it came from, or whose site an Editor made it for; never to an earlier
    segment than its operands. What comes after the last layer is the head.
    """
    last = len(program.sites)
    by_path = {layer_path(site.fqn): place for place, site in enumerate(program.site_list, 1)}
    by_site = {site.fqn: place for place, site in enumerate(program.site_list, 1)}
    result: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        if node.op in ("get_attr", "output"):
            continue
        own = [by_path[path] for path in module_paths(node) if path in by_path]
        made_for = (node.meta.get("attnopt") or {}).get("site")
        if made_for in by_site:
            own = [by_site[made_for]]
        before = max((result[n] for n in node.all_input_nodes if n.op != "get_attr"), default=0)
        if own:
            result[node] = max(own[-1], before)
        else:
            result[node] = last + 1 if before == last else before
    return result


def segment_graph(program: Program) -> list[Segment]:
    """The segments of a program, prelude first and head last."""
    place = assign_segments(program)
    last = len(program.sites) + 1
    last_use: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        for source in node.all_input_nodes:
            if source in place:
                at = last if node.op == "output" else place[node]
                last_use[source] = max(last_use.get(source, 0), at)
    live: list[list[fx.Node]] = [
        [n for n, made in place.items() if made < i and last_use.get(n, -1) >= i] for i in range(last + 2)
    ]
    streams = _streams(program, place, live)
    names = ["prelude", *(layer_path(site.fqn) for site in program.site_list), "head"]
    sites: list[AttentionSite | None] = [None, *program.site_list, None]
    return [Segment(i, names[i], sites[i], _names(live[i]), _names(live[i + 1]), streams[i]) for i in range(last + 1)]


def _names(nodes: list[fx.Node]) -> tuple[str, ...]:
    return tuple(node.name for node in nodes)


def _streams(program: Program, place: dict[fx.Node, int], live: list[list[fx.Node]]) -> list[str | None]:
    """For each segment, the one floating-point tensor that enters it and was made by the segment before it.

    The prelude also makes rotary tables and masks; there it is the one with the shape that leaves the first layer.
    Queries, keys and values that a later layer shares are not the stream.
    """
    shared = _shared(program)
    result: list[str | None] = [None]
    shapes: list[tuple[object, ...] | None] = [None]
    for i in range(1, len(live) - 1):
        fresh = [n for n in live[i] if place[n] == i - 1 and _is_float(n) and n not in shared]
        result.append(fresh[0].name if len(fresh) == 1 else None)
        shapes.append(_shape(fresh[0]) if len(fresh) == 1 else None)
    if len(result) > 2 and result[1] is None and shapes[2] is not None:
        fitting = [n for n in live[1] if _is_float(n) and _shape(n) == shapes[2]]
        result[1] = fitting[0].name if len(fitting) == 1 else None
    return result


def _shared(program: Program) -> set[fx.Node]:
    """Operands of attention that layers take from earlier ones, and the biases of their scores."""
    consumers = {site.nodes.attention for site in program.site_list if site.share is not None}
    found: set[fx.Node] = set()
    for node in program.graph.nodes if consumers else ():
        if node.name in consumers:
            for source in node.all_input_nodes:
                found |= {source, *source.all_input_nodes}  # heads of the source may be picked on the way
    return found


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _shape(node: fx.Node) -> tuple[object, ...]:
    # Names of symbols may differ between equal sizes (batch of ids and of positions): only numbers must agree.
    return tuple(d if isinstance(d, int) else None for d in node.meta["val"].shape)
