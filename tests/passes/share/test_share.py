"""The pass on whole tiny models: what it removes, planted layers it must find, edges it must refuse."""

from __future__ import annotations

import pytest
import torch

from attnopt.errors import OptionError, UnsupportedError
from attnopt.passes.share.share import Share, parse_layers
from attnopt.rewriter.interpret import run
from attnopt.rewriter.program import Program
from tests import models
from tests.passes.helpers import apply, change, program_of, with_weights

SITE = "model.layers.{}.self_attn"


def planted(order: list[int] | None = None) -> Program:
    """A model whose layer 2 holds the attention of layer 1, heads in another order, and sees the same input.

    Layer 1 adds nothing to the stream, so that layer 2's attention reads what layer 1's did.
    """
    program = program_of("llama")
    values = {n: program.weights.get(n) for n in program.weights.names()}
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        values[f"model.layers.1.{name}.weight"] = values[f"model.layers.1.{name}.weight"] * 0
    values["model.layers.2.input_layernorm.weight"] = values["model.layers.1.input_layernorm.weight"]
    heads = order or [0, 1, 2, 3]
    groups = [heads[0] // 2, heads[2] // 2]
    for name, index in (("q_proj", heads), ("k_proj", groups)):
        weight = values[f"model.layers.1.self_attn.{name}.weight"].unflatten(0, (-1, 8))
        values[f"model.layers.2.self_attn.{name}.weight"] = weight[index].flatten(0, 1)
    return with_weights(program, values)


@pytest.mark.parametrize("order", [[3, 2, 0, 1], pytest.param([0, 1, 2, 3], marks=pytest.mark.slow)])
def test_a_planted_duplicate_is_found_and_shares_exactly(order: list[int]) -> None:
    program = planted(order)
    result = apply(program, "share{layers=2 fill=none reach=2}")
    (edit,) = result.results[0].plan.edits  # type: ignore[union-attr]
    assert edit.site == SITE.format(2)
    assert edit.edit["map_from"] == SITE.format(1)
    assert list(edit.edit["head_map"]) == order
    assert change(program, result.program) < 1e-5


def test_unaligned_heads_do_not_share() -> None:
    program = planted([3, 2, 0, 1])
    plan = {SITE.format(2): {"map_from": SITE.format(1), "head_map": [0, 1, 2, 3]}}
    assert change(program, apply(program, "share{fill=none}", given={"share": plan}).program) > 1e-2


def test_equal_keys_and_values_share_exactly() -> None:
    program = planted()
    values = {"model.layers.2.self_attn.v_proj.weight": program.weights.get("model.layers.1.self_attn.v_proj.weight")}
    program = with_weights(program, values)
    result = apply(program, "share{layers=2 edge=kv reach=1 fill=none}")
    assert change(program, result.program) < 1e-5
    assert result.program.sites[SITE.format(2)].cached_numbers_per_token == 0


@pytest.mark.parametrize(("heads", "kv_heads"), [
    (8, 2), (8, 4), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((16, 4), (16, 2), (8, 8), (8, 1))),
])  # fmt: skip
def test_projections_and_caches_shrink_by_exactly_the_shared_part(heads: int, kv_heads: int) -> None:
    program = program_of("llama", 2, heads, kv_heads)
    maps = apply(program, 'share{layers="1:0" fill=none}').program
    assert program.parameters - maps.parameters == 32 * 8 * (heads + kv_heads)
    assert program.cached_numbers_per_token - maps.cached_numbers_per_token == 8 * kv_heads
    both = apply(program, 'share{layers="1:0" edge=kv fill=none}').program
    assert program.parameters - both.parameters == 2 * 32 * 8 * kv_heads
    assert program.cached_numbers_per_token - both.cached_numbers_per_token == 2 * 8 * kv_heads
    gone = ("1.self_attn.q_proj.weight", "1.self_attn.k_proj.weight")
    assert not any(name.endswith(gone) for name in maps.weight_names)


