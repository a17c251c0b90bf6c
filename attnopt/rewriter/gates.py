"""Finds the gates of routed heads in a graph (see `RouteSpec`), and checks their formula on numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Literal

import torch
from torch import Tensor, fx

from attnopt.rewriter.probe import Mismatch, Probe
from attnopt.rewriter.program import walk_back
from attnopt.rewriter.projections import linear_map
from attnopt.rewriter.site import RouteSpec

aten = torch.ops.aten

_UNITS: tuple[Literal["head", "kv-group"], ...] = ("head", "kv-group")


@dataclass(frozen=True)
class Gates:
    """Factors on the outputs of heads.

    Attributes:
        result: the heads' outputs times their gates, [B, S, H, dv].
        heads: the gates [B, S, H].
    """

    result: fx.Node
    heads: fx.Node


def find_gates(anchor: fx.Node) -> Gates | None:
    """The gates that the outputs of an attention op are multiplied by, or None if they are used as they are."""
    users = list(anchor.users)
    if len(users) != 1 or users[0].target is not aten.mul.Tensor:
        return None
    other = next((n for n in users[0].all_input_nodes if n is not anchor), None)
    if other is None or other.target is not aten.unsqueeze.default or other.args[1] not in (-1, 3):
        return None
    (gates,) = other.all_input_nodes
    return Gates(users[0], gates) if gates.meta["val"].shape[2:] == anchor.meta["val"].shape[2:3] else None


def idle_part(output: fx.Node, route: RouteSpec | None) -> fx.Node | None:
    """What idle units add to a layer's output, a node among the operands of `output`; None if nothing."""
    if route is None or route.fill is None:
        return None
    return next(n for n in output.all_input_nodes if any(w.target == route.fill for w in n.all_input_nodes))


def read_route(
    gates: Gates, x: fx.Node, q: fx.Node, starts: tuple[fx.Node, ...], kv_of: tuple[int, ...], probe: Probe
) -> tuple[RouteSpec, fx.Node]:
    """What decides on the gates of a layer.

    Args:
        gates: of the layer.
        x: its input [B, S, D].
        q: its queries [B, H, S, d].
        starts: results of the projections that its queries come from.
        kv_of: key/value head that each query head reads.
        probe: of the program.

    Returns:
        the route without what idle units add, and the node that says which units work, [B, S, units] of 0 and 1.

    Raises:
        Mismatch: if the gates are not those of a route.
    """
    return _Reader(gates, x, q, starts, kv_of, probe).read()


def read_fill(output: fx.Node, works: fx.Node, x: fx.Node, probe: Probe) -> tuple[str, fx.Node] | None:
    """What idle units add to the result of the output projection: (name of its weight, the sum), or None.

    Raises:
        Mismatch: if something else is made of which units work.
    """
    sums = [user for user in output.users if user.target is aten.add.Tensor and len(user.all_input_nodes) == 2]
    others = [next(n for n in user.all_input_nodes if n is not output) for user in sums]
    made = [(user, n) for user, n in zip(sums, others, strict=True) if works in walk_back(n, stop=(x,))]
    if not made:
        return None
    (user, added), *_ = made
    weight = added.args[1] if added.target is aten.matmul.default else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or weight.meta["val"].ndim != 2:
        raise Mismatch("what idle heads add is no constant for each", added)
    generator = torch.Generator().manual_seed(0)
    fill = torch.randn(tuple(weight.meta["val"].shape), generator=generator)
    on = torch.randint(0, 2, probe.shape(works, 2, 3), generator=generator).float()
    (found,) = probe.evaluate([added], {works: on}, 2, 3, weight=lambda _: fill)
    if not torch.allclose(found, (1 - on) @ fill, rtol=1e-4, atol=1e-4):
        raise Mismatch("what idle heads add is no constant for each", added)
    return str(weight.target), user


def route_gates(
    route: RouteSpec, units: tuple[tuple[int, ...], ...], heads: int, given: Mapping[str, Tensor]
) -> Tensor:
    """The formula that a RouteSpec stands for; see there.

    Args:
        route: the route.
        units: heads of each unit, see `AttentionSite.routed_units`.
        heads: number of heads.
        given: "scores" [..., units]; where the route has them, "share" [..., |shared|] and "balance" [..., 2] before
            their softmax.

    Returns:
        gates [..., heads].
    """
    scores = given["scores"]
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    works = torch.zeros_like(scores).scatter(-1, order[..., : route.active], 1.0)
    always = scores.new_ones(*scores.shape[:-1], len(route.shared))
    if route.gate == "weighted":
        p = scores.softmax(-1) * works
        works = route.active * p / p.sum(-1, keepdim=True)
        if route.shared_weight is not None:
            always = len(route.shared) * given["share"].softmax(-1)
        if route.balance is not None:
            two = 2 * given["balance"].softmax(-1)
            always, works = always * two[..., :1], works * two[..., 1:]
    gates = scores.new_empty(*scores.shape[:-1], heads)
    gates[..., list(route.shared)] = always
    for u, unit in enumerate(units):
        gates[..., list(unit)] = works[..., u : u + 1]
    return gates


