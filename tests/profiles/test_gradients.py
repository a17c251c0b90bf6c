"""Gradients layer by layer are those of the whole model, and the scores are what they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnopt.profiles.gradients import BackwardPass
from attnopt.profiles.layers import LayerReader
from attnopt.profiles.metric import Collected
from attnopt.profiles.metrics.gradient import map_effects
from attnopt.profiles.prompts import Prompts
from attnopt.profiles.view import LayerView
from attnopt.progress import Silent
from attnopt.rewriter.interpret import LayerRunner
from attnopt.rewriter.program import Program
from tests import models
from tests.profiles.opening import SETTINGS, blocks, dense_map, random_view


class Gradients(BackwardPass):
    """Keeps dL/d(context) of every layer and prompt."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.seen: dict[tuple[int, int], Tensor] = {}

    def _measure(self, index: int, prompt: int, view: LayerView) -> None:
        assert view.grad is not None
        self.seen[index, prompt] = view.grad
        super()._measure(index, prompt, view)


def backward(program: Program, inputs: dict[str, Tensor]) -> tuple[Gradients, Collected]:
    prompts = Prompts.of([inputs], "test")
    reader = LayerReader(program, SETTINGS, prompts.images, max(prompts.lengths))
    work = Gradients(LayerRunner(program, torch.float64), reader, prompts, 0, Silent())
    return work, work.run()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_gradient_is_that_of_a_gate_on_the_model(family: str) -> None:
    """dL/d(gate) = sum of <ctx, dL/dctx>: gates on the heads of the model itself, by finite differences."""
    program = models.captured(family)[1]
    ids = models.inputs(family, 1, 12)["input_ids"]
    work, _ = backward(program, {"input_ids": ids})
    runner = LayerRunner(program, torch.float64)

    def loss(layer: int, head: int, gate: float) -> float:
        env = runner.start({"input_ids": ids})
        for index, segment in enumerate(runner.layers):
            with runner.load(segment) as loaded, torch.no_grad():
                assert segment.site is not None
                context = loaded.evaluate(env, segment.site.nodes.attention).clone()
                if index == layer:
                    context[:, :, head] *= gate
                env = loaded.advance(env, {segment.site.nodes.attention: context})
        logits = runner.finish(env)
        return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))

    reader = work.reader
    for layer in (0, 1):
        env = runner.start({"input_ids": ids})
        for segment in runner.layers[:layer]:
            with runner.load(segment) as loaded:
                env = loaded.advance(env)
        with runner.load(runner.layers[layer]) as loaded, torch.no_grad():
            context = reader.open(loaded, env).view.context
        for head in (0, 3):
            slope = float((context[:, :, head] * work.seen[layer, 0][:, :, head]).sum())
            step = 1e-4
            measured = (loss(layer, head, 1 + step) - loss(layer, head, 1 - step)) / (2 * step)
            assert slope == pytest.approx(measured, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize("family", ["bert", "swin"])
def test_models_without_a_loss_are_ranked_by_their_output(family: str) -> None:
    program = models.captured(family)[1]
    inputs = {name: value[:2] for name, value in models.inputs(family, 2, 12).items()}
    _, found = backward(program, inputs)
    michel = found.array("michel")
    assert bool((michel.nan_to_num(1) > 0).all())


def test_long_texts_give_the_same_gradient_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    program = models.captured("llama")[1]
    inputs = {"input_ids": models.inputs("llama", 2, 40)["input_ids"]}
    whole, _ = backward(program, inputs)
    monkeypatch.setattr("attnopt.profiles.gradients.LOGIT_BYTES", 1)
    monkeypatch.setattr("attnopt.profiles.gradients.KEPT_BYTES", 1)
    parts, _ = backward(program, inputs)
    for key, grad in whole.seen.items():
        torch.testing.assert_close(parts.seen[key], grad, rtol=1e-6, atol=1e-9)


def test_map_effect_is_exact_for_a_linear_loss() -> None:
    """L = <g, A>: dropping key j of row t and renormalising changes it by E_tj."""
    view = random_view(2, 1, 9)
    grad = torch.randn(view.context.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    view = view.with_gradient(grad)
    (block,) = blocks(view, 64)
    found = map_effects(block)
    weights = dense_map(view.call)
    of_map = grad.transpose(1, 2) @ view.call.per_head(view.call.v).mT
    for t in range(1, 9):
        for j in range(t + 1):
            kept = weights[:, :, t].clone()
            kept[..., j] = 0
            kept = kept / kept.sum(-1, keepdim=True)
            change = ((kept - weights[:, :, t]) * of_map[:, :, t]).sum(-1)
            torch.testing.assert_close(found[:, :, t, j], change.abs(), rtol=1e-9, atol=1e-12)
    # The first row has one key: its whole effect goes.
    torch.testing.assert_close(found[:, :, 0, 0], of_map[:, :, 0, 0].abs())


def test_michel_adds_up_over_prompts() -> None:
    program = models.captured("llama")[1]
    ids = models.inputs("llama", 2, 12)["input_ids"]
    _, both = backward(program, {"input_ids": ids})
    _, one = backward(program, {"input_ids": ids[1:]})
    torch.testing.assert_close(both.array("michel")[1], one.array("michel")[0])
