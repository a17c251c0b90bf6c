"""An attention layer's call in one form, whatever op computes it, and its map in blocks of rows.

Maps are recomputed from queries and keys, block by block, and never stored: memory grows with the length of a prompt,
not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.errors import UnsupportedError
from attnopt.rewriter import ops as _registered  # noqa: F401 - the ops below exist once it is imported
from attnopt.rewriter.gates import find_gates
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite

_ops = torch.ops.attnopt
_PLAIN = ("q", "k", "v", "bias", "q_pos", "scale", "causal", "window", "softcap", "sinks")
_ARGUMENTS: Mapping[Any, tuple[str, ...]] = {
    _ops.attention.default: _PLAIN,
    _ops.shared_attention.default: _PLAIN,
    _ops.routed_attention.default: ("q", "k", "v", "gates", *_PLAIN[3:]),
    _ops.latent_attention.default: (
        "q_nope", "q_rope", "latent", "k_rope", "w_uk", "w_uv", "q_pos", "scale", "causal", "window", "softcap",
    ),
}  # fmt: skip

#: Rows of a block are a multiple of this, so that 64 x 64 tiles of the map lie within one block.
TILE = 64

#: Entries of the map that are in memory at once, about; blocks of this size stay in the processor's cache.
ENTRIES = 1 << 20


def call_arguments(program: Program, site: AttentionSite) -> dict[str, Any]:
    """Arguments of a site's attention by name: graph nodes, or plain values; gates of its heads behind it, too.

    Raises:
        UnsupportedError: if the layer is computed by another op.
    """
    node = program.node(site.nodes.attention)
    names = _ARGUMENTS.get(node.target)
    if names is None:
        raise UnsupportedError(f"{site.fqn} is computed by {node.target}, which cannot be profiled")
    arguments = dict(zip(names, node.args, strict=False))
    behind = find_gates(node)
    return arguments if behind is None else {**arguments, "gates": behind.heads}


def heads_outputs(program: Program, site: AttentionSite) -> str:
    """Name of the node that holds the outputs of a layer's heads as the output projection reads them, [N, T, H, dv]."""
    behind = find_gates(program.node(site.nodes.attention))
    return site.nodes.attention if behind is None else behind.result.name


def argument_nodes(arguments: Mapping[str, Any]) -> list[str]:
    """Names of the graph nodes among a call's arguments."""
    return [value.name for value in arguments.values() if isinstance(value, fx.Node)]


@dataclass(frozen=True)
class AttentionCall:
    """One attention call on one prompt. N is 1, or the number of windows of a windowed image model.

    Attributes:
        q: [N, H, T, d].
        k, v: [N, K, T, d] and [N, K, T, dv], K key/value heads.
        bias: additive, broadcastable to [N, H, T, T], or None.
        scale, causal, window, softcap: as in `attnopt::attention`; 0 for none.
        sinks: [H] logits of a virtual key without value, or None.
        gates: [N, T, H] factors on the heads' outputs, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    scale: float
    causal: bool
    window: int
    softcap: float
    sinks: Tensor | None
    gates: Tensor | None = None

    @classmethod
    def read(cls, arguments: Mapping[str, Any], values: Mapping[str, Any]) -> AttentionCall:
        """From a call's arguments and the values of its nodes. Latent attention is expanded to keys per head."""

        def value(name: str) -> Any:
            given = arguments.get(name)
            return values[given.name] if isinstance(given, fx.Node) else given

        if "latent" in arguments:
            latent, k_rope = value("latent"), value("k_rope")
            k_nope = latent[:, None] @ value("w_uk").mT
            rope = k_rope[:, None].expand(-1, k_nope.shape[1], -1, -1)
            q = torch.cat([value("q_nope"), value("q_rope")], -1)
            k, v = torch.cat([k_nope, rope], -1), latent[:, None] @ value("w_uv").mT
        else:
            q, k, v = value("q"), value("k"), value("v")
        return cls(
            q=q,
            k=k,
            v=v,
            bias=value("bias"),
            scale=float(value("scale")),
            causal=bool(value("causal")),
            window=int(value("window")),
            softcap=float(value("softcap")),
            sinks=value("sinks"),
            gates=value("gates"),
        )

    @property
    def heads(self) -> int:
        """H."""
        return self.q.shape[1]

    @property
    def groups(self) -> int:
        """K."""
        return self.k.shape[1]

    @property
    def length(self) -> int:
        """T."""
        return self.k.shape[2]

    def per_head(self, grouped: Tensor) -> Tensor:
        """Keys or values of each query head, [N, H, T, ...]."""
        return grouped.repeat_interleave(self.heads // self.groups, dim=1)

    def with_keys(self, k: Tensor, v: Tensor) -> AttentionCall:
        """The same queries on other keys and values."""
        return replace(self, k=k, v=v)

    def rows(self, queries: Tensor | slice, keys: int | None = None, windows: Tensor | None = None) -> Tensor:
        """Rows of the attention map, [N, H, R, keys], in the type of the logits.

        Args:
            queries: which, as positions.
            keys: only this many keys from the front (those after the last query of a causal layer have no weight).
            windows: which of the N; None for all.
        """
        keys = keys or self.length
        pick = slice(None) if windows is None else windows
        q, k = self.q[pick][:, :, queries], self.k[pick][:, :, :keys]
        n, count = q.shape[0], q.shape[2]
        grouped = q.reshape(n, self.groups, -1, q.shape[-1])
        logits = torch.matmul(grouped * self.scale, k.mT).view(n, self.heads, count, keys)
        if self.softcap > 0:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.bias is not None:
            bias = self.bias if self.bias.shape[0] == 1 else self.bias[pick]
            logits = logits + (bias if bias.shape[2] == 1 else bias[:, :, queries])[..., :keys]
        if self.causal or self.window:
            self._hide(logits, queries, keys)
        if self.sinks is None:
            return torch.softmax(logits, -1)
        sink = self.sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        return torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]

    def _hide(self, logits: Tensor, queries: Tensor | slice, keys: int) -> None:
        at = torch.arange(self.length, device=logits.device)[queries]
        # Only the columns from the first query on can be in its future, unless there is a window.
        start = 0 if self.window else int(at.min()) if self.causal else keys
        apart = at[:, None] - torch.arange(start, keys, device=logits.device)
        hidden = torch.zeros_like(apart, dtype=torch.bool)
        if self.causal:
            hidden |= apart < 0
        if self.window:
            hidden |= apart >= self.window
        # Adding is many times faster than masked_fill with a broadcast mask.
        logits[..., start:keys] += torch.where(hidden, -torch.inf, 0.0).to(logits.dtype)

    def block_rows(self) -> int:
        """Rows of a block: a multiple of `TILE`, so that about `ENTRIES` entries are in memory at once."""
        per_row = self.q.shape[0] * self.heads * self.length
        return TILE * max(1, min(8, ENTRIES // (per_row * TILE)))

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, map rows [N, H, R, keys]) over all rows; future keys of causal layers are left out."""
        step = self.block_rows()
        for first in range(0, self.length, step):
            last = min(first + step, self.length)
            yield first, self.rows(slice(first, last), last if self.causal else self.length)
