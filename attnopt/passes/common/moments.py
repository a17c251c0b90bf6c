"""Second moments of what each layer's heads give, on calibration text, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.errors import OptionError
from attnopt.passes.common.reading import output_nodes
from attnopt.passes.common.stream import Stream
from attnopt.rewriter import parallel
from attnopt.rewriter.interpret import LayerRunner
from attnopt.rewriter.passes import PassContext
from attnopt.rewriter.precision import exact_products
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite


@dataclass(frozen=True)
class Moments:
    """Weighted moments of a layer's heads, side by side (n = H d_v); tokens count by how small the stream is there.

    Attributes:
        gram: E[z z^T] [n, n], float64.
        mean: E[z] [n].
        weight: of the output projection, [n, D].
    """

    gram: Tensor
    mean: Tensor
    weight: Tensor

    @property
    def covariance(self) -> Tensor:
        """E[z z^T] - E[z] E[z]^T."""
        return self.gram - torch.outer(self.mean, self.mean)


def check_text(program: Program, context: PassContext, why: str) -> None:
    """Refuse to go on without text, or with a program that does not read text.

    Raises:
        OptionError: there is no calibration text, or the model reads images.
    """
    if "input_ids" not in program.inputs:
        raise OptionError(
            f"{why} needs calibration text, and this model reads {', '.join(program.inputs)}",
            "dimap needs no data; the other methods take a plan and fill=none",
        )
    if context.calibration is None:
        raise OptionError(f"{why} needs calibration text", "give text with --calib, or --calib self")


def measure_moments(program: Program, context: PassContext, why: str) -> Iterator[tuple[AttentionSite, Moments]]:
    """The moments of every layer of a program, in order.

    Args:
        program: runs on its own hidden states.
        context: holds the calibration text.
        why: what the text is needed for, for the message when there is none.

    Raises:
        OptionError: there is no calibration text.
    """
    check_text(program, context, why)
    runner = LayerRunner(program, context.dtype, context.device)
    stream = Stream(runner, context.calibration.windows, context.calibration.windows[:0], context.dtype, spread=True)
    for site, loaded in stream.layers(context.reporter, "measuring heads"):
        nodes = output_nodes(program, loaded.segment)
        size = site.heads * site.d_v
        gram = torch.zeros(size, size, dtype=torch.float64, device=context.device)
        total, count = gram.new_zeros(size), 0.0
        for batch in stream.batches:
            env = stream.env(batch)
            found = loaded.evaluate_all(env, [nodes.context, site.nodes.output])
            z, y = found[nodes.context].flatten(0, -2), found[site.nodes.output]
            each = z.new_full((len(z), 1), batch.count)
            if nodes.added and y.shape == env.hidden.shape:
                each = stream.weights(batch, y).flatten()[:, None].to(z.dtype)
            with exact_products():
                gram += ((z * each).T @ z).double()
            total += (z * each).sum(0).double()
            count += float(each.sum())
            stream.advance(batch, loaded, y)
        matrix = loaded.weight(site.o.weight)
        weight = (matrix if site.o.layout == "conv1d" else matrix.T).double()
        parallel.add_up(gram, total)
        (count,) = parallel.sum_of(count)
        yield site, Moments(gram / count, total / count, weight)
