"""The constant lane: how a layer without a latent norm is written for a class that always has one.

The stock class computes RMSNorm(c, B) * w for the latent c [n] with one more channel that is the constant B >> |c|:

    rms = sqrt((|c|^2 + B^2) / (n + 1) + eps)  =  rms_0 * sqrt(1 + |c|^2 / ((n + 1) * rms_0^2)),
    rms_0 = sqrt(B^2 / (n + 1) + eps).

With weight w = 2^k on the n channels the result is c * (w / rms_0), short by at most |c|^2 / (2 B^2) (relative);
w / rms_0 is close to 1 and the next matrix takes it up exactly. The lane itself leaves the norm as a constant and can
feed a bias through the next matrix. mla-conversion section 5.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from attnopt.errors import UnsupportedError

NORM_EPS = 1e-6  # of the class's norms on latents; not the config's rms_norm_eps
HEADROOM = 1024.0  # B / bound on |c| where the exponent range allows: error at most 5e-7
LEAST_HEADROOM = 32.0  # below this the error reaches 5e-4 and emission is refused


@dataclass(frozen=True)
class Lane:
    """Numbers that make one norm with a constant lane neutral.

    Attributes:
        channels: latent channels without the lane.
        bias: B, the lane's value before the norm; exact in bfloat16, and so in every type that is written.
        weight: norm weight of the channels, a power of two.
        lane_weight: norm weight of the lane, a power of two.
        gain: what the norm multiplies the channels by, close to 1.
        value: the lane after the norm, as the class computes it in the target type.
        shortfall: largest relative shrink of the channels, for the bound the lane was made for.
    """

    channels: int
    bias: float
    weight: float
    lane_weight: float
    gain: float
    value: float
    shortfall: float


def make_lane(channels: int, bound: float, dtype: torch.dtype, typical: float = 0.0) -> Lane:
    """Choose the constants for a latent of `channels` numbers whose norm never exceeds `bound`.

    Args:
        channels: width of the latent without the lane.
        bound: upper limit of |c|, or the largest |c| seen.
        dtype: type the written model computes in.
        typical: wanted size of the lane after the norm (that of a latent channel, so that a cache quantised with one
            scale per tensor is not crushed); 0 for about 1.

    Raises:
        UnsupportedError: if `dtype` cannot hold a B that is large enough.
    """
    width = channels + 1
    bound = max(bound, 1e-6)
    headroom = HEADROOM
    # The norm divides by about B: half of the small end of the exponent range is left for the channels.
    largest = torch.finfo(dtype).max / 4 if dtype == torch.float16 else 2.0**60
    if bound * headroom * 2 > largest:
        headroom = largest / (2 * bound)
    if headroom < LEAST_HEADROOM:
        raise UnsupportedError(
            f"a latent of norm {bound:.0f} leaves no room for the constant lane in {str(dtype).removeprefix('torch.')}",
            "write the model in bfloat16 or float32 (--dtype bfloat16), or use --emit attnopt",
        )
    weight = 2.0 ** math.ceil(math.log2(headroom * bound / math.sqrt(width)))
    # Eight significant bits: exact in every type, so that a model written in float32 and loaded in bfloat16 keeps B.
    bias = float(torch.tensor(weight * math.sqrt(width), dtype=torch.float64).to(torch.bfloat16))
    rms = math.sqrt(bias**2 / width + NORM_EPS)
    lane_weight = 2.0 ** round(math.log2((typical or 1.0) / math.sqrt(width)))
    normal = torch.tensor(bias / rms, dtype=torch.float64).to(dtype)
    return Lane(
        channels=channels,
        bias=bias,
        weight=weight,
        lane_weight=lane_weight,
        gain=weight / rms,
        value=float(normal) * lane_weight,
        shortfall=0.5 * (bound / bias) ** 2,
    )


def largest_norm(matrix: torch.Tensor, offset: torch.Tensor | None, gain: torch.Tensor) -> float:
    """Upper limit of |matrix @ x + offset| over all x that leave an RMSNorm with weight `gain`.

    Such an x is gain * u with |u| <= sqrt(D), so the limit is the largest singular value of matrix * gain times
    sqrt(D), plus |offset|. It holds for every text, not only for the one that was looked at.

    Args:
        matrix: [n, D]; offset: [n] or None; gain: [D].
    """
    scaled = matrix.double() * gain.double()
    small = scaled @ scaled.T if scaled.shape[0] <= scaled.shape[1] else scaled.T @ scaled
    top = float(torch.linalg.eigvalsh(small)[-1].clamp(min=0)) ** 0.5
    return top * math.sqrt(matrix.shape[1]) + (float(offset.double().norm()) if offset is not None else 0.0)
