"""Mixture of heads: gates are counted, all heads active is the model as it was, repair helps, the cache stays."""

from __future__ import annotations

import pytest
import torch

from attnopt.errors import OptionError, UnsupportedError
from attnopt.rewriter.interpret import LayerRunner, run
from attnopt.rewriter.program import Program
from tests import models
from tests.passes.helpers import apply, calibration, change, program_of, with_weights


def gates_of(program: Program) -> list[torch.Tensor]:
    """Gates [B, S, H] of every layer, on some text."""
    runner = LayerRunner(program)
    env = runner.start(models.inputs("llama", 3, 21))
    found = []
    for segment in runner.layers:
        assert segment.site is not None
        anchor = program.node(segment.site.nodes.attention)
        with runner.load(segment) as loaded:
            found.append(loaded.evaluate(env, anchor.args[3].name))  # type: ignore[union-attr]  # a node
            env = loaded.advance(env)
    return found


@pytest.mark.parametrize(("router", "heads", "kv_heads"), [
    ("linear", 8, 2), ("qnorm", 8, 4),
    *(pytest.param("linear", *sizes, marks=pytest.mark.slow) for sizes in ((8, 4), (16, 4), (16, 2), (8, 8), (8, 1))),
])  # fmt: skip
def test_exactly_the_active_share_works_on_every_token(router: str, heads: int, kv_heads: int) -> None:
    program = program_of("llama", 2, heads, kv_heads)
    result = apply(program, f"moh{{active=0.75 router={router} behind=false}}")
    for gates in gates_of(result.program):
        assert set(gates.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(gates.sum(-1), torch.full(gates.shape[:2], 0.75 * heads))
    assert result.program.cached_numbers_per_token == program.cached_numbers_per_token
    for site in result.program.site_list:
        assert site.route is not None
        assert len(site.route.shared) == heads // 2


def test_whole_groups_are_switched_together() -> None:
    program = program_of("llama", 2, 8, 4)
    after = apply(program, "moh{active=0.5 unit=kv-group shared-heads=2}").program
    for gates in gates_of(after):
        pairs = gates.unflatten(-1, (4, 2))
        assert torch.equal(pairs[..., 0], pairs[..., 1])
        assert torch.equal(pairs[..., 0].sum(-1), torch.full(gates.shape[:2], 2.0))


def test_all_heads_active_changes_nothing() -> None:
    program = program_of("llama", 2)
    with pytest.raises(UnsupportedError, match="changed no attention layer"):
        apply(program, "moh{active=1}")


def test_equal_scores_take_the_lower_heads() -> None:
    program = program_of("llama", 2)
    after = apply(program, "moh{active=0.5 shared-heads=0 behind=false fill=none}").program
    zeros = {}
    for site in after.site_list:
        assert site.route is not None
        for name in (site.route.weight, site.route.bias):
            assert name is not None
            zeros[name] = torch.zeros_like(after.weights.get(name))
    for gates in gates_of(with_weights(after, zeros)):
        assert torch.equal(gates, torch.tensor([1.0, 1, 0, 0]).expand_as(gates))


@pytest.mark.parametrize("router", ["linear", "qnorm"])
def test_the_fill_is_no_worse_than_zeros_where_it_is_fitted(router: str) -> None:
    program = program_of("llama", 2)
    result = apply(program, f"moh{{active=0.5 router={router} follow=0}}")
    for record in result.results[0].layers:
        assert record["error_after"] <= record["error_before"] * (1 + 1e-9)
        assert 0 <= record["agreement"] <= 1
    none = apply(program, f"moh{{active=0.5 router={router} fill=none}}").program
    text = {"input_ids": calibration(seed=5).windows}  # not the text of the fit
    expected = run(program, **text)["logits"]
    errors = [models.relative_error(run(p, **text)["logits"], expected) for p in (result.program, none)]
    assert errors[0] < errors[1]


def test_a_planted_rule_is_learnt_by_the_linear_router() -> None:
    """Head 0 of each layer gives nothing and the router leaves it out."""
    program = program_of("llama", 2)
    values = {}
    for site in program.site_list:
        weight = program.weights.get(site.o.weight)
        weight[:, :8] = 0
        values[site.o.weight] = weight
    dead = with_weights(program, values)
    result = apply(dead, "moh{active=0.75 shared-heads=0 behind=false}")
    assert all(float(gates[..., 0].max()) == 0 for gates in gates_of(result.program))
    assert change(dead, result.program) < 1e-4


@pytest.mark.parametrize(
    "family", ["qwen3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("phi3", "bert", "gpt2"))]
)
def test_every_family_routes(family: str) -> None:
    _, program = models.captured(family)
    result = apply(program, "moh{active=0.75}")
    assert set(result.changed_sites) == set(program.sites)
    assert change(program, result.program, family) < 2


@pytest.mark.parametrize(
    ("edit", "words"),
    [({"shared": [9]}, "shares heads"), ({"k": 9}, "work on a token"), ({"gate": "weighted"}, "another type"),
     ({"extra": 1}, "needs type"), ({"type": "qnorm"}, "another type")],
)  # fmt: skip
def test_bad_plans_are_refused(edit: dict[str, object], words: str) -> None:
    program = program_of("llama", 2)
    good = {"type": "linear", "unit": "head", "k": 1, "gate": "binary", "shared": [0, 1]}
    site = next(iter(program.sites))
    assert apply(program, "moh{fill=none}", given={"route": {site: good}}).changed_sites == (site,)
    with pytest.raises(OptionError, match=words):
        apply(program, "moh", given={"route": {site: {**good, **edit}}})


def test_more_shared_than_active_heads_are_refused() -> None:
    with pytest.raises(OptionError, match="are more than"):
        apply(program_of("llama", 2), "moh{active=0.5 shared-heads=3}")


def routed(program: Program, **values: float) -> Program:
    """The program with some of its routes' weights at random, of the given size."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for site in program.site_list:
        for field, size in values.items():
            name = getattr(site.route, field)
            found[name] = size * torch.randn(program.weights.get(name).shape, generator=generator)
    return with_weights(program, found)


WEIGHTED = "moh{active=0.75 gate=weighted shared-heads=2 fill=none behind=false}"


def test_zero_routers_give_gates_of_one() -> None:
    """M1: with all weights of the gates zero, every head that works counts in full."""
    after = routed(apply(program_of("llama", 2, 8, 4), WEIGHTED).program, weight=0.0, bias=0.0)
    for gates in gates_of(after):
        assert torch.allclose(gates.sum(-1), torch.tensor(6.0), atol=1e-5)
        assert float(torch.minimum(gates, (gates - 1).abs()).max()) < 1e-6
    start = gates_of(apply(program_of("llama", 2, 8, 4), WEIGHTED).program)
    assert all(float(torch.minimum(gates, (gates - 1).abs()).max()) < 0.5 for gates in start)


def test_weighted_gates_are_those_of_the_paper() -> None:
    """M3, M4: sums and counts of gates with routers at random; the sum is that of the two-stage formula."""
    after = routed(apply(program_of("llama", 2, 8, 4), WEIGHTED).program, weight=1.0, shared_weight=1.0, balance=1.0)
    runner = LayerRunner(after)
    env = runner.start(models.inputs("llama", 3, 21))
    for segment, gates in zip(runner.layers, gates_of(after), strict=True):
        site = segment.site
        assert site is not None
        assert site.route is not None
        with runner.load(segment) as loaded:
            x = loaded.evaluate(env, site.nodes.input)
            env = loaded.advance(env)
        balance = 2 * (x @ after.weights.get(site.route.balance).T).softmax(-1)  # type: ignore[arg-type]  # a name
        assert torch.equal((gates > 0).sum(-1), torch.full(gates.shape[:2], 6))
        assert torch.allclose(gates[..., list(site.route.shared)].sum(-1), 2 * balance[..., 0], rtol=1e-4)
        assert torch.allclose(gates.sum(-1), 2 * balance[..., 0] + 4 * balance[..., 1], rtol=1e-4)
        assert float(gates.std()) > 0.1


def test_weighted_gates_are_trained_by_the_refit() -> None:
    program = program_of("llama", 2)
    text = "moh{active=0.5 gate=weighted shared-heads=1 recover=refit epochs=6 behind=false}"
    result = apply(program, text)
    untrained = apply(program, text.replace("recover=refit epochs=6", "recover=none"))
    for site, record in zip(result.program.site_list, result.results[0].layers, strict=True):
        assert record["error_after_refit"] < record["error_before_refit"]
        assert site.route is not None
        for name in (site.route.weight, site.route.balance):
            assert name is not None
            assert not torch.equal(result.program.weights.get(name), untrained.program.weights.get(name))


@pytest.mark.parametrize(("text", "words"), [
    ("moh{gate=weighted router=qnorm}", "can be trained"), ("moh{gate=weighted shared-heads=3}", "nothing to route"),
])  # fmt: skip
def test_weighted_gates_that_cannot_be_trained_are_refused(text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        apply(program_of("llama", 2), text)
