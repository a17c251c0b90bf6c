"""Text on its way through the layers, and the tokens that are sent through alone, as first tokens."""

from __future__ import annotations

import pytest
import torch

from attnopt.passes.common.stream import FIRST_TOKEN_SHARE, FIRST_TOKEN_STRIDE, Stream, first_tokens
from attnopt.progress import Silent
from attnopt.rewriter.interpret import LayerRunner
from tests import models


def test_first_tokens_are_the_windows_own_and_more_from_within() -> None:
    windows = torch.arange(8 * 64).view(8, 64)
    found = first_tokens(windows)
    assert found.shape[1] == 1
    assert set(windows[:, 0].tolist()) <= set(found.flatten().tolist())
    assert len(found) == 8 + 8 * 64 // FIRST_TOKEN_STRIDE


def test_where_all_windows_begin_alike_it_is_that_token() -> None:
    windows = torch.arange(8 * 64).view(8, 64)
    windows[:, 0] = 7
    assert first_tokens(windows).tolist() == [[7]]
    assert len(first_tokens(windows[:0])) == 0


def test_first_tokens_weigh_their_share_of_the_text() -> None:
    runner = LayerRunner(models.captured("llama")[1])
    windows = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    stream = Stream(runner, windows, windows[:1], torch.float32)
    for held_out, tokens in ((False, 128), (True, 32)):
        lone = [b for b in stream.batches if b.lone and b.held_out == held_out]
        assert sum(b.count * b.env.hidden.shape[0] for b in lone) == pytest.approx(FIRST_TOKEN_SHARE * tokens)
        assert all(b.env.hidden.shape[1] == 1 for b in lone)
    batch = stream.batches[0]
    hidden = stream.env(batch).hidden
    assert torch.equal(stream.weights(batch, -hidden + 2), torch.full(hidden.shape[:2], 0.25))


@torch.no_grad()
def test_what_the_caller_does_not_send_goes_through_as_it_is() -> None:
    windows = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    runner = LayerRunner(models.captured("llama")[1])
    left, sent = (Stream(runner, windows, windows[:0], torch.float32) for _ in range(2))
    seen = [site.layer for site, _ in left.layers(Silent(), "looking")]
    assert seen == list(range(len(runner.layers)))
    for site, layer in sent.layers(Silent(), "looking"):
        for batch in sent.batches[:1] if site.layer else sent.batches:
            sent.advance(batch, layer, layer.evaluate(sent.env(batch), site.nodes.output))
    for mine, theirs in zip(left.batches, sent.batches, strict=True):
        assert mine.passed == theirs.passed == len(runner.layers)
        assert torch.allclose(mine.env.hidden, theirs.env.hidden, atol=1e-5)
