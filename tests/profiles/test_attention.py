"""Maps in blocks of rows are those of the plain formula, whatever op computes the layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.profiles.attention import AttentionCall
from attnopt.profiles.geometry import Geometry, bin_labels, bin_of, distance_bins, power_of_two_below
from attnopt.profiles.view import RowBlock
from tests import models
from tests.profiles.opening import blocks, dense_map, random_view, views

#: Grouped heads, window and softcap, no rotation, an encoder, shifted windows, a latent.
FAMILIES = ("llama", "gemma2", "gpt2", "bert", "swin", "deepseek_v3")


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_make_up_the_map_and_the_map_makes_the_output(family: str) -> None:
    inputs = {name: value[:1] for name, value in models.inputs(family, 1, 20).items()}
    for view in views(models.captured(family)[1], inputs):
        dense = dense_map(view.call)
        for block in blocks(view, 7):
            rows = dense[:, :, block.first : block.first + block.weights.shape[2]]
            torch.testing.assert_close(block.weights, rows[..., : block.keys], rtol=1e-9, atol=1e-12)
            assert float(rows[..., block.keys :].abs().sum()) == 0
        context = (dense @ view.call.per_head(view.call.v)).transpose(1, 2)
        torch.testing.assert_close(view.context, context, rtol=1e-5, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    length=st.integers(1, 40),
    step=st.integers(1, 17),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 5]),
    sinks=st.booleans(),
)
def test_rows_of_any_shape(
    groups: int, per_group: int, length: int, step: int, causal: bool, window: int, sinks: bool
) -> None:
    view = random_view(groups * per_group, groups, length, causal=causal, window=window if causal else 0, sinks=sinks)
    dense = dense_map(view.call)
    found = torch.zeros_like(dense)
    for block in blocks(view, step):
        found[:, :, block.first : block.first + block.weights.shape[2], : block.keys] = block.weights
    torch.testing.assert_close(found, dense, rtol=1e-9, atol=1e-12)


def test_the_models_own_blocks_cover_all_rows_in_tiles() -> None:
    view = random_view(length=200)
    firsts = [first for first, _ in view.call.blocks()]
    assert sum(weights.shape[2] for _, weights in view.call.blocks()) == 200
    assert all(first % 64 == 0 for first in firsts)


def test_memory_does_not_grow_with_the_square_of_the_length() -> None:
    call = random_view(heads=8, groups=8, length=4).call
    long = AttentionCall(**{**vars(call), **{name: torch.zeros(1, 8, 8192, 6) for name in ("q", "k", "v")}})
    first, weights = next(iter(long.blocks()))
    assert first == 0
    assert weights.shape == (1, 8, 64, 64)
    assert long.block_rows() == 64


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("image", [True, False])
def test_mass_by_distance(causal: bool, image: bool) -> None:
    view = random_view(length=50, causal=causal and not image, image=image)
    dense = dense_map(view.call)
    distance = view.geometry.distances(torch.arange(50), 50)
    expected = torch.zeros(1, 4, 50, view.bins, dtype=torch.float64)
    for b in range(view.bins):
        expected[..., b] = (dense * (bin_of(distance.clamp(min=0)) == b)).sum(-1)
    for block in blocks(view, 16):
        rows = slice(block.first, block.first + block.weights.shape[2])
        torch.testing.assert_close(block.by_distance, expected[:, :, rows])


def test_skewing_puts_diagonals_into_columns() -> None:
    view = random_view(heads=1, groups=1, length=9)
    weights = torch.arange(4 * 6, dtype=torch.float64).view(1, 1, 4, 6) + 1
    block = RowBlock(view, 2, weights)
    skewed = block.skewed(weights)[0]
    for column, diagonal in enumerate(block.diagonals.tolist()):
        expected = [weights[0, 0, i, 2 + i - diagonal] if 0 <= 2 + i - diagonal < 6 else 0.0 for i in range(4)]
        assert skewed[:, column].tolist() == [float(value) for value in expected]


def test_bins() -> None:
    assert bin_of(torch.tensor([0, 1, 2, 3, 4, 7, 8, 1023])).tolist() == [0, 1, 2, 2, 3, 3, 4, 10]
    assert distance_bins(1) == 1
    assert distance_bins(1024) == 11
    assert bin_labels(4) == ("0", "1", "2-3", "4-7")
    assert [power_of_two_below(v) for v in (0.3, 1, 5, 256)] == [1, 1, 4, 256]


def test_image_geometry() -> None:
    grid = Geometry.of_image(17)
    assert (grid.side, grid.prefix) == (4, 1)
    distances = grid.distances(torch.arange(17), 17)
    assert distances[0].tolist() == [0] * 17
    assert int(distances[1, 16]) == 3
    assert int(distances[1, 6]) == 1
    assert not Geometry.of_image(7).planar
