"""Running a Program segment by segment: values, laziness, memory, overrides."""

from __future__ import annotations

import pytest
import torch

from attnopt.errors import OptionError, UnsupportedError
from attnopt.rewriter.interpret import LayerRunner, run
from attnopt.rewriter.program import Program
from attnopt.rewriter.weights import WeightStore
from tests import models


class CountingStore(WeightStore):
    """Counts reads of each weight."""

    def __init__(self, store: WeightStore) -> None:
        super().__init__(dict(store.items()))
        self.reads: list[str] = []

    def get(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        self.reads.append(name)
        return super().get(name, dtype)


@pytest.fixture
def program() -> Program:
    return models.captured("llama")[1]


def test_segments_are_prelude_layers_head(program: Program) -> None:
    runner = LayerRunner(program)
    assert [s.name for s in runner.layers] == ["model.layers.0", "model.layers.1"]
    assert [s.site for s in runner.layers] == list(program.site_list)
    assert (runner.prelude.name, runner.head.name) == ("prelude", "head")


def test_hidden_is_the_residual_stream(program: Program) -> None:
    model, _ = models.captured("llama")
    x = models.inputs("llama", 2, 6)
    with torch.no_grad():
        states = model(**x, output_hidden_states=True).hidden_states
    runner = LayerRunner(program)
    env = runner.start(x)
    for segment, expected in zip(runner.layers, states, strict=False):
        torch.testing.assert_close(env.hidden, expected, rtol=1e-5, atol=1e-5)
        with runner.load(segment) as layer:
            env = layer.advance(env)
    other = env.with_hidden(torch.zeros_like(env.hidden))
    assert not torch.equal(runner.finish(other), runner.finish(env))
    assert (runner.finish(other) == 0).all()


def test_overriding_the_attention_output_changes_what_follows_and_skips_what_it_needs(program: Program) -> None:
    store = CountingStore(program.weights)
    runner = LayerRunner(program.replace(weights=store))
    env = runner.start(models.inputs("llama", 1, 4))
    segment = runner.layers[0]
    assert segment.site is not None
    with runner.load(segment) as layer:
        store.reads.clear()
        after = layer.advance(env, {segment.site.nodes.output: torch.zeros_like(env.hidden)})
        assert not [name for name in store.reads if "self_attn" in name]
        assert not torch.equal(after.hidden, layer.advance(env).hidden)


def test_each_weight_is_read_once_per_segment_and_only_when_needed(program: Program) -> None:
    store = CountingStore(program.weights)
    runner = LayerRunner(program.replace(weights=store))
    envs = [runner.start(models.inputs("llama", 2, 5, seed=s)) for s in range(3)]
    assert store.reads.count("model.embed_tokens.weight") == 1
    store.reads.clear()
    with runner.load(runner.layers[0]) as layer:
        site = runner.layers[0].site
        assert site is not None
        layer.evaluate(envs[0], site.nodes.input)
        assert store.reads == ["model.layers.0.input_layernorm.weight"]
        for env in envs:
            layer.advance(env)
        assert len(store.reads) == len(set(store.reads))
        assert all(name.startswith("model.layers.0.") for name in store.reads)
        assert layer.weight(site.o.weight).dtype == torch.float32


def test_only_live_values_are_kept(program: Program) -> None:
    runner = LayerRunner(program)
    env = runner.start(models.inputs("llama", 1, 4))
    for segment in runner.layers:
        with runner.load(segment) as layer:
            env = layer.advance(env)
    tensors = [v for v in env.values.values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 1


def test_batches_and_lengths_are_independent_of_each_other(program: Program) -> None:
    x = models.inputs("llama", 2, 6)["input_ids"]
    both = run(program, input_ids=x)["logits"]
    torch.testing.assert_close(run(program, input_ids=x[1:])["logits"], both[1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(program, input_ids=x[:, :2])["logits"], both[:, :2], rtol=1e-5, atol=1e-5)


def test_positions_can_be_given(program: Program) -> None:
    x = models.inputs("llama", 1, 5)["input_ids"]
    default = run(program, input_ids=x)["logits"]
    same = run(program, input_ids=x, position_ids=torch.arange(5)[None])["logits"]
    spread = run(program, input_ids=x, position_ids=torch.arange(5)[None] * 3)["logits"]
    torch.testing.assert_close(same, default, rtol=0, atol=0)
    assert not torch.allclose(spread, default)


def test_float64_is_closer_to_exact(program: Program) -> None:
    x = models.inputs("llama", 1, 5)
    double = run(program, torch.float64, **x)["logits"]
    assert double.dtype == torch.float64
    assert models.relative_error(run(program, **x)["logits"].double(), double) < 5e-6


def test_padding_is_honoured_by_encoders() -> None:
    program = models.captured("bert")[1]
    x = models.inputs("bert", 2, 8)
    masked = run(program, **x)["last_hidden_state"]
    changed = {**x, "input_ids": torch.where(x["attention_mask"] == 0, 5, x["input_ids"])}
    again = run(program, **changed)["last_hidden_state"]
    seen = x["attention_mask"].bool()
    torch.testing.assert_close(masked[seen], again[seen], rtol=0, atol=0)


def test_half_precision_is_refused(program: Program) -> None:
    with pytest.raises(OptionError, match="float32 or float64"):
        LayerRunner(program, torch.bfloat16)


def test_wrong_inputs_are_named(program: Program) -> None:
    with pytest.raises(UnsupportedError, match="'input_ids' is missing"):
        run(program)
    with pytest.raises(UnsupportedError, match="no input pixel_values"):
        run(program, pixel_values=torch.zeros(1, 3, 4, 4))


def test_values_do_not_share_memory_with_the_weights(program: Program) -> None:
    name = program.site_list[0].o.weight
    runner = LayerRunner(program)
    with runner.load(runner.layers[0]) as layer:
        layer.weight(name).zero_()
    assert program.weights.get(name).abs().max() > 0
