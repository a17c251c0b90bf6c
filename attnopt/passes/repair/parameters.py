"""Which weights of a program are trained, and how: as a change of what they are now, in units of their own size.

    w = w_0 + size * mask * u                     all of w (size: of a matrix one number, of a vector one each)
    w = w_0 + size * mask * (B A) / sqrt(rank)    low-rank adapters (LoRA, arXiv 2106.09685), B = 0 at the start

One step size fits all matrices and models then, decay of u pulls to the start instead of to zero, and what must stay
exactly as it is has mask 0: a latent's constant lane, and the zeros of a pruned matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from attnopt.errors import OptionError
from attnopt.passes.common.refit import size_of
from attnopt.passes.common.repair import trained_weights
from attnopt.rewriter.edit import weight_names
from attnopt.rewriter.program import Program
from attnopt.rewriter.weights import Value, meta_of

#: Rank of the adapters if none is given.
LORA_RANK = 16


@dataclass(frozen=True)
class Selection:
    """What is trained.

    Attributes:
        names: of the weights; of tied ones the first.
        rank: of low-rank changes to matrices; None for changes of all their numbers.
    """

    names: tuple[str, ...]
    rank: int | None


def select(program: Program, parameters: str | Sequence[str], rank: int | None) -> Selection:
    """The weights that an option names.

    Args:
        program: to be trained.
        parameters: "attention" (all weights of attention layers), "all", "lora" (low-rank changes of the attention's
            matrices), or shell patterns of weight names.
        rank: of low-rank changes, or None.

    Raises:
        OptionError: a pattern fits no weight.
    """
    owner = owners(program)
    own = {owner[name]: None for name in _parameters(program)}
    if parameters == "all":
        return Selection(tuple(own), rank)
    if parameters in ("attention", "lora"):
        inside = {n for site in program.site_list for n in (*weight_names(site), *trained_weights(site).values())}
        names = tuple(name for name in own if name in inside)
        return Selection(names, rank or LORA_RANK if parameters == "lora" else rank)
    patterns = parameters.split() if isinstance(parameters, str) else list(parameters)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in own):
            raise OptionError(
                f"distill: no weight is named like {pattern!r}",
                f"names look like {', '.join(list(own)[1:4])}; or give attention, all or lora",
            )
    return Selection(tuple(n for n in own if any(fnmatchcase(n, pattern) for pattern in patterns)), rank)


def _parameters(program: Program) -> list[str]:
    """Floating-point weights that the graph reads and that are no constants."""
    nodes = (n for n in program.graph.nodes if n.op == "get_attr" and not n.meta.get("buffer"))
    names = dict.fromkeys(str(n.target) for n in nodes)
    floating = (n for n in names if meta_of(program.weights[n]).dtype.is_floating_point)
    return [name for name in floating if not name.endswith("inv_freq")]


def owners(program: Program) -> dict[str, str]:
    """For each weight the first name of the same weight: others are tied to it."""
    first: dict[Value, str] = {}
    return {name: first.setdefault(program.weights[name], name) for name in program.weight_names}


def step_size(weight: Tensor) -> Tensor:
    """What steps of a weight are relative to: the root mean square of a matrix, each number of a vector by itself.

    Norm gains and biases may hold numbers of very different sizes, such as the constant lane of a latent in a stock
    class, whose gain is a thousandth of the others'.
    """
    if weight.dim() > 1 or not bool(weight.any()):
        return torch.tensor(size_of(weight)).to(weight)
    return torch.where(weight == 0, weight[weight != 0].abs().median(), weight.abs())


class Fixed(nn.Module):
    """A weight that is not trained.

    Args:
        value: the tensor; not copied.
        constant: it is no parameter.
    """

    def __init__(self, value: Tensor, constant: bool) -> None:
        super().__init__()
        self.value: Tensor
        if constant or not value.is_floating_point():
            self.register_buffer("value", value, persistent=False)
        else:
            self.value = nn.Parameter(value, requires_grad=False)

    def forward(self) -> Tensor:
        return self.value


class Changed(nn.Module):
    """A weight that is trained; see the head of this module.

    Args:
        start: w_0; not copied.
        free: what of it may change, a mask of its shape; None for all.
        rank: of the change to a matrix; None, and for vectors, for a change of all numbers.
        seed: of A.
    """

    def __init__(self, start: Tensor, free: Tensor | None, rank: int | None, seed: int) -> None:
        super().__init__()
        self.start = nn.Parameter(start, requires_grad=False)
        self.size: Tensor
        self.register_buffer("size", step_size(start), persistent=False)
        self.free: Tensor | None
        self.register_buffer("free", None if free is None else free.to(start), persistent=False)
        self.low = rank is not None and start.dim() > 1
        if self.low:
            assert rank is not None
            generator = torch.Generator().manual_seed(seed)
            across = torch.randn(rank, start.shape[-1], generator=generator)
            self.a = nn.Parameter(across.to(start))
            self.b = nn.Parameter(start.new_zeros(start.numel() // start.shape[-1], rank))
        else:
            self.u = nn.Parameter(torch.zeros_like(start))

    def forward(self) -> Tensor:
        return self.value_of(dict(self._parameters))  # type: ignore[arg-type]

    def value_of(self, given: Mapping[str, Tensor]) -> Tensor:
        """The weight for given values of its parameters."""
        start = given["start"]
        if self.low:
            change = (given["b"] @ given["a"]).view_as(start) * (self.size / given["a"].shape[0] ** 0.5)
        else:
            change = given["u"] * self.size
        return start + (change if self.free is None else change * self.free)
