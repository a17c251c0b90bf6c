"""Opening a layer on a prompt: from a loaded segment and what is live before it to a `LayerView`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import UnsupportedError
from attnopt.profiles.attention import AttentionCall, argument_nodes, call_arguments, heads_outputs
from attnopt.profiles.geometry import Geometry, distance_bins, power_of_two_below
from attnopt.profiles.settings import Settings
from attnopt.profiles.view import LayerView, output_weights
from attnopt.rewriter.gates import idle_part
from attnopt.rewriter.interpret import Env, LoadedSegment
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite

#: The heads' terms must add up to the layer's output to this share of it; see `LayerReader.open`.
SUMS_UP = 1e-3


@dataclass(frozen=True)
class Opened:
    """A layer on one prompt.

    Attributes:
        view: for metrics.
        env: what is live before the layer.
        x: input of the attention, [N, T, D].
        y: its output as the graph has it, to go on with.
    """

    view: LayerView
    env: Env
    x: Tensor
    y: Tensor


@dataclass
class LayerReader:
    """Opens layers of a program on prompts.

    Attributes:
        program: what is profiled.
        settings: sizes and thresholds.
        images: whether prompts are images.
        longest: tokens of the longest prompt (0 for images); distances are binned up to it.
    """

    program: Program
    settings: Settings
    images: bool
    longest: int
    _geometries: dict[tuple[int, bool], Geometry] = field(default_factory=dict)

    @property
    def bins(self) -> int:
        """Distance bins, the same for all layers and prompts."""
        # An image of 4,096 patches has 64 on a side; 7 bins reach as far as 64.
        return distance_bins(self.longest) if not self.images else 8

    def geometry(self, call: AttentionCall) -> Geometry:
        """Of the tokens of a call."""
        key = (call.length, call.causal)
        if key not in self._geometries:
            image = self.images and not call.causal
            self._geometries[key] = Geometry.of_image(call.length) if image else Geometry(call.length, call.causal)
        return self._geometries[key]

    def recent(self, geometry: Geometry) -> int:
        """Recent keys that a streaming head sees: a quarter of the longest prompt; of images, a quarter of the area."""
        if geometry.planar:
            return power_of_two_below((geometry.side / 2 + 1) / 2)
        if self.settings.recent is not None:
            return self.settings.recent
        return power_of_two_below(self.longest / (4 if geometry.causal else 8))

    def open(self, layer: LoadedSegment, env: Env) -> Opened:
        """Run a layer's attention on a prompt.

        Raises:
            UnsupportedError: if the layer's output is not finite, or the heads' terms do not add up to it, so that no
                value per head would mean what it says.
        """
        site = layer.segment.site
        assert site is not None
        arguments = call_arguments(self.program, site)
        idle = idle_part(self.program.node(site.nodes.output), site.route)
        context = heads_outputs(self.program, site)
        nodes = [*argument_nodes(arguments), context, site.nodes.output, site.nodes.input]
        nodes += [idle.name] if idle is not None else []
        values = layer.evaluate_all(env, list(dict.fromkeys(nodes)))
        view = self.view(layer, env, arguments, values, values[context])
        if not bool(view.output.isfinite().all()):
            raise UnsupportedError(f"{site.fqn}: its output on a prompt is not finite", "check the model's weights")
        expected = torch.einsum("nthv,hvd->ntd", view.context, view.w_o)
        if view.b_o is not None:
            expected = expected + view.b_o
        if idle is not None:
            expected = expected + values[idle.name].reshape(expected.shape)
        if not torch.allclose(expected, view.output, rtol=SUMS_UP, atol=SUMS_UP * float(view.output.abs().max())):
            raise UnsupportedError(
                f"{site.fqn}: its heads do not add up to its output",
                "something lies between heads and output projection that attnopt does not know; please report it",
            )
        return Opened(view, env, values[site.nodes.input], values[site.nodes.output])

    def view(
        self, layer: LoadedSegment, env: Env, arguments: dict[str, Any], values: dict[str, Any], context: Tensor
    ) -> LayerView:
        """From the values of the layer's nodes, and the outputs of its heads."""
        site = layer.segment.site
        assert site is not None
        call = AttentionCall.read(arguments, values)
        geometry = self.geometry(call)
        output = values[site.nodes.output].unflatten(0, (call.q.shape[0], -1)).flatten(1, -2)
        stream = env.values[env.stream] if env.stream is not None else None
        same = isinstance(stream, Tensor) and stream.shape == output.shape
        w_o, b_o = self.output(layer, site)
        return LayerView(
            site=site,
            call=call,
            context=context,
            output=output,
            stream=stream if same else None,
            w_o=w_o,
            b_o=b_o,
            geometry=geometry,
            settings=self.settings,
            recent=self.recent(geometry),
            bins=self.bins,
        )

    def output(self, layer: LoadedSegment, site: AttentionSite) -> tuple[Tensor, Tensor | None]:
        """W_O [H, dv, D] and b_O [D]."""
        w_o = output_weights(site.o, layer.weight(site.o.weight), site.heads)
        if site.o.bias is None:
            return w_o, None
        bias = layer.weight(site.o.bias)
        return w_o, torch.cat([bias[start:stop] for start, stop in site.o.rows])
