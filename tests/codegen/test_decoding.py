"""The cache a graph is given: what is stored per layer, under which names, and for which site."""

from __future__ import annotations

import pytest

from attnopt.codegen.decoding import decoding_graph
from attnopt.codegen.onnx.forms import OnnxLane
from attnopt.rewriter.absorb import to_latent_form
from attnopt.rewriter.program import Program
from tests.codegen.variants import variant
from tests.models import captured


def lowered(program: Program) -> tuple[list[str], int, list[str]]:
    """(inputs of the cache, numbers per token, modules of the nodes that softmax or mix)."""
    decoding = decoding_graph(program, OnnxLane({site.fqn: "matmul" for site in program.site_list}))
    mixing = [n for n in decoding.graph.nodes if getattr(n.target, "__name__", "") in ("attention_weights", "attend")]
    stacks = [list(n.meta["nn_module_stack"].values())[-1][0] for n in mixing]
    return [t.past for t in decoding.cache], sum(t.numbers_per_token for t in decoding.cache), stacks


@pytest.mark.parametrize(
    ("name", "second"),
    [
        ("shared-map", ["past_key_values.1.value"]),
        ("shared-kv", []),
        ("uneven", ["past_key_values.1.key", "past_key_values.1.value"]),
        ("routed", ["past_key_values.1.key", "past_key_values.1.value"]),
    ],
)
def test_layers_cache_what_they_really_store(name: str, second: list[str]) -> None:
    pasts, numbers, stacks = lowered(variant(name))
    assert pasts == ["past_key_values.0.key", "past_key_values.0.value", *second]
    assert numbers == variant(name).cached_numbers_per_token == 32 + 16 * len(second)
    assert set(stacks) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert len(stacks) == (3 if name == "shared-map" else 4)  # the map is computed once


def test_latent_layers_cache_the_latent_only() -> None:
    pasts, numbers, _ = lowered(to_latent_form(captured("deepseek_v3")[1]))
    assert pasts == ["past_latent.0", "past_latent.1"]
    assert numbers == captured("deepseek_v3")[1].cached_numbers_per_token
