"""WeightStore: names mapped to tensors that are read, or computed from others, only when asked for.

A value is `Stored` in a file, `Derived` from other values by a small pure function, or `Inline`. Values are immutable
expression trees: a pass that rewrites a weight puts a new tree under its name and never touches the tensors below it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch

from attnopt.errors import SourceError
from attnopt.rewriter.safe_tensors import TensorEntry, TensorFile, read_bytes


@dataclass(frozen=True)
class TensorMeta:
    """Shape and element type of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file.

    Attributes:
        path: the file.
        key: its name there.
        shape, dtype: what it is.
        offset: absolute position of its first byte.
        file_size: length of the file when its header was read, to notice that it was replaced.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    file_size: int

    @classmethod
    def of(cls, file: TensorFile, entry: TensorEntry) -> Stored:
        """The value of one entry of a file."""
        return cls(file.path, entry.key, entry.shape, entry.dtype, entry.offset, file.size)


@dataclass(frozen=True)
class Derived:
    """A pure function of other values.

    Attributes:
        op: name of a function registered with `derived_op`.
        inputs: its tensor arguments.
        params: its other arguments as (name, value) pairs, sorted by name; values are plain data.
    """

    op: str
    inputs: tuple[Value, ...]
    params: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, op: str, *inputs: Value, **params: Any) -> Derived:
        """Build an expression; `op` must be registered."""
        if op not in _OPS:
            raise KeyError(f"no derived op {op!r}; there are {', '.join(sorted(_OPS))}")
        return cls(op, inputs, tuple(sorted(params.items())))


@dataclass(frozen=True, eq=False)
class Inline:
    """A tensor held in memory. Two are equal only if they are the same object, which is how tied weights are known."""

    tensor: torch.Tensor


Value = Stored | Derived | Inline

_OPS: dict[str, Callable[..., torch.Tensor]] = {}


