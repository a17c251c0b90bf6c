"""The largest latent of layers with a constant lane, measured again after their weights have changed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, fx

from attnopt.passes.common.stream import Stream
from attnopt.rewriter import parallel
from attnopt.rewriter.interpret import LayerRunner
from attnopt.rewriter.passes import PassContext
from attnopt.rewriter.program import Program


@torch.no_grad()
def with_peaks(program: Program, sites: Collection[str], windows: Tensor, context: PassContext) -> Program:
    """The program with `LatentSpec.peak` of some layers as it is on some text.

    Args:
        program: with its new weights.
        sites: fqns of layers to look at; those whose peak was never measured are left alone.
        windows: [n, S] token ids.
        context: device and type.
    """
    wanted = [f for f in sites if (latent := program.sites[f].latent) is not None and latent.peak > 0]
    if not wanted:
        return program
    found = dict(program.sites)
    runner = LayerRunner(program, context.dtype, context.device)
    stream = Stream(runner, windows, windows[:0], context.dtype, spread=True)
    for site, loaded in stream.layers(context.reporter, "measuring latents"):
        if site.fqn not in wanted:
            continue
        assert site.latent is not None
        op = program.node(site.nodes.attention)
        assert isinstance(op.args[2], fx.Node)
        name, channels = op.args[2].name, site.latent.kv_lora_rank - int(site.latent.lane)
        codes = (loaded.evaluate(stream.env(batch), name)[..., :channels] for batch in stream.batches)
        largest = max((float(code.norm(dim=-1).max()) for code in codes), default=0.0)
        found[site.fqn] = replace(site, latent=replace(site.latent, peak=parallel.largest_of(largest)))
    return program.replace(sites=found)
