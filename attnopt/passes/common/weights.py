"""Weights of some of a layer's heads, as expressions over what is stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from attnopt.rewriter.site import Projection
from attnopt.rewriter.weights import Derived, Value, WeightStore, meta_of


def rows_of(projection: Projection) -> list[int]:
    """Stored row of each output channel of a projection."""
    return list(chain.from_iterable(range(start, stop) for start, stop in projection.rows))


def channels(heads: Iterable[int], width: int) -> list[int]:
    """Channels of some heads of equal width, in order."""
    return [h * width + i for h in heads for i in range(width)]


def matrix(store: WeightStore, projection: Projection, outputs: Sequence[int] | None = None) -> Value:
    """[out, in] matrix of some output channels of a projection (of all if None), whatever it is stored in."""
    whole = store[projection.weight]
    if projection.layout == "conv1d":
        whole = Derived.of("transpose", whole, dim0=0, dim1=1)
    return pick(whole, _stored_rows(projection, outputs), 0)


def vector(store: WeightStore, projection: Projection, outputs: Sequence[int] | None = None) -> Value | None:
    """The bias of the same channels, [out]; None if there is none."""
    if projection.bias is None:
        return None
    return pick(store[projection.bias], _stored_rows(projection, outputs), 0)


def columns(store: WeightStore, projection: Projection, inputs: Sequence[int]) -> Value:
    """[out, inputs] of some input channels of a projection."""
    return pick(matrix(store, projection), list(inputs), 1)


def _stored_rows(projection: Projection, outputs: Sequence[int] | None) -> list[int]:
    rows = rows_of(projection)
    return rows if outputs is None else [rows[i] for i in outputs]


def pick(value: Value, index: Sequence[int], dim: int) -> Value:
    """Entries of a dimension in the order of `index`, as few spans as there are."""
    size = meta_of(value).shape[dim]
    spans = runs(index)
    if spans == [(0, size)]:
        return value
    parts: list[Value] = []
    for start, stop in spans:
        if dim == 0:
            parts.append(Derived.of("rows", value, start=start, stop=stop))
        else:
            parts.append(Derived.of("narrow", value, dim=dim, start=start, length=stop - start))
    return parts[0] if len(parts) == 1 else Derived.of("cat", *parts, dim=dim)


def runs(index: Iterable[int]) -> list[tuple[int, int]]:
    """Half-open ranges of neighbouring numbers, in order."""
    found: list[tuple[int, int]] = []
    for i in index:
        if found and found[-1][1] == i:
            found[-1] = (found[-1][0], i + 1)
        else:
            found.append((i, i + 1))
    return found
