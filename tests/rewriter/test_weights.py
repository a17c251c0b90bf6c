"""Lazy weights: reading, expressions, identity, and that reading costs no more memory than the tensor."""

from __future__ import annotations

import math
import os
import pickle
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from attnopt.artifact import outgoing
from attnopt.errors import SourceError
from attnopt.rewriter.safe_tensors import DTYPES, read_header, write_tensors
from attnopt.rewriter.weights import (
    Derived,
    Inline,
    Stored,
    TensorMeta,
    Value,
    WeightStore,
    derived_op,
    evaluate,
    is_finite,
    meta_of,
)


def _stored(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Stored]:
    save_file(tensors, path)
    file = read_header(path)
    return {key: Stored.of(file, entry) for key, entry in file.entries.items()}


@pytest.mark.parametrize("name", DTYPES)
def test_every_element_type(name: str, tmp_path: Path) -> None:
    dtype = DTYPES[name]
    raw = torch.arange(24 * dtype.itemsize, dtype=torch.uint8) % (2 if name == "BOOL" else 60)
    tensor = raw.view(dtype).reshape(2, 3, 4)
    value = _stored(tmp_path / "x.safetensors", {"t": tensor})["t"]
    read = evaluate(value)
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))
    part = evaluate(Derived.of("rows", value, start=1, stop=2))
    assert torch.equal(part.view(torch.uint8), tensor[1:].view(torch.uint8))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 3), (5, 1, 2)])
