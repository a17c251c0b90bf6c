"""Heads are matched across layers, groups kept together; unrelated maps are not similar."""

from __future__ import annotations

import pytest
import torch

from attnopt.passes.share.align import align_heads, attention_rows, consumer_order, row_correlation

REST = (1.0, True, 0, 0.0)


def maps(heads: int, length: int, seed: int, sink: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of independent random maps, with a common liking of the first token."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(heads, length, 48, generator=generator)
    k = torch.randn(heads, length, 48, generator=generator)
    q[..., 0], k[:, 0, 0] = 1.0, k[:, 0, 0] + sink
    return attention_rows(q * 0.3, k, REST, range(heads))


@pytest.mark.parametrize("sink", [0.0, 24.0])
def test_independent_maps_do_not_correlate(sink: float) -> None:
    a, seen = maps(4, 256, 0, sink)
    b, _ = maps(4, 256, 1, sink)
    assert float(row_correlation(a, b, seen).abs().mean()) < 0.02
    assert torch.allclose(row_correlation(a, a, seen).diagonal(), torch.ones(4), atol=1e-5)
    flat = torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1))
    assert float(flat.mean()) > (0.3 if sink else 0.01)  # what plain cosines would say


@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (8, 4), (16, 4), (8, 8), (8, 1)])
def test_a_permutation_that_keeps_groups_is_recovered(heads: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(heads * groups)
    size = heads // groups
    order = [int(g) * size + int(p) for g in torch.randperm(groups, generator=generator)
             for p in torch.randperm(size, generator=generator)]  # fmt: skip
    a, seen = maps(heads, 96, 3)
    moved = a[order]  # head h of the consumer holds head order[h] of the source
    found = align_heads(-row_correlation(moved, a, seen), groups)
    assert found == order
    assert torch.equal(moved[consumer_order(found)], a)


def test_rows_sum_to_one_and_see_only_what_they_may() -> None:
    rows, seen = maps(2, 64, 5)
    assert torch.allclose(rows.sum(-1), torch.ones(rows.shape[:2]))
    assert float((rows * ~seen).abs().max()) == 0
    windowed, visible = attention_rows(torch.randn(2, 64, 8), torch.randn(1, 64, 8), (1.0, True, 7, 3.0), [0, 0])
    assert int(visible.sum(-1).max()) == 7
    assert torch.allclose(windowed.sum(-1), torch.ones(windowed.shape[:2]))
