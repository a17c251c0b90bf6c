"""Fits what decides which heads work on a token: a linear map of the layer's input, by ridge regression.

Mixture-of-Head Attention (arXiv 2410.11842) trains its routers. Without training, the best a router can do per token is
to keep the units whose loss would hurt most; the target is the logarithm of how much that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from attnopt.passes.common.reading import output_nodes
from attnopt.passes.common.stream import Stream
from attnopt.rewriter.interpret import LayerRunner, LoadedSegment
from attnopt.rewriter.passes import PassContext
from attnopt.rewriter.precision import exact_products
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite

#: Ridge, as a share of the mean square of the inputs.
STRENGTH = 0.01


@dataclass(frozen=True)
class Router:
    """What was fitted for one layer.

    Attributes:
        weight, bias: scores of the units are weight x + bias, [units, D] and [units].
        mean: [units, D], what each unit adds to the layer's output on average.
        agreement: share of the units chosen by this router that the best choice (by the true loss) has chosen too.
        agreement_qnorm: the same for the norms of the queries.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    agreement: float
    agreement_qnorm: float


def fit_routers(
    program: Program, units: Mapping[str, tuple[Sequence[tuple[int, ...]], int]], context: PassContext
) -> dict[str, Router]:
    """Fit the routers of some layers on the program's own hidden states.

    Args:
        program: before it is routed.
        units: by fqn, the heads of each unit and how many units work on a token.
        context: calibration text.
    """
    runner = LayerRunner(program, context.dtype, context.device)
    text = context.calibration.windows
    stream = Stream(runner, text, text[:0], context.dtype)
    return {
        site.fqn: _fit(program, loaded, stream, site, *units[site.fqn])
        for site, loaded in stream.layers(context.reporter, "fitting routers")
        if site.fqn in units
    }


def _fit(
    program: Program,
    loaded: LoadedSegment,
    stream: Stream,
    site: AttentionSite,
    units: Sequence[tuple[int, ...]],
    active: int,
) -> Router:
    nodes = output_nodes(program, loaded.segment)
    query = program.node(site.nodes.attention).args[0]
    assert isinstance(query, fx.Node)
    names = [site.nodes.input, nodes.context, site.nodes.output, query.name]
    inputs, contexts, weights, norms = [], [], [], []
    for batch in stream.batches:
        env = stream.env(batch)
        x, z, y, q = loaded.evaluate_all(env, names).values()
        inputs.append(x.flatten(0, -2))
        contexts.append(z.flatten(0, -2))
        same = nodes.added and y.shape == env.hidden.shape
        weights.append(stream.weights(batch, y).flatten() if same else x.new_full((len(inputs[-1]),), batch.count))
        norms.append(q.pow(2).sum(-1).transpose(1, 2).flatten(0, 1))  # [tokens, H]
    x, z, weight = torch.cat(inputs), torch.cat(contexts), torch.cat(weights)
    matrix = loaded.weight(site.o.weight)
    blocks = (matrix if site.o.layout == "conv1d" else matrix.T).unflatten(0, (site.heads, site.d_v))
    heads = z.unflatten(-1, (site.heads, site.d_v))
    mean = (heads * weight[:, None, None]).sum(0) / weight.sum()
    loss, fill = [], []
    for unit in units:
        rows = blocks[list(unit)].flatten(0, 1)
        moved = (heads - mean)[:, list(unit)].flatten(1)
        loss.append(((moved @ (rows @ rows.T)) * moved).sum(-1).clamp(min=1e-20))
        fill.append(mean[list(unit)].flatten() @ rows)
    true = torch.stack(loss, -1)
    with exact_products():
        router, offset = _ridge(x, true.log() / 2, weight)
    norm = torch.stack([torch.cat(norms)[:, list(unit)].sum(-1) for unit in units], -1)
    scores = x @ router.T.to(x.dtype) + offset.to(x.dtype)
    return Router(
        router.to(x.dtype), offset.to(x.dtype), torch.stack(fill), _agreement(scores, true, active),
        _agreement(norm, true, active),
    )  # fmt: skip


def _ridge(x: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(W [units, D], b [units]) of the weighted ridge regression of target on x; the bias is free."""
    each = weight[:, None].to(x.dtype)
    total = float(weight.sum())
    centre, aim = (x * each).sum(0) / total, (target * each).sum(0) / total
    moved = x - centre
    gram = ((moved * each).T @ moved).double()
    pull = STRENGTH * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    solved = torch.linalg.solve(gram + pull, ((moved * each).T @ (target - aim)).double()).T
    return solved, aim.double() - solved @ centre.double()


def _agreement(scores: Tensor, true: Tensor, active: int) -> float:
    """Share of the best choice that is chosen."""
    if active == 0:
        return 1.0
    chosen = torch.zeros_like(true).scatter_(-1, scores.topk(active, -1).indices, 1.0)
    best = torch.zeros_like(true).scatter_(-1, true.topk(active, -1).indices, 1.0)
    return float((chosen * best).sum(-1).mean() / active)
