"""The text forms of a program."""

from __future__ import annotations

import pytest
import torch

from attnopt.rewriter.edit import Editor
from attnopt.rewriter.printer import long_print, short_print
from attnopt.rewriter.program import HistoryEntry
from tests import models

LINES = {
    "llama": "  1 model.layers.1.self_attn  gqa  4/2 heads x 8, rope 8 half, causal, cache 32",
    "qwen3": "  0 model.layers.0.self_attn  gqa  4/2 heads x 8, rope 8 half, q/k norm, causal, cache 32",
    "gemma2": "  0 model.layers.0.self_attn  gqa  4/2 heads x 8, rope 8 half, causal, window 5, softcap 2, cache 32",
    "llama-llama3": "  0 model.layers.0.self_attn  gqa  4/2 heads x 8, rope 8 half llama3, causal, cache 32",
    "deepseek_v3": "  0 model.layers.0.self_attn  mla  4 heads x 12+6, latent 16+4, rope 4 interleaved, causal, "
    "cache 20",
    "bert": "  0 encoder.layer.0.attention.self  mha  4 heads x 8, bidirectional, padding, cache 0",
}


@pytest.mark.parametrize("family", LINES)
def test_one_line_says_what_a_site_is(family: str) -> None:
    assert LINES[family] in short_print(models.captured(family)[1]).split("\n")


def test_the_head_line_and_the_history() -> None:
    program = models.captured("llama")[1]
    text = short_print(program.replace(history=(HistoryEntry("to-mla{kv-keep=0.5}"), HistoryEntry("share"))))
    assert text.startswith("llama: 2 attention layers, ")
    assert "64 cached numbers per token" in text.split("\n")[0]
    assert text.endswith("history: to-mla{kv-keep=0.5},share")


def test_the_long_form_has_a_line_for_every_node() -> None:
    program = models.captured("llama")[1]
    text = long_print(program)
    body = text.removeprefix(short_print(program)).strip().split("\n")
    assert len(body) == len(list(program.graph.nodes))
    assert any(line.startswith("%input_ids : i64[") and line.endswith("= input") for line in body)
    assert "%model_norm_weight : f32[32] = weight model.norm.weight" in body
    anchor = next(line for line in body if "attnopt.attention(" in line)
    assert anchor.endswith("# model.layers.0.self_attn")
    assert body[-1].startswith("return [%linear")


def test_new_nodes_say_who_made_them() -> None:
    program = models.captured("llama")[1]
    site = program.site_list[0]
    editor = Editor(program, "to-x{a=1}")
    with editor.at(site.fqn, before=editor.node(site.nodes.output).next):
        output = editor.node(site.nodes.output)
        editor.redirect(output, editor.call(torch.ops.aten.neg.default, output, name="negated"))
    (line,) = [line for line in long_print(editor.finish()).split("\n") if line.startswith("%negated")]
    assert "= aten.neg(%linear_3)" in line
    assert line.endswith(f"# made by to-x{{a=1}} for {site.fqn}")