class _Reader:
    def __init__(
        self, gates: Gates, x: fx.Node, q: fx.Node, starts: tuple[fx.Node, ...], kv_of: tuple[int, ...], probe: Probe
    ) -> None:
        self.gates, self.x, self.q, self.starts, self.kv_of, self.probe = gates, x, q, starts, kv_of, probe
        self.heads = len(kv_of)
        self.scores, self.works = self._choice()
        self.linear = linear_map(self.scores)

    def read(self) -> tuple[RouteSpec, fx.Node]:
        active, shared, units = self._units()
        weighted = self.scores in walk_back(self.gates.heads, stop=(self.works, self.x))
        route = RouteSpec("qnorm", shared, active, gate="weighted" if weighted else "binary")
        if self.linear is not None and self.linear.x is self.x:
            route = replace(route, router="linear", weight=self.linear.weight, bias=self.linear.bias)
        candidates = [route] if not weighted else self._weighted(route)
        for candidate in candidates:
            if self._holds(candidate, units):
                return replace(candidate, unit=self._unit(units, shared)), self.works
        raise Mismatch("gates of heads are not those of a known mixture of heads", self.gates.heads)

    def _choice(self) -> tuple[fx.Node, fx.Node]:
        """(scores [B, S, units], which units work)."""
        inside = list(walk_back(self.gates.heads, stop=(self.x, *self.starts)))
        sorts = [n for n in inside if n.target is aten.sort.stable]
        marks = [n for n in inside if n.target is aten.scatter.value]
        if len(sorts) != 1 or len(marks) != 1:
            raise Mismatch("heads are multiplied by something that is no choice among them", self.gates.heads)
        scores = sorts[0].args[0]
        assert isinstance(scores, fx.Node)
        return scores, marks[0]

    def _units(self) -> tuple[int, tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """(units that work on a token, heads that always work, heads of each unit), by switching units one by one."""
        count = int(self.scores.meta["val"].shape[2])
        random = torch.randn(1, 3, count, generator=torch.Generator().manual_seed(0))
        (works,) = self.probe.evaluate([self.works], {self.scores: random}, 1, 3)
        # Units work one by one, and in the last row none does; weighted gates divide by zero then.
        one = torch.cat([torch.eye(count), torch.zeros(1, count)])[None]
        x = torch.zeros(1, count + 1, int(self.x.meta["val"].shape[-1]))
        given = {self.scores: torch.zeros_like(one), self.works: one, self.x: x}
        (found,) = self.probe.evaluate([self.gates.heads], given, 1, count + 1, weight=self._zeros)
        on = found[0] > 0
        shared = tuple(h for h in range(self.heads) if on[count, h])
        units = tuple(tuple(h for h in range(self.heads) if on[u, h] and h not in shared) for u in range(count))
        return int(works[0, 0].sum()), shared, units

    def _zeros(self, name: str) -> Tensor:
        return torch.zeros(self.probe.program.weights.meta(name).shape)

    def _unit(self, units: tuple[tuple[int, ...], ...], shared: tuple[int, ...]) -> Literal["head", "kv-group"]:
        rest = [h for h in range(self.heads) if h not in shared]
        groups = [tuple(h for h in rest if self.kv_of[h] == g) for g in sorted({self.kv_of[h] for h in rest})]
        for kind, wanted in zip(_UNITS, ([(h,) for h in rest], groups), strict=True):
            if list(units) == wanted:
                return kind
        raise Mismatch("heads that are switched together are no key/value groups", self.gates.heads)

    def _weighted(self, route: RouteSpec) -> list[RouteSpec]:
        """Ways in which weighted gates can use the linear maps of x that they read."""
        inside = walk_back(self.gates.heads, stop=(self.x, self.works, self.scores))
        maps = [m for m in map(linear_map, inside) if m is not None and m.x is self.x]
        ways = []
        for order in permutations([*maps, *[None] * (2 - len(maps))], 2):
            share, balance = (m.weight if m else None for m in order)
            ways.append(replace(route, shared_weight=share, balance=balance))
        return ways

    def _holds(self, route: RouteSpec, units: tuple[tuple[int, ...], ...]) -> bool:
        """Whether the gates are those of the route, on random numbers."""
        generator = torch.Generator().manual_seed(1)
        made: dict[str, Tensor] = {}

        def weight(name: str) -> Tensor:
            if name not in made:
                made[name] = torch.randn(self.probe.program.weights.meta(name).shape, generator=generator)
            return made[name]

        given = {n: torch.randn(self.probe.shape(n, 2, 5), generator=generator) for n in (self.x, *self.starts)}
        found, q = self.probe.evaluate([self.gates.heads, self.q], given, 2, 5, weight=weight)
        x = given[self.x]
        if route.router == "linear":
            bias = None if route.bias is None else weight(route.bias)
            scores = torch.nn.functional.linear(x, weight(str(route.weight)), bias)
        else:
            norms = (q * q).sum(-1).transpose(1, 2)
            scores = torch.stack([norms[..., list(unit)].sum(-1) for unit in units], -1)
        values = {"scores": scores}
        for name, stored in (("share", route.shared_weight), ("balance", route.balance)):
            if stored is not None:
                matrix = weight(stored)
                if len(matrix) != (len(route.shared) if name == "share" else 2):
                    return False
                values[name] = torch.nn.functional.linear(x, matrix)
        expected = route_gates(route, units, self.heads, values)
        return torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
