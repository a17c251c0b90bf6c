"""MLA spelled with expanded keys and values becomes latent attention, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnopt.rewriter.absorb import LATENT_ATTENTION, obstacle, to_latent_form
from attnopt.rewriter.interpret import run
from attnopt.rewriter.verify import violations
from tests.models import captured, inputs, relative_error

SLOW = ("deepseek_v2", "deepseek_v2-yarn", "deepseek_v3-half", "deepseek_v3-yarn")
MLA = ["deepseek_v3", "deepseek_v2-lite", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize("family", MLA)
def test_same_function_on_the_latent(family: str) -> None:
    before = captured(family)[1]
    after = to_latent_form(before)
    found = run(after, torch.float64, **inputs(family))["logits"]
    wanted = run(before, torch.float64, **inputs(family))["logits"]
    assert relative_error(found, wanted) < 1e-9  # rotary angles are float32 in both
    assert [after.node(s.nodes.attention).target for s in after.site_list] == [LATENT_ATTENTION] * len(after.sites)
    left = {str(node.target) for node in after.graph.nodes}  # keys and values are gone
    assert "attnopt.attention.default" not in left
    assert not any("slice_scatter" in name for name in left)
    assert not violations(after, "transformed")


def test_other_programs_are_returned_as_they_are() -> None:
    program = captured("llama")[1]
    assert to_latent_form(program) is program
    again = to_latent_form(captured("deepseek_v3")[1])
    assert to_latent_form(again) is again


def test_obstacles_are_named() -> None:
    program = captured("deepseek_v3")[1]
    site = program.site_list[0]
    assert obstacle(program, site) is None
    assert site.latent is not None
    biased = replace(site, latent=replace(site.latent, kv_b=replace(site.latent.kv_b, bias="b")))
    assert "bias" in str(obstacle(program, biased))
    assert "not mla" in str(obstacle(captured("llama")[1], captured("llama")[1].site_list[0]))
