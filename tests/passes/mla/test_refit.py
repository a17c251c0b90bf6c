"""Recovery: the ridge solution is the minimum, and a refit never loses on windows it has not seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from attnopt.passes.common import refit as fitting
from attnopt.passes.mla import refit as module
from attnopt.passes.mla.layer import LatentLayer, closed_form
from attnopt.passes.mla.refit import Window, output_fit, refit, with_output
from attnopt.passes.mla.slots import choose_table, slot_energies
from attnopt.passes.mla.source_layer import SourceLayer
from tests.passes.mla.layers import apart, relative, source, statistics, text, weights_of


def small(layer: SourceLayer) -> LatentLayer:
    stats = statistics(layer)
    return closed_form(stats, choose_table([slot_energies(stats)], 3), 6)[0]


def examples(layer: SourceLayer, seed: int, count: int) -> list[partial[list[Window]]]:
    def example(x: Tensor) -> list[Window]:
        return [Window(part, layer.attend(part), weights_of(part)) for part in (x, x[:, :1])]

    return [partial(example, text(layer, batch=2, seed=seed + i)) for i in range(count)]


def error_of(layer: LatentLayer, source: SourceLayer, windows: list[partial[list[Window]]]) -> float:
    makes = [lambda make=make: [window.example(layer, source) for window in make()] for make in windows]
    return fitting.error_of({}, makes)


def test_ridge_is_the_weighted_least_squares_solution() -> None:
    layer = source()
    start = small(layer)
    x = text(layer, batch=8)
    weights = weights_of(x).double()
    fit = output_fit(start)
    fit.add(start.mixed(layer, x[:3]), layer.attend(x[:3]), weights[:3])
    fit.add(start.mixed(layer, x[3:]), layer.attend(x[3:]), weights[3:])
    solved = with_output(start, fit, 1e-12)
    inputs = torch.cat([start.mixed(layer, x).flatten(0, 1), torch.ones(8 * 48, 1, dtype=torch.float64)], 1)
    root = weights.flatten().sqrt()[:, None]
    # Values that come from a narrow latent determine less than the whole projection: directions that are only rounding
    # are cut off, and what the projections give is compared.
    expected = torch.linalg.pinv(inputs * root, rtol=1e-7) @ (layer.attend(x).flatten(0, 1) * root)
    assert relative(inputs @ torch.cat([solved.w_o.T, solved.b_o[None]]), inputs @ expected) < 1e-4


def test_strong_ridge_leaves_the_projection_alone() -> None:
    layer = source()
    start = small(layer)
    x = text(layer)
    fit = output_fit(start)
    fit.add(start.mixed(layer, x), layer.attend(x), weights_of(x))
    assert relative(with_output(start, fit, 1e9).w_o, start.w_o) < 1e-6
    assert relative(with_output(start, fit, 1e-2).w_o, start.w_o) > 1e-3


def test_ridge_helps_on_other_text() -> None:
    layer = source()
    start = small(layer)
    fit = output_fit(start)
    x = text(layer, batch=24)
    fit.add(start.mixed(layer, x), layer.attend(x), weights_of(x))
    held_out = examples(layer, 50, 2)
    assert error_of(with_output(start, fit), layer, held_out) < error_of(start, layer, held_out)


@pytest.mark.parametrize("form", ["plain", "bias", "norms"])
def test_refit_helps_on_other_text(form: str) -> None:
    layer = source(bias=form == "bias", norms=form == "norms")
    start = small(layer)
    made = []
    train = [lambda make=make: made.append(make) or make() for make in examples(layer, 10, 8)]
    after, fitted = refit(start, layer, train, examples(layer, 50, 2), epochs=6)
    assert len(made) == 48 + 1, "one example a step, and one for their size"
    assert fitted.after < 0.99 * fitted.before
    assert fitted.after == pytest.approx(error_of(after, layer, examples(layer, 50, 2)))
    assert torch.equal(after.inv_freq, start.inv_freq)
    if form != "bias":
        assert torch.equal(after.query_bias, start.query_bias)


@pytest.mark.parametrize("rate", [1.0, 30.0])
def test_refit_is_never_worse_on_held_out_text(rate: float) -> None:
    layer = source()
    start = small(layer)
    _, fitted = refit(start, layer, examples(layer, 10, 4), examples(layer, 50, 1), epochs=2, rate=rate)
    assert fitted.after <= fitted.before


def test_refit_is_repeatable_and_leaves_the_start_alone() -> None:
    layer = source()
    start = small(layer)
    before = {name: tensor.clone() for name, tensor in start.tensors().items()}
    runs = [refit(start, layer, examples(layer, 10, 3), examples(layer, 50, 1), epochs=2)[0] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(run.tensors().values() for run in runs), strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.tensors().items())
    other, _ = refit(start, layer, examples(layer, 10, 3), examples(layer, 50, 1), epochs=2, seed=1)
    assert not torch.equal(other.w_uv, runs[0].w_uv)


def test_nothing_to_do_is_nothing_done() -> None:
    layer = source()
    start = small(layer)
    after, fitted = refit(start, layer, [], examples(layer, 50, 1))
    assert all(torch.equal(a, b) for a, b in zip(after.tensors().values(), start.tensors().values(), strict=True))
    assert fitted.after == fitted.before


@pytest.mark.parametrize("norms", [False, True])
def test_some_queries_are_answered_as_in_the_whole_window(norms: bool) -> None:
    layer = source(norms=norms)
    start, x = small(layer), text(layer)
    whole = start.attend(layer, x)
    for first in (0, 1, 20, x.shape[1] - 1):
        assert relative(start.attend(layer, x, first), whole[:, first:]) < 1e-12


def test_every_query_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUERIES_PER_STEP", 20)
    layer = source()
    start, x = small(layer), text(layer)
    window = Window(x, layer.attend(x), weights_of(x))
    parts = [window.example(start, layer, turn) for turn in (5, 6, 7, 8)]
    assert [part.target.shape[1] for part in parts] == [8, 20, 20, 8]
    assert torch.equal(torch.cat([part.target for part in parts[1:]], 1), window.target)
    assert torch.equal(torch.cat([part.weights for part in parts[1:]], 1), window.weights)
    far = apart(*x.shape[:2], 90)
    moved = Window(x, layer.attend(x, far), weights_of(x), far)
    found = torch.cat([moved.example(start, layer, turn).output({}) for turn in (6, 7, 8)], 1)
    assert relative(found, start.attend(layer, x, positions=far)) < 1e-12
    assert relative(found, start.attend(layer, x)) > 1e-3
    whole = window.example(start, layer).output({})
    assert relative(torch.cat([part.output({}) for part in parts[1:]], 1), whole) < 1e-12


def line(far: float) -> tuple[dict[str, torch.Tensor], list[Callable[[], list[fitting.Example]]]]:
    """A linear map that is `far` from the right one, and examples of that."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator, dtype=torch.float64)
    truth = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    example = fitting.Example(lambda w: (x @ w["w"])[None], (x @ truth)[None], torch.ones(1, 64))
    start = truth + far * torch.randn(8, 8, generator=generator, dtype=torch.float64)
    return {"w": start}, [lambda: [example]] * 16


def test_steps_that_harm_are_taken_shorter() -> None:
    near, windows = line(0.003)
    found = fitting.refit(near, windows, windows, epochs=1, rate=0.2)
    assert found.after < found.before
    assert found.rate == pytest.approx(0.2 / fitting.SHORTER**2)
    hopeless = fitting.refit(near, windows, windows, epochs=1, rate=20.0)
    assert hopeless.after == hopeless.before
    assert torch.equal(hopeless.weights["w"], near["w"])


@pytest.mark.parametrize("far", [0.003, 0.03, 0.3])
def test_steps_are_as_long_as_the_error_asks_for(far: float) -> None:
    start, windows = line(far)
    found = fitting.refit(start, windows, windows, epochs=8)
    assert found.rate == fitting.STEP * found.before**0.5, "the first try served"
    assert found.before == pytest.approx(far**2, rel=0.5)
    assert found.after < 0.6 * found.before
