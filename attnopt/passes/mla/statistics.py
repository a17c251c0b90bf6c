"""Statistics of one attention layer over calibration text, streamed window by window into float64 sums.

To first order an error ds_ij of a logit and dv_j of a value change a head's output by

    W_O do_i = sum_j a_ij ( W_O (v_j - o_i) ds_ij + W_O dv_j ),

so with token weights l_i (how much an error at query i counts) keys matter by

    omega_ij = l_i a_ij^2 ||W_O (v_j - o_i)||^2

and values through the averages abar_i = sum_j a_ij u_j that they enter the output by. All that slots and low rank need
are second moments under these weights. Nothing of the size of the text is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.errors import UnsupportedError
from attnopt.passes.mla.source_layer import SourceLayer
from attnopt.rewriter import parallel
from attnopt.rewriter.precision import exact_products

#: Vectors that are added to a moment in one product, at most.
VECTORS_AT_ONCE = 2048

#: Queries of a text that are looked at where it has them, and those of one window at most: a window's attention is as
#: large as they are many. Of longer text every `MAX_STRIDE`-th is: time is better spent on other text then.
QUERIES, WINDOW_QUERIES, MAX_STRIDE = 4096, 256, 8


class Moment:
    """Weighted second moments of vectors, one per class, with means and weights.

    Most of the energy is in the mean, which the covariance takes out again. So the mean of the first vectors is taken
    off before anything is multiplied; then float32 products of float32 vectors are exact enough, summed in float64.

    Args:
        classes: how many.
        width: p, of the vectors.

    Attributes:
        weight: sum of the weights per class, [classes].
    """

    def __init__(self, classes: int, width: int) -> None:
        self._second = torch.zeros(classes, width, width, dtype=torch.float64)
        self._first = torch.zeros(classes, width, dtype=torch.float64)
        self._shift = torch.zeros(classes, width, dtype=torch.float64)
        self.weight = torch.zeros(classes, dtype=torch.float64)

    def add(self, of: int, vectors: Tensor, weights: Tensor) -> None:
        """Add vectors [n, p] with weights [n] >= 0 to class `of`."""
        weights = weights.to(vectors.dtype).clamp(min=0)
        total = float(weights.double().sum())
        if total <= 0:
            return
        with exact_products():
            if not self.weight[of]:
                self._shift[of] = (weights @ vectors / total).to(self._shift)
            centred = vectors - self._shift[of].to(vectors)
            self._second[of] += ((centred * weights[:, None]).T @ centred).to(self._second)
            self._first[of] += (weights @ centred).to(self._first)
        self.weight[of] += total

    @property
    def second(self) -> Tensor:
        """Sum of w u uᵀ per class, [classes, p, p]."""
        # (shift)(first + w shift / 2)ᵀ and its transpose; in place, for these are the largest tensors there are.
        half = self._shift[:, :, None] * (self._first + self.weight[:, None] / 2 * self._shift)[:, None, :]
        result = half + half.mT
        del half
        return result.add_(self._second)

    @property
    def first(self) -> Tensor:
        """Sum of w u per class, [classes, p]."""
        return self._first + self.weight[:, None] * self._shift

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Second and first sums and weights, such that adding those of others to them in place adds these up."""
        self._second, self._first = self.second, self.first
        self._shift = torch.zeros_like(self._shift)
        return self._second, self._first, self.weight

    def uncentred(self) -> Tensor:
        """E[u uᵀ] per class, [classes, p, p]."""
        return self.second / self.weight.clamp(min=1e-300)[:, None, None]

    def mean(self) -> Tensor:
        """E[u] per class, [classes, p]."""
        return self._shift + self._first / self.weight.clamp(min=1e-300)[:, None]

    def covariance(self) -> Tensor:
        """E[u uᵀ] - E[u] E[u]ᵀ per class, [classes, p, p]."""
        weight = self.weight.clamp(min=1e-300)
        mean = self._first / weight[:, None]
        result = torch.baddbmm(self._second / weight[:, None, None], mean[:, :, None], mean[:, None, :], alpha=-1)
        return (result + result.mT).div_(2)