def derived_op(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Register a pure function of tensors under its own name for use in `Derived`.

    It must work on meta tensors too, because shapes are found by running it on them.
    """
    if function.__name__ in _OPS:
        raise ValueError(f"derived op {function.__name__!r} is registered twice")
    _OPS[function.__name__] = function
    return function


@derived_op
def rows(x: torch.Tensor, *, start: int, stop: int) -> torch.Tensor:
    """Rows start..stop of the first dimension. Reads only these rows if `x` is stored."""
    return x[start:stop]


@derived_op
def narrow(x: torch.Tensor, *, dim: int, start: int, length: int) -> torch.Tensor:
    """`length` entries of dimension `dim` from `start`."""
    return x.narrow(dim, start, length)


@derived_op
def take(x: torch.Tensor, *, dim: int, index: tuple[int, ...]) -> torch.Tensor:
    """Entries of dimension `dim` in the order of `index`."""
    return x.index_select(dim, torch.tensor(index, device=x.device))


@derived_op
def cat(*xs: torch.Tensor, dim: int) -> torch.Tensor:
    """Concatenation along `dim`."""
    return torch.cat(xs, dim)


@derived_op
def stack(*xs: torch.Tensor, dim: int) -> torch.Tensor:
    """Stack along a new dimension `dim`."""
    return torch.stack(xs, dim)


@derived_op
def transpose(x: torch.Tensor, *, dim0: int, dim1: int) -> torch.Tensor:
    """Exchange of two dimensions."""
    return x.transpose(dim0, dim1)


@derived_op
def reshape(x: torch.Tensor, *, shape: tuple[int, ...]) -> torch.Tensor:
    """The same elements in another shape."""
    return x.reshape(shape)


@derived_op
def scale(x: torch.Tensor, *, factor: float) -> torch.Tensor:
    """x * factor."""
    return x * factor


@derived_op
def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + y."""
    return x + y


@derived_op
def cast(x: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """x in another element type."""
    return x.to(dtype)


@derived_op
def full(*, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> torch.Tensor:
    """A constant tensor."""
    return torch.full(shape, value, dtype=dtype)


@derived_op
def zeros(*, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros."""
    return torch.zeros(shape, dtype=dtype)


def meta_of(value: Value) -> TensorMeta:
    """Shape and element type of a value, without reading anything."""
    if isinstance(value, Stored):
        return TensorMeta(value.shape, value.dtype)
    if isinstance(value, Inline):
        return TensorMeta(tuple(value.tensor.shape), value.tensor.dtype)
    return _derived_meta(value)


@lru_cache(maxsize=65536)
def _derived_meta(value: Derived) -> TensorMeta:
    with torch.device("meta"):
        metas = [torch.empty(m.shape, dtype=m.dtype) for m in map(meta_of, value.inputs)]
        result = _OPS[value.op](*metas, **dict(value.params))
    return TensorMeta(tuple(result.shape), result.dtype)


def evaluate(value: Value) -> torch.Tensor:
    """The tensor a value stands for, in memory that belongs to the caller.

    Raises:
        SourceError: if a file cannot be read, or a stored tensor holds NaN or infinity.
    """
    if isinstance(value, Stored):
        return _read(value, 0, value.shape[0] if value.shape else 1)
    if isinstance(value, Inline):
        return value.tensor.detach().clone()
    if value.op == "rows" and isinstance(value.inputs[0], Stored):
        span = dict(value.params)
        start, stop, _ = slice(span["start"], span["stop"]).indices(value.inputs[0].shape[0])
        return _read(value.inputs[0], start, max(start, stop))
    inputs = [evaluate(v) for v in value.inputs]
    result = _OPS[value.op](*inputs, **dict(value.params))
    # A view of a part would keep the whole of its base alive.
    if result.untyped_storage().nbytes() > result.numel() * result.element_size():
        return result.clone(memory_format=torch.contiguous_format)
    return result.contiguous()


def _read(value: Stored, start: int, stop: int) -> torch.Tensor:
    stride = prod(value.shape[1:]) * value.dtype.itemsize
    shape = (stop - start, *value.shape[1:]) if value.shape else ()
    data = read_bytes(value.path, value.offset + start * stride, (stop - start) * stride, value.file_size)
    tensor = data.view(value.dtype).reshape(shape)
    if not is_finite(tensor):
        raise SourceError(
            f"tensor {value.key!r} in {value.path} holds NaN or infinity",
            "the checkpoint is damaged or its training diverged; use another one",
        )
    return tensor


def is_finite(x: torch.Tensor) -> bool:
    """True if no element is NaN or infinite. Needs no memory of the size of `x`."""
    if not (x.is_floating_point() or x.is_complex()) or x.numel() == 0:
        return True
    if x.is_complex():
        x = torch.view_as_real(x)
    if x.dtype.itemsize == 1:  # the float8 types have no aminmax; widen them piece by piece
        return all(bool(torch.isfinite(piece.float()).all()) for piece in x.flatten().split(1 << 22))
    low, high = torch.aminmax(x)  # both are NaN if any element is
    return bool(torch.isfinite(low) and torch.isfinite(high))


class WeightStore:
    """An immutable mapping from weight names to values.

    `store[name]` is the expression, `store.get(name)` the tensor.

    Names mapped to equal values are one weight (tied embeddings); `parameters` counts it once.
    """

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def items(self) -> Iterable[tuple[str, Value]]:
        """(name, value) pairs, in order."""
        return self._values.items()

    def names(self) -> tuple[str, ...]:
        """All names, in order."""
        return tuple(self._values)

    def get(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor called `name`, cast to `dtype` if given; always fresh, the caller may write into it.

        Raises:
            KeyError: if there is no such name.
            SourceError: if it cannot be read or is not finite.
        """
        tensor = evaluate(self._values[name])
        return tensor if dtype is None else tensor.to(dtype)

    def meta(self, name: str) -> TensorMeta:
        """Shape and element type of `name`, without reading it."""
        return meta_of(self._values[name])

    def with_values(self, values: Mapping[str, Value], drop: Iterable[str] = ()) -> WeightStore:
        """A store with some names (re)defined and others gone."""
        kept = {name: value for name, value in self._values.items() if name not in set(drop)}
        return WeightStore({**kept, **values})

    @property
    def parameters(self) -> int:
        """Number of elements of all distinct values."""
        return sum(meta_of(value).numel for value in set(self._values.values()))

    def digest(self) -> str:
        """SHA-256 that identifies names, expressions and tensors.

        Files enter with their header, their length and 256 blocks of 4 KiB spread over them, so that a checkpoint of
        any size is identified at once. It tells checkpoints apart; it is no proof that not one byte was altered.
        """
        state = hashlib.sha256()
        for name in sorted(self._values):
            state.update(f"{name}\0{value_digest(self._values[name])}\n".encode())
        return state.hexdigest()


def value_digest(value: Value) -> str:
    """Identity of one value as text; see `WeightStore.digest`."""
    if isinstance(value, Stored):
        stat = os.stat(value.path)
        return f"stored {file_digest(value.path, stat.st_size, stat.st_mtime_ns)} {value.key}"
    if isinstance(value, Derived):
        inner = ",".join(value_digest(v) for v in value.inputs)
        return hashlib.sha256(f"{value.op}({inner}){value.params!r}".encode()).hexdigest()
    tensor = value.tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    state = hashlib.sha256(f"inline {tuple(value.tensor.shape)} {value.tensor.dtype}".encode())
    for start in _samples(tensor.numel()):
        state.update(tensor[start : start + _BLOCK].numpy().tobytes())
    return state.hexdigest()


_BLOCK = 4096


def _samples(size: int, count: int = 256) -> list[int]:
    if size <= count * _BLOCK:
        return list(range(0, size, _BLOCK))
    return [round(i * (size - _BLOCK) / (count - 1)) for i in range(count)]


@lru_cache(maxsize=4096)
def file_digest(path: Path, size: int, mtime_ns: int) -> str:
    """Identity of a safetensors file by header, length and sampled blocks; size and time are those of its stat."""
    state = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        length = file.read(8)
        state.update(length + file.read(int.from_bytes(length, "little")))
        for start in _samples(size):
            file.seek(start)
            state.update(file.read(_BLOCK))
    return state.hexdigest()
