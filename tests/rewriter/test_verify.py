"""The verifier: every family's program is legal, and every rule has a program that breaks it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from attnopt.errors import VerificationError
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite, CacheEntry, CacheSpec, RouteSpec, ShareSpec
from attnopt.rewriter.verify import RULES, verify, violations
from attnopt.rewriter.weights import Inline
from tests import models


# Captures are slow; the tests of capture verify the other families.
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "deepseek_v3", "bert"])
def test_captured_programs_are_legal(family: str) -> None:
    assert violations(models.captured(family)[1], "captured") == []


def _site(**changes: Any) -> Callable[[Program], Program]:
    """Change facts of the second layer."""

    def damage(program: Program) -> Program:
        return _put(program, replace(program.site_list[1], **changes))

    return damage


def _put(program: Program, site: AttentionSite) -> Program:
    return program.replace(sites={**program.sites, site.fqn: site})


def _projection(name: str, **changes: Any) -> Callable[[Program], Program]:
    def damage(program: Program) -> Program:
        site = program.site_list[1]
        return _put(program, replace(site, **{name: replace(getattr(site, name), **changes)}))

    return damage


def _graph(change: Callable[[fx.Graph, Program], None]) -> Callable[[Program], Program]:
    def damage(program: Program) -> Program:
        copy = program.clone()
        change(copy.graph, copy)
        return copy

    return damage


def _nodes(**changes: str) -> Callable[[Program], Program]:
    def damage(program: Program) -> Program:
        site = program.site_list[1]
        return _put(program, replace(site, nodes=replace(site.nodes, **changes)))

    return damage


def _insert(target: Any, *args: Any) -> Callable[[Program], Program]:
    def change(graph: fx.Graph, program: Program) -> None:
        output = next(node for node in graph.nodes if node.op == "output")
        with graph.inserting_before(output):
            graph.call_function(target, (next(iter(graph.nodes)), *args))

    return _graph(change)


def _method(graph: fx.Graph, program: Program) -> None:
    output = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        graph.call_method("neg", (next(iter(graph.nodes)),))


def _misplace(graph: fx.Graph, program: Program) -> None:
    nodes = list(graph.nodes)
    next(n for n in nodes if n.name == "linear").prepend(nodes[-2])


def _foreign(graph: fx.Graph, program: Program) -> None:
    next(n for n in graph.nodes if n.name == "linear").meta["attnopt"] = {"pass": "x", "site": "gone"}


def _second_anchor(graph: fx.Graph, program: Program) -> None:
    anchor = next(n for n in graph.nodes if n.name == program.site_list[0].nodes.attention)
    with graph.inserting_after(anchor):
        graph.node_copy(anchor)


def _renumber(graph: fx.Graph, program: Program) -> None:
    anchor = next(n for n in graph.nodes if n.name == program.site_list[1].nodes.attention)
    anchor.args = (*anchor.args[:-1], 7)


def _lose(name: str) -> Callable[[Program], Program]:
    return lambda p: p.replace(weights=p.weights.with_values({}, drop=[name]))


def _reshape(name: str, *shape: int) -> Callable[[Program], Program]:
    return lambda p: p.replace(weights=p.weights.with_values({name: Inline(torch.zeros(shape))}))


O_PROJ = "model.layers.1.self_attn.o_proj.weight"
DAMAGE: list[tuple[str, str, Callable[[Program], Program]]] = [
    ("node kinds", "llama", _graph(_method)),
    ("known ops", "llama", _insert(print)),
    ("functional", "llama", _insert(torch.ops.aten.add_.Tensor, 1)),
    ("weights exist", "llama", _lose("model.norm.weight")),
    ("weight shapes", "llama", _reshape("model.norm.weight", 31)),
    ("defined before use", "llama", _graph(_misplace)),
    ("anchors belong to sites", "llama", _graph(_second_anchor)),
    ("provenance", "llama", _graph(_foreign)),
    ("inputs", "llama", lambda p: p.replace(inputs=("position_ids", "input_ids"))),
    ("outputs", "llama", lambda p: p.replace(outputs=("logits", "hidden"))),
    ("layer order", "llama", _site(layer=4)),
    ("site names", "llama", lambda p: p.replace(sites=dict(zip(["a", "b"], p.site_list, strict=True)))),
    ("nodes exist", "llama", _nodes(output="nowhere")),
    ("nodes in order", "llama", lambda p: _nodes(output=p.site_list[1].nodes.input)(p)),
    ("anchor", "llama", lambda p: _nodes(attention=p.site_list[1].nodes.input)(p)),
    ("anchor layer", "llama", _graph(_renumber)),
    ("kind", "llama", _site(kind="mha")),
    ("kind", "llama", _site(kind="mla")),
    ("kind", "deepseek_v3", _site(kv_heads=1)),
    ("heads divide", "llama", _site(kv_heads=3)),
    ("heads divide", "llama", _site(kv_heads=0)),
    ("widths", "llama", _site(d_qk=16)),
    ("widths", "llama", _projection("v", rows=((0, 8),))),
    ("widths", "llama", _site(k=None)),
    ("widths", "deepseek_v3", _site(d_v=5)),
    ("rope", "llama", lambda p: _site(rope=replace(p.site_list[1].rope, offset=1))(p)),
    ("rope", "deepseek_v3", lambda p: _site(rope=replace(p.site_list[1].rope, inv_freq=(1.0,) * 3))(p)),
    ("cache", "llama", _site(cache=CacheSpec())),
    ("cache", "llama", _site(cache=CacheSpec((CacheEntry("key", 2, 8), CacheEntry("value", 2, 7))))),
    ("cache", "deepseek_v3", _site(cache=CacheSpec((CacheEntry("latent", 1, 16),)))),
    ("scale", "llama", _site(scale=float("nan"))),
    ("scale", "llama", _site(scale=0.0)),
    ("latent heads", "deepseek_v3", _site(d_qk=13)),
    ("site weights exist", "qwen2", _projection("q", bias="nowhere")),
    ("matrix", "llama", _reshape(O_PROJ, 32, 31)),
    ("matrix", "llama", _projection("o", rows=((1, 33),))),
    ("matrix", "llama", _projection("o", in_features=16)),
    ("bias", "qwen2", _reshape("model.layers.1.self_attn.q_proj.bias", 31)),
    ("rows", "llama", _projection("o", rows=((0, 20), (12, 24)))),
    ("sharing", "llama", _site(share=ShareSpec("nowhere", "map"))),
    ("sharing", "llama", _site(share=ShareSpec("model.layers.1.self_attn", "kv"))),
    ("sharing", "llama", lambda p: _site(share=ShareSpec(p.site_list[0].fqn, "kv"), kv_heads=4)(p)),
    ("route", "llama", _site(route=RouteSpec("qnorm", (0,), active=4))),
    ("route", "llama", _site(route=RouteSpec("linear", (0,), active=2))),
    ("route", "llama", _site(route=RouteSpec("qnorm", (1, 0), active=1))),
    ("head ids", "llama", _site(head_ids=(0, 1, 1, 2))),
    ("head ids", "llama", _site(head_ids=(0, 1, 2))),
]


@pytest.mark.parametrize(("rule", "family", "damage"), DAMAGE, ids=[f"{i}-{d[0]}" for i, d in enumerate(DAMAGE)])
def test_every_rule_fires(rule: str, family: str, damage: Callable[[Program], Program]) -> None:
    program = models.captured(family)[1]
    broken = violations(damage(program))
    assert any(line.startswith(f"[{rule}]") for line in broken), broken
    assert violations(program) == [], "the original was not touched"


def test_every_rule_is_tried() -> None:
    assert {rule for rule, _, _ in DAMAGE} == {rule.name for rule in RULES}


def test_the_error_lists_everything_that_is_wrong() -> None:
    program = models.captured("llama")[1]
    with pytest.raises(VerificationError) as caught:
        verify(_site(scale=-1.0, kv_heads=3)(program))
    assert {line.split("]")[0] for line in caught.value.violations} >= {"[scale", "[heads divide"}
    assert "model.layers.1.self_attn" in str(caught.value)


def test_arithmetic_on_sizes_is_allowed() -> None:
    program = models.captured("llama")[1]
    copy = program.clone()
    size = next(n for n in copy.graph.nodes if n.target == torch.ops.aten.sym_size.int)
    with copy.graph.inserting_after(size):
        copy.graph.call_function(operator.mul, (size, 2))
    assert violations(copy) == []