def test_shapes_down_to_nothing(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    value = _stored(tmp_path / "x.safetensors", {"t": tensor, "u": torch.zeros(1)})["t"]
    assert torch.equal(evaluate(value), tensor)
    assert meta_of(value) == TensorMeta(shape, torch.float32)


X, Y = torch.randn(4, 6), torch.randn(4, 6)
EXPRESSIONS: dict[str, tuple[Callable[[Value, Value], Derived], torch.Tensor]] = {
    "rows": (lambda x, y: Derived.of("rows", x, start=1, stop=3), X[1:3]),
    "rows to the end": (lambda x, y: Derived.of("rows", x, start=2, stop=99), X[2:]),
    "rows of a sum": (lambda x, y: Derived.of("rows", Derived.of("add", x, y), start=0, stop=1), (X + Y)[:1]),
    "narrow": (lambda x, y: Derived.of("narrow", x, dim=1, start=2, length=3), X[:, 2:5]),
    "take": (lambda x, y: Derived.of("take", x, dim=1, index=(5, 0, 0)), X[:, [5, 0, 0]]),
    "cat": (lambda x, y: Derived.of("cat", x, y, dim=1), torch.cat([X, Y], 1)),
    "stack": (lambda x, y: Derived.of("stack", x, y, dim=0), torch.stack([X, Y])),
    "transpose": (lambda x, y: Derived.of("transpose", x, dim0=0, dim1=1), X.T),
    "reshape": (lambda x, y: Derived.of("reshape", x, shape=(2, 12)), X.reshape(2, 12)),
    "scale": (lambda x, y: Derived.of("scale", x, factor=0.5), X * 0.5),
    "add": (lambda x, y: Derived.of("add", x, y), X + Y),
    "cast": (lambda x, y: Derived.of("cast", x, dtype=torch.float64), X.double()),
    "full": (lambda x, y: Derived.of("full", shape=(2, 2), value=1.5, dtype=torch.bfloat16), torch.full((2, 2), 1.5)),
    "zeros": (lambda x, y: Derived.of("zeros", shape=(3,), dtype=torch.float32), torch.zeros(3)),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions(name: str, tmp_path: Path) -> None:
    build, expected = EXPRESSIONS[name]
    for values in (_stored(tmp_path / "x.safetensors", {"x": X, "y": Y}), {"x": Inline(X), "y": Inline(Y)}):
        value = build(values["x"], values["y"])
        found = evaluate(value)
        assert torch.equal(found.double(), expected.double())
        assert found.is_contiguous()
        assert found.untyped_storage().nbytes() == found.numel() * found.element_size(), "no larger base kept alive"
        assert meta_of(value) == TensorMeta(tuple(found.shape), found.dtype)
        found.zero_()
        assert torch.equal(evaluate(value).double(), expected.double())
    assert pickle.loads(pickle.dumps(build(Inline(X), Inline(Y)))).op == build(Inline(X), Inline(Y)).op


def test_unknown_and_doubly_defined_ops() -> None:
    with pytest.raises(KeyError, match="no derived op 'invert'"):
        Derived.of("invert")
    with pytest.raises(ValueError, match="registered twice"):
        derived_op(_named("rows"))


def _named(name: str) -> Callable[..., torch.Tensor]:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x

    function.__name__ = name
    return function


def test_what_get_returns_belongs_to_the_caller() -> None:
    original = torch.ones(3)
    store = WeightStore({"w": Inline(original)})
    store.get("w").zero_()
    assert torch.equal(original, torch.ones(3))
    assert store.get("w", torch.float64).dtype == torch.float64


def test_stores_are_immutable_and_derive_others() -> None:
    first = WeightStore({"a": Inline(X), "b": Inline(Y)})
    second = first.with_values({"c": Inline(X)}, drop=["a"])
    assert first.names() == ("a", "b")
    assert second.names() == ("b", "c")
    assert "a" not in second
    with pytest.raises(KeyError):
        second.get("a")


def test_shared_weights_count_once() -> None:
    shared = Inline(torch.zeros(5, 2))
    assert WeightStore({"embed": shared, "head": shared, "other": Inline(torch.zeros(3))}).parameters == 13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(dtype: torch.dtype, bad: float, tmp_path: Path) -> None:
    tensor = torch.zeros(7, 5)
    tensor[4, 2] = bad
    value = _stored(tmp_path / "x.safetensors", {"layer.w": tensor.to(dtype)})["layer.w"]
    with pytest.raises(SourceError, match=r"'layer.w' in .*x.safetensors holds NaN or infinity"):
        evaluate(value)
    good = evaluate(Derived.of("rows", value, start=0, stop=4))
    assert good.shape == (4, 5)
    assert is_finite(good)


def test_largest_finite_numbers_are_fine() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2):
        assert is_finite(torch.full((9,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype))
    assert is_finite(torch.tensor([1 + 2j]))
    assert not is_finite(torch.tensor([complex(0, math.inf)], dtype=torch.complex64))


def test_a_file_that_changes_under_us(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    value = _stored(path, {"t": X})["t"]
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(SourceError, match="changed while it was in use"):
        evaluate(value)
    path.unlink()
    with pytest.raises(SourceError, match="cannot read"):
        evaluate(value)


def test_a_file_shortened_after_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = _stored(tmp_path / "x.safetensors", {"t": X})["t"]
    monkeypatch.setattr(os, "preadv", lambda *args: 0)
    with pytest.raises(SourceError, match="ends before byte"):
        evaluate(value)


def test_reading_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = _stored(tmp_path / "x.safetensors", {"t": X})["t"]
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    assert torch.equal(evaluate(value), X)


def test_digest_tells_contents_names_and_expressions_apart(tmp_path: Path) -> None:
    values = _stored(tmp_path / "x.safetensors", {"a": X, "b": Y})
    other = _stored(tmp_path / "y.safetensors", {"a": X, "b": Y + 1})
    stores = [
        WeightStore(values),
        WeightStore(other),
        WeightStore({"a": values["b"], "b": values["a"]}),
        WeightStore({"a": values["a"]}),
        WeightStore({"a": Derived.of("scale", values["a"], factor=2.0), "b": values["b"]}),
        WeightStore({"a": Derived.of("scale", values["a"], factor=3.0), "b": values["b"]}),
        WeightStore({"a": Inline(X), "b": Inline(Y)}),
        WeightStore({"a": Inline(X.double()), "b": Inline(Y)}),
    ]
    assert len({store.digest() for store in stores}) == len(stores)
    copy = _stored(tmp_path / "copy.safetensors", {"a": X, "b": Y})
    assert WeightStore(copy).digest() == stores[0].digest(), "the place of a file is no part of its identity"
    assert WeightStore({"a": Inline(X.clone()), "b": Inline(Y)}).digest() == stores[6].digest()


def test_digest_of_a_large_tensor_reads_samples_of_all_of_it() -> None:
    big = torch.zeros(3_000_000)
    first = WeightStore({"w": Inline(big)}).digest()
    changed = big.clone()
    changed[-1] = 1
    assert WeightStore({"w": Inline(changed)}).digest() != first


def test_reading_a_file_does_not_keep_it_in_memory(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((2_000_000,), float(i)) for i in range(24)}
    values = _stored(tmp_path / "x.safetensors", tensors)
    del tensors

    def read_all() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(24):
            assert evaluate(values[f"t{i}"])[0] == i
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # threads do not survive a fork
            os.write(writer, str(read_all()).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    grown = int(os.read(reader, 100))
    assert grown < 60_000, f"192 MB were read 8 MB at a time, yet {grown} KB of memory were added"


@given(
    st.lists(
        st.tuples(st.text(max_size=8), st.lists(st.integers(0, 3), max_size=3)), max_size=6, unique_by=lambda p: p[0]
    )
)
def test_written_files_are_read_back(entries: list[tuple[str, list[int]]]) -> None:
    names = [name for name, _ in entries if name != "__metadata__" and name.isprintable()]
    tensors = {name: torch.randn(shape) for name, shape in entries if name in names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write_tensors(path, outgoing(WeightStore({name: Inline(t) for name, t in tensors.items()})))
        file = read_header(path)
        assert set(file.entries) == set(tensors)
        assert file.metadata == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(evaluate(Stored.of(file, file.entries[name])), tensor)
