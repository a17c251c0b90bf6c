"""Several processes working as one: who is which, sums over all of them, and steps that the first one keeps.

`torchrun --nproc-per-node N -m attnopt ...` starts N processes that each take a share of the text. What they measure is
summed, so that all of them make the same choices and hold the same weights; the first one alone reads and writes the
staging directory and talks. In a single process everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from attnopt.rewriter.steps import StepStore
from attnopt.rewriter.weights import Inline, Value, evaluate

T = TypeVar("T")


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if world() > 1 else 0


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, for the length of the block; yields the device of this one.

    Args:
        device: what was asked for; each process takes its own GPU of the machine if that is a GPU without a number.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    # gloo besides, because plain objects and sums in float64 on the processor are exchanged as well.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def add_up(*tensors: torch.Tensor) -> None:
    """Replace each tensor by its sum over all processes, in place."""
    if world() > 1:
        for tensor in tensors:
            if tensor.is_complex():
                parts = torch.view_as_real(tensor).contiguous()
                dist.all_reduce(parts)
                tensor.copy_(torch.view_as_complex(parts))
            else:
                whole = tensor.contiguous()
                dist.all_reduce(whole)
                tensor.copy_(whole)


def sum_of(*numbers: float) -> tuple[float, ...]:
    """Each number summed over all processes."""
    if world() == 1:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tuple(tensor.tolist())


def largest_of(number: float) -> float:
    """The largest of all processes' numbers."""
    if world() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def smallest_of(number: int) -> int:
    """The smallest of all processes' numbers."""
    return -round(largest_of(-number)) if world() > 1 else number


def average_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Replace the gradient of each tensor by its mean over all processes."""
    if world() > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                add_up(parameter.grad)
                parameter.grad /= world()


def from_first(value: T) -> T:
    """The first process's value, in all of them."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def share_of(count: int) -> slice:
    """The share of `count` things that this process takes: every N-th."""
    return slice(rank(), count, world())


class FirstSteps(StepStore):
    """Finished steps that the first process keeps for all. All of them must call its methods in the same order.

    Args:
        inner: the first process's store; not used in the others.
    """

    def __init__(self, inner: StepStore) -> None:
        self._inner = inner

    def save(self, step: str, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> Mapping[str, Value]:
        # What the first one has found holds for all: sums may differ in their last bits from machine to machine.
        tensors = from_first({name: tensor.detach().cpu() for name, tensor in tensors.items()})
        if rank() == 0:
            return self._inner.save(step, tensors, record)
        return {name: Inline(tensor) for name, tensor in tensors.items()}

    def load(self, step: str) -> tuple[Mapping[str, Value], dict[str, Any]]:
        found: tuple[Mapping[str, Value], dict[str, Any]] = ({}, {})
        if rank() == 0:
            found = self._inner.load(step)
        tensors = from_first({name: evaluate(value) for name, value in found[0].items()})
        record = from_first(found[1])
        return found if rank() == 0 else ({name: Inline(tensor) for name, tensor in tensors.items()}, record)

    def steps_done(self) -> tuple[str, ...]:
        return from_first(self._inner.steps_done() if rank() == 0 else ())
