"""Captures a deep model from a few of its layers.

Tracing thirty Llama layers takes most of a minute, though they are one layer thirty times. So one layer of each kind
is traced, and its subgraph is repeated for its equals with the weights renamed. Layers count as equal only if that is
provable: same tree of classes, same parameter shapes, equal buffers and attributes, same entries in the config's
per-layer lists; the layer's own index may differ if the traced code did nothing with it. Otherwise everything is
traced.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from attnopt.rewriter.normalize import ATTENTION, ROUTED
from attnopt.rewriter.program import Program
from attnopt.rewriter.segments import Segment, assign_segments, layer_path, segment_graph
from attnopt.rewriter.site import AttentionSite, LatentSpec, NormSpec, Projection, RouteSpec, SiteNodes
from attnopt.rewriter.weights import Value


class LayerIndex:
    """Stands in for `layer_idx` while a layer is traced, and remembers whether anyone computed with it.

    Not an int, because Python reads the value of an int subclass without asking it (indexing a list does).
    """

    def __init__(self, value: int) -> None:
        self.value = value
        self.used = False


def _watched(name: str) -> Any:
    def watch(self: LayerIndex, *args: Any) -> Any:
        self.used = True
        return getattr(self.value, name)(*args)

    return watch


for _name in set(dir(int)) - set(dir(object)) | {
    "__eq__",
    "__ne__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "__hash__",
    "__str__",
    "__repr__",
    "__format__",
}:
    setattr(LayerIndex, _name, _watched(_name))


_MISSING = object()
# Attributes of nn.Module itself that hold no facts about the layer.
_BOOKKEEPING = frozenset(vars(nn.Module()))


def same_layer(a: nn.Module, b: nn.Module, index_a: int, index_b: int) -> bool:
    """Whether two layers provably compute the same function of their inputs and parameters.

    Attributes that hold the layer's own index may differ. Attributes that are objects must be the same object or
    compare equal as plain data.
    """
    modules_a, modules_b = dict(a.named_modules()), dict(b.named_modules())
    if list(modules_a) != list(modules_b):
        return False
    return all(_same_module(modules_a[name], modules_b[name], index_a, index_b) for name in modules_a)


def _same_module(a: nn.Module, b: nn.Module, index_a: int, index_b: int) -> bool:
    if type(a) is not type(b) or a.training != b.training:
        return False
    if a._forward_hooks or a._forward_pre_hooks or b._forward_hooks or b._forward_pre_hooks:
        return False
    for kind in ("_parameters", "_buffers"):
        ours, theirs = getattr(a, kind), getattr(b, kind)
        if list(ours) != list(theirs):
            return False
        for name, value in ours.items():
            other = theirs[name]
            if (value is None) != (other is None):
                return False
            if value is not None and (value.shape != other.shape or value.dtype != other.dtype):
                return False
            if kind == "_buffers" and value is not None and not torch.equal(value, other):
                return False
    names = (set(vars(a)) | set(vars(b))) - _BOOKKEEPING
    return all(_same_value(vars(a).get(n, _MISSING), vars(b).get(n, _MISSING), index_a, index_b) for n in names)


def _same_value(a: Any, b: Any, index_a: int, index_b: int) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, bool | float | str | bytes | torch.dtype | torch.device):
        return bool(a == b)
    if isinstance(a, int):
        return a == b or (a == index_a and b == index_b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same_value(x, y, index_a, index_b) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same_value(a[k], b[k], index_a, index_b) for k in a)
    if isinstance(a, functools.partial):
        ours, theirs = (a.func, a.args, a.keywords), (b.func, b.args, b.keywords)
        return _same_value(ours, theirs, index_a, index_b)
    if isinstance(a, types.MethodType):
        return a.__func__ is b.__func__
    return False


class Cut:
    """A choice of representatives in a model's one list of layers.

    Attributes:
        path: of the list, e.g. "model.layers".
        chosen: original index of each representative, ascending.
        kind: for each layer, the place of its representative in `chosen`.
    """

    def __init__(self, model: nn.Module, path: str, chosen: list[int], kind: list[int]) -> None:
        self.model, self.path, self.chosen, self.kind = model, path, chosen, kind
        self._indices: list[LayerIndex] = []

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Leave only the representatives in the model, and their entries in the config's per-layer lists."""
        parent_path, _, name = self.path.rpartition(".")
        parent = self.model.get_submodule(parent_path)
        layers = parent._modules[name]
        assert isinstance(layers, nn.ModuleList)
        depth = len(layers)
        undo: list[tuple[Any, str, Any]] = []
        for config in _configs(self.model):
            for key, value in list(vars(config).items()):
                if isinstance(value, list | tuple) and len(value) == depth:
                    undo.append((config, key, value))
                    setattr(config, key, type(value)(value[i] for i in self.chosen))
                elif key in ("num_hidden_layers", "n_layer", "num_layers") and value == depth:
                    undo.append((config, key, value))
                    setattr(config, key, len(self.chosen))
        kept = [layers[i] for i in self.chosen]
        for original, layer in zip(self.chosen, kept, strict=True):
            for module in layer.modules():
                for key, value in list(vars(module).items()):
                    if type(value) is int and value == original and "idx" in key:
                        undo.append((module, key, value))
                        watched = LayerIndex(value)
                        self._indices.append(watched)
                        object.__setattr__(module, key, watched)
        parent._modules[name] = nn.ModuleList(kept)
        try:
            yield
        finally:
            parent._modules[name] = layers
            for owner, key, value in reversed(undo):
                object.__setattr__(owner, key, value)

    def proven(self) -> bool:
        """Whether the traced code left the layers' indices alone."""
        return not any(index.used for index in self._indices)


