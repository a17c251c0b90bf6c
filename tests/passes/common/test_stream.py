"""Text on its way through the layers, and the tokens that are sent through alone, as first tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.passes.common.positions import LEAST_GAP, SPACED, reach_of, spaced
from attnopt.passes.common.stream import (
    FIRST_TOKEN_SHARE,
    FIRST_TOKEN_STRIDE,
    Stream,
    first_tokens,
)
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


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 12), length=st.integers(1, 40), reach=st.integers(1, 5000))
def test_positions_rise_and_stay_within_reach(count: int, length: int, reach: int) -> None:
    positions = spaced(count, length, reach)
    assert positions.shape == (count, length)
    steps = positions.diff(dim=1)
    assert bool((positions[:, 0] == 0).all())
    assert bool((steps >= 1).all())
    assert int(positions.max()) < max(reach, length)
    gapped = (steps > 1).sum(1)
    far = reach > length and length >= 4
    assert gapped.tolist() == [int(far and index % SPACED == SPACED - 1) for index in range(count)]
    if reach - length >= LEAST_GAP and far:
        assert bool((steps[steps > 1] > LEAST_GAP).all())


def test_gaps_of_all_sizes_are_equally_likely_in_the_logarithm() -> None:
    steps = spaced(4000, 8, 8192).diff(dim=1).max(1).values
    steps = steps[steps > 1].double().log2()
    assert float(steps.mean()) == pytest.approx((6 + 13) / 2, abs=0.2)
    for first in (0, 1, 2):
        assert torch.equal(spaced(40, 8, 8192, first), spaced(80, 8, 8192)[first : first + 40])


@torch.no_grad()
def test_windows_go_through_the_layers_at_their_positions() -> None:
    _, program = models.captured("llama")
    runner = LayerRunner(program)
    windows = torch.randint(0, 64, (5, 32), generator=torch.Generator().manual_seed(0))
    stream = Stream(runner, windows, windows[:0], torch.float32, reach=500)
    positions = torch.cat([b.positions for b in stream.batches if not b.lone])
    assert torch.equal(positions, spaced(5, 32, 500))
    for _ in stream.layers(Silent(), "looking"):
        pass
    env = runner.start({"input_ids": windows, "position_ids": positions})
    for segment in runner.layers:
        with runner.load(segment) as layer:
            env = layer.advance(env)
    found = torch.cat([b.env.hidden for b in stream.batches if not b.lone])
    assert torch.allclose(found, env.hidden, atol=1e-4)


def test_where_a_layer_sees_a_window_nothing_is_moved() -> None:
    _, program = models.captured("llama")
    assert reach_of(program) == program.config["max_position_embeddings"]
    first, *rest = program.site_list
    windowed = {first.fqn: replace(first, mask=replace(first.mask, window=8)), **{s.fqn: s for s in rest}}
    assert reach_of(program.replace(sites=windowed)) == 0
    assert reach_of(program.replace(config={})) == 0
