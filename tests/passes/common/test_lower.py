"""Facts become nodes that compute the same; slices of heads equal masks of heads, whatever the family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnopt.errors import VerificationError
from attnopt.passes.common.heads import take_heads
from attnopt.passes.common.lower import lower, obstacle
from attnopt.rewriter.edit import Editor
from attnopt.rewriter.interpret import run
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite
from attnopt.rewriter.verify import verify, violations
from tests import models
from tests.passes.helpers import program_of, with_weights

FAST = ("llama", "qwen3", "phi3-partial", "gpt2", "swin")
MORE = (
    "llama-mqa", "gemma3", "gpt_neox", "llama-mha", "llama-llama3", "mistral", "qwen2", "gemma2", "phi3", "mixtral",
    "opt", "falcon-new", "bert", "vit",
)  # fmt: skip
FAMILIES = (*FAST, *(pytest.param(family, marks=pytest.mark.slow) for family in MORE))
GRID = (
    (8, 2), (8, 4), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((16, 4), (16, 2), (8, 8), (8, 1))),
)  # fmt: skip


def keep(program: Program, kept: dict[str, list[int]]) -> Program:
    editor = Editor(program, "test")
    facts = {fqn: take_heads(editor, program, program.sites[fqn], heads) for fqn, heads in kept.items()}
    lower(editor, program, facts)
    after = editor.finish()
    assert violations(after) == []
    return after


def masked(program: Program, kept: dict[str, list[int]]) -> Program:
    """The program with the output columns of the other heads set to zero."""
    values = {}
    for fqn, heads in kept.items():
        site = program.sites[fqn]
        weight = program.weights.get(site.o.weight)
        view = weight.T if site.o.layout == "conv1d" else weight
        for h in set(range(site.heads)) - set(heads):
            view[:, h * site.d_v : (h + 1) * site.d_v] = 0
        values[site.o.weight] = weight
    return with_weights(program, values)


def outputs(program: Program, family: str) -> torch.Tensor:
    return run(program, **models.inputs(family))[program.outputs[0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_lowered_facts_compute_what_was_captured(family: str) -> None:
    _, program = models.captured(family)
    assert not any(obstacle(site) for site in program.site_list)
    every = {site.fqn: list(range(site.heads)) for site in program.site_list}
    assert models.relative_error(outputs(keep(program, every), family), outputs(program, family)) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_equals_slice(family: str) -> None:
    _, program = models.captured(family)
    kept = {site.fqn: [h for h in range(site.heads) if h != site.layer % 2] for site in program.site_list}
    sliced = keep(program, kept)
    expected = outputs(masked(program, kept), family)
    assert models.relative_error(outputs(sliced, family), expected) < 1e-6
    assert models.relative_error(outputs(sliced, family), outputs(program, family)) > 1e-4
    assert sliced.parameters < program.parameters


@pytest.mark.parametrize(("heads", "kv_heads"), GRID)
def test_uneven_groups(heads: int, kv_heads: int) -> None:
    program = program_of("llama", 2, heads, kv_heads)
    first, second = program.site_list
    kept = {first.fqn: [0, *range(heads // 2, heads)], second.fqn: list(range(heads - 1))}
    after = keep(program, kept)
    expected = outputs(masked(program, kept), "llama")
    assert models.relative_error(outputs(after, "llama"), expected) < 1e-6
    for site in after.site_list:
        assert site.original_heads == tuple(kept[site.fqn])
        assert site.kv_heads == len({h * kv_heads // heads for h in kept[site.fqn]})
        assert site.cached_numbers_per_token == 16 * site.kv_heads


def test_groups_that_nobody_reads_are_gone() -> None:
    program = program_of("llama", 2, 8, 4)
    site = program.site_list[0]
    after = keep(program, {site.fqn: [0, 1, 4, 5]}).site_list[0]
    assert (after.heads, after.kv_heads, after.kv_of) == (4, 2, ())
    assert after.k is not None
    assert after.k.out_features == 16
    assert after.cached_numbers_per_token == site.cached_numbers_per_token // 2


def test_bias_tables_lose_the_columns_of_the_heads() -> None:
    _, program = models.captured("swin")
    site = program.site_list[-1]
    after = keep(program, {site.fqn: [0, 2, 3]})
    (table,) = after.sites[site.fqn].mask.bias
    assert after.weights.meta(table).shape == (9, 3)
    assert site.mask.bias[0] not in after.weight_names


def test_a_share_that_does_not_fit_is_not_legal() -> None:
    program = program_of("llama", 2)
    first, second = program.site_list

    def with_site(site: AttentionSite) -> Program:
        return program.replace(sites={**program.sites, site.fqn: site})

    wrong = replace(second, head_ids=(0, 0, 1, 2))
    with pytest.raises(VerificationError, match="head ids"):
        verify(with_site(wrong))
    with pytest.raises(VerificationError, match="heads divide"):
        verify(with_site(replace(first, kv_of=(0, 0, 0, 0))))
