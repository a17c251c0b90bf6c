"""Program: clones, counts, look-ups."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attnopt.rewriter.interpret import run
from attnopt.rewriter.program import HistoryEntry, Program, fake_value, walk_back
from tests import models


@pytest.fixture
def program() -> Program:
    return models.captured("llama")[1]


def test_clone_is_equal_and_separate(program: Program) -> None:
    clone = program.clone()
    assert [n.name for n in clone.graph.nodes] == [n.name for n in program.graph.nodes]
    site = clone.site_list[0]
    x = models.inputs("llama")
    before = run(program, **x)["logits"]
    torch.testing.assert_close(run(clone, **x)["logits"], before, rtol=0, atol=0)
    attention = clone.node(site.nodes.attention)
    attention.update_arg(5, 0.0)
    attention.meta["val"] = None
    assert program.node(site.nodes.attention).args[5] == site.scale
    assert program.node(site.nodes.attention).meta["val"] is not None
    torch.testing.assert_close(run(program, **x)["logits"], before, rtol=0, atol=0)
    assert not torch.allclose(run(clone, **x)["logits"], before)


def test_replace_shares_the_rest(program: Program) -> None:
    changed = program.replace(history=(HistoryEntry("to-mla{kv-keep=0.5}", {"sites": 2}),))
    assert changed.graph is program.graph
    assert program.history == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.history = ()  # type: ignore[misc]  # that is the point


def test_nodes_are_found_by_name(program: Program) -> None:
    site = program.site_list[1]
    assert fake_value(program.node(site.nodes.input)).shape[-1] == 32
    with pytest.raises(KeyError):
        program.node("no_such_node")
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    with pytest.raises(KeyError):
        fake_value(output)


def test_walk_back_visits_every_ancestor_once(program: Program) -> None:
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    seen = list(walk_back(output))
    assert len(seen) == len(set(seen)) == len(program.graph.nodes)


def test_weight_names_exist_in_the_store(program: Program) -> None:
    assert set(program.weight_names) <= set(program.weights.names())
    assert "model.rotary_emb.inv_freq" in program.weight_names
    assert program.cached_numbers_per_token == sum(s.cached_numbers_per_token for s in program.site_list) == 64
