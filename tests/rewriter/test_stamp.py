"""When two layers count as equal, and what makes a shortcut unsafe."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from attnopt.rewriter.stamp import Cut, LayerIndex, cut_layers, same_layer
from tests import models


class Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.layer_idx = index
        self.linear = nn.Linear(2, 2)
        self.register_buffer("table", torch.ones(2))
        self.scale = 0.5
        self.act = functools.partial(torch.relu)


def change_scale(layer: Layer) -> None:
    layer.scale = 0.25


def change_buffer(layer: Layer) -> None:
    layer.table[0] = 2.0


def change_shape(layer: Layer) -> None:
    layer.linear = nn.Linear(2, 3)


def change_class(layer: Layer) -> None:
    layer.linear = nn.Bilinear(2, 2, 2)


def change_act(layer: Layer) -> None:
    layer.act = functools.partial(torch.tanh)


def add_hook(layer: Layer) -> None:
    layer.linear.register_forward_hook(lambda *args: None)


def add_child(layer: Layer) -> None:
    layer.extra = nn.Identity()


def opaque_object(layer: Layer) -> None:
    layer.secret = object()


def test_layers_that_differ_only_in_weights_and_index_are_equal() -> None:
    assert same_layer(Layer(0), Layer(5), 0, 5)


@pytest.mark.parametrize(
    "change",
    [change_scale, change_buffer, change_shape, change_class, change_act, add_hook, add_child, opaque_object],
)
def test_any_other_difference_is_noticed(change: Callable[[Layer], None]) -> None:
    other = Layer(1)
    change(other)
    assert not same_layer(Layer(0), other, 0, 1)


def test_an_int_that_is_not_the_index_must_agree() -> None:
    a, b = Layer(0), Layer(1)
    a.layer_idx = b.layer_idx = 7
    assert same_layer(a, b, 0, 1)
    b.layer_idx = 8
    assert not same_layer(a, b, 0, 1)


@pytest.mark.parametrize(
    "use",
    [
        lambda i: i % 2,
        lambda i: i + 1,
        lambda i: 1 / (i + 1),
        lambda i: i == 0,
        lambda i: [1, 2][i],
        bool,
        hash,
        float,
        str,
    ],
)
def test_computing_with_the_index_is_noticed(use: Callable[[Any], Any]) -> None:
    index = LayerIndex(1)
    assert not index.used
    use(index)
    assert index.used


def test_cutting_keeps_one_layer_of_each_kind_and_restores_everything() -> None:
    model = models.build("gemma3", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
    cut = cut_layers(model)
    assert isinstance(cut, Cut)
    assert (cut.path, cut.chosen, cut.kind) == ("model.layers", [0, 1], [0, 1, 0, 1])
    layers = model.model.layers
    with cut.applied():
        assert len(model.model.layers) == 2
        assert model.config.num_hidden_layers == 2
        assert model.config.layer_types == ["sliding_attention", "full_attention"]
    assert model.model.layers is layers
    assert model.config.num_hidden_layers == 4
    assert type(layers[1].self_attn.layer_idx) is int
    assert cut.proven()


def test_layers_with_their_own_scale_are_kinds_of_their_own() -> None:
    assert cut_layers(models.build("gpt2", n_layer=3, scale_attn_by_inverse_layer_idx=True)) is None
    assert cut_layers(models.build("gpt2", n_layer=3)) is not None


def test_models_with_several_lists_of_layers_are_traced_whole() -> None:
    assert cut_layers(models.build("swin")) is None
