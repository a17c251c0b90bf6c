"""Writes into tensors: rewritten where that is provably the same, otherwise left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from attnopt.errors import UnsupportedError
from attnopt.rewriter import export
from attnopt.rewriter.capture import capture_module
from attnopt.rewriter.functional import make_functional
from attnopt.rewriter.interpret import run
from tests import models


class Toy(nn.Module):
    """Computes a function; `table` is a buffer it may use."""

    table: Tensor

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def in_parts(_: Toy, x: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    out[:, :1] = x[:, 3:]
    out[:, 1:] = x[:, :3] * 2
    return out


def source_changed_later(_: Toy, x: Tensor) -> Tensor:
    y, out = x * 2, x.new_zeros(x.shape)
    out[:, :1] = y[:, 3:]
    y.neg_()
    return out + y


def nested(_: Toy, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[1:, 2:] = x[1:, 2:]
    out[0].mul_(5)
    return out + 1


def twice(_: Toy, x: Tensor) -> Tensor:
    y = x * 2
    z = y.add_(1)
    y.mul_(x)
    return y + z


def view_read_before(_: Toy, x: Tensor) -> Tensor:
    y = x.exp()
    total = y.T.sum()
    y.neg_()
    return y + total


def view_made_after(_: Toy, x: Tensor) -> Tensor:
    y = x.exp()
    y.neg_()
    return y.T.contiguous()


def best_shares(_: Toy, x: Tensor) -> Tensor:
    values, _places = x.topk(2, dim=-1)
    values /= values.sum(-1, keepdim=True)
    return values


def scattered(_: Toy, x: Tensor) -> Tensor:
    mask = torch.zeros_like(x)
    mask.scatter_(1, x.argmax(-1, keepdim=True), 1)
    return x.masked_fill(~mask.bool(), 0.0)


def of_another_type(_: Toy, x: Tensor) -> Tensor:
    out = torch.zeros(3, 4, dtype=torch.float64)
    out[:, 1] = x[:, 0]
    out[:, 2:] = x[0, 0]
    return out


def constant(_: Toy, x: Tensor) -> Tensor:
    return x + torch.tensor([1.0, 2.0, 3.0, 4.0])


REWRITTEN = [
    in_parts, source_changed_later, nested, twice, view_read_before, view_made_after, best_shares, scattered,
    of_another_type, constant,
]  # fmt: skip


def older_view_read_later(_: Toy, x: Tensor) -> Tensor:
    y = x.exp()
    row = y[0]
    y.neg_()
    return y + row


def older_view_of_a_view_read_later(_: Toy, x: Tensor) -> Tensor:
    y = x.exp()
    row = y.view(-1)[:4]
    y.neg_()
    return y + row


def overlapping_slice_read_later(_: Toy, x: Tensor) -> Tensor:
    y = x.exp()
    head = y[:, :3]
    y[:, 2:] = 0
    return head.sum() + y


def through_a_transpose(_: Toy, x: Tensor) -> Tensor:
    y = x.exp()
    y.T.mul_(2)
    return y


def result_of_a_write_into_a_view(_: Toy, x: Tensor) -> Tensor:
    y = x.exp()
    row = y[0].mul_(3)
    y[1] = 0
    return y + row


def into_the_input(_: Toy, x: Tensor) -> Tensor:
    x.add_(1)
    return x * 2


def into_a_buffer(toy: Toy, x: Tensor) -> Tensor:
    toy.table.add_(1)
    return x + toy.table


def into_dropped_out(_: Toy, x: Tensor) -> Tensor:
    y = x.exp()
    z = nn.functional.dropout(y, 0.5, training=False)
    z.neg_()
    return y + z


def into_a_narrower_type(_: Toy, x: Tensor) -> Tensor:
    y = torch.ones(3, 4, dtype=torch.int8)
    y.mul_(x.argmax(-1, keepdim=True) + 100)
    return y * 2


def under_another_grad_mode(_: Toy, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return x * 2


LEFT_ALONE = [
    older_view_read_later, older_view_of_a_view_read_later, overlapping_slice_read_later, through_a_transpose,
    result_of_a_write_into_a_view, into_the_input, into_a_buffer, into_dropped_out, into_a_narrower_type,
    under_another_grad_mode,
]  # fmt: skip


def exported(function: Callable[..., Tensor]) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(Toy(function).eval(), (torch.zeros(3, 4),))


def writes(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if isinstance(n.target, OpOverload) and n.target._schema.is_mutable]


@pytest.mark.parametrize("function", REWRITTEN, ids=lambda f: f.__name__)
def test_rewritten(function: Callable[..., Tensor]) -> None:
    program = exported(function)
    assert writes(program.graph)
    assert make_functional(program.graph)
    assert writes(program.graph) == []
    program.graph.lint()
    program.graph_module.recompile()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = function(Toy(function), x)
    found = program.module()(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    noted = {n.name: n.meta["val"] for n in program.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    for name, value in values(program, x).items():
        assert (value.shape, value.dtype) == (noted[name].shape, noted[name].dtype)


@pytest.mark.parametrize("function", [in_parts, source_changed_later], ids=lambda f: f.__name__)
def test_what_is_rewritten_can_be_differentiated(function: Callable[..., Tensor]) -> None:
    program = exported(function)
    assert make_functional(program.graph)
    program.graph_module.recompile()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found, expected = (
        torch.autograd.grad(work(x).square().sum(), x)
        for work in (program.module(), lambda x: function(Toy(function), x))
    )
    torch.testing.assert_close(found, expected)


def values(program: torch.export.ExportedProgram, x: Tensor) -> dict[str, Tensor]:
    """What each op of the graph really returns."""
    found: dict[str, Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.op == "call_function" and isinstance(value, Tensor):
                found[n.name] = value
            return value

    state = [*program.state_dict.values(), *program.constants.values()]
    Watch(program.graph_module).run(*state, x)
    return found


@pytest.mark.parametrize("function", LEFT_ALONE, ids=lambda f: f.__name__)
def test_left_alone(function: Callable[..., Tensor]) -> None:
    program = exported(function)
    assert not make_functional(program.graph)
    program.graph.lint()
    program.graph_module.recompile()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = function(Toy(function), x.clone())
    torch.testing.assert_close(program.module()(x.clone()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v3", "swin"])
def test_families_are_traced_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise UnsupportedError("traced a second time")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", refuse)
    capture_module(models.build(family))


def test_what_is_left_alone_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    program = models.captured("mixtral")[1]
    monkeypatch.setattr(export, "make_functional", lambda graph: False)
    again = capture_module(models.build("mixtral"))
    assert again.site_list[0].q == program.site_list[0].q
    assert [(s.fqn, s.kind, s.scale, s.rope) for s in again.site_list] == [
        (s.fqn, s.kind, s.scale, s.rope) for s in program.site_list
    ]
    x = models.inputs("mixtral")
    torch.testing.assert_close(run(again, **x), run(program, **x), rtol=0, atol=0)
