"""The Editor: provenance, journal, and the original left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnopt.rewriter.edit import Edit, Editor, weight_names
from attnopt.rewriter.interpret import run
from attnopt.rewriter.passes import sites_differing
from attnopt.rewriter.printer import long_print
from attnopt.rewriter.program import Program
from attnopt.rewriter.verify import verify
from attnopt.rewriter.weights import Derived, Inline
from tests import models

aten = torch.ops.aten


@pytest.fixture
def program() -> Program:
    return models.captured("llama")[1]


def test_new_nodes_compute_and_carry_provenance(program: Program) -> None:
    before = long_print(program)
    inputs = models.inputs("llama")
    expected = run(program, **inputs)["logits"]
    site = program.site_list[1]
    editor = Editor(program, "double")
    with editor.at(site.fqn, before=editor.node(site.nodes.output).next):
        output = editor.node(site.nodes.output)
        bias = editor.weight("attnopt.bias", Inline(torch.full((32,), 0.25)))
        moved = editor.call(aten.add.Tensor, output, bias, name="moved")
        editor.redirect(output, moved)
    assert editor.changed_sites == (site.fqn,)
    result = editor.finish()
    verify(result)
    assert long_print(program) == before, "the original is as it was"
    node = result.node("moved")
    assert node.meta["attnopt"] == {"pass": "double", "site": site.fqn}
    assert node.meta["val"].shape[2] == 32
    assert node.meta["nn_module_stack"], "so that the interpreter knows the layer"
    assert {(e.kind, e.what) for e in editor.journal} == {
        ("weight", "attnopt.bias"),
        ("insert", "attnopt_bias"),
        ("insert", "moved"),
        ("redirect", site.nodes.output),
    }
    found = run(result, **inputs)["logits"]
    weight = program.weights.get(site.o.weight)
    other = Editor(program, "same by weights")
    with other.at(site.fqn):
        other.set_weight("attnopt.o.bias", Inline(torch.full((32,), 0.25)))
        linear = other.node(site.nodes.output)
        with other.at(site.fqn, before=linear):
            again = other.call(aten.linear.default, *linear.args, other.weight("attnopt.o.bias"))
        other.redirect(linear, again)
    assert weight.shape == (32, 32)
    assert models.relative_error(run(other.finish(), **inputs)["logits"], found) < 1e-5
    assert not torch.equal(found, expected)


def test_what_is_not_used_in_the_end_is_no_change(program: Program) -> None:
    site = program.site_list[0]
    editor = Editor(program, "idle")
    with editor.at(site.fqn):
        editor.call(aten.neg.default, editor.node(site.nodes.input))
        editor.set_weight("attnopt.unused", Inline(torch.zeros(1)))
        editor.set_site(site)
    assert editor.journal != ()
    result = editor.finish()
    assert editor.journal == ()
    assert editor.changed_sites == ()
    assert [n.name for n in result.graph.nodes] == [n.name for n in program.graph.nodes]


def test_a_site_set_and_set_back_is_no_change(program: Program) -> None:
    site = program.site_list[0]
    editor = Editor(program, "idle")
    editor.set_site(replace(site, scale=0.5))
    editor.set_site(site)
    editor.finish()
    assert editor.changed_sites == ()


def test_dead_originals_go(program: Program) -> None:
    site = program.site_list[0]
    editor = Editor(program, "cut")
    with editor.at(site.fqn, before=editor.node(site.nodes.output).next):
        zero = editor.call(aten.mul.Tensor, editor.node(site.nodes.input), 0.0)
        editor.redirect(site.nodes.output, zero)
    names = {str(n.target) for n in editor.finish().graph.nodes if n.op == "get_attr"}
    assert site.q is not None
    assert site.q.weight not in names
    assert site.o.weight not in names


def test_weights_are_not_overwritten_by_accident(program: Program) -> None:
    site = program.site_list[0]
    editor = Editor(program, "clash")
    value = Derived.of("scale", program.weights[site.o.weight], factor=2.0)
    with editor.at(site.fqn):
        with pytest.raises(ValueError, match="exists; use fresh_name"):
            editor.set_weight(site.o.weight, value)
        editor.set_weight(site.o.weight, program.weights[site.o.weight])  # the same value is no change
        assert editor.journal == ()
        assert editor.fresh_name(site.o.weight) == f"attnopt.{site.o.weight}"
        assert editor.fresh_name("new") == "new"
        editor.set_weight(site.o.weight, value, replace=True)
        with pytest.raises(KeyError, match="no weight"):
            editor.weight("nowhere")
    result = editor.finish()
    assert editor.journal == (Edit("weight", site.fqn, site.o.weight),)
    assert torch.equal(result.weights.get(site.o.weight), 2 * program.weights.get(site.o.weight))
    assert sites_differing(program, result) == (site.fqn,)


def test_a_weight_is_read_by_one_node_and_before_its_first_reader(program: Program) -> None:
    site = program.site_list[0]
    late = program.site_list[1].o.weight
    editor = Editor(program, "early")
    with editor.at(site.fqn):
        node = editor.weight(late)
        early = editor.call(aten.sum.default, node)
        assert editor.weight(late) is node
        with pytest.raises(ValueError, match="which comes later"):
            editor.call(aten.add.Tensor, editor.node(site.nodes.attention), early)
    with editor.at(site.fqn, before=editor.node(site.nodes.output).next):
        output = editor.node(site.nodes.output)
        editor.redirect(output, editor.call(aten.add.Tensor, output, early))
    result = editor.finish()
    verify(result)
    names = [n.name for n in result.graph.nodes]
    assert names.index(node.name) < names.index(early.name) < names.index(site.nodes.attention)


def test_edits_need_a_place_and_an_open_editor(program: Program) -> None:
    editor = Editor(program, "lost")
    with pytest.raises(RuntimeError, match=r"editor\.at\(site\)"):
        editor.set_weight("w", Inline(torch.zeros(1)))
    with pytest.raises(KeyError), editor.at("no.such.site"):
        pass
    editor.finish()
    with pytest.raises(RuntimeError, match="has finished"):
        editor.finish()
    with editor.at(program.site_list[0].fqn), pytest.raises(RuntimeError, match="has finished"):
        editor.set_weight("w", Inline(torch.zeros(1)))


def test_wrong_shapes_are_noticed_when_the_node_is_made(program: Program) -> None:
    site = program.site_list[0]
    editor = Editor(program, "wrong")
    with editor.at(site.fqn):
        weight = editor.weight("attnopt.narrow", Inline(torch.zeros(8, 31)))
        with pytest.raises(RuntimeError, match=r"31|invalid|shape"):
            editor.call(aten.linear.default, editor.node(site.nodes.input), weight)


def test_weight_names_of_every_kind_of_site() -> None:
    assert weight_names(models.captured("qwen2")[1].site_list[0])[:2] == (
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
    )
    latent = weight_names(models.captured("deepseek_v3")[1].site_list[0])
    assert {name.split(".")[-2] for name in latent} >= {"kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj"}
    assert "model.layers.0.self_attn.q_norm.weight" in weight_names(models.captured("qwen3")[1].site_list[0])
