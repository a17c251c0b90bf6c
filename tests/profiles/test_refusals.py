"""What cannot be profiled is refused, with a hint, before anything is written."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from attnopt.conversion import CalibrationOptions
from attnopt.errors import OptionError, UnsupportedError
from attnopt.profiles import layers
from attnopt.profiles.attention import call_arguments
from attnopt.profiles.build import Options, profile_program, require_finite
from attnopt.profiles.prompts import Prompts
from attnopt.profiles.settings import Settings
from attnopt.profiling import make_prompts, within_positions
from attnopt.progress import Silent
from attnopt.rewriter.program import Program
from tests import models


def profiled(program: Program) -> Any:
    prompts = Prompts.of([{"input_ids": torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])}], "x")
    return profile_program(program, prompts, Settings(windows=(2,), skip=2), Options(gradients=False))


def test_layers_whose_heads_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    program = models.captured("llama")[1]
    real = layers.output_weights
    monkeypatch.setattr(layers, "output_weights", lambda *arguments: 1.01 * real(*arguments))
    with pytest.raises(UnsupportedError, match="do not add up"):
        profiled(program)


def test_activations_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    program = models.captured("llama")[1]
    name = program.site_list[0].o.weight
    get = type(program.weights).get

    def broken(store: Any, wanted: str) -> Tensor:
        found = get(store, wanted)
        return found * torch.inf if wanted == name else found

    monkeypatch.setattr(type(program.weights), "get", broken)
    with pytest.raises(UnsupportedError, match="not finite"):
        profiled(program)


def test_values_that_are_not_finite() -> None:
    profile = profiled(models.captured("llama")[1])
    require_finite(profile)
    tensors = {**profile.tensors, "q_norm/mean": profile.tensors["q_norm/mean"] * torch.inf}
    with pytest.raises(UnsupportedError, match="q_norm"):
        require_finite(replace(profile, tensors=tensors))


def test_attention_by_another_op() -> None:
    graph = fx.Graph()
    node = graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"),))
    program: Any = SimpleNamespace(node=lambda _: node)
    other: Any = SimpleNamespace(fqn="layer", nodes=SimpleNamespace(attention="relu"))
    with pytest.raises(UnsupportedError, match="cannot be profiled"):
        call_arguments(program, other)


def test_models_that_read_something_else() -> None:
    program: Any = SimpleNamespace(inputs=("input_features",))
    source: Any = SimpleNamespace(name="listener")
    with pytest.raises(UnsupportedError, match="neither text nor images"):
        make_prompts(source, program, CalibrationOptions(), torch.device("cpu"), Silent())


@pytest.mark.parametrize(
    ("model_type", "positions", "expected"),
    [("bert", 512, 512), ("roberta", 514, 512), ("llama", 8192, 1024), ("bert", None, 1024)],
)
def test_prompts_fit_the_positions_a_model_knows(model_type: str, positions: int | None, expected: int) -> None:
    config = {"max_position_embeddings": positions, "pad_token_id": 1}
    program: Any = SimpleNamespace(config=config, model_type=model_type)
    found = within_positions(program, CalibrationOptions(tokens=4096, context=1024))
    assert (found.context, found.tokens) == (expected, 4096)


def test_models_that_know_hardly_any_position() -> None:
    program: Any = SimpleNamespace(config={"max_position_embeddings": 4}, model_type="bert")
    with pytest.raises(OptionError, match="4 positions"):
        within_positions(program, CalibrationOptions())


def test_windows_that_bins_cannot_hold() -> None:
    with pytest.raises(OptionError, match="powers of two"):
        Settings(windows=(3,))
