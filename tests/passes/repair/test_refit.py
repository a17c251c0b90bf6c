"""The refit pass: after any transformation it brings a model closer, and no layer ends worse on held-out text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnopt.errors import OptionError
from attnopt.passes.common.free import lane_of
from attnopt.passes.repair.refit import Refit
from attnopt.rewriter.passes import PassContext, PassResult
from attnopt.rewriter.program import Program
from tests.passes.helpers import apply, program_of
from tests.passes.repair.helpers import KilledError, KilledSteps, context, converted, loss, text


def fit(program: Program, original: Program, how: dict[str, Any] | None = None, **changes: Any) -> PassResult:
    item = Refit(**{"epochs": 2, **(how or {})})
    return item.apply(program, item.plan(program, {}), context(original, **changes))


@pytest.mark.parametrize(
    ("family", "pipeline"),
    [
        ("llama", "dimap{sparsity=0.4}"),
        pytest.param("qwen3", "to-mla{kv-keep=0.5}", marks=pytest.mark.slow),
        pytest.param("gpt2", "prune{keep-heads=0.5 fill=none}", marks=pytest.mark.slow),
    ],
)
def test_it_helps_after_any_transformation(family: str, pipeline: str) -> None:
    program = program_of(family, layers=3, **({"n_head": 4} if family == "gpt2" else {}))
    how = PassContext(calibration=text())
    alone = apply(program, pipeline, how).program
    result = apply(program, f"{pipeline},refit{{epochs=2}}", how)
    assert loss(program, result.program) < loss(program, alone)
    for layer in result.results[-1].layers:
        assert layer["held_out_after"] <= layer["held_out_before"]
        assert layer.get("error_after_refit", 0) <= layer.get("error_before_refit", 0)


def test_zeros_and_lane_stay() -> None:
    original, program = converted()
    after = fit(program, original, {"epochs": 4}).program
    changed = []
    for site in program.site_list:
        assert site.latent is not None
        lane = lane_of(site)
        for stored in (site.latent.kv_a.weight, site.latent.kv_a.bias):
            assert stored is not None
            assert torch.equal(program.weights.get(stored)[lane], after.weights.get(stored)[lane])
        stored = site.latent.kv_a.weight
        found = after.sites[site.fqn].latent
        assert found is not None
        if not torch.equal(program.weights.get(stored), after.weights.get(stored)):
            changed.append(site.fqn)
            assert found.peak != site.latent.peak
    assert changed, "a layer that would get worse on held-out text stays as it is, but not all do"
    source = program_of("llama", layers=2)
    pruned = apply(source, "dimap{sparsity=0.4}").program
    fitted = fit(pruned, source).program
    assert [int((fitted.weights.get(n) == 0).sum()) for n in pruned.weight_names] == [
        int((pruned.weights.get(n) == 0).sum()) for n in pruned.weight_names
    ]


def test_a_rate_that_harms_is_not_taken() -> None:
    original, program = converted()
    result = fit(program, original, {"rate": 100.0})
    assert all(layer["error_after_refit"] <= layer["error_before_refit"] for layer in result.layers)
    assert loss(original, result.program) < 1.1 * loss(original, program)


def test_an_unchanged_program_is_left_alone() -> None:
    program = program_of("llama", layers=2)
    result = fit(program, program)
    assert result.program is program
    assert result.changed_sites == ()


def test_killed_and_resumed_gives_the_same_weights() -> None:
    original, program = converted()
    whole = fit(program, original).program
    steps = KilledSteps(1)
    with pytest.raises(KilledError):
        fit(program, original, workdir=steps)
    steps.saves = 10
    again = fit(program, original, workdir=steps, resume=True).program
    assert all(torch.equal(whole.weights.get(n), again.weights.get(n)) for n in whole.weight_names)


def test_without_text_it_says_so() -> None:
    original, program = converted()
    with pytest.raises(OptionError, match="text"):
        fit(program, original, calibration=None)
