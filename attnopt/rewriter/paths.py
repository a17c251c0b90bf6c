"""The way from a projection to an operand of attention: choice of channels, norm, rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from attnopt.rewriter.norms import NormMatch, find_norm
from attnopt.rewriter.ops.rope import rope_reference
from attnopt.rewriter.probe import Mismatch, Probe
from attnopt.rewriter.program import walk_back
from attnopt.rewriter.projections import LinearMap

# Positions at which a rotary embedding is measured: powers of two resolve frequencies from 1 down to 1e-6.
_POSITIONS = (0, *(2**k for k in range(18)))


@dataclass(frozen=True)
class Path:
    """One projection on its way to one operand of attention.

    Attributes:
        probe: how to evaluate it.
        source: the projection.
        arg: the operand, [B, N, S, d].
        norm: the normalisation on the way, or None.
        zero: results of other projections that reach `arg` too; held at 0.
    """

    probe: Probe
    source: LinearMap
    arg: fx.Node
    norm: NormMatch | None
    zero: tuple[fx.Node, ...] = ()

    @classmethod
    def trace(cls, probe: Probe, source: LinearMap, arg: fx.Node, zero: Iterable[LinearMap] = ()) -> Path:
        """Find the norm between `source` and `arg`, if there is one.

        Raises:
            Mismatch: if the norm is not understood.
        """
        norm = find_norm(source.node, arg, probe, int(arg.meta["val"].shape[1]))
        return cls(probe, source, arg, norm, tuple(m.node for m in zero))

    def feed(self, value: Tensor, batch: int, length: int, positions: Tensor | None = None) -> Tensor:
        """What `arg` is for inputs of this size when the projection's result is `value` and the norm is passed by."""
        shape = self.probe.shape(self.source.node, batch, length)
        given = {self.source.node: value.reshape(shape)}
        for node in self.zero:
            given[node] = torch.zeros(self.probe.shape(node, batch, length))
        if self.norm is not None:
            (inner,) = self.probe.evaluate([self.norm.x], given, batch, length)
            given = {**given, self.norm.y: inner}
        return self.probe.evaluate([self.arg], given, batch, length, positions)[0]


@dataclass(frozen=True)
class Choice:
    """Which channels of a projection make up each head at position 0.

    Attributes:
        rows: per head, the channel behind each dim; -1 where a dim does not come from this projection.
        factor: [N, d], what it is multiplied by.
        of: which of these heads each head of the operand is; empty if each is one of its own.
    """

    rows: list[list[int]]
    factor: Tensor
    of: tuple[int, ...] = ()

    def in_order(self) -> list[list[int]]:
        """Channels of each head, ascending, absent ones left out."""
        return [sorted(r for r in head if r >= 0) for head in self.rows]

    def permutation(self) -> list[int]:
        """Place of each present dim of head 0 in that ascending order."""
        return [place for place in _places(self.rows[0]) if place >= 0]


def _places(head: list[int]) -> list[int]:
    """For each dim, the rank of its channel among the head's channels; -1 where it has none."""
    order = {row: place for place, row in enumerate(sorted(row for row in head if row >= 0))}
    return [order.get(row, -1) for row in head]