def _configs(model: nn.Module) -> list[Any]:
    found = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None}
    return list(found.values())


def _without(entry: Any, index: int) -> Any:
    """A layer's entry in a list of the config; of a path, what does not say the layer's own number."""
    return entry.replace(f".{index}.", "..") if isinstance(entry, str) else entry


def cut_layers(model: nn.Module, least: int = 1) -> Cut | None:
    """Choose representatives, or None if the model has no single list of layers or too few to gain anything.

    Args:
        least: smallest number of layers saved that is worth it.
    """
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not any(p.isdigit() for p in path.split("."))
    ]
    if len(lists) != 1:
        return None
    path, layers = lists[0]
    depth = len(layers)
    per_layer = [
        value
        for config in _configs(model)
        for value in vars(config).values()
        if isinstance(value, list | tuple) and len(value) == depth
    ]
    chosen: list[int] = []
    kind: list[int] = []
    for i, layer in enumerate(layers):
        for place, j in enumerate(chosen):
            alike = all(_without(v[i], i) == _without(v[j], j) for v in per_layer)
            if alike and same_layer(layers[j], layer, j, i):
                kind.append(place)
                break
        else:
            kind.append(len(chosen))
            chosen.append(i)
    return Cut(model, path, chosen, kind) if depth - len(chosen) >= least else None


def stamp(partial: Program, cut: Cut) -> Program | None:
    """The whole program from one that holds only the representatives, or None if the layers do not chain.

    Args:
        partial: captured under `cut.applied()`; its i-th layer is representative i.
        cut: how the layers map to representatives.

    Returns:
        None if there is not exactly one site per representative, or layers are connected by more than one tensor.
    """
    sites = partial.site_list
    expected = [f"{cut.path}.{place}" for place in range(len(cut.chosen))]
    if [layer_path(site.fqn) for site in sites] != expected:
        return None
    segments = segment_graph(partial)
    prelude, layers, head = segments[0], segments[1:-1], segments[-1]
    streams = [segment.stream_in for segment in segments[1:]]
    if any(stream is None for stream in streams):
        return None
    for segment in segments[2:]:
        if set(segment.live_in) - {segment.stream_in} - set(prelude.live_out):
            return None
    return _Stamper(partial, cut, layers, head).build()


