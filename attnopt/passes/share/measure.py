"""What it costs to let one layer read another's attention map, or its keys and values: measured, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from attnopt.passes.common.reading import output_nodes
from attnopt.passes.common.ridge import OutputFit
from attnopt.passes.common.stream import Stream
from attnopt.passes.share.align import align_heads, attention_rows, consumer_order, row_correlation
from attnopt.rewriter.interpret import LayerRunner, LoadedSegment
from attnopt.rewriter.ops.attention import attention_reference
from attnopt.rewriter.passes import PassContext
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite

EdgeKind = Literal["map", "kv"]


@dataclass(frozen=True)
class Edge:
    """A layer that could read another's.

    Attributes:
        source, consumer: layer indices.
        head_map: head of the source for each head of the consumer.
        error: squared error of the consumer's output relative to its square, before any repair.
        repaired: the same after least squares of the output projection.
        cost: the repaired error relative to the size of the residual stream: what later layers notice.
    """

    source: int
    consumer: int
    head_map: tuple[int, ...]
    error: float
    repaired: float
    cost: float


@dataclass(frozen=True)
class _Kept:
    """Attention of a layer on each batch: operands of the op."""

    site: AttentionSite
    operands: list[dict[str, Any]]


def measure_edges(
    program: Program,
    wanted: Mapping[int, Sequence[int]],
    edge: EdgeKind,
    align: bool,
    context: PassContext,
    windows: int,
) -> list[Edge]:
    """Measure edges on the program's own hidden states.

    Args:
        program: whose layers.
        wanted: sources to try for each consumer, by layer index.
        edge: what is shared.
        align: reorder the consumer's heads to match the source's.
        context: calibration text and device.
        windows: of calibration text to measure on.
    """
    runner = LayerRunner(program, context.dtype, context.device)
    text = context.calibration.windows
    stream = Stream(runner, text[:: max(1, len(text) // windows)][:windows], text[:0], context.dtype)
    last_use = {i: j for j, sources in sorted(wanted.items()) for i in sources}
    kept: dict[int, _Kept] = {}
    found: list[Edge] = []
    for site, loaded in stream.layers(context.reporter, "measuring edges"):
        if site.layer in last_use or site.layer in wanted:
            kept[site.layer] = _Kept(site, [_operands(program, loaded, stream, b) for b in stream.batches])
        if site.layer in wanted:
            consumer = _Consumer(program, loaded, stream, kept[site.layer])
            found += [consumer.measure(kept[source], edge, align) for source in wanted[site.layer]]
        kept = {i: one for i, one in kept.items() if last_use.get(i, -1) > site.layer}
    return found


_NAMES = ("q", "k", "v", "bias", "q_pos", "scale", "causal", "window", "softcap", "sinks")


def _operands(program: Program, loaded: LoadedSegment, stream: Stream, batch: Any) -> dict[str, Any]:
    """The arguments of a layer's attention op for one batch, tensors evaluated."""
    assert loaded.segment.site is not None
    args = dict(zip(_NAMES, program.node(loaded.segment.site.nodes.attention).args, strict=False))
    nodes = {name: arg.name for name, arg in args.items() if isinstance(arg, fx.Node)}
    values = loaded.evaluate_all(stream.env(batch), list(nodes.values()))
    return {**args, **{name: values[node] for name, node in nodes.items()}}


