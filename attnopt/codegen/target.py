"""Targets: machines that code is written for, with the facts that decisions need, and the verdict on a site.

A lane (one kind of output: ONNX, Triton, ...) asks for every attention site whether it has a form for it on the
target. The answer is a `Claim` that names the form, or a `Refusal` that says why not; never a silent fallback.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from attnopt.errors import OptionError


@dataclass(frozen=True)
class Target:
    """A kind of machine.

    Attributes:
        name: what users call it; for GPUs the compiler's name of the architecture.
        vendor: whose compiler it takes.
        arch: number of the architecture as Triton's GPUTarget wants it (an int for NVIDIA, a string for AMD).
        warp: threads that run in lockstep.
        shared_memory: bytes of fast memory a thread block can have.
        multiprocessors: of the usual card, for splitting work when no device can be asked.
        dtypes: element types its matrix units multiply.
    """

    name: str
    vendor: Literal["cpu", "nvidia", "amd"]
    arch: int | str = 0
    warp: int = 0
    shared_memory: int = 0
    multiprocessors: int = 0
    dtypes: tuple[str, ...] = ("float32",)

    @property
    def is_gpu(self) -> bool:
        """Whether Triton compiles for it."""
        return self.vendor != "cpu"


_HALF = ("float32", "float16", "bfloat16")

# Shared memory: CUDA C++ programming guide, technical specifications per compute capability (maximum per block);
# gfx942: 64 KiB of local data share (AMD CDNA 3 ISA guide).
TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("cpu", "cpu"),
        Target("sm_80", "nvidia", 80, 32, 166_912, 108, _HALF),
        Target("sm_89", "nvidia", 89, 32, 101_376, 128, _HALF),
        Target("sm_90", "nvidia", 90, 32, 232_448, 132, _HALF),
        Target("sm_100", "nvidia", 100, 32, 232_448, 148, _HALF),
        Target("gfx942", "amd", "gfx942", 64, 65_536, 304, _HALF),
    )
}


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
        OptionError: there is none.
    """
    if name in TARGETS:
        return TARGETS[name]
    near = difflib.get_close_matches(name, list(TARGETS), n=1)
    hint = f"did you mean {near[0]}? there are: " if near else "there are: "
    raise OptionError(f"there is no target {name!r}", hint + ", ".join(TARGETS))


@dataclass(frozen=True)
class Claim:
    """A site that a lane lowers.

    Attributes:
        site: its fqn.
        form: what it becomes, e.g. "latent-matmul" or "mla_decode".
        note: what a reader should know about the choice; empty if nothing.
    """

    site: str
    form: str
    note: str = ""


@dataclass(frozen=True)
class Refusal:
    """A site that a lane has no form for.

    Attributes:
        site: its fqn.
        reason: why not, in one clause.
    """

    site: str
    reason: str


Verdict = Claim | Refusal


def refusals(verdicts: Sequence[Verdict]) -> list[Refusal]:
    """The refused ones."""
    return [v for v in verdicts if isinstance(v, Refusal)]
