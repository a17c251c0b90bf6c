"""Runs the Gluon kernel's own source on torch tensors: Triton has no interpreter for Gluon.

`kernel()` executes `mla_decode_gluon.py` with this module in place of Gluon. Layouts and threads are not modelled: what
is modelled is order. A copy reaches shared memory when its group is waited for and not earlier, and finds there what
the buffer's memory held before; a product reads its operands when it is waited for, and insists that they are what they
were when it was issued. So a buffer that is overwritten too early, a wait for the wrong group and a block that is taken
for another show as wrong numbers or as `Race`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.triton.runtime import designs

NAN = float("nan")


class Race(AssertionError):
    """Memory changed while something that reads it was under way, or was read before it was there."""


@dataclass(frozen=True)
class Pointer:
    """A flat tensor and offsets into it."""

    data: Tensor
    at: Any = 0

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.data.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.at + offset)

    def read(self, mask: Tensor | None) -> Tensor:
        at = torch.as_tensor(self.at)
        seen = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.broadcast_to(at.shape)
        inside = at[seen]
        assert not inside.numel() or (int(inside.min()) >= 0 and int(inside.max()) < self.data.numel()), "outside"
        found = torch.zeros(at.shape, dtype=self.data.dtype)
        found[seen] = self.data[inside.long()]
        return found


@dataclass(frozen=True)
class Shared:
    """A view of shared memory."""

    data: Tensor

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def index(self, place: int) -> Shared:
        return Shared(self.data[int(place)])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)


@dataclass
class Product:
    """A product that was issued: operands, what they were, and where it is in the order of issue."""

    a: Shared
    b: Shared
    acc: Any
    number: int
    operands: tuple[Tensor, Tensor]

    def result(self) -> Tensor:
        before = self.acc.result() if isinstance(self.acc, Product) else self.acc
        for view, then in zip((self.a, self.b), self.operands, strict=True):
            if not torch.equal(view.data.nan_to_num(1e30), then.nan_to_num(1e30)):
                raise Race("an operand changed before its product was waited for")
        return before + self.a.data.float() @ self.b.data.float()


@dataclass
class Machine:
    """A thread block: its place in the grid, and what it has under way."""

    program: tuple[int, int]
    groups: list[list[tuple[Shared, Tensor]]] = field(default_factory=list)
    open: list[tuple[Shared, Tensor]] = field(default_factory=list)
    issued: int = 0

    def copy(self, buffer: Shared, pointer: Pointer, mask: Tensor) -> None:
        buffer.data.fill_(NAN)  # from now on it holds neither the old nor the new
        self.open.append((buffer, pointer.read(mask)))

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def arrive(self, pending: int) -> None:
        assert pending >= 0
        while len(self.groups) > pending:
            for buffer, value in self.groups.pop(0):
                buffer.data.copy_(value)

    def multiply(self, a: Shared, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async
        self.issued += 1
        if not use_acc:
            acc = torch.zeros_like(acc)
        return Product(a, b, acc, self.issued, (a.data.clone(), b.data.clone()))

    def wait(self, pending: int, deps: Sequence[Product]) -> Any:
        late = [d for d in deps if d.number > self.issued - pending]
        if late:
            raise Race("a product is used that was not waited for")
        results = tuple(d.result() for d in deps)
        return results[0] if len(results) == 1 else results


MACHINE = Machine((0, 0))


def _store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    at, seen = torch.as_tensor(pointer.at), mask.broadcast_to(torch.as_tensor(pointer.at).shape)
    pointer.data[at[seen]] = value.broadcast_to(at.shape)[seen].to(pointer.data.dtype)


def _where(condition: Any, a: Any, b: Any) -> Tensor:
    return torch.where(torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b))


def _pairwise(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
    return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))


def _modules() -> dict[str, ModuleType]:
    """What the kernel's source imports."""
    language: dict[str, Any] = {
        **{name: getattr(torch, name) for name in ("float32", "int64", "exp2", "log2")},
        "constexpr": object,
        "static_range": range,
        "barrier": lambda: None,
        "num_warps": lambda: 8,
        "arange": lambda start, stop, layout: torch.arange(start, stop),
        "full": lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        "zeros": lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        "load": lambda pointer: pointer.read(None),
        "store": _store,
        "where": _where,
        "maximum": _pairwise(torch.maximum),
        "minimum": _pairwise(torch.minimum),
        "max": lambda x, axis: x.amax(axis),
        "sum": lambda x, axis: x.sum(axis),
        "program_id": lambda axis: MACHINE.program[axis],
        "convert_layout": lambda x, layout: x,
        "allocate_shared_memory": lambda dtype, shape, layout: Shared(torch.full(shape, NAN, dtype=dtype)),
        **{name: lambda *a, **k: None for name in ("SliceLayout", "BlockedLayout", "NVMMADistributedLayout")},
        "NVMMASharedLayout": SimpleNamespace(get_default_for=lambda shape, dtype: None),
    }
    hopper = {
        "async_copy": SimpleNamespace(
            async_copy_global_to_shared=lambda buffer, pointer, mask: MACHINE.copy(buffer, pointer, mask),
            commit_group=lambda: MACHINE.commit(),
            wait_group=lambda pending: MACHINE.arrive(pending),
        ),
        "fence_async_shared": lambda: None,
        "warpgroup_mma": lambda *a, **k: MACHINE.multiply(*a, **k),
        "warpgroup_mma_wait": lambda pending, deps: MACHINE.wait(pending, deps),
    }
    gluon = {"jit": lambda f: f, "constexpr_function": lambda f: f}
    made = {"triton.experimental": ModuleType("triton.experimental")}
    for name, content in (
        ("triton.experimental.gluon", gluon),
        ("triton.experimental.gluon.language", language),
        ("triton.experimental.gluon.language.nvidia.hopper", hopper),
    ):
        made[name] = ModuleType(name)
        made[name].__dict__.update(content)
    made["triton.experimental"].__dict__["gluon"] = made["triton.experimental.gluon"]
    made["triton.experimental.gluon"].__dict__["language"] = made["triton.experimental.gluon.language"]
    return made


class Kernel:
    """The kernel as `launch.py` calls it: `kernel[grid](arguments)`."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def run(*arguments: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
            global MACHINE
            assert num_warps == 8
            assert constants["STAGES"] == num_stages
            pointers = [Pointer(a.view(-1)) if isinstance(a, Tensor) else a for a in arguments]
            for item in range(grid[0]):
                for tile in range(grid[1]):
                    MACHINE = Machine((item, tile))
                    self.function(*pointers, **constants)
                    assert not (MACHINE.open or MACHINE.groups), "copies under way at the end"

        return run


def kernel(edits: Sequence[tuple[str, str]] = ()) -> Kernel:
    """The kernel, after replacements in its source."""
    path = Path(designs.__file__).with_name("mla_decode_gluon.py")
    source = path.read_text()
    for old, new in edits:
        if old not in source:
            raise ValueError(f"the kernel has no {old!r}")
        source = source.replace(old, new)
    space: dict[str, Any] = {}
    stubs = _modules()
    real = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        exec(compile(source, str(path), "exec"), space)
    finally:
        for name, module in real.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return Kernel(space["mla_decode_d4"])
