"""Programs whose layers share or route, made by hand: what code generation has to lower, whichever pass made it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from attnopt.rewriter.edit import Editor
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import CacheSpec
from tests.models import captured

aten, dialect = torch.ops.aten, torch.ops.attnopt
VARIANTS = ("shared-map", "shared-kv", "uneven", "routed")


@functools.cache
def variant(name: str) -> Program:
    """A two-layer grouped Llama with another second layer.

    shared-map: it uses the first layer's map; shared-kv: its keys and values; uneven: three query heads read the first
    key/value head and one the second; routed: heads work where the first channel of their query is positive.
    """
    program = captured("llama")[1]
    editor = Editor(program, by="test")
    first, site = program.site_list
    old, owner = program.node(site.nodes.attention), program.node(first.nodes.attention)
    with editor.at(site.fqn, before=old.name):
        args: list[Any] = [editor.node(a.name) if isinstance(a, torch.fx.Node) else a for a in old.args]
        lent = [editor.node(a.name) for a in owner.args[:3]]  # type: ignore[union-attr]
        if name == "shared-map":
            new = editor.call(dialect.shared_attention.default, *lent[:2], *args[2:10], first.layer, site.layer)
            cache = CacheSpec(tuple(entry for entry in site.cache.entries if entry.name == "value"))
        elif name == "shared-kv":
            new = editor.call(dialect.attention.default, args[0], *lent[1:3], *args[3:])
            cache = CacheSpec(())
        elif name == "uneven":
            for place in (1, 2):
                parts = [editor.call(aten.slice.Tensor, args[place], 1, i, i + 1) for i in (0, 0, 0, 1)]
                args[place] = editor.call(aten.cat.default, parts, 1)
            new, cache = editor.call(dialect.attention.default, *args), site.cache
        else:
            score = editor.call(aten.transpose.int, editor.call(aten.select.int, args[0], 3, 0), 1, 2)
            gates = editor.call(aten.sign.default, editor.call(aten.relu.default, score))
            new = editor.call(dialect.routed_attention.default, *args[:3], gates, *args[3:])
            cache = site.cache
        editor.redirect(old.name, new)
        editor.set_site(replace(site, cache=cache, nodes=replace(site.nodes, attention=new.name)))
    return editor.finish()
