"""Similarities of layers, and the measured error of sharing.

For layers i < j and prompts, on sampled rows t, head by head:

    map_cosine              <A_i, A_j> / (‖A_i‖ ‖A_j‖), flattened over heads and rows     EchoAtt, arXiv 2409.14595
    map_cosine_no_sink      the same without the sink columns, rows renormalised
    map_correlation         mean over heads and rows of the cosine of rows without sinks and less their mean: unrelated
                            maps give 0, where plain cosines give 0.5 and more
    map_js                  Jensen-Shannon divergence / log 2, mean over heads and rows
    map_reuse_error         ‖y_j' - y_j‖² / ‖y_j‖², y_j' with A_i in the place of A_j and V_j kept
    kv_distance             E_t (‖K_i - K_j‖ + ‖V_i - V_j‖) / 2                           KVSharer, arXiv 2410.18517
    kv_reuse_error          as map_reuse_error with K_i and V_i in the place of K_j and V_j

"..._aligned": after the assignment of heads that maximises the correlation (see `align`). Similarities shortlist;
errors decide. In [source, consumer] arrays the similarities are symmetric, errors have i < j only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnopt.profiles.pairs.align import align_heads
from attnopt.profiles.pairs.rows import Consumer, LayerRows, consumer_of, signature, without_sinks
from attnopt.profiles.profile import MetricInfo
from attnopt.profiles.view import LayerView

_AXES = ("source", "consumer")
_OURS = "definition"
DESCRIBED = {
    "map_cosine": MetricInfo(1, _AXES, "", "cosine of attention maps", "arXiv 2409.14595"),
    "map_cosine_no_sink": MetricInfo(1, _AXES, "", "cosine of attention maps without sinks", _OURS),
    "map_correlation": MetricInfo(1, _AXES, "", "correlation of map rows without sinks", _OURS),
    "map_correlation_aligned": MetricInfo(1, _AXES, "", "correlation of map rows without sinks, heads aligned", _OURS),
    "map_js": MetricInfo(1, _AXES, "", "Jensen-Shannon divergence of map rows, 0 to 1", _OURS),
    "map_js_aligned": MetricInfo(1, _AXES, "", "Jensen-Shannon divergence of map rows, heads aligned", _OURS),
    "head_alignment": MetricInfo(1, (*_AXES, "head"), "", "source head that a consumer head matches", _OURS),
    "map_reuse_error": MetricInfo(1, _AXES, "high_keep", "NMSE of the consumer's output with the source's maps", _OURS),
    "map_reuse_error_aligned": MetricInfo(
        1, _AXES, "high_keep", "NMSE of the consumer's output with the source's maps, heads aligned", _OURS
    ),
    "kv_distance": MetricInfo(1, _AXES, "", "distance of keys and values", "arXiv 2410.18517"),
    "kv_reuse_error": MetricInfo(
        1, _AXES, "high_keep", "NMSE of the consumer's output with the source's keys and values", _OURS
    ),
    "head_redundancy": MetricInfo(
        1, ("site", "head", "head"), "", "correlation of the maps of two heads of a layer", _OURS
    ),
}
_SYMMETRIC = (
    "map_cosine",
    "map_cosine_no_sink",
    "map_correlation",
    "map_correlation_aligned",
    "map_js",
    "map_js_aligned",
    "kv_distance",
)
_SELF = {
    "map_cosine": 1.0,
    "map_cosine_no_sink": 1.0,
    "map_correlation": 1.0,
    "map_correlation_aligned": 1.0,
}


class LayerComparison:
    """Compares each layer with all before it. Feed it layer by layer, every prompt of a layer in the same order.

    Args:
        layers: how many there are.
        prompts: how many prompts are compared.
    """

    def __init__(self, layers: int, prompts: int) -> None:
        self.layers = layers
        self.prompts = prompts
        self._kept: list[list[LayerRows]] = []
        self._signatures: list[tuple[object, ...]] = []
        self._now: list[Consumer] = []
        self._sinks: list[int] = []
        self._alignment: dict[tuple[int, int], Tensor] = {}
        self._redundancy: list[list[Tensor]] = []
        self._values = {
            name: torch.full((prompts, layers, layers), torch.nan, dtype=torch.float64)
            for name in DESCRIBED
            if name not in ("head_alignment", "head_redundancy")
        }

    def add(self, view: LayerView) -> None:
        """Take the layer at hand on the next prompt."""
        self._now.append(consumer_of(view))
        if len(self._now) == 1:
            self._signatures.append(signature(view))
            self._sinks.append(view.sink)

    def end_layer(self) -> None:
        """Compare the layer at hand with all before it, and keep it."""
        j = len(self._kept)
        for name in self._values:
            self._values[name][:, j, j] = _SELF.get(name, 0.0)
        self._redundancy.append([_correlations(one.rows.shape, one.rows.shape) for one in self._now])
        earlier = [i for i in range(j) if self._signatures[i] == self._signatures[j]]
        for i in earlier:
            self._compare(i, j)
        self._kept.append([one.rows for one in self._now])
        self._now = []

    def _compare(self, i: int, j: int) -> None:
        pairs = list(zip(self._kept[i], self._now, strict=True))
        correlations = [_correlations(source.shape, consumer.rows.shape) for source, consumer in pairs]
        order = align_heads(torch.stack(correlations).mean(0), self._now[0].call.groups)
        self._alignment[i, j] = order
        heads = torch.arange(len(order))
        for prompt, (source, consumer) in enumerate(pairs):
            found = _similarities(source, consumer, self._sinks[j])
            found["map_correlation"] = float(correlations[prompt].diagonal().mean())
            found["map_correlation_aligned"] = float(correlations[prompt][order, heads].mean())
            found |= _sharing(source, consumer, order)
            for name, value in found.items():
                self._values[name][prompt, i, j] = value
                if name in _SYMMETRIC:
                    self._values[name][prompt, j, i] = value

    def result(self) -> dict[str, Tensor]:
        """All arrays by name, [prompts, ...]; only those of single layers where no two layers could be compared."""
        most = max(matrix.shape[0] for layer in self._redundancy for matrix in layer)
        redundancy = torch.full((self.prompts, self.layers, most, most), torch.nan, dtype=torch.float64)
        for layer, matrices in enumerate(self._redundancy):
            for prompt, matrix in enumerate(matrices):
                redundancy[prompt, layer, : len(matrix), : len(matrix)] = matrix
        if not self._alignment:
            return {"head_redundancy": redundancy}
        alignment = torch.full((self.layers, self.layers, most), torch.nan, dtype=torch.float64)
        for (i, j), order in self._alignment.items():
            alignment[i, j, : len(order)] = order.double()
        return {"head_redundancy": redundancy, **self._values, "head_alignment": alignment}


def _correlations(source: Tensor, consumer: Tensor) -> Tensor:
    """Mean over rows of the cosine of every two heads' rows, [Hi, Hj] float64.

    Rows are of unit length, or 0 where the map is constant. Where both are constant there is nothing to compare; heads
    that are constant throughout are alike.
    """
    left, right = source.transpose(0, 1).flatten(1), consumer.transpose(0, 1).flatten(1)
    flat = [(rows.abs().amax(-1) == 0).transpose(0, 1).flatten(1).double() for rows in (source, consumer)]
    count = flat[0].shape[1] - flat[0] @ flat[1].T
    return torch.where(count > 0, (left @ right.T).double() / count.clamp(min=1), 1.0)


def _similarities(source: LayerRows, consumer: Consumer, sink: int) -> dict[str, float]:
    a, b = source.weights, consumer.rows.weights
    found = {"map_cosine": _cosine(a, b)}
    sink = min(sink, a.shape[-1] - 1)
    found["map_cosine_no_sink"] = _cosine(without_sinks(a, sink), without_sinks(b, sink))
    keys = (source.k - consumer.rows.k).transpose(1, 2).flatten(2).double().norm(dim=-1).mean()
    values = (source.v - consumer.rows.v).transpose(1, 2).flatten(2).double().norm(dim=-1).mean()
    found["kv_distance"] = float(keys + values) / 2
    return found


def _sharing(source: LayerRows, consumer: Consumer, order: Tensor) -> dict[str, float]:
    """Divergences and measured errors, with the heads as they are and aligned."""
    own = consumer.context(consumer.rows.weights)
    borrowed = consumer.call.with_keys(source.k, source.v)
    other = Consumer(source, borrowed, consumer.sample, consumer.w_o, consumer.energy)
    found = {
        "map_js": jensen_shannon(source.weights, consumer.rows.weights),
        "map_reuse_error": consumer.error(consumer.context(source.weights), own),
        "kv_reuse_error": consumer.error(other.context(borrowed.rows(consumer.sample.rows)), own),
    }
    if bool((order == torch.arange(len(order))).all()):
        return found | {
            "map_js_aligned": found["map_js"],
            "map_reuse_error_aligned": found["map_reuse_error"],
        }
    aligned = source.weights[:, order]
    return found | {
        "map_js_aligned": jensen_shannon(aligned, consumer.rows.weights),
        "map_reuse_error_aligned": consumer.error(consumer.context(aligned), own),
    }


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten(), b.flatten()
    return float(a @ b) / max(float(a.norm()) * float(b.norm()), 1e-300)


def jensen_shannon(a: Tensor, b: Tensor) -> float:
    """Mean over rows of the Jensen-Shannon divergence of the last axis, as a share of its bound log 2."""
    rows = a.numel() // a.shape[-1]
    mixture = (a + b) / 2
    divergence = _negative_entropy(a) / 2 + _negative_entropy(b) / 2 - _negative_entropy(mixture)
    return max(0.0, divergence / rows / math.log(2))


def _negative_entropy(p: Tensor) -> float:
    """Sum of p log p."""
    logs = p.clamp(min=torch.finfo(p.dtype).tiny).log()
    return float(torch.dot(p.flatten(), logs.flatten()).double())
