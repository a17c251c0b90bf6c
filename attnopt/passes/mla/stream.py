"""Windows of text on their way through a model, layer by layer: only hidden states are kept between layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.passes.mla.statistics import token_weights
from attnopt.rewriter import parallel
from attnopt.rewriter.interpret import Env, LayerRunner, LoadedSegment

#: Share of the text that first tokens count for. Attention sinks sit there (Xiao et al., arXiv 2309.17453): every later
#: token reads the first one, and an error in it changes all of them.
FIRST_TOKEN_SHARE = 0.25
#: One of so many tokens of the text is also sent through alone, as the first token of a window.
FIRST_TOKEN_STRIDE = 16
#: Tokens that go through a layer at once: enough to keep the processor busy, few enough for little memory.
TOKENS_AT_ONCE = 1024


@dataclass(eq=False)
class Batch:
    """Some windows and where they are.

    Attributes:
        env: what is live before the next layer; the residual stream in the type it is kept in.
        held_out: True for windows that results are judged by, False for those they are fitted on.
        count: how many tokens each of its tokens stands for.
        lone: True for windows of one token.
    """

    env: Env
    held_out: bool
    count: float
    lone: bool


def first_tokens(windows: Tensor) -> Tensor:
    """Tokens to be looked at as first tokens, [n, 1].

    A few dozen windows begin with a few dozen tokens, too few to learn how the model makes any token its attention
    sink; tokens from within the text serve as well. Where all windows begin alike (a document-start token), it is that
    token.

    Args:
        windows: [m, S] token ids.
    """
    if not len(windows) or (bool((windows[:, 0] == windows[0, 0]).all()) and len(windows) > 1):
        return windows[:1, :1]
    inner = windows.flatten()[FIRST_TOKEN_STRIDE // 2 :: FIRST_TOKEN_STRIDE]
    return torch.cat([windows[:, 0], inner]).unique()[:, None]


class Stream:
    """All windows before some layer.

    Args:
        runner: of the program.
        windows: [n, S] token ids to fit on.
        held_out: [m, S] token ids to judge by; may be empty.
        keep: type in which the residual stream is kept between layers.
        spread: of several processes, each takes its share of the windows; sums over them are the caller's to make.
    """

    def __init__(
        self, runner: LayerRunner, windows: Tensor, held_out: Tensor, keep: torch.dtype, *, spread: bool = False
    ) -> None:
        self.runner = runner
        self.keep = keep
        self.batches: list[Batch] = []
        for ids, held in ((windows, False), (held_out, True)):
            starts = first_tokens(ids)
            share = FIRST_TOKEN_SHARE * ids.numel() / max(1, len(starts))
            for these, count in ((ids, 1.0), (starts, share)):
                self._add(these[parallel.share_of(len(these))] if spread else these, held, count)
        runner.close()

    def _add(self, ids: Tensor, held_out: bool, count: float) -> None:
        for part in ids.split(max(1, TOKENS_AT_ONCE // ids.shape[1])) if len(ids) else ():
            env = self._store(self.runner.start({"input_ids": part}))
            self.batches.append(Batch(env, held_out, count, ids.shape[1] == 1))

    def weights(self, batch: Batch, output: Tensor) -> Tensor:
        """Token weights of a batch [B, S], for the output of the layer's attention [B, S, D]."""
        return token_weights(self.env(batch).hidden + output) * batch.count

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