@dataclass(frozen=True)
class _Window:
    """One window's attention, for the sampled queries."""

    inputs: Tensor  # [S, p] what the encoder reads
    queries: Tensor  # [H, n, d] before rotation
    weights: Tensor  # [n] weight of each sampled query, l_i times the queries it stands for
    attention: Tensor  # [H, n, S]
    sensitivity: Tensor  # [H, n, S] omega_ij
    at: Tensor  # [n] index of each sampled query
    turns: Tensor  # [S, F] complex, e^{i theta_f p_s} of the tokens' positions p_s


def stride_for(windows: Tensor) -> int:
    """Every how many queries of calibration windows [n, S] one should be looked at."""
    return min(MAX_STRIDE, max(1, windows.numel() // QUERIES, windows.shape[1] // WINDOW_QUERIES))


class LayerStatistics:
    """What the closed form of one layer needs to know of the text.

    Args:
        layer: the source layer.
        stride: every stride-th query of a window is looked at, and the first; keys are all looked at.
        pooled: one second moment for all groups instead of one per group, where those would not fit in memory.

    Attributes:
        queries: [H, d, d] sum over i of (sum_j omega_ij) q_i q_iᵀ.
        phase: [H, F] complex, sum over ij of omega_ij e^{i theta_f (p_j - p_i)}.
        phase_weight: [H] sum of omega_ij.
        keys: moments of u_j under omega, per class of groups.
        values: moments of abar_i under l_i, per class of groups.
        inputs: moments of u under l, one class.
        tokens: how many tokens were seen in windows of more than one.
    """

    def __init__(self, layer: SourceLayer, stride: int = MAX_STRIDE, pooled: bool = False) -> None:
        if stride < 1:
            raise ValueError(f"stride must be positive, not {stride}")
        heads, d, classes = layer.heads, layer.d, 1 if pooled else layer.groups
        self.layer = layer
        self.stride = stride
        self.class_of = torch.zeros(layer.groups, dtype=torch.long) if pooled else torch.arange(layer.groups)
        self._class_of_head = self.class_of.to(layer.group_of)[layer.group_of]
        self.queries = torch.zeros(heads, d, d, dtype=torch.float64)
        self.phase = torch.zeros(heads, d // 2, dtype=torch.complex128)
        self.phase_weight = torch.zeros(heads, dtype=torch.float64)
        self.keys = Moment(classes, layer.input_width)
        self.values = Moment(classes, layer.input_width)
        self.input_mean = torch.zeros(layer.input_width, dtype=torch.float64)
        self.input_weight = torch.zeros((), dtype=torch.float64)
        self.tokens = 0

    def update(self, x: Tensor, weights: Tensor, positions: Tensor | None = None) -> None:
        """Add windows.

        Args:
            x: attention inputs [B, S, D].
            weights: token weights [B, S], see `token_weights`.
            positions: of the tokens [B, S]; by default 0 ... S-1.
        """
        if x.shape[1] == 1:
            self._add_lone(x[:, 0], weights[:, 0])
            return
        positions = torch.arange(x.shape[1]).expand(x.shape[:2]) if positions is None else positions
        for row in range(x.shape[0]):
            window = self._attend(x[row : row + 1], weights[row], positions[row : row + 1])
            self._add_keys(window)
            self._add_values(window)
            self.input_mean += (weights[row].to(x.dtype) @ window.inputs).double()
            self.input_weight += weights[row].double().sum()
            self.tokens += x.shape[1]

    def _add_lone(self, x: Tensor, weights: Tensor) -> None:
        """Add windows of one token, [n, D] with weights [n]: each reads only itself, so no key matters."""
        layer = self.layer
        keys, values = layer.keys(x[:, None]), layer.values(x[:, None])
        inputs = layer.encoder_input(x[:, None], keys, values)[:, 0]
        for of, count in enumerate(torch.bincount(self._class_of_head).tolist()):
            self.values.add(of, inputs, weights * count)
        self.input_mean += (weights.to(x.dtype) @ inputs).double()
        self.input_weight += weights.double().sum()

    def add_up(self) -> None:
        """Sum over all processes, each of which has seen its share of the text."""
        moments = (self.keys, self.values) if parallel.world() > 1 else ()
        parallel.add_up(
            self.queries, self.phase, self.phase_weight, self.input_mean, self.input_weight,
            *(sums for moment in moments for sums in moment.sums()),
        )  # fmt: skip
        self.tokens = round(parallel.sum_of(self.tokens)[0])

    def check(self) -> None:
        """Refuse sums that are useless.

        Raises:
            UnsupportedError: if the text is too short, or something is not finite.
        """
        sums = (self.queries, self.keys.second, self.values.second, self.phase)
        if not all(bool(torch.isfinite(torch.view_as_real(s) if s.is_complex() else s).all()) for s in sums):
            raise UnsupportedError(
                "activations on the calibration text are not finite", "check the model's weights, and the text"
            )
        if self.tokens < self.layer.d:
            raise UnsupportedError(
                f"{self.tokens} calibration tokens are fewer than a head has channels ({self.layer.d})",
                "give more calibration text (--calib-tokens)",
            )

    def _place(self, length: int) -> int:
        """Number of the window among those of all processes, of which each takes every N-th."""
        return parallel.rank() + parallel.world() * (self.tokens // length)

    def _sampled(self, length: int, offset: int) -> tuple[Tensor, Tensor]:
        """Positions of the queries looked at, and how many queries each stands for."""
        if self.stride == 1:
            return torch.arange(length), torch.ones(length)
        rest = torch.arange(1 + offset % self.stride, length, self.stride)
        share = (length - 1) / max(1, len(rest))
        return torch.cat([torch.zeros(1, dtype=torch.long), rest]), torch.tensor([1.0] + [share] * len(rest))

    def _attend(self, x: Tensor, weights: Tensor, positions: Tensor) -> _Window:
        layer = self.layer
        length = x.shape[1]
        at, share = self._sampled(length, self._place(length))
        at = at.to(x.device)
        plain, keys, values = layer.queries(x), layer.keys(x), layer.values(x)
        inputs = layer.encoder_input(x, keys, values)[0]
        group = layer.group_of
        q, k, v = layer.rotate(plain, positions)[0][:, at], layer.rotate(keys, positions)[0][group], values[0][group]
        logits = (q @ k.mT) * layer.scale
        hidden = torch.arange(length, device=x.device)[None, :] > at[:, None]
        attention = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
        # ||W_O (v_j - o_i)||^2 = v_jᵀ M v_j + o_iᵀ M o_i - 2 o_iᵀ M v_j with M = W_Oᵀ W_O: nothing is of width D.
        metric = torch.einsum("Dhd,Dhe->hde", layer.w_o, layer.w_o)
        mixed = attention @ v
        carried = v @ metric
        own, out = (carried * v).sum(-1), ((mixed @ metric) * mixed).sum(-1)
        effect = (own[:, None, :] + out[:, :, None] - 2 * mixed @ carried.mT).clamp_(min=0)
        counted = weights[at] * share.to(weights)
        sensitivity = effect.mul_(attention).mul_(attention).mul_(counted[:, None])
        angle = positions[0].to(x.device, torch.float64)[:, None] * layer.inv_freq
        turns = torch.polar(torch.ones_like(angle), angle)
        return _Window(inputs, plain[0][:, at], counted, attention, sensitivity, at, turns)

    def _add_keys(self, window: _Window) -> None:
        layer, omega = self.layer, window.sensitivity
        by_query, by_key = omega.sum(2), omega.sum(1)
        self.queries += ((window.queries * by_query[..., None]).mT @ window.queries).double()
        self.phase_weight += by_query.double().sum(1)
        turns = window.turns
        parts = torch.cat([turns.real, turns.imag], 1).to(omega.dtype)
        with exact_products():  # a pair that does not turn has phase 1, not nearly 1
            summed = (omega @ parts).double()
        pairs = layer.d // 2
        self.phase += (torch.complex(summed[..., :pairs], summed[..., pairs:]) * turns[window.at].conj()).sum(1)
        for of in range(len(self.keys.weight)):
            self.keys.add(of, window.inputs, by_key[self._class_of_head == of].sum(0))

    def _add_values(self, window: _Window) -> None:
        # Several heads at once: adding to a moment costs as much as multiplying a few hundred vectors.
        at_once = max(1, VECTORS_AT_ONCE // window.attention.shape[1])
        for of in range(len(self.values.weight)):
            for heads in (self._class_of_head == of).nonzero()[:, 0].split(at_once):
                averages = (window.attention[heads] @ window.inputs).flatten(0, 1)
                self.values.add(of, averages, window.weights.repeat(len(heads)))