class _Stamper:
    """Builds the whole graph: prelude, then per layer a copy of its representative's nodes, then the head."""

    def __init__(self, partial: Program, cut: Cut, layers: Sequence[Segment], head: Segment) -> None:
        self.partial, self.cut, self.layers, self.head = partial, cut, layers, head
        self.graph = fx.Graph()
        self.by_name = {node.name: node for node in partial.graph.nodes}
        self.shared: dict[fx.Node, fx.Node] = {}
        self.weights: dict[str, fx.Node] = {}
        self.buffers: dict[str, Value] = {}

    def build(self) -> Program:
        place = assign_segments(self.partial)
        parts: dict[int, list[fx.Node]] = {}
        for node, index in place.items():
            parts.setdefault(index, []).append(node)
        last = len(self.layers) + 1
        for node in parts.get(0, []):
            self.shared[node] = self._copy(node, self.shared, None)
        stream = self.shared[self.by_name[str(self.layers[0].stream_in)]]
        sites: dict[str, AttentionSite] = {}
        for layer, kind in enumerate(self.cut.kind):
            segment = self.layers[kind]
            env = dict(self.shared)
            env[self.by_name[str(segment.stream_in)]] = stream
            renamed: dict[str, str] = {}
            for node in parts[segment.index]:
                env[node] = copied = self._copy(node, env, (kind, layer))
                renamed[node.name] = copied.name
            after = self.layers[kind + 1] if kind + 1 < len(self.layers) else self.head
            incoming = self.by_name[str(segment.stream_in)]
            renamed.setdefault(incoming.name, env[incoming].name)
            stream = env[self.by_name[str(after.stream_in)]]
            site = self._site(self.partial.site_list[kind], kind, layer, renamed)
            sites[site.fqn] = site
        env = dict(self.shared)
        env[self.by_name[str(self.head.stream_in)]] = stream
        for node in parts.get(last, []):
            env[node] = self._copy(node, env, None)
        (output,) = (node for node in self.partial.graph.nodes if node.op == "output")
        self.graph.output(fx.map_arg(output.args[0], lambda n: env[n]))
        self.graph.lint()
        return self.partial.replace(
            graph=self.graph, sites=sites, weights=self.partial.weights.with_values(self.buffers)
        )

    def _copy(self, node: fx.Node, env: Mapping[fx.Node, fx.Node], move: tuple[int, int] | None) -> fx.Node:
        def operand(n: fx.Node) -> fx.Node:
            return self._weight(n, move) if n.op == "get_attr" else env[n]

        for source in node.all_input_nodes:  # weights first: a node is inserted where it is created
            operand(source)
        copied = self.graph.node_copy(node, operand)
        copied.meta = self._moved_meta(node.meta, move)
        if move is not None and node.target in (ATTENTION, ROUTED):
            copied.update_arg(len(node.args) - 1, move[1])
        return copied

    def _weight(self, node: fx.Node, move: tuple[int, int] | None) -> fx.Node:
        name = self._rename(str(node.target), move)
        if name not in self.weights:
            self.weights[name] = made = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
            made.meta = self._moved_meta(node.meta, move)
            if node.meta.get("buffer"):
                self.buffers[name] = self.partial.weights[str(node.target)]
        return self.weights[name]

    def _rename(self, name: str, move: tuple[int, int] | None) -> str:
        if move is None:
            return name
        before, after = f"{self.cut.path}.{move[0]}.", f"{self.cut.path}.{move[1]}."
        if name + "." == before:
            return after[:-1]
        return after + name[len(before) :] if name.startswith(before) else name

    def _moved_meta(self, meta: Mapping[str, Any], move: tuple[int, int] | None) -> dict[str, Any]:
        result = dict(meta)
        if move is not None and "nn_module_stack" in result:
            result["nn_module_stack"] = {
                self._rename(key.removeprefix("L__self__"), move): (self._rename(path, move), kind)
                for key, (path, kind) in result["nn_module_stack"].items()
            }
        return result

    def _site(self, site: AttentionSite, kind: int, layer: int, nodes: Mapping[str, str]) -> AttentionSite:
        move = (kind, layer)

        def named(name: str | None) -> str | None:
            return None if name is None else self._rename(name, move)

        def projection(p: Projection | None) -> Projection | None:
            return None if p is None else replace(p, weight=self._rename(p.weight, move), bias=named(p.bias))

        def norm(n: NormSpec | None) -> NormSpec | None:
            return None if n is None else replace(n, weight=named(n.weight), bias=named(n.bias))

        def latent(part: LatentSpec | None) -> LatentSpec | None:
            if part is None:
                return None
            changes: dict[str, Any] = {n: projection(getattr(part, n)) for n in ("kv_a", "kv_b", "q", "q_a", "q_b")}
            changes |= {n: norm(getattr(part, n)) for n in ("kv_a_norm", "q_a_norm")}
            return replace(part, **changes, q_map=named(part.q_map))

        def route(part: RouteSpec | None) -> RouteSpec | None:
            if part is None:
                return None
            changes: dict[str, Any] = {field: named(getattr(part, field)) for field in part.WEIGHTS}
            return replace(part, **changes)

        o = projection(site.o)
        assert o is not None
        return replace(
            site,
            fqn=self._rename(site.fqn, move),
            layer=layer,
            q=projection(site.q),
            k=projection(site.k),
            v=projection(site.v),
            o=o,
            q_norm=norm(site.q_norm),
            k_norm=norm(site.k_norm),
            mask=replace(
                site.mask, sinks=named(site.mask.sinks), bias=tuple(self._rename(b, move) for b in site.mask.bias)
            ),
            latent=latent(site.latent),
            route=route(site.route),
            nodes=SiteNodes(nodes[site.nodes.input], nodes[site.nodes.attention], nodes[site.nodes.output]),
        )
