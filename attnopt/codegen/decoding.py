"""Gives a captured graph its cache: one graph that reads a prompt and that goes on token by token.

A Program is captured without a cache. Here every attention layer gets the tensors that its `CacheSpec` names as
inputs and outputs: buffers with room for C slots, of which row b has filled `past_length[b]`. New rows are written at
slots past_length[b] ... past_length[b] + S - 1; token i of row b has position past_length[b] + i and sees the slots up
to its own. So slot index is position, rows of a batch may differ in length, and what lies behind a row's end is never
seen: it only has to be finite.

    latent sites    latent.N           [B, C, r + d_rope]       one tensor, never keys and values
    other sites     N.key, N.value     [B, kv heads, C, width]
    shared maps     N.value            the map, and so the keys, are the owner's
    shared keys and values             nothing: the layer they come from keeps them

How attention is computed from these is the lane's business (`Lane`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from attnopt.errors import UnsupportedError
from attnopt.rewriter.normalize import ATTENTION
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite

aten = torch.ops.aten
LATENT = torch.ops.attnopt.latent_attention.default
SHARED = torch.ops.attnopt.shared_attention.default
ROUTED = torch.ops.attnopt.routed_attention.default
ANCHORS = (ATTENTION, LATENT, SHARED, ROUTED)

_NAMES: Mapping[Any, tuple[str, ...]] = {
    ATTENTION: ("q", "k", "v", "bias", "q_pos", "scale", "causal", "window", "softcap", "sinks", "layer"),
    SHARED: ("q", "k", "v", "bias", "q_pos", "scale", "causal", "window", "softcap", "sinks", "owner", "layer"),
    ROUTED: ("q", "k", "v", "gates", "bias", "q_pos", "scale", "causal", "window", "softcap", "sinks", "layer"),
    LATENT: (
        *("q_nope", "q_rope", "latent", "k_rope", "w_uk", "w_uv"),
        *("q_pos", "scale", "causal", "window", "softcap", "layer"),
    ),
}  # fmt: skip


@torch.library.custom_op("attnopt::cache_write", mutates_args=())
def cache_write(past: Tensor, new: Tensor, past_length: Tensor) -> Tensor:
    """A cache with new rows in it (ONNX TensorScatter): row i of `new` goes to slot past_length[b] + i.

    Args:
        past: [B, C, w] or [B, G, C, w].
        new: the same with S slots; past_length[b] + S <= C.
        past_length: int64 [B].

    Returns:
        the cache, of the shape of `past`.
    """
    present = past.clone()
    for b, start in enumerate(past_length.tolist()):
        present[b].narrow(-2, start, new.shape[-2]).copy_(new[b])
    return present


@cache_write.register_fake
def _(past: Tensor, new: Tensor, past_length: Tensor) -> Tensor:
    return torch.empty_like(past)


def token_positions(input_ids: Tensor, past_length: Tensor) -> Tensor:
    """Position of every token, int64 [B, S]."""
    return past_length[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)[None, :]


def hidden_slots(positions: Tensor, cache: Tensor, window: int) -> Tensor:
    """What is added to scores: 0 where a slot is seen, a very negative number elsewhere; [B, 1, S, C].

    Args:
        positions: see `token_positions`.
        cache: any cached tensor, for its number of slots.
        window: how many slots up to its own a token sees; 0 for all.
    """
    slots = torch.arange(cache.shape[-2], device=positions.device)
    i = positions[:, None, :, None]
    hidden = slots > i
    if window > 0:
        hidden = torch.logical_or(hidden, slots <= i - window)
    return torch.where(hidden, -1e9, 0.0)


@dataclass(frozen=True)
class CacheTensor:
    """One cached tensor of a site.

    Attributes:
        site: fqn.
        entry: "key", "value" or "latent".
        past, present: names of input and output.
        heads: key/value heads; 0 if the tensor has no such axis.
        width: numbers per slot (and head).
    """

    site: str
    entry: str
    past: str
    present: str
    heads: int
    width: int

    def shape(self, batch: int, capacity: int) -> tuple[int, ...]:
        """Shape of a buffer."""
        return (batch, self.heads, capacity, self.width) if self.heads else (batch, capacity, self.width)

    @property
    def numbers_per_token(self) -> int:
        """Numbers kept per token."""
        return max(self.heads, 1) * self.width


@dataclass(frozen=True)
class Decoding:
    """A graph with its cache.

    Attributes:
        graph: as in `Program.graph`; placeholders are `inputs`, the output is (first output, *presents).
        inputs, outputs: names. For decoders the inputs are input_ids, past_length and the pasts. A placeholder has
            the name with dots replaced by underscores.
        cache: cached tensors, in the order of inputs and outputs; empty for encoders.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cache: tuple[CacheTensor, ...]


