"""Reading a layer: whatever the checkpoint's form, it computes what the captured program computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnopt.passes.mla.source_layer import causal_attention, paired_order, read_source
from attnopt.passes.mla.support import obstacle
from attnopt.rewriter.interpret import LayerRunner
from attnopt.rewriter.site import AttentionSite, CacheSpec, MaskSpec, NormSpec
from tests import models
from tests.passes.mla.layers import GRIDS, apart, relative, source, text

CONVERTIBLE = (
    "llama", "llama-mha", "llama-mqa", "llama-llama3", "llama-wide-heads", "mistral-full", "qwen2", "qwen3", "phi3",
    "phi3-partial", "mixtral", "qwen3_moe",
)  # fmt: skip


@pytest.mark.parametrize("gap", [0, 19])
@pytest.mark.parametrize("family", CONVERTIBLE)
def test_it_computes_what_the_program_computes(family: str, gap: int) -> None:
    _, program = models.captured(family)
    runner = LayerRunner(program)
    inputs = models.inputs(family)
    positions = apart(*inputs["input_ids"].shape, gap)
    env = runner.start({**inputs, "position_ids": positions})
    segment = runner.layers[1]
    with torch.no_grad(), runner.load(runner.layers[0]) as first:
        env = first.advance(env)
    with torch.no_grad(), runner.load(segment) as loaded:
        assert segment.site is not None
        values = loaded.evaluate_all(env, [segment.site.nodes.input, segment.site.nodes.output])
        layer = read_source(segment.site, loaded.weight)
        found = layer.attend(values[segment.site.nodes.input], positions if gap else None)
    assert relative(found, values[segment.site.nodes.output]) < 1e-5


@pytest.mark.parametrize(("heads", "groups"), GRIDS)
@pytest.mark.parametrize("form", ["plain", "bias", "norms"])
def test_heads_are_maps_of_what_the_encoder_reads(heads: int, groups: int, form: str) -> None:
    layer = source(heads, groups, 4, d_v=6, width=24, bias=form == "bias", norms=form == "norms", turn=1.3)
    x = text(layer, batch=2, length=5)
    keys, values = layer.keys(x), layer.values(x)
    u = layer.encoder_input(x, keys, values)
    assert u.shape[-1] == layer.input_width
    assert relative(torch.einsum("gdp,bsp->bgsd", layer.key_rows(), u), keys) < 1e-12
    assert relative(torch.einsum("gdp,bsp->bgsd", layer.value_rows(), u), values) < 1e-12
    if form != "norms":
        rows, offset = layer.output_map()
        assert relative(x @ rows.T + offset, u) < 1e-12


def test_paired_order_puts_partners_half_a_head_apart() -> None:
    assert paired_order(8, 8, 0, "half").tolist() == list(range(8))
    assert paired_order(8, 8, 0, "interleaved").tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert paired_order(8, 4, 2, "half").tolist() == [2, 3, 0, 1, 4, 5, 6, 7]
    assert paired_order(8, 4, 0, "interleaved").tolist() == [0, 2, 4, 5, 1, 3, 6, 7]


def test_values_may_be_narrower_or_wider_than_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 4, 7, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    for width in (4, 6, 9):
        v = torch.randn(1, 4, 7, width, generator=generator, dtype=torch.float64)
        logits = (q @ k.mT / 6**0.5).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        assert relative(causal_attention(q, k, v, 6**-0.5), logits.softmax(-1) @ v) < 1e-12


def site(family: str, layer: int = 0) -> AttentionSite:
    return models.captured(family)[1].site_list[layer]


@pytest.mark.parametrize("family", CONVERTIBLE)
def test_nothing_stands_in_the_way_of_what_can_be_converted(family: str) -> None:
    assert obstacle(site(family)) is None


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mistral", "last 5 tokens"),
        ("gemma2", "last 5 tokens"),
        ("olmo2", "spans all heads"),
        ("deepseek_v3", "already"),
        ("gpt2", "not rotary"),
        ("bert", "encoder"),
    ],
)
def test_what_cannot_be_converted_says_why(family: str, reason: str) -> None:
    assert reason in (obstacle(site(family)) or "")


def test_every_kind_of_obstacle_is_named() -> None:
    plain = site("llama")
    norm = NormSpec("rms", "w", None, 1e-6)
    changed = {
        "soft-capped": replace(plain, mask=MaskSpec(True, softcap=30.0)),
        "sinks": replace(plain, mask=MaskSpec(True, sinks="s")),
        "position bias": replace(plain, mask=MaskSpec(True, alibi=True)),
        "not causal": replace(plain, mask=MaskSpec(False)),
        "keeps no cache": replace(plain, cache=CacheSpec()),
        "plain projections": replace(plain, q=None),
        "odd width": replace(plain, d_qk=7),
        "only one": replace(plain, q_norm=norm),
        "not a plain RMS": replace(plain, q_norm=replace(norm, unit_offset=True), k_norm=norm),
        "multiple": replace(plain, heads=5),
    }
    for words, changed_site in changed.items():
        assert words in (obstacle(changed_site) or ""), words
