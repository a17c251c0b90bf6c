"""The constant lane keeps its promise: the norm it goes through changes the latent by less than it says."""

from __future__ import annotations

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from attnopt.codegen.hf.lane import LEAST_HEADROOM, largest_norm, make_lane
from attnopt.errors import UnsupportedError


def through_the_norm(lane, latent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the stock class makes of a latent [n, channels] with the lane added."""
    norm = DeepseekV3RMSNorm(lane.channels + 1).to(dtype)
    norm.weight.data[:-1] = lane.weight
    norm.weight.data[-1] = lane.lane_weight
    return norm(torch.cat([latent, torch.full((len(latent), 1), lane.bias)], 1).to(dtype)).detach()


@pytest.mark.parametrize("channels", [3, 16, 143, 511])
@pytest.mark.parametrize("size", [1e-3, 1.0, 200.0, 1e5])
def test_float32_error_is_at_rounding(channels: int, size: float) -> None:
    latent = torch.randn(50, channels)
    latent *= size * torch.rand(50, 1) / latent.norm(dim=1, keepdim=True)
    latent[0] *= size / latent[0].norm()
    lane = make_lane(channels, size, torch.float32, typical=size / channels**0.5)
    out = through_the_norm(lane, latent, torch.float32)
    error = (out[:, :-1].double() / lane.gain - latent).norm(dim=1) / latent.norm(dim=1)
    assert lane.shortfall < 5e-7
    assert error.max() < lane.shortfall + 1e-6
    assert (out[:, -1].double() / lane.value - 1).abs().max() < lane.shortfall + 1e-6


def test_the_constants_are_exact_in_every_type() -> None:
    """A model written in float32 may be loaded in bfloat16."""
    for channels in (3, 15, 143, 575):
        lane = make_lane(channels, 77.0, torch.float32)
        for value in (lane.bias, lane.weight, lane.lane_weight):
            assert float(torch.tensor(value).bfloat16()) == value
        assert abs(lane.gain - 1) < 2**-8


def test_the_lane_has_the_size_that_was_asked_for() -> None:
    for typical in (0.02, 1.0, 37.0):
        lane = make_lane(143, 50.0, torch.float32, typical)
        assert 0.7 < lane.value / typical < 1.42


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_lose_no_more_than_a_rounding(dtype: torch.dtype) -> None:
    latent = torch.randn(200, 31).to(dtype).float()
    bound = float(latent.norm(dim=1).max())
    lane = make_lane(31, bound, dtype, typical=1.0)
    out = through_the_norm(lane, latent, dtype).double()
    errors = (out[:, :-1] / lane.gain - latent).norm(dim=1) / latent.norm(dim=1)
    assert errors.max() < lane.shortfall + torch.finfo(dtype).eps
    # The lane is a constant: the class's own rounding of it is known, so nothing is lost at all.
    assert (out[:, -1] / lane.value - 1).abs().max() < lane.shortfall + torch.finfo(dtype).eps
    assert torch.finfo(dtype).max > 2 * lane.bias


def test_the_shortfall_is_the_one_that_happens() -> None:
    """At the bound itself, with as little headroom as is ever used, the error is what the formula says."""
    bound = torch.finfo(torch.float16).max / 4 / (2 * LEAST_HEADROOM)
    lane = make_lane(15, bound, torch.float16)
    latent = torch.randn(1, 15)
    latent *= bound / latent.norm()
    # Arithmetic of the norm in float32, so that only the shortfall is left.
    out = through_the_norm(lane, latent, torch.float32).double()
    error = 1 - float(out[0, :-1].norm() / lane.gain / latent.norm())
    assert error == pytest.approx(lane.shortfall, rel=0.02)
    assert 1e-4 < lane.shortfall < 5e-4


def test_float16_without_room_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="float16") as caught:
        make_lane(15, 1000.0, torch.float16)
    assert "bfloat16" in caught.value.hint
    make_lane(15, 1000.0, torch.bfloat16)


def test_largest_norm_is_a_limit_and_is_reached() -> None:
    torch.manual_seed(0)
    matrix, offset, gain = torch.randn(6, 20).double(), torch.randn(6).double(), torch.rand(20).double() + 0.5
    limit = largest_norm(matrix, offset, gain)
    x = torch.randn(5000, 20).double() * torch.rand(5000, 1) * 100
    normal = x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * gain
    assert (normal @ matrix.T + offset).norm(dim=1).max() < limit
    worst = torch.linalg.svd(matrix * gain)[2][0] * 20**0.5
    reached = float((matrix @ (worst * gain)).norm())
    assert reached == pytest.approx(largest_norm(matrix, None, gain), rel=1e-9)
    assert largest_norm(matrix.T[:20], None, torch.ones(6)) > 0  # more rows than columns
