"""Mass that a sparse pattern retains of the map.

    retained_mass(P) = E_t sum_{j in P(t)} a_tj

and its 5th percentile and minimum over rows. Every pattern may keep the same number b of keys per row, what sinks and
recent keys make up together:

    dense           all keys
    sink_recent     the first s keys and the recent ones                          StreamingLLM, arXiv 2309.17453
    vertical_slash  b/2 columns and b/2 diagonals, those with most mass in the last 64 rows     MInference, arXiv
                    2407.02490, section 3.2
    block_topk      the b/64 tiles of 64 x 64 with most mass of each block of rows (chosen with knowledge of the map: an
                    upper bound for any predictor)                                SeerAttention, arXiv 2410.13276
    strided         b/2 recent keys and every l-th key, l so that b are kept of the longest row    Sparse Transformer,
                    arXiv 1904.10509, section 4.2

"high = the pattern is safe": dropping the rest and renormalising moves a head's output by at most 2 (1 - m) max ‖v_j‖.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.profiles.attention import TILE
from attnopt.profiles.metric import Metric
from attnopt.profiles.metrics.mass import streaming_mass
from attnopt.profiles.profile import MetricInfo
from attnopt.profiles.settings import Settings
from attnopt.profiles.view import LayerView, RowBlock

PATTERNS = ("dense", "sink_recent", "vertical_slash", "block_topk", "strided")


class RetainedMass(Metric):
    """Mass that patterns keep, by row."""

    uses_map = True

    def __init__(self, view: LayerView) -> None:
        super().__init__(view)
        self.columns, self.slashes = vertical_slash(view)
        self.kept: list[Tensor] = []

    @classmethod
    def describe(cls, settings: Settings, bins: int) -> dict[str, MetricInfo]:
        axes = ("site", "head", "pattern")
        source = "patterns' papers in metrics/patterns.py"
        what = "attention kept by a sparse pattern"
        return {
            "retained_mass": MetricInfo(1, axes, "", what, source, PATTERNS),
            "retained_mass_p05": MetricInfo(1, axes, "", f"{what}: 5th percentile of rows", source, PATTERNS),
            "retained_mass_min": MetricInfo(1, axes, "", f"{what}: worst row", source, PATTERNS),
        }

    def update(self, block: RowBlock) -> None:
        kept = [
            block.total,
            streaming_mass(block),
            self._vertical_slash(block),
            self._block_topk(block),
            self._strided(block),
        ]
        self.kept.append(torch.stack(kept, -1)[:, :, block.counted])

    def result(self) -> dict[str, Tensor]:
        rows = torch.cat(self.kept, 2).transpose(0, 1).flatten(1, 2)  # [H, rows, patterns]
        if rows.shape[1] == 0:
            return {}
        ordered = rows.sort(1).values
        return {
            "retained_mass": rows.double().mean(1),
            "retained_mass_p05": ordered[:, int(0.05 * (rows.shape[1] - 1))],
            "retained_mass_min": ordered[:, 0],
        }

    def _vertical_slash(self, block: RowBlock) -> Tensor:
        columns = self.columns[..., : block.keys]
        vertical = torch.einsum("nhrt,nht->nhr", block.weights, columns)
        rest = block.weights * (1 - columns)[:, :, None]
        at = (block.diagonals + self.view.geometry.length).clamp(0, self.slashes.shape[-1] - 1)
        table = self.slashes.flatten(0, 1)[:, at, None]
        return vertical + block.along_diagonals(block.skewed(rest), table)[..., 0]

    def _block_topk(self, block: RowBlock) -> Tensor:
        count, keys = block.weights.shape[2:]
        padded = torch.nn.functional.pad(block.weights, (0, -keys % TILE))
        tiles = padded.unflatten(-1, (-1, TILE)).sum(-1)  # [N, H, R, tiles]
        pooled = torch.nn.functional.pad(tiles, (0, 0, 0, -count % TILE)).unflatten(2, (-1, TILE)).sum(3)
        chosen = pooled.topk(min(max(1, self.view.budget // TILE), pooled.shape[-1]), dim=-1).indices
        each_row = chosen.repeat_interleave(TILE, 2)[:, :, :count]
        return tiles.gather(-1, each_row).sum(-1)

    def _strided(self, block: RowBlock) -> Tensor:
        view = self.view
        near = max(1, view.budget // 2)
        stride = max(2, -(-view.geometry.length // max(1, view.budget - near)))
        if view.geometry.planar:
            apart = block.rows[:, None] - torch.arange(block.keys, device=block.rows.device)
            # A square neighbourhood of about `near` patches.
            seen = (block.distances < max(1, round(near**0.5 / 2))) | (apart % stride == 0)
            return torch.einsum("nhrt,rt->nhr", block.weights, seen.to(block.weights.dtype))
        apart = block.diagonals
        reach = near if view.geometry.causal else (near + 1) // 2
        table = ((apart.abs() < reach) | (apart % stride == 0)).to(block.weights.dtype)
        return block.along_diagonals(block.skewed_weights, table[:, None])[..., 0]


def vertical_slash(view: LayerView) -> tuple[Tensor, Tensor]:
    """The columns and diagonals with most mass in the last `TILE` rows.

    Returns:
        0 or 1 for each column, [N, H, T], and for each diagonal, [N, H, 2 T], by query minus key position plus T.
    """
    length = view.geometry.length
    first = max(0, length - TILE)
    block = RowBlock(view, first, view.call.rows(slice(first, length)))
    n, heads = block.weights.shape[:2]
    kept_columns = max(1, view.budget // 2)
    mass = block.weights.sum(2)
    columns = torch.zeros_like(mass).scatter_(-1, mass.topk(min(kept_columns, length)).indices, 1.0)
    along = block.skewed_weights.sum(1).view(n, heads, -1)
    by_diagonal = along.new_zeros(n, heads, 2 * length + TILE + 1)
    by_diagonal[..., block.diagonals + length] = along
    kept_slashes = max(1, view.budget - kept_columns)
    slashes = torch.zeros_like(by_diagonal).scatter_(-1, by_diagonal.topk(kept_slashes).indices, 1.0)
    return columns, slashes[..., : 2 * length + 1]
