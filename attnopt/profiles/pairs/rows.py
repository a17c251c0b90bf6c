"""What is kept of a layer for comparison with later ones: sampled rows of its map, its keys and its values.

Comparing layers needs the same rows of several layers at once. Keeping queries and keys of all layers and rebuilding
every map would repeat the work of the main pass for each pair; keeping whole maps would take memory with the square of
the length. Sampled rows are enough: a similarity is a mean over rows, and so is the error of an output. And as all
prompts go through layer j before layer j + 1 is read, the error of reusing an earlier map is measured on the spot.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.profiles.attention import AttentionCall
from attnopt.profiles.settings import Settings
from attnopt.profiles.view import LayerView

#: At most this many windows of a windowed image model are compared.
WINDOWS = 8


@dataclass(frozen=True)
class Sample:
    """Which rows of a prompt are compared.

    Attributes:
        rows: positions, ascending.
        keys: how many keys are kept.
        windows: which of the N windows; None where there is one.
    """

    rows: Tensor
    keys: int
    windows: Tensor | None

    @classmethod
    def of(cls, view: LayerView) -> Sample:
        """Rows spread evenly over the counted ones of the first tokens. Queries of a causal layer see no later key, so
        cutting its prompts is exact; where they do, all tokens are kept."""
        settings, length = view.settings, view.geometry.length
        keys = min(length, settings.pair_context) if view.geometry.causal else length
        first = min(view.skip, keys // 4)
        rows = torch.linspace(first, keys - 1, min(settings.pair_rows, keys - first)).round().long()
        n = view.call.q.shape[0]
        windows = None if n == 1 else torch.linspace(0, n - 1, min(n, WINDOWS)).round().long().unique()
        return cls(rows, keys, windows)


@dataclass(frozen=True, eq=False)
class LayerRows:
    """A layer on one prompt, for comparison. M windows, R rows, T keys.

    Attributes:
        weights: rows of the map, [M, H, R, T].
        shape: rows without the sinks, renormalised, less their mean over visible keys, of unit length (0 for constant
            rows), [M, H, R, T].
        k, v: [M, K, T, d] and [M, K, T, dv].
    """

    weights: Tensor
    shape: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, eq=False)
class Consumer:
    """The layer at hand on one prompt: what is needed to measure its output with another layer's map.

    Attributes:
        rows: as kept.
        call: its attention on the kept keys and windows.
        sample: which rows.
        w_o: [H, dv, D].
        energy: sum over the sampled rows of ‖y‖².
    """

    rows: LayerRows
    call: AttentionCall
    sample: Sample
    w_o: Tensor
    energy: float

    def context(self, weights: Tensor) -> Tensor:
        """Heads' outputs for some map, [M, H, R, dv]."""
        n, heads, count, keys = weights.shape
        grouped = weights.reshape(n, self.call.groups, -1, keys) @ self.rows.v
        context = grouped.view(n, heads, count, -1)
        if self.call.gates is not None:
            context = context * self.call.gates[:, self.sample.rows].transpose(1, 2)[..., None]
        return context

    def error(self, context: Tensor, own: Tensor) -> float:
        """NMSE of the layer's output with other heads' outputs, [M, H, R, dv] each."""
        change = torch.einsum("mhrv,hvd->mrd", context - own, self.w_o)
        return float(change.double().pow(2).sum()) / max(self.energy, 1e-300)


def consumer_of(view: LayerView) -> Consumer:
    """Sample a layer on one prompt."""
    sample = Sample.of(view)
    pick = slice(None) if sample.windows is None else sample.windows
    call = restricted(view.call, sample)
    weights = call.rows(sample.rows)
    rows = LayerRows(weights, centred(weights, view, sample), call.k, call.v)
    energy = float(view.output[pick][:, sample.rows].double().pow(2).sum())
    return Consumer(rows, call, sample, view.w_o, energy)


def restricted(call: AttentionCall, sample: Sample) -> AttentionCall:
    """The call on the sampled windows and the first keys only."""
    pick = slice(None) if sample.windows is None else sample.windows
    bias = call.bias
    if bias is not None:
        bias = (bias if bias.shape[0] == 1 else bias[pick])[..., : sample.keys]
        bias = bias if bias.shape[2] == 1 else bias[:, :, : sample.keys]
    return AttentionCall(
        q=call.q[pick][:, :, : sample.keys],
        k=call.k[pick][:, :, : sample.keys].clone(),
        v=call.v[pick][:, :, : sample.keys].clone(),
        bias=bias,
        scale=call.scale,
        causal=call.causal,
        window=call.window,
        softcap=call.softcap,
        sinks=call.sinks,
        gates=None if call.gates is None else call.gates[pick][:, : sample.keys],
    )


def without_sinks(weights: Tensor, sink: int) -> Tensor:
    """Rows without their first `sink` keys, renormalised; zero where nothing is left."""
    rest = weights[..., sink:]
    total = rest.sum(-1, keepdim=True)
    return rest / total.clamp(min=torch.finfo(weights.dtype).tiny)


def centred(weights: Tensor, view: LayerView, sample: Sample) -> Tensor:
    """`LayerRows.shape` of some rows, padded to their width with zeros."""
    sink = min(view.sink, weights.shape[-1] - 1)
    rest = without_sinks(weights, sink)
    if view.geometry.causal:
        apart = sample.rows[:, None] - torch.arange(sink, weights.shape[-1])
        seen = (apart >= 0) & (apart < view.call.window if view.call.window else True)
    else:
        seen = torch.ones(rest.shape[-2:], dtype=torch.bool)
    if view.call.bias is not None and not view.geometry.causal:
        seen = seen & (rest > 0).any(1, keepdim=True)  # what a window mask hides has no weight in any head
    visible = seen.to(rest)
    mean = rest.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp(min=1)
    shape = (rest - mean) * visible
    norm = shape.norm(dim=-1, keepdim=True)
    alive = norm > 64 * torch.finfo(weights.dtype).eps * mean
    shape = torch.where(alive, shape / norm.clamp(min=torch.finfo(weights.dtype).tiny), 0.0)
    return torch.nn.functional.pad(shape, (sink, 0))


def signature(view: LayerView) -> tuple[object, ...]:
    """What two layers must have in common for one to read the other's map: sizes, and which keys a query sees."""
    call, hidden = view.call, ""
    if call.bias is not None:
        # Windows that are shifted hide other keys: large negative biases.
        hidden = hashlib.sha256((call.bias < -50).cpu().numpy().tobytes()).hexdigest()
    sizes = (call.q.shape[0], call.heads, call.groups, call.length, call.q.shape[-1], call.v.shape[-1])
    return (*sizes, call.causal, call.window, hidden)


def kept_bytes(view: LayerView) -> int:
    """Bytes that one prompt's sample of a layer takes."""
    sample = Sample.of(view)
    windows = 1 if sample.windows is None else len(sample.windows)
    per_row = 2 * view.call.heads * len(sample.rows)
    per_key = view.call.groups * (view.call.k.shape[-1] + view.call.v.shape[-1])
    return windows * sample.keys * (per_row + per_key) * view.call.q.element_size()


def affordable(settings: Settings, prompts: int, first: LayerView, layers: int) -> int:
    """How many prompts can be compared within `settings.pair_bytes`; at least one."""
    each = kept_bytes(first) * layers
    return max(1, min(settings.pair_prompts, prompts, settings.pair_bytes // max(1, each)))
