"""The pass on whole tiny models: counts, repair, plans, composition."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from attnopt.errors import OptionError, UnsupportedError
from attnopt.passes.prune.prune import Prune
from attnopt.rewriter.passes import PassContext
from tests.passes.helpers import apply, calibration, change, program_of, with_weights

GRID = (
    (8, 2), (8, 4), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((16, 4), (16, 2), (8, 8))),
)  # fmt: skip


@pytest.mark.parametrize(("heads", "kv_heads"), GRID)
def test_whole_groups_shrink_cache_and_weights(heads: int, kv_heads: int) -> None:
    program = program_of("llama", 2, heads, kv_heads)
    result = apply(program, "prune{keep-heads=0.5 fill=none}")
    after = result.program
    assert after.cached_numbers_per_token == program.cached_numbers_per_token // 2
    per_layer = 32 * 8 * (heads // 2) * 2 + 32 * 8 * (kv_heads // 2) * 2  # q and o, k and v
    assert program.parameters - after.parameters == 2 * per_layer
    assert result.changed_sites == tuple(program.sites)
    assert result.results[0].summary["heads_removed"] == heads


@pytest.mark.parametrize(("heads", "kv_heads"), GRID)
def test_heads_of_even_groups(heads: int, kv_heads: int) -> None:
    program = program_of("llama", 2, heads, kv_heads)
    after = apply(program, "prune{keep-heads=0.5 unit=head fill=none}").program
    for site in after.site_list:
        assert site.heads == heads // 2
        assert site.kv_of == ()
        assert site.kv_heads == (kv_heads if kv_heads < heads else heads // 2)


def test_repairs_help_in_the_order_they_should() -> None:
    program = program_of("llama")
    errors = [change(program, apply(program, f"prune{{keep-heads=0.5 fill={f} behind=false}}").program)
              for f in ("lsq", "none")]  # fmt: skip
    assert errors[0] < errors[1]
    result = apply(program, "prune{keep-heads=0.5 recover=refit epochs=2}")
    for record in result.results[0].layers:
        assert record["error_after"] <= record["error_before"] * (1 + 1e-6)
        if "error_after_refit" in record:
            assert record["error_after_refit"] <= record["error_before_refit"]


def test_a_planted_dead_group_costs_nothing() -> None:
    program = program_of("llama", 2, 8, 4)
    values = {}
    for site in program.site_list:
        weight = program.weights.get(site.o.weight)
        weight[:, 32:48] = 0  # heads 4 and 5 read group 2
        values[site.o.weight] = weight
    dead = with_weights(program, values)
    result = apply(dead, "prune{keep-heads=0.75}")
    assert [edit.edit["keep"] for edit in result.results[0].plan.edits] == [[0, 1, 2, 3, 6, 7]] * 2  # type: ignore[union-attr]
    assert change(dead, result.program) < 1e-5


def test_free_layers_lose_where_it_costs_least() -> None:
    program = program_of("llama")
    values = {s.o.weight: program.weights.get(s.o.weight) * 1e-3 for s in program.site_list[:1]}
    result = apply(with_weights(program, values), "prune{keep-heads=0.75 unit=head groups=free layers=free fill=mean}")
    heads = [site.heads for site in result.program.site_list]
    assert heads[0] == 1
    assert sum(heads) == 12


def test_two_prunings_are_their_union() -> None:
    program = program_of("llama", 2, 8, 4)
    names = list(program.sites)
    first = {names[0]: {"keep": [0, 1, 2, 3, 4, 5]}}
    second = {names[0]: {"keep": [0, 1, 4, 5]}, names[1]: {"keep": [2, 3]}}
    one = apply(program, "prune{fill=none}", given={"heads": first}).program
    both = apply(one, "prune{fill=none}", given={"heads": second}).program
    at_once = apply(program, "prune{fill=none}", given={"heads": second}).program
    assert change(both, at_once) == 0
    assert [s.original_heads for s in both.site_list] == [s.original_heads for s in at_once.site_list]


def test_disjoint_prunings_commute() -> None:
    program = program_of("llama", 2, 8, 4)
    edits = [{fqn: {"keep": [0, 1, 4, 5]}} for fqn in program.sites]
    orders = []
    for order in (edits, edits[::-1]):
        after = program
        for edit in order:
            after = apply(after, "prune{fill=none}", given={"heads": edit}).program
        orders.append(after)
    assert change(orders[0], orders[1]) == 0


def test_layers_that_a_plan_does_not_name_stay_as_they_are() -> None:
    program = program_of("llama", 2, 8, 4)
    first, second = program.site_list
    after = apply(program, "prune{fill=none}", given={"heads": {second.fqn: {"keep": [0, 1]}}}).program
    assert after.sites[first.fqn] == first
    names = [n for n in program.weight_names if not n.startswith(f"{second.fqn}.")]
    assert all(after.weights[n] is program.weights[n] for n in names)


def test_pruning_nothing_is_an_error() -> None:
    program = program_of("llama", 2)
    with pytest.raises(UnsupportedError, match="changed no attention layer"):
        apply(program, "prune{keep-heads=1}")
    with pytest.raises(UnsupportedError, match="changed no attention layer"):
        apply(program, "prune", given={"heads": {}})


def test_multi_query_attention_has_no_group_to_lose() -> None:
    with pytest.raises(UnsupportedError, match="only one unit"):
        apply(program_of("llama", 2, 8, 1), "prune")


@pytest.mark.parametrize(
    ("edit", "words"),
    [({"keep": []}, "at least one"), ({"keep": [0, 9]}, "has the heads"), ({"keep": [0, 0]}, "each once"),
     ({"kep": [0]}, "form"), ({"count": 0}, "neither")],
)  # fmt: skip
def test_bad_plans_are_refused(edit: dict[str, object], words: str) -> None:
    program = program_of("llama", 2)
    with pytest.raises(OptionError) as caught:
        apply(program, "prune", given={"heads": {next(iter(program.sites)): edit}})
    assert words in f"{caught.value.message} {caught.value.hint}"


def test_importance_of_a_profile() -> None:
    program = program_of("llama", 2, 8, 4)
    scores = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6, 7, 8]])
    values = {
        "contrib": (("site", "head"), "high_keep", scores),
        "groups": (("site", "kv_head"), "low_keep", scores[:, ::2]),
        "entropy": (("site", "head"), "", scores),
        "layer_cos": (("source", "consumer"), "high_keep", scores[:, :2]),
    }

    class Profile:
        metrics = {n: SimpleNamespace(axes=axes, direction=way) for n, (axes, way, _) in values.items()}  # noqa: RUF012
        sites = ({"heads": 8, "kv_heads": 4},) * 2

        def metric(self, name: str) -> torch.Tensor:
            return values[name][2]

    profiles = {"profile": Profile()}
    plan = Prune(keep_heads=0.5, importance="contrib").plan(program, profiles)
    assert [list(edit.edit["keep"]) for edit in plan.edits] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    context = PassContext(calibration=calibration(), profiles=profiles)
    after = apply(program, "prune{keep-heads=0.5 importance=contrib fill=none}", context).program
    assert [site.original_heads for site in after.site_list] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    plan = Prune(keep_heads=0.5, importance="groups").plan(program, profiles)  # of key/value heads, small ones kept
    assert [list(edit.edit["keep"]) for edit in plan.edits] == [[4, 5, 6, 7], [0, 1, 2, 3]]
    with pytest.raises(OptionError, match="not one of heads"):
        apply(program, "prune{importance=layer_cos}", context)
    with pytest.raises(OptionError, match="only describes"):
        apply(program, "prune{importance=entropy}", context)
    with pytest.raises(OptionError, match="none was given"):
        apply(program, "prune{importance=contrib}")


def test_without_text_it_says_what_it_needs() -> None:
    with pytest.raises(OptionError, match="needs calibration text"):
        apply(program_of("llama", 2), "prune", PassContext())