def test_a_shared_map_is_the_attention_with_the_sources_queries_and_keys() -> None:
    program = program_of("llama")
    after = apply(program, 'share{layers="2:1" fill=none align=false}').program
    anchor = after.node(after.sites[SITE.format(2)].nodes.attention)
    source = after.node(after.sites[SITE.format(1)].nodes.attention)
    assert anchor.args[:2] == source.args[:2]
    assert anchor.args[10:] == (1, 2)


@pytest.mark.parametrize(("family", "edge"), [
    ("llama", "map"), ("llama", "kv"), ("qwen3", "map"),
    *(pytest.param(*case, marks=pytest.mark.slow)
      for case in (("qwen3", "kv"), ("phi3", "map"), ("bert", "map"), ("gpt2", "kv"))),
])  # fmt: skip
def test_every_family_shares_and_repairs(family: str, edge: str) -> None:
    _, program = models.captured(family)
    plain = apply(program, f"share{{layers=1 edge={edge} fill=none}}").program
    repaired = apply(program, f"share{{layers=1 edge={edge}}}")
    assert change(program, repaired.program, family) < 2 * change(program, plain, family)
    record = next(r for r in repaired.results[0].layers if "share" in r)
    assert record["error_after"] <= record["error_before"]


@pytest.mark.parametrize(
    ("options", "words"),
    [("layers=9", "does not have"), ("layers=0", "no earlier layer"), ('layers="2:3"', "comes later"),
     ('layers="1,2:1"', "reads another layer's itself"), ("layers=x", "not a list"),
     ("layers=2 fraction=0.5", "exclude")],
)  # fmt: skip
def test_bad_layers_are_refused(options: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        apply(program_of("llama"), f"share{{{options}}}")


@pytest.mark.parametrize(
    ("edit", "words"),
    [({"map_from": SITE.format(3)}, "comes later"), ({"map_from": "nowhere"}, "no attention layer"),
     ({"kv_from": SITE.format(1)}, "form"), ({"map_from": SITE.format(1), "head_map": [0, 2, 1, 3]}, "groups"),
     ({"map_from": SITE.format(1), "head_map": [0, 0, 1, 2]}, "order")],
)  # fmt: skip
def test_bad_plans_are_refused(edit: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        apply(program_of("llama"), "share", given={"share": {SITE.format(2): edit}})


def test_windows_and_stages_must_agree() -> None:
    with pytest.raises(UnsupportedError, match="masks differ"):
        apply(models.captured("gemma2")[1], "share{protect=0}")
    _, swin = models.captured("swin")
    assert not any(Share()._candidates(swin).values())
    _, gemma = models.captured("gemma3")
    assert Share(protect=0)._candidates(gemma) == {0: [], 1: [0], 2: []}


def test_layer_lists() -> None:
    assert parse_layers("7, 8:6,25-27", 30) == {7: None, 8: 6, 25: None, 26: None, 27: None}


def test_sources_stay_and_groups_do_not_chain() -> None:
    program = program_of("llama", 6)
    after = apply(program, "share{fraction=0.5 max-error=9 protect=0}").program
    consumers = [site for site in after.site_list if site.share is not None]
    assert len(consumers) == 3
    for site in consumers:
        assert site.share is not None
        assert after.sites[site.share.source].share is None
        assert after.sites[site.share.source].layer < site.layer


def test_no_edge_below_the_bound_is_said() -> None:
    with pytest.raises(UnsupportedError, match="with an error below"):
        apply(program_of("llama"), "share{max-error=0.0001}")


def test_sharing_in_float64_agrees() -> None:
    program = program_of("llama")
    after = apply(program, 'share{layers="2:1" fill=none}').program
    batch = models.inputs("llama")
    double = run(after, dtype=torch.float64, **batch)["logits"]
    assert models.relative_error(run(after, **batch)["logits"].double(), double) < 1e-5
