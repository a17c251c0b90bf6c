"""Editor: the only thing that changes a graph. It works on a copy, marks what it makes and keeps a journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite
from attnopt.rewriter.weights import Value, meta_of

EditKind = Literal["insert", "redirect", "weight", "site"]


@dataclass(frozen=True)
class Edit:
    """One change.

    Attributes:
        kind: "insert" (a node), "redirect" (readers of a node now read another), "weight" (a value was defined),
            "site" (facts of an attention layer).
        site: fqn of the attention layer it belongs to.
        what: the node, weight or site.
    """

    kind: EditKind
    site: str
    what: str


class Editor:
    """Changes a copy of a program.

    Every change happens inside `at`, which says to which attention layer it belongs and where new nodes go. New nodes
    carry `meta["attnopt"] = {"pass": ..., "site": ...}`, the module stack of the node they were put before, and a fake
    value. `finish` removes what is no longer used and returns the new program.

    Args:
        program: what to change; it stays as it is.
        by: text of the pass that does it.
    """

    def __init__(self, program: Program, by: str) -> None:
        self._before = program
        self._program = program.clone()
        self._by = by
        self._graph = self._program.graph
        self._nodes = {node.name: node for node in self._graph.nodes}
        self._weights: dict[str, Value] = {}
        self._sites: dict[str, AttentionSite] = {}
        self._journal: list[Edit] = []
        self._place: tuple[str, fx.Node] | None = None
        self._finished = False

    @property
    def journal(self) -> tuple[Edit, ...]:
        """All changes so far, in order. After `finish`, those that had an effect."""
        return tuple(self._journal)

    @property
    def changed_sites(self) -> tuple[str, ...]:
        """Attention layers with changes, in layer order."""
        changed = {edit.site for edit in self._journal}
        return tuple(fqn for fqn in self._before.sites if fqn in changed)

    def node(self, name: str) -> fx.Node:
        """A node of the copy. Read it; do not change it.

        Raises:
            KeyError: if there is none of that name.
        """
        return self._nodes[name]

    @contextmanager
    def at(self, site: str, before: str | fx.Node | None = None) -> Iterator[None]:
        """Changes inside the block belong to `site`; new nodes go before the node given, or the site's attention.

        Raises:
            KeyError: if there is no such site or node.
        """
        facts = self._sites.get(site) or self._before.sites[site]
        node = before if isinstance(before, fx.Node) else self.node(before or facts.nodes.attention)
        outer, self._place = self._place, (site, node)
        try:
            yield
        finally:
            self._place = outer

    def call(self, target: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        """Insert a call of an ATen or dialect op.

        Args:
            target: the op, e.g. `torch.ops.aten.linear.default`, or `operator.getitem`.
            args, kwargs: its arguments; nodes stand for values.
            name: what to call the node; made unique.

        Returns:
            the new node.

        Raises:
            ValueError: if an argument comes after the place the node would have.
        """
        site, before = self._where()
        sources: list[fx.Node] = []
        fx.map_arg((args, kwargs), sources.append)
        for source in sources:
            if not source < before:
                raise ValueError(f"{target} before {before.name} cannot read {source.name}, which comes later")
        with self._graph.inserting_before(before):
            node = self._graph.create_node("call_function", target, args, kwargs, name=name)
        self._mark(node, site, before)
        value = _fake_result(target, args, kwargs)
        if value is not None:
            node.meta["val"] = value
        return node

    def weight(self, name: str, value: Value | None = None, buffer: bool = False) -> fx.Node:
        """The node that reads a weight, made if there is none.

        Args:
            name: name in the WeightStore.
            value: defines the weight first, see `set_weight`.
            buffer: it is a constant and no parameter.
        """
        if value is not None:
            self.set_weight(name, value)
        site, before = self._where()
        if name not in self._weights and name not in self._before.weights:
            raise KeyError(f"no weight {name!r}")
        for node in self._graph.nodes:
            if node.op == "get_attr" and node.target == name:
                if not node < before:  # it was made for a later reader
                    before.prepend(node)
                return node
        with self._graph.inserting_before(before):
            node = self._graph.create_node("get_attr", name, name=name.replace(".", "_"))
        self._mark(node, site, before)
        node.meta["buffer"] = buffer
        meta = meta_of(self._weights[name] if name in self._weights else self._before.weights[name])
        dtype = torch.float32 if meta.dtype.is_floating_point else meta.dtype
        with _fake_mode(before):
            node.meta["val"] = torch.empty(meta.shape, dtype=dtype)
        return node

    def set_weight(self, name: str, value: Value, *, replace: bool = False) -> None:
        """Define a weight.

        Raises:
            ValueError: if the name has another value and `replace` is not given.
        """
        site, _ = self._where()
        current = self._weights.get(name)
        if current is None and name in self._before.weights:
            current = self._before.weights[name]
        if current == value:
            return
        if current is not None and not replace:
            raise ValueError(f"weight {name!r} exists; use fresh_name, or replace=True to give it a new value")
        self._weights[name] = value
        self._journal.append(Edit("weight", site, name))

    def fresh_name(self, name: str) -> str:
        """`name`, with as many `attnopt.` before it as it takes for it to be the name of nothing else."""
        while name in self._before.weights or name in self._weights:
            name = f"attnopt.{name}"
        return name

    def redirect(self, old: str | fx.Node, new: fx.Node) -> None:
        """Let every reader of `old` read `new` instead (but not `new` itself, if it is computed from `old`)."""
        site, _ = self._where()
        old = self.node(old) if isinstance(old, str) else old
        upstream = _ancestors(new)
        users = [user for user in old.users if user not in upstream]
        for user in users:
            user.replace_input_with(old, new)
        if users:
            self._journal.append(Edit("redirect", site, old.name))

    def set_site(self, facts: AttentionSite) -> None:
        """Put new facts in the place of an attention layer's; `facts.fqn` says which.

        Raises:
            KeyError: if there is no such layer.
        """
        current = self._sites.get(facts.fqn) or self._before.sites[facts.fqn]
        if current == facts:
            return
        self._sites[facts.fqn] = facts
        self._journal.append(Edit("site", facts.fqn, facts.fqn))

    def finish(self) -> Program:
        """Remove unused nodes, check the graph and return the new program. The editor cannot be used after that.

        Raises:
            RuntimeError: if the graph is not well formed, or `finish` was called before.
        """
        if self._finished:
            raise RuntimeError("this editor has finished")
        self._finished = True
        self._graph.eliminate_dead_code()
        self._graph.lint()
        alive = {node.name for node in self._graph.nodes}
        read = {str(node.target) for node in self._graph.nodes if node.op == "get_attr"}
        named = {name for facts in self._sites.values() for name in weight_names(facts)}
        self._journal = [edit for edit in self._journal if self._had_effect(edit, alive, read | named)]
        sites = {fqn: self._sites.get(fqn, facts) for fqn, facts in self._before.sites.items()}
        weights = self._before.weights.with_values(self._weights) if self._weights else self._before.weights
        return self._program.replace(sites=sites, weights=weights)

    def _had_effect(self, edit: Edit, alive: set[str], read: set[str]) -> bool:
        if edit.kind == "insert":
            return edit.what in alive
        if edit.kind == "weight":
            return edit.what in read
        if edit.kind == "site":
            return self._sites[edit.what] != self._before.sites[edit.what]
        return True

    def _where(self) -> tuple[str, fx.Node]:
        if self._finished:
            raise RuntimeError("this editor has finished")
        if self._place is None:
            raise RuntimeError("say to which site the change belongs: with editor.at(site): ...")
        return self._place

    def _mark(self, node: fx.Node, site: str, like: fx.Node) -> None:
        node.meta["attnopt"] = {"pass": self._by, "site": site}
        if "nn_module_stack" in like.meta:
            node.meta["nn_module_stack"] = like.meta["nn_module_stack"]
        self._nodes[node.name] = node
        self._journal.append(Edit("insert", site, node.name))


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen = {node}
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return seen


def _fake_mode(node: fx.Node) -> FakeTensorMode:
    for other in (node, *node.graph.nodes):
        value = other.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode()


def _fake_result(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Fake value of a call, or None if one of its arguments has none."""
    nodes: list[fx.Node] = []
    fx.map_arg((args, dict(kwargs)), nodes.append)
    if any("val" not in node.meta for node in nodes):
        return None
    mode = next((n.meta["val"].fake_mode for n in nodes if isinstance(n.meta["val"], FakeTensor)), FakeTensorMode())
    fake_args, fake_kwargs = fx.map_arg((args, dict(kwargs)), lambda node: node.meta["val"])
    # Without Python's dispatcher torch 2.11 asks composite operators such as linear for a number of elements.
    with mode, enable_python_dispatcher():
        return target(*fake_args, **fake_kwargs)


def weight_names(site: AttentionSite) -> tuple[str, ...]:
    """Names of all weights an attention layer's facts speak of, without repetition."""
    names: list[str | None] = []
    projections = [site.q, site.k, site.v, site.o]
    norms = [site.q_norm, site.k_norm]
    if site.latent is not None:
        latent = site.latent
        projections += [latent.kv_a, latent.kv_b, latent.q, latent.q_a, latent.q_b]
        norms += [latent.kv_a_norm, latent.q_a_norm]
        names.append(latent.q_map)
    for part in (*projections, *norms):
        if part is not None:
            names += [part.weight, part.bias]
    names += [site.mask.sinks, *site.mask.bias]
    if site.route is not None:
        names += [getattr(site.route, field) for field in site.route.WEIGHTS]
    return tuple(dict.fromkeys(name for name in names if name is not None))
