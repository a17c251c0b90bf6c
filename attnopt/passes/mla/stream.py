"""Windows of text on their way through a model, layer by layer: only hidden states are kept between layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.rewriter.interpret import Env, LayerRunner, LoadedSegment

#: Tokens that go through a layer at once: enough to keep the processor busy, few enough for little memory.
TOKENS_AT_ONCE = 1024


@dataclass(eq=False)
class Batch:
    """Some windows and where they are.

    Attributes:
        env: what is live before the next layer; the residual stream in the type it is kept in.
        held_out: True for windows that results are judged by, False for those they are fitted on.
    """

    env: Env
    held_out: bool


class Stream:
    """All windows before some layer.

    Args:
        runner: of the program.
        windows: [n, S] token ids to fit on.
        held_out: [m, S] token ids to judge by; may be empty.
        keep: type in which the residual stream is kept between layers.
    """

    def __init__(self, runner: LayerRunner, windows: Tensor, held_out: Tensor, keep: torch.dtype) -> None:
        self.runner = runner
        self.keep = keep
        self.batches: list[Batch] = []
        for ids, held in ((windows, False), (held_out, True)):
            for part in ids.split(max(1, TOKENS_AT_ONCE // ids.shape[1])) if len(ids) else ():
                self.batches.append(Batch(self._store(runner.start({"input_ids": part})), held))
        runner.close()

    def env(self, batch: Batch) -> Env:
        """What is live before the next layer, in the type to compute in."""
        return batch.env.with_hidden(batch.env.hidden.to(self.runner.dtype))

    def advance(self, batch: Batch, layer: LoadedSegment, output: Tensor) -> None:
        """Send a batch through a layer whose attention gives `output`."""
        assert layer.segment.site is not None
        env = layer.advance(self.env(batch), overrides={layer.segment.site.nodes.output: output})
        batch.env = self._store(env)

    def advance_unchanged(self, batch: Batch, layer: LoadedSegment) -> None:
        """Send a batch through a layer as it is."""
        batch.env = self._store(layer.advance(self.env(batch)))

    def _store(self, env: Env) -> Env:
        return env.with_hidden(env.hidden.to(self.keep))
