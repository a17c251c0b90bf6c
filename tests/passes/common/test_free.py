"""What of a weight may change: pruned zeros may not, zeros by chance may."""

from __future__ import annotations

import pytest
import torch

from attnopt.passes.common.free import free_of
from attnopt.rewriter.program import Program
from tests.passes.helpers import apply, program_of, with_weights

OUTPUT = "model.layers.{}.self_attn.o_proj.weight"


def with_zeros(share: float) -> Program:
    """A model of whose output projections so much is zero."""
    torch.manual_seed(0)
    program = program_of("llama", layers=2)
    names = [OUTPUT.format(i) for i in range(2)]
    return with_weights(
        program,
        {n: torch.where(torch.rand_like(program.weights.get(n)) < share, 0.0, program.weights.get(n)) for n in names},
    )


@pytest.mark.parametrize("share", [0.003, 0.1])
def test_zeros_that_few_bits_leave_stop_no_repair(share: float) -> None:
    program = with_zeros(share)
    assert all(bool((program.weights.get(OUTPUT.format(i)) == 0).any()) for i in range(2))
    (result,) = apply(program, "prune{keep-heads=0.5 unit=head}").results
    errors = [(layer["error_before"], layer["error_after"]) for layer in result.layers]
    assert len(errors) == 2
    assert all(after < 0.9 * before for before, after in errors)


def test_a_matrix_that_was_pruned_before_keeps_its_zeros() -> None:
    program = with_zeros(0.5)
    name = OUTPUT.format(0)
    weight = program.weights.get(name)
    free = free_of(program, name, weight)
    assert free is not None
    assert torch.equal(free, weight != 0)


def test_a_few_zeros_stay_if_this_run_made_them() -> None:
    pruned = apply(program_of("llama", layers=2), "dimap{sparsity=0.05 shares=equal}").program
    name = OUTPUT.format(0)
    weight = pruned.weights.get(name)
    assert 0 < float((weight == 0).float().mean()) < 0.2
    free = free_of(pruned, name, weight)
    assert free is not None
    assert torch.equal(free, weight != 0)


def test_zeros_by_chance_do_not_stay_after_structured_removal() -> None:
    shrunk = apply(with_zeros(0.03), "dimap{sparsity=0.5 structured=true}").program
    name = OUTPUT.format(0)
    assert free_of(shrunk, name, shrunk.weights.get(name)) is None