@dataclass(frozen=True)
class SiteCall:
    """One attention call to be lowered.

    Attributes:
        site: its facts.
        op: the dialect op.
        args: its arguments by name: nodes and plain values.
        cache: nodes of the present tensors by entry ("key", "value", "latent"); empty for encoders.
        past_length, positions: nodes; None for encoders.
        mask: additive mask [B, 1, S, C], a node, or None for encoders. Dead if the lane does not read it.
        owner: what the lane kept of the owner of a shared map.
    """

    site: AttentionSite
    op: Any
    args: Mapping[str, Any]
    cache: Mapping[str, fx.Node]
    past_length: fx.Node | None
    positions: fx.Node | None
    mask: fx.Node | None
    owner: Any = None


class Lane(Protocol):
    """How one kind of output computes attention. Both methods insert nodes at the graph's insertion point."""

    def attention(self, graph: fx.Graph, call: SiteCall) -> tuple[fx.Node, Any]:
        """Nodes that compute [B, S, H, d_v], and what a layer that shares this map will need."""
        ...

    def rope(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """Node that computes `attnopt::rope`; may be `node` itself."""
        ...


def decoding_graph(program: Program, lane: Lane) -> Decoding:
    """Lower the attention of a program, with a cache if it is a decoder.

    Args:
        program: in latent form (see `absorb.to_latent_form`); not modified.
        lane: how to compute attention.

    Raises:
        UnsupportedError: the program cannot be given a cache.
    """
    return _Builder(program, lane).build()


class _Builder:
    def __init__(self, program: Program, lane: Lane) -> None:
        self.program = program
        self.lane = lane
        self.graph = program.clone().graph
        self.decoder = any(site.mask.causal for site in program.site_list)
        self.sites = {site.nodes.attention: site for site in program.site_list}
        self.cache: list[CacheTensor] = []
        self.presents: list[fx.Node] = []
        self.masks: dict[int, fx.Node] = {}
        self.written: dict[tuple[fx.Node, ...], fx.Node] = {}
        self.kept: dict[int, tuple[Any, dict[str, fx.Node]]] = {}
        self.past_length: fx.Node | None = None
        self.positions: fx.Node | None = None

    def build(self) -> Decoding:
        if self.decoder:
            self._inputs()
        for node in list(self.graph.nodes):
            if node.target in ANCHORS:
                self._anchor(node)
            elif node.target is torch.ops.attnopt.rope.default:
                with self.graph.inserting_before(node):
                    new = self.lane.rope(self.graph, node)
                if new is not node:
                    new.meta = dict(node.meta)
                    node.replace_all_uses_with(new)
        outputs = self._output()
        self.graph.eliminate_dead_code()
        spelled = {tensor.past.replace(".", "_"): tensor.past for tensor in self.cache}
        names = [str(node.target) for node in self.graph.nodes if node.op == "placeholder"]
        self.graph.lint()
        return Decoding(self.graph, tuple(spelled.get(n, n) for n in names), outputs, tuple(self.cache))

    def _inputs(self) -> None:
        if not all(site.mask.causal for site in self.program.site_list):
            raise UnsupportedError("some attention layers are causal and some are not: there is no decoding step")
        if set(self.program.inputs) != {"input_ids", "position_ids"}:
            raise UnsupportedError(
                f"a decoder with inputs {', '.join(self.program.inputs)} cannot be given a cache",
                "attnopt gives a cache to models that read input_ids and position_ids",
            )
        ids = next(n for n in self.graph.nodes if n.op == "placeholder" and n.target == "input_ids")
        old = next(n for n in self.graph.nodes if n.op == "placeholder" and n.target == "position_ids")
        for node in reversed([n for n in self.graph.nodes if n.op == "placeholder"]):
            next(iter(self.graph.nodes)).prepend(node)
        with self.graph.inserting_after(ids):
            self.past_length = self.graph.placeholder("past_length")
        with self.graph.inserting_after(old):
            self.positions = self.graph.call_function(token_positions, (ids, self.past_length))
        old.replace_all_uses_with(self.positions)
        self.graph.erase_node(old)

    def _past(self, tensor: CacheTensor) -> fx.Node:
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(tensor.past.replace(".", "_"))
        self.cache.append(tensor)
        return node

    def _anchor(self, node: fx.Node) -> None:
        site = self.sites[node.name]
        args: dict[str, Any] = dict(zip(_NAMES[node.target], node.args, strict=True))
        cached: dict[str, fx.Node] = {}
        mask, owner = None, None
        before = set(self.graph.nodes)
        with self.graph.inserting_before(node):
            if self.decoder:
                cached = self._cached(site, node.target, args)
            if node.target is SHARED:
                owner, of_owner = self.kept[args["owner"]]
                cached = {**of_owner, **cached}
            if self.decoder:
                mask = self._mask(args["window"])
            call = SiteCall(site, node.target, args, cached, self.past_length, self.positions, mask, owner)
            new, kept = self.lane.attention(self.graph, call)
        self.kept[args["layer"]] = kept, {k: v for k, v in cached.items() if k != "value"}
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        shared = {self.positions, *self.masks.values()}
        for made in set(self.graph.nodes) - before - shared:  # whoever reads the result sees which site they are of
            made.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack", {}))

    def _cached(self, site: AttentionSite, op: Any, args: Mapping[str, Any]) -> dict[str, fx.Node]:
        n, call = site.layer, self.graph.call_function
        if op is LATENT:
            assert site.latent is not None
            width = site.latent.kv_lora_rank + site.latent.d_rope
            tensor = CacheTensor(site.fqn, "latent", f"past_latent.{n}", f"present_latent.{n}", 0, width)
            parts = args["latent"], args["k_rope"]
            if parts not in self.written:
                self.written[parts] = self._write(call(torch.cat, (list(parts), -1)), tensor)
            return {"latent": self.written[parts]}
        result = {}
        for name in ("value",) if op is SHARED else ("key", "value"):
            read = args[name[0]]
            rows = _evenly(read)
            heads, width = (int(size) for size in rows.meta["val"].shape[1::2])
            if (rows,) not in self.written:  # otherwise an earlier layer keeps them already
                tensor = CacheTensor(site.fqn, name, f"past_key_values.{n}.{name}", f"present.{n}.{name}", heads, width)
                self.written[(rows,)] = self._write(rows, tensor)
            result[name] = self._spread(read, rows, self.written[(rows,)])
        return result

    def _write(self, rows: fx.Node, tensor: CacheTensor) -> fx.Node:
        past = self._past(tensor)
        present = self.graph.call_function(torch.ops.attnopt.cache_write.default, (past, rows, self.past_length))
        self.presents.append(present)
        return present

    def _spread(self, read: fx.Node, rows: fx.Node, present: fx.Node) -> fx.Node:
        """What attention reads, made from a cached tensor as `read` is made from its new rows."""
        if read is rows:
            return present
        parts = [self.graph.node_copy(part, lambda n: present if n is rows else n) for part in read.args[0]]  # type: ignore[union-attr, arg-type]
        return self.graph.call_function(aten.cat.default, (parts, 1))

    def _mask(self, window: int) -> fx.Node:
        if window not in self.masks:
            # From a past tensor, not a present one: the mask is then ready before the first layer.
            some = self.presents[0].args[0]
            self.masks[window] = self.graph.call_function(hidden_slots, (self.positions, some, window))
        return self.masks[window]

    def _output(self) -> tuple[str, ...]:
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        values, names = list(output.args[0]), list(self.program.outputs)
        if self.decoder:
            values, names = values[:1], names[:1]
        output.args = ((*values, *self.presents),)
        return (*names, *(tensor.present for tensor in self.cache))


def _evenly(read: fx.Node) -> fx.Node:
    """Keys or values as they are stored. A layer whose query heads do not divide evenly among them reads a
    concatenation of single heads; what is cached is the tensor these were taken from."""
    parts = read.args[0] if read.target is aten.cat.default and read.args[1:] == (1,) else ()
    if not isinstance(parts, (list, tuple)) or not parts:
        return read
    sources = {part.args[0] for part in parts if isinstance(part, fx.Node) and part.target is aten.slice.Tensor}
    heads = all(isinstance(part, fx.Node) and part.args[1] == 1 for part in parts)
    source = next(iter(sources)) if len(sources) == 1 and heads else None
    return source if isinstance(source, fx.Node) else read