def read_choice(path: Path, spread: bool = False) -> Choice:
    """Measure which channel every dim of every head comes from.

    Args:
        path: from the projection to the operand.
        spread: whether heads may stand there several times, not equally often: key/value heads that serve different
            numbers of query heads.

    Raises:
        Mismatch: if a dim is not one channel times a factor, or heads are laid out differently from one another.
    """
    # Rows are tokens, whatever the result's own shape: split into heads, or windows in the place of sequences.
    channels = path.source.out_features
    shape = (math.prod(path.probe.shape(path.source.node, 2, 3)) // channels, channels)
    index = torch.arange(channels, dtype=torch.float32).expand(shape)
    factors = path.feed(torch.ones(shape), 2, 3)
    found = path.feed(index + 1.0, 2, 3)
    same = bool((factors == factors[:1, :, :1]).all() and (found == found[:1, :, :1]).all())
    if not same:
        raise Mismatch("a head's vector depends on the other tokens", path.arg)
    factor, value = factors[0, :, 0], found[0, :, 0]
    rows = torch.where(factor == 0, torch.zeros_like(value), value / torch.where(factor == 0, 1.0, factor)) - 1.0
    if bool(((rows - rows.round()).abs() > 1e-2).any()):
        raise Mismatch("a head's vector is not a choice of projection channels", path.arg)
    choice = Choice([[int(r) for r in head] for head in rows.round().tolist()], factor)
    if spread:
        choice = _distinct(choice)
    flat = [row for head in choice.in_order() for row in head]
    if len(set(flat)) != len(flat) or max(flat, default=-1) >= shape[-1]:
        raise Mismatch("heads share channels of a projection", path.arg)
    if len({tuple(_places(head)) for head in choice.rows}) > 1:
        raise Mismatch("heads are laid out differently from one another", path.arg)
    return choice


def _distinct(choice: Choice) -> Choice:
    """The choice without repeated heads; as it is if none is repeated, or all of them equally often."""
    seen = [tuple(head) for head in choice.rows]
    once = list(dict.fromkeys(seen))
    of = tuple(once.index(head) for head in seen)
    if len(seen) % len(once) == 0 and of == tuple(h * len(once) // len(seen) for h in range(len(seen))):
        return choice
    return Choice([list(head) for head in once], choice.factor[[of.index(g) for g in range(len(once))]], of)


@dataclass(frozen=True)
class Rotation:
    """A measured rotary embedding; `offset` counts from the head's first present dim. Fields as in RopeSpec."""

    inv_freq: tuple[float, ...]
    style: Literal["half", "interleaved"]
    offset: int
    attention_scaling: float


def read_rotation(path: Path, choice: Choice) -> Rotation | None:
    """Measure how positions turn the head's dims, or None if they do not.

    The dims are taken in the order of the projection's channels, so that a model which also reorders them
    (DeepSeek-V3 writes interleaved pairs out as halves) is described by how it pairs channels.

    Raises:
        Mismatch: if positions act, but not as a rotary embedding.
    """
    if not any(n.op == "placeholder" and n.target == "position_ids" for n in walk_back(path.arg)):
        return None
    maps = _turns(path, choice)
    d = maps.shape[1]
    eye = torch.eye(d)
    if torch.equal(maps, eye.expand_as(maps)):
        return None
    moved = [i for i in range(d) if not torch.equal(maps[:, i], eye[i].expand(len(_POSITIONS), -1))]
    offset, width = moved[0], len(moved)
    if moved != list(range(offset, offset + width)) or width % 2:
        raise Mismatch(f"positions change dims {_short(moved)} of a head, which is no block of pairs", path.arg)
    n = width // 2
    pairings: dict[Literal["half", "interleaved"], list[tuple[int, int]]] = {
        "half": [(offset + m, offset + m + n) for m in range(n)],
        "interleaved": [(offset + 2 * m, offset + 2 * m + 1) for m in range(n)],
    }
    for style, pairs in pairings.items():
        first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))
        angle = torch.atan2(maps[:, first, second], maps[:, first, first])
        rotation = Rotation(tuple(_stored_table(path, _unwrap(angle))), style, offset, 1.0)
        if _agrees(maps, rotation):
            return rotation
    raise Mismatch("positions change a head's vector, but not by turning pairs of dims", path.arg)


def _turns(path: Path, choice: Choice) -> Tensor:
    """[P, d, d]: row i is the image of dim i of head 0 at each position, in channel order, factors divided out."""
    ordered = choice.in_order()[0]
    d = len(ordered)
    value = torch.zeros(d, len(_POSITIONS), path.source.out_features)
    value[torch.arange(d), :, torch.tensor(ordered)] = 1.0
    out = path.feed(value, d, len(_POSITIONS), torch.tensor(_POSITIONS).expand(d, -1))[:, 0]
    present = [i for i, row in enumerate(choice.rows[0]) if row >= 0]
    out = out[..., present] / choice.factor[0, present]
    images = torch.empty_like(out)
    images[..., torch.tensor(choice.permutation())] = out
    return images.transpose(0, 1)


def _stored_table(path: Path, measured: list[float]) -> list[float]:
    """The stored table of frequencies behind the operand that was measured, exactly as the model holds it.

    Falls back to the measured values where the model computes its frequencies.
    """
    weights = path.probe.program.weights
    given = {path.source.node, *path.zero} | ({path.norm.y} if path.norm else set())
    for node in walk_back(path.arg, stop=given):
        if node.op == "get_attr" and node.meta.get("buffer"):
            meta = weights.meta(str(node.target))
            if meta.shape == (len(measured),) and meta.dtype.is_floating_point:
                table = weights.get(str(node.target)).double()
                if torch.allclose(table, torch.tensor(measured, dtype=table.dtype), rtol=1e-3, atol=0):
                    return table.tolist()
    return measured


def _unwrap(angle: Tensor) -> list[float]:
    """Frequencies from angles (mod 2 pi) at positions 0, 1, 2, 4, ...: each doubling halves the error."""
    angles = angle.double()
    freq = angles[1]
    for k in range(2, len(_POSITIONS)):
        p = _POSITIONS[k]
        turns = torch.round((p * freq - angles[k]) / (2 * torch.pi))
        freq = (angles[k] + 2 * torch.pi * turns) / p
    return freq.tolist()


def _agrees(maps: Tensor, rotation: Rotation) -> bool:
    d = maps.shape[1]
    x = torch.eye(d)[:, None, None, :].expand(d, 1, len(_POSITIONS), d)
    table = torch.tensor(rotation.inv_freq)
    turned = rope_reference(x, torch.tensor(_POSITIONS)[None], table, rotation.style, rotation.offset, 1.0)
    # An angle of 2^17 radians is known to 2^-7 in float32, whichever way it was computed.
    near = torch.tensor(_POSITIONS) <= 4096
    difference = (turned[:, 0].transpose(0, 1) - maps).abs()
    return bool(difference[near].max() < 2e-3 and difference.max() < 0.1)


def _short(dims: list[int]) -> str:
    return f"{dims[:4]}{'...' if len(dims) > 4 else ''}"
