"""Random source layers and text for the tests of the conversion, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.passes.mla.source_layer import HeadNorm, SourceLayer
from attnopt.passes.mla.statistics import LayerStatistics

#: Query heads / key heads that must work.
GRIDS = ((8, 2), (8, 4), (16, 4), (16, 2), (8, 8), (8, 1), (9, 3))


def source(
    heads: int = 4,
    groups: int = 2,
    d: int = 8,
    d_v: int | None = None,
    width: int | None = None,
    *,
    bias: bool = False,
    norms: bool = False,
    rotary: int | None = None,
    turn: float = 1.0,
    seed: int = 0,
) -> SourceLayer:
    """A layer whose logits have a spread of about 2; `rotary` of d dims turn."""
    generator = torch.Generator().manual_seed(seed)
    d_v = d if d_v is None else d_v
    width = heads * d if width is None else width
    pairs = (d if rotary is None else rotary) // 2

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    inv_freq = torch.zeros(d // 2, dtype=torch.float64)
    inv_freq[:pairs] = 100.0 ** (-torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
    gain = torch.ones(d, dtype=torch.float64)
    gain[:pairs] = gain[d // 2 : d // 2 + pairs] = turn
    return SourceLayer(
        w_q=random(heads, d, width, scale=1.5 * width**-0.5),
        w_k=random(groups, d, width, scale=1.5 * width**-0.5),
        w_v=random(groups, d_v, width, scale=width**-0.5),
        w_o=random(width, heads, d_v, scale=(heads * d_v) ** -0.5),
        b_q=random(heads, d) if bias else None,
        b_k=random(groups, d) if bias else None,
        b_v=random(groups, d_v) if bias else None,
        b_o=None,
        q_norm=HeadNorm(1 + 0.3 * random(d), 1e-6) if norms else None,
        k_norm=HeadNorm(1 + 0.3 * random(d), 1e-6) if norms else None,
        turn=gain,
        inv_freq=inv_freq,
        scale=d**-0.5,
        order=torch.arange(d),
        by_outputs=bias or norms or groups * (d + d_v) <= width,
    )


def text(layer: SourceLayer, batch: int = 6, length: int = 48, seed: int = 1, mean: float = 0.5) -> Tensor:
    """Attention inputs [B, S, D] with a mean and an uneven spectrum."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, layer.width, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(2, 0.2, layer.width, dtype=torch.float64)
    return x + mean * torch.randn(layer.width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


def apart(batch: int, length: int, gap: int) -> Tensor:
    """Positions [B, S] of which the second half is moved away by `gap`, in the second window twice as far."""
    positions = torch.arange(length).repeat(batch, 1)
    positions[:, length // 2 :] += gap
    positions[1:, length // 2 :] += gap
    return positions


def weights_of(x: Tensor) -> Tensor:
    """Positive token weights [B, S], not all equal."""
    return 0.5 + torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(3))


def statistics(layer: SourceLayer, x: Tensor | None = None, stride: int = 1, pooled: bool = False) -> LayerStatistics:
    """Statistics of a layer over `text`."""
    x = text(layer) if x is None else x
    result = LayerStatistics(layer, stride, pooled)
    result.update(x, weights_of(x))
    return result


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())
