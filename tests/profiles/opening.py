"""Ways to get at one layer of a tiny model as metrics see it, and the plain formula of its map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnopt.profiles.attention import AttentionCall
from attnopt.profiles.geometry import Geometry
from attnopt.profiles.layers import LayerReader
from attnopt.profiles.prompts import Prompts
from attnopt.profiles.settings import Settings
from attnopt.profiles.view import LayerView, RowBlock
from attnopt.rewriter.interpret import LayerRunner
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite, MaskSpec

SETTINGS = Settings(windows=(2, 8), skip=3, recent=8, pair_rows=16)


@torch.no_grad()
def views(program: Program, inputs: Mapping[str, Tensor], settings: Settings = SETTINGS) -> list[LayerView]:
    """Every layer of a program on one prompt, in float64."""
    prompts = Prompts.of([inputs], "test")
    reader = LayerReader(program, settings, prompts.images, max(prompts.lengths))
    runner = LayerRunner(program, torch.float64)
    env = runner.start(prompts.inputs[0])
    found = []
    for segment in runner.layers:
        with runner.load(segment) as layer:
            found.append(reader.open(layer, env).view)
            env = layer.advance(env)
    return found


def random_view(
    heads: int = 4,
    groups: int = 2,
    length: int = 50,
    *,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
    image: bool = False,
    windows: int = 1,
    recent: int = 8,
    seed: int = 0,
    **call: Any,
) -> LayerView:
    """A layer made of random queries, keys and values in float64; `call` replaces fields of its AttentionCall."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d, dv, width = 6, 5, 24
    fields: dict[str, Any] = {
        "q": 2 * draw(windows, heads, length, d),
        "k": draw(windows, groups, length, d),
        "v": draw(windows, groups, length, dv),
        "bias": None,
        "scale": d**-0.5,
        "causal": causal,
        "window": window,
        "softcap": softcap,
        "sinks": draw(heads) if sinks else None,
    }
    attention = AttentionCall(**{**fields, **call})
    w_o = draw(heads, dv, width)
    context = (dense_map(attention) @ attention.per_head(attention.v)).transpose(1, 2)
    geometry = Geometry.of_image(length) if image else Geometry(length, causal)
    return LayerView(
        site=site(heads, groups, causal),
        call=attention,
        context=context,
        output=torch.einsum("nthv,hvd->ntd", context, w_o),
        stream=None,
        w_o=w_o,
        b_o=None,
        geometry=geometry,
        settings=SETTINGS,
        recent=recent,
        bins=8,
    )


def site(heads: int, groups: int, causal: bool = True) -> AttentionSite:
    """Facts of a layer; only heads and mask matter."""
    facts: dict[str, Any] = dict.fromkeys(AttentionSite.__dataclass_fields__)
    mask = MaskSpec(causal=causal)
    return AttentionSite(**{**facts, "fqn": "layer", "heads": heads, "kv_heads": groups, "mask": mask})


def dense_map(call: AttentionCall) -> Tensor:
    """The whole attention map [N, H, T, T], straight from the formula at the head of `rewriter.ops.attention`."""
    length = call.length
    logits = call.q @ call.per_head(call.k).mT * call.scale
    if call.softcap > 0:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    if call.bias is not None:
        logits = logits + call.bias
    apart = torch.arange(length)[:, None] - torch.arange(length)
    if call.causal:
        logits = logits.masked_fill(apart < 0, -torch.inf)
    if call.window:
        logits = logits.masked_fill(apart >= call.window, -torch.inf)
    weights = logits.exp()
    total = weights.sum(-1, keepdim=True)
    if call.sinks is not None:
        total = total + call.sinks.exp().view(-1, 1, 1)
    return weights / total


def blocks(view: LayerView, step: int) -> list[RowBlock]:
    """The map in blocks of `step` rows."""
    length = view.call.length
    result = []
    for first in range(0, length, step):
        last = min(first + step, length)
        keys = last if view.call.causal else length
        result.append(RowBlock(view, first, view.call.rows(slice(first, last), keys)))
    return result