class _Consumer:
    """One layer that is tried as a consumer."""

    def __init__(self, program: Program, loaded: LoadedSegment, stream: Stream, own: _Kept) -> None:
        self.own, self.site = own, own.site
        matrix = loaded.weight(self.site.o.weight)
        self.weight = matrix if self.site.o.layout == "conv1d" else matrix.T  # [H d_v, D]
        self.bias = None if self.site.o.bias is None else loaded.weight(self.site.o.bias)
        nodes = output_nodes(program, loaded.segment)
        self.outputs, self.importance, self.sizes = [], [], []
        for batch in stream.batches:
            env = stream.env(batch)
            y = loaded.evaluate(env, self.site.nodes.output)
            added = nodes.added and y.shape == env.hidden.shape
            after = env.hidden + y if added else y
            self.outputs.append(y)
            self.importance.append(stream.weights(batch, y) if added else torch.full_like(y[..., 0], batch.count))
            self.sizes.append(float((self.importance[-1][..., None] * after.float() ** 2).sum()))

    def measure(self, source: _Kept, edge: EdgeKind, align: bool) -> Edge:
        """Measure the edge from a source, with the repair that its layer would get."""
        heads = list(range(self.site.heads))
        if align and not self.site.kv_of:
            heads = self._map_alignment(source) if edge == "map" else self._kv_alignment(source)
        order = consumer_order(heads)
        channels = [h * self.site.d_v + i for h in order for i in range(self.site.d_v)]
        fit = OutputFit(self.weight[channels], self.bias)
        for mine, theirs, y, each in zip(
            self.own.operands, source.operands, self.outputs, self.importance, strict=True
        ):
            context = self._context(mine, theirs, order, edge).flatten(-2)
            fit.add(context, y, each)
        repaired = fit.error(*fit.solve())
        size = sum(
            float((w[..., None] * y.float() ** 2).sum()) for w, y in zip(self.importance, self.outputs, strict=True)
        )
        cost = repaired * size / max(sum(self.sizes), 1e-300)
        return Edge(source.site.layer, self.site.layer, tuple(heads), fit.error_before, repaired, cost)

    def _context(self, mine: dict[str, Any], theirs: dict[str, Any], order: list[int], edge: EdgeKind) -> Tensor:
        """[B, S, H, d_v]: the heads' outputs in the order of the source's heads."""
        if edge == "map":
            groups = _group_order(order, mine["v"].shape[1])
            given = {**theirs, "v": mine["v"][:, groups]}
        else:
            given = {**mine, "q": mine["q"][:, order], "k": theirs["k"], "v": theirs["v"]}
            if mine["bias"] is not None and mine["bias"].shape[1] > 1:
                given["bias"] = mine["bias"][:, order]
        return attention_reference(**given, layer=self.site.layer)

    def _map_alignment(self, source: _Kept) -> list[int]:
        similarity = torch.zeros(self.site.heads, self.site.heads)
        for mine, theirs in zip(self.own.operands, source.operands, strict=True):
            for b in range(mine["q"].shape[0]):
                maps = []
                for one in (mine, theirs):
                    rest = [one[name] for name in ("scale", "causal", "window", "softcap")]
                    maps.append(attention_rows(one["q"][b], one["k"][b], rest, self._spread(one["k"])))
                similarity += row_correlation(maps[0][0], maps[1][0], maps[0][1]).cpu()
        return align_heads(-similarity, self.site.kv_heads)

    def _spread(self, keys: Tensor) -> list[int]:
        return [h * keys.shape[1] // self.site.heads for h in range(self.site.heads)]

    def _kv_alignment(self, source: _Kept) -> list[int]:
        """Groups of the consumer to key/value heads of the source, by the error that each pair causes."""
        groups, heads = self.site.kv_heads, self.site.heads
        size = heads // groups
        cost = torch.zeros(groups, groups, dtype=torch.float64)
        blocks = self.weight.unflatten(0, (heads, self.site.d_v))
        # The first batch is one of whole windows.
        for mine, theirs in list(zip(self.own.operands, source.operands, strict=True))[:1]:
            own = attention_reference(**mine, layer=self.site.layer)
            for other in range(groups):
                given = {**mine, "k": theirs["k"][:, [other] * groups], "v": theirs["v"][:, [other] * groups]}
                difference = attention_reference(**given, layer=self.site.layer) - own
                for g in range(groups):
                    at = slice(g * size, (g + 1) * size)
                    moved = torch.einsum("bshd,hdD->bsD", difference[:, :, at], blocks[at])
                    cost[g, other] += float(moved.double().pow(2).sum())
        partner = align_heads(cost, groups)
        return [partner[h // size] * size + h % size for h in range(heads)]


def _group_order(order: Sequence[int], groups: int) -> list[int]:
    """Key/value heads in the order that an order of heads, which keeps groups together, brings them into."""
    size = len(order) // groups
    return [order[g * size] // size for g in range(groups)]
