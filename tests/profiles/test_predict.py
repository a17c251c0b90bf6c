"""Predicted costs are the counts that the formulas say, and windows end them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnopt.profiles.predict import CONTEXTS, predictions, totals
from attnopt.profiles.profile import SharingGroup
from attnopt.rewriter.site import AttentionSite, MaskSpec
from tests import models

# The tiny Llama: two layers, hidden size 32, 4 query and 2 key/value heads of 8.
D, H, K, W = 32, 4, 2, 8
PROJECTIONS = 2 * D * (H * W + 2 * K * W) + 2 * H * W * D


def sites() -> list[AttentionSite]:
    return list(models.captured("llama")[1].site_list)


def test_counts_by_hand() -> None:
    group = SharingGroup((0, 1), 1.0, 0.0)
    streaming = torch.tensor([[0.001, 0.5], [0.5, 0.5]])
    found = predictions(sites(), (group,), streaming, 100, [64, 64])
    assert tuple(found["contexts"]) == CONTEXTS
    costs = totals(found, 1024)
    cache, flops = 2 * 1024 * 2 * K * W, 2 * (PROJECTIONS + 1024 * 2 * H * 2 * W)
    assert costs["original"] == (cache, flops)
    assert costs["mla 0.5"][0] == cache // 2
    # Layer 1 has no queries and keys of its own: half its cache, and the product with the values only.
    saved = 2 * D * (H + K) * W + 1024 * 2 * H * W
    assert costs["share map"] == (cache - 1024 * K * W, flops - saved)
    assert costs["share kv"] == (cache // 2, flops - 2 * D * 2 * K * W)
    assert costs["prune 0.75"] == (0.75 * cache, 0.75 * flops)
    assert costs["moh 0.75"][0] == cache
    # One of four KV heads keeps 100 tokens.
    assert costs["streaming"][0] == cache - (1024 - 100) * 2 * W
    assert costs["streaming"][1] == flops - (1024 - 100) * 2 * (H // K) * 2 * W


def test_windows_end_the_cache() -> None:
    narrow = [replace(site, mask=MaskSpec(causal=True, window=50)) for site in sites()]
    found = totals(predictions(narrow, (), None, 100, [64, 64]), 1024)
    assert found["original"] == (2 * 50 * 2 * K * W, 2 * (PROJECTIONS + 50 * 2 * H * 2 * W))


@pytest.mark.parametrize(("family", "tokens"), [("bert", [20, 20]), ("swin", [4, 4, 4, 4])])
def test_layers_that_are_not_causal_see_what_they_were_measured_with(family: str, tokens: list[int]) -> None:
    program = models.captured(family)[1]
    found = predictions(program.site_list, (), None, 100, tokens)
    assert found["contexts"] == [max(tokens)]
    assert totals(found, max(tokens))["original"][0] == 0
    per_key = [2 * site.heads * 2 * site.d_v for site in program.site_list]
    wider = predictions(program.site_list, (), None, 100, [t + 1 for t in tokens])
    more = totals(wider, max(tokens) + 1)["original"][1] - totals(found, max(tokens))["original"][1]
    assert more == sum(per_key)
