"""Windows of text on their way through a model, layer by layer: only hidden states are kept between layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.passes.common.positions import spaced
from attnopt.progress import Reporter, bar
from attnopt.rewriter import parallel
from attnopt.rewriter.interpret import Env, LayerRunner, LoadedSegment
from attnopt.rewriter.precision import quick_products
from attnopt.rewriter.site import AttentionSite

#: Share of the text that first tokens count for. Attention sinks sit there (Xiao et al., arXiv 2309.17453): every later
#: token reads the first one, and an error in it changes all of them.
FIRST_TOKEN_SHARE = 0.25
#: One of so many tokens of the text is also sent through alone, as the first token of a window.
FIRST_TOKEN_STRIDE = 16
#: Tokens that go through a layer at once: enough to keep the processor busy, few enough for little memory.
TOKENS_AT_ONCE = 1024


def token_weights(hidden: Tensor) -> Tensor:
    """l_i = 1 / mean-square(h_i): the next norm divides by the residual stream's size, and so it does its errors.

    Args:
        hidden: the residual stream after the attention was added, [B, S, D].

    Returns:
        [B, S], positive.
    """
    return 1 / hidden.float().pow(2).mean(-1).clamp(min=1e-12)


@dataclass(eq=False)
class Batch:
    """Some windows and where they are.

    Attributes:
        env: what is live before the next layer; the residual stream in the type it is kept in.
        held_out: True for windows that results are judged by, False for those they are fitted on.
        count: how many tokens each of its tokens stands for.
        lone: True for windows of one token.
        positions: of the tokens [B, S], rising.
        passed: how many layers it has gone through.
    """

    env: Env
    held_out: bool
    count: float
    lone: bool
    positions: Tensor
    passed: int = 0


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
        reach: some windows' positions are to span up to so many tokens, see `spaced`; 0 for none.
    """

    def __init__(
        self,
        runner: LayerRunner,
        windows: Tensor,
        held_out: Tensor,
        keep: torch.dtype,
        *,
        spread: bool = False,
        reach: int = 0,
    ) -> None:
        self.runner = runner
        self.keep = keep
        self.batches: list[Batch] = []
        for ids, held in ((windows, False), (held_out, True)):
            starts = first_tokens(ids)
            share = FIRST_TOKEN_SHARE * ids.numel() / max(1, len(starts))
            for these, count in ((ids, 1.0), (starts, share)):
                own = parallel.share_of(len(these)) if spread else slice(None)
                self._add(these[own], spaced(len(these), these.shape[1], reach)[own], held, count)
        runner.close()

    def _add(self, ids: Tensor, positions: Tensor, held_out: bool, count: float) -> None:
        at_once = max(1, TOKENS_AT_ONCE // ids.shape[1])
        for part, places in zip(ids.split(at_once), positions.split(at_once), strict=True) if len(ids) else ():
            env = self._store(self.runner.start({"input_ids": part, "position_ids": places}))
            self.batches.append(Batch(env, held_out, count, ids.shape[1] == 1, places))

    def weights(self, batch: Batch, output: Tensor) -> Tensor:
        """Token weights of a batch [B, S], for the output of the layer's attention [B, S, D]."""
        return token_weights(self.env(batch).hidden + output) * batch.count

    def env(self, batch: Batch) -> Env:
        """What is live before the next layer, in the type to compute in."""
        return batch.env.with_hidden(batch.env.hidden.to(self.runner.dtype))

    def advance(self, batch: Batch, layer: LoadedSegment, output: Tensor) -> None:
        """Send a batch through a layer whose attention gives `output`."""
        assert layer.segment.site is not None
        self._sent(batch, layer.advance(self.env(batch), overrides={layer.segment.site.nodes.output: output}))

    def advance_unchanged(self, batch: Batch, layer: LoadedSegment) -> None:
        """Send a batch through a layer as it is."""
        self._sent(batch, layer.advance(self.env(batch)))

    def layers(self, reporter: Reporter, what: str) -> Iterator[tuple[AttentionSite, LoadedSegment]]:
        """Every layer in turn, with all batches before it.

        Batches that the caller does not send through a layer then go through it as it is. Products are quick ones
        meanwhile (`attnopt.rewriter.precision`).

        Args:
            reporter: told of the layers done.
            what: is being done, for people.
        """
        total = len(self.runner.layers)
        with quick_products(self.runner.device), bar(reporter, what, total, "layers") as handle:
            for index, segment in enumerate(self.runner.layers):
                assert segment.site is not None
                with self.runner.load(segment) as layer:
                    yield segment.site, layer
                    for batch in self.batches:
                        if batch.passed == index:
                            self.advance_unchanged(batch, layer)
                reporter.advance(handle)

    def _sent(self, batch: Batch, env: Env) -> None:
        batch.env = self._store(env)
        batch.passed += 1

    def _store(self, env: Env) -> Env:
        return env.with_hidden(env.hidden.to(self.keep))
