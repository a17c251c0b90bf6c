"""What a metric sees: one layer on one prompt, and the layer's map in blocks of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from attnopt.profiles.attention import AttentionCall
from attnopt.profiles.geometry import Geometry, bin_of
from attnopt.profiles.settings import Settings
from attnopt.rewriter.site import AttentionSite, Projection


@dataclass(frozen=True, eq=False)
class LayerView:
    """One attention layer on one prompt.

    Attributes:
        site: the layer.
        call: its attention.
        context: heads' outputs, [N, T, H, dv].
        output: the layer's output before the residual addition, [N, T, D].
        stream: the residual stream before the layer, or None if it is not of the output's shape.
        w_o: output projection by head, [H, dv, D].
        b_o: its bias [D], or None.
        geometry: positions.
        settings: sizes and thresholds.
        recent: recent keys that a streaming head sees.
        bins: number of distance bins, the same for all layers and prompts of a profile.
        grad: dL/d(context) [N, T, H, dv], in the backward pass only.
    """

    site: AttentionSite
    call: AttentionCall
    context: Tensor
    output: Tensor
    stream: Tensor | None
    w_o: Tensor
    b_o: Tensor | None
    geometry: Geometry
    settings: Settings
    recent: int
    bins: int
    grad: Tensor | None = None

    def with_gradient(self, grad: Tensor) -> LayerView:
        """The same with dL/d(context)."""
        return replace(self, grad=grad)

    @property
    def sink(self) -> int:
        """Keys at the front that count as sinks: the prefix of an image, else as the settings say."""
        return self.geometry.prefix if self.geometry.planar else min(self.settings.sink, self.geometry.length)

    @property
    def budget(self) -> int:
        """Keys per row that every sparse pattern may keep."""
        width = 2 * self.recent - 1 if not self.geometry.causal else self.recent
        kept = width * width if self.geometry.planar else width
        return min(self.geometry.length, self.sink + kept)

    @property
    def skip(self) -> int:
        """First row that counts for shape metrics."""
        return min(self.settings.skip, self.geometry.length // 4) if self.geometry.causal else 0

    @cached_property
    def output_gram(self) -> Tensor:
        """W_O^h (W_O^h)ᵀ of every head, [H, dv, dv]: ‖ctx W_O‖² = ctx gram ctxᵀ needs no [T, H, D]."""
        return self.w_o @ self.w_o.mT

    @cached_property
    def _groups(self) -> list[tuple[list[int], Tensor]]:
        """Heads of each KV group, and the same for these heads stacked, [n dv, n dv]."""
        heads: dict[int, list[int]] = {}
        for head, group in enumerate(self.site.kv_head_of):
            heads.setdefault(group, []).append(head)
        stacked = [(group, self.w_o[group].flatten(0, 1)) for group in heads.values()]
        return [(group, rows @ rows.mT) for group, rows in stacked]

    def head_norms(self, vectors: Tensor) -> Tensor:
        """‖v_h W_O^h‖ of vectors [tokens, H, dv]: [tokens, H] float64."""
        by_head = vectors.transpose(0, 1)
        return _norms(by_head, self.output_gram).T

    def group_norms(self, vectors: Tensor) -> Tensor:
        """‖sum of v_h W_O^h over a KV group‖ of vectors [tokens, H, dv]: [tokens, K] float64."""
        return torch.stack([_norms(vectors[:, heads].flatten(1), gram) for heads, gram in self._groups], 1)


def _norms(vectors: Tensor, gram: Tensor) -> Tensor:
    """sqrt(v gram vᵀ) over the last axis of vectors [..., tokens, p] with gram [..., p, p], in float64."""
    return ((vectors @ gram) * vectors).sum(-1).clamp(min=0).double().sqrt()


@dataclass(frozen=True, eq=False)
class RowBlock:
    """Some rows of a layer's map.

    Attributes:
        view: the layer.
        first: position of the first row.
        weights: [N, H, R, keys]; keys after the last row are left out where they cannot be seen.
    """

    view: LayerView
    first: int
    weights: Tensor

    @property
    def rows(self) -> Tensor:
        """Positions of the rows, [R]."""
        return torch.arange(self.first, self.first + self.weights.shape[2], device=self.weights.device)

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.weights.shape[3]

    @property
    def counted(self) -> slice:
        """Rows of the block that count for shape metrics."""
        return slice(min(max(0, self.view.skip - self.first), self.weights.shape[2]), None)

    @cached_property
    def distances(self) -> Tensor:
        """[R, keys], see `Geometry.distances`."""
        return self.view.geometry.distances(self.rows, self.keys)

    @cached_property
    def total(self) -> Tensor:
        """Sum of each row, [N, H, R]: 1 without learned sinks."""
        return self.weights.sum(-1)

    @cached_property
    def by_distance(self) -> Tensor:
        """Mass of each row by distance bin, [N, H, R, bins]."""
        view = self.view
        if view.geometry.planar:
            return self._planar_bins(self.weights)
        return self.along_diagonals(self.skewed_weights, self.distance_table)

    def binned(self, values: Tensor) -> Tensor:
        """Sum of values [N, H, R, keys] over each distance bin, [N, H, R, bins]."""
        if self.view.geometry.planar:
            return self._planar_bins(values)
        return self.along_diagonals(self.skewed(values), self.distance_table)

    def _planar_bins(self, values: Tensor) -> Tensor:
        each = torch.nn.functional.one_hot(bin_of(self.distances), self.view.bins).to(values.dtype)
        return torch.einsum("nhrt,rtb->nhrb", values, each)

    @cached_property
    def distance_table(self) -> Tensor:
        """Which diagonal lies in which bin, [keys + R, bins]."""
        # The outermost columns of `skewed` are empty; their distance may be out of range.
        of = bin_of(self.diagonals.abs()).clamp(max=self.view.bins - 1)
        return torch.nn.functional.one_hot(of, self.view.bins).to(self.weights.dtype)

    @cached_property
    def diagonals(self) -> Tensor:
        """Query minus key position of each column of `skewed`, [keys + R]."""
        count = self.weights.shape[2]
        return self.first + count - torch.arange(self.keys + count, device=self.weights.device)

    @cached_property
    def skewed_weights(self) -> Tensor:
        """`skewed` of the map itself."""
        return self.skewed(self.weights)

    def skewed(self, values: Tensor) -> Tensor:
        """Values [N, H, R, keys] with every diagonal in a column, [N H, R, keys + R], without a loop.

        Column c is the diagonal `diagonals[c]`, and zero where that leaves the block.
        """
        n, heads, count, keys = values.shape
        wide = values.new_zeros(n * heads, count + 1, keys + count)
        wide[:, :count, count:] = values.flatten(0, 1)
        # Row i starts i entries further: a stride one longer than the row.
        width = keys + count
        return wide.as_strided((n * heads, count, width), ((count + 1) * width, width + 1, 1))

    def along_diagonals(self, skewed: Tensor, table: Tensor) -> Tensor:
        """Sum over diagonals of skewed values times a table by diagonal, [keys + R, C] or [N H, keys + R, C].

        Returns:
            [N, H, R, C].
        """
        n, heads, count, _ = self.weights.shape
        if table.ndim == 2:
            table = table.expand(n * heads, *table.shape)
        return torch.bmm(skewed, table).view(n, heads, count, -1)


def output_weights(projection: Projection, weight: Tensor, heads: int) -> Tensor:
    """W_O of each head, [H, dv, D], from the stored matrix.

    Args:
        projection: of the output.
        weight: as stored.
        heads: H.
    """
    matrix = weight if projection.layout == "conv1d" else weight.T
    if projection.rows != ((0, matrix.shape[1]),):
        matrix = torch.cat([matrix[:, start:stop] for start, stop in projection.rows], 1)
    return matrix.reshape(heads, -1, matrix.shape[1])
