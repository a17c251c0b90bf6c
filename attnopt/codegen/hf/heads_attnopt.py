"""Attention of the `attnopt` model class with any heads: pruned, sharing an earlier layer's map or cache, or routed.

Self-contained on purpose: this file is copied into every emitted directory and imports nothing of attnopt. Sharing of
maps is EchoAtt's (arXiv 2409.14595), of keys and values KVSharer's (2410.18517); routing is that of Mixture-of-Head
attention (2410.11842) with binary gates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: Under this name a model hands every layer one dict per forward pass, in which layers leave what others read.
SHARED = "attnopt_shared"


class HeadNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32 (Qwen3's q_norm and k_norm)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class HeadRouter(nn.Module):
    """Chooses the heads that work on a token: shared ones always, of the other units the `active` highest scored.

    Args:
        width: hidden size.
        heads: number of heads.
        spec: router ("linear" or "qnorm"), units (heads of each routed unit), active, gate ("binary" or "weighted"),
            bias and fill (whether the router has a bias, and idle units add a constant).

    Attributes:
        load: of the last call with weighted gates: units * sum_u mean(p_u) mean(m_u), with p the softmax of the scores
            and m which units work; `active` if tokens are spread evenly. None before, and with binary gates.
    """

    def __init__(self, width: int, heads: int, spec: dict[str, Any]) -> None:
        super().__init__()
        self.units, self.active = [list(unit) for unit in spec["units"]], spec["active"]
        routed = {head for unit in self.units for head in unit}
        shared = [head for head in range(heads) if head not in routed]
        self.weighted = spec["gate"] == "weighted"
        several = self.weighted and len(shared) > 1
        self.common = len(shared) if several else 1
        place = {head: i if several else 0 for i, head in enumerate(shared)}
        place |= {head: self.common + u for u, unit in enumerate(self.units) for head in unit}
        self.place = [place[head] for head in range(heads)]
        self.share = nn.Linear(width, len(shared), bias=False) if several else None
        self.balance = nn.Linear(width, 2, bias=False) if self.weighted and shared else None
        self.load: torch.Tensor | None = None
        linear = spec["router"] == "linear"
        self.score = nn.Linear(width, len(self.units), bias=spec["bias"]) if linear else None
        self.fill = nn.Parameter(torch.zeros(len(self.units), width)) if spec["fill"] else None

    def forward(self, x: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(gates [B, S, H], what idle units add [B, S, D] or None) for x [B, S, D] and q [B, H, S, d]."""
        if self.score is not None:
            scores = self.score(x)
        else:
            square = (q * q).sum(-1).transpose(1, 2)
            scores = torch.stack([square[..., unit].sum(-1) for unit in self.units], -1)
        chosen = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., : self.active]
        works = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        always, gates = torch.ones_like(works[..., :1]), works
        if self.weighted:
            always, gates = self.weigh(x, scores, works)
        every = torch.cat((always, gates), -1)[..., self.place]
        return every.to(x.dtype), None if self.fill is None else (1 - works).to(x.dtype) @ self.fill

    def weigh(self, x: torch.Tensor, scores: torch.Tensor, works: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gates of the shared heads [B, S, shared or 1] and of the units [B, S, units]; zero weights give 1."""
        p = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        if not torch.compiler.is_exporting():  # a traced graph holds the result alone
            tokens = tuple(range(p.dim() - 1))
            self.load = len(self.units) * (p.mean(tokens) * works.to(p.dtype).mean(tokens)).sum()
        gates = self.active * p * works / (p * works).sum(-1, keepdim=True)
        always = torch.ones_like(gates[..., :1])
        if self.share is not None:
            always = self.common * self.share(x).softmax(-1, dtype=p.dtype)
        if self.balance is not None:
            two = 2 * self.balance(x).softmax(-1, dtype=p.dtype)
            always, gates = always * two[..., :1], gates * two[..., 1:]
        return always, gates


def rotate_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (m, m + n) of the first 2n dims of x [B, N, S, d]; cos and sin are [B, S, 2n]."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-b, a), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What "eager" means here; the interface of transformers' attention functions: [B, S, H, d_v] and the map."""
    weights = attention_map(query, key, attention_mask, scaling, bool(getattr(module, "is_causal", False)))
    return spread_product(weights, value).transpose(1, 2), weights


def attention_map(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float, causal: bool
) -> torch.Tensor:
    """Softmax weights [B, H, S, T] of q [B, H, S, d] and k [B, K, T, d]; softmax in float32 at least.

    No mask means causal, if `causal`: the queries are then the last of the keys' tokens.
    """
    batch, heads, steps, width = q.shape
    total = k.shape[2]
    scores = q.reshape(batch, k.shape[1], -1, width) @ k.mT
    scores = scores.view(batch, heads, steps, total) * scale
    if mask is None and causal and steps > 1:
        slots = torch.arange(total, device=q.device)
        mask = slots <= slots[total - steps :, None]
    if mask is not None:
        mask = mask[..., :total]
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)


def spread_product(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """weights [B, H, S, T] times value [B, K, T, d_v] of each head's group: [B, H, S, d_v]."""
    batch, heads, steps, total = weights.shape
    out = weights.reshape(batch, value.shape[1], -1, total) @ value
    return out.view(batch, heads, steps, value.shape[-1])


class RelativeBias(nn.Module):
    """Swin's relative position bias: a table with a column for each head, looked up for every pair in a window."""

    index: torch.Tensor

    def __init__(self, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("index", relative_index(window), persistent=False)

    def forward(self) -> torch.Tensor:
        """[1, H, w^2, w^2]."""
        area = self.window**2
        return self.table[self.index].view(area, area, -1).permute(2, 0, 1).contiguous().unsqueeze(0)


def relative_index(window: int) -> torch.Tensor:
    """Row of the table for each pair of places in a window, [w^4]."""
    place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
    apart = place[:, :, None] - place[:, None, :] + window - 1
    return (apart[0] * (2 * window - 1) + apart[1]).flatten()


class GroupedAttention(nn.Module):
    """Attention whose sizes are a record's, not the config's, and that may take parts from an earlier layer.

    A layer that reads another's map has no queries and keys and caches only values; one that reads another's keys and
    values caches nothing. With few new tokens (decoding) the map itself is handed on; for long prompts, where the map
    is larger than the queries and keys that it comes from, those are, and a fused kernel computes the map again.

    Args:
        config: configuration of the source architecture (its hidden size and attention implementation).
        layer_idx: index of the layer in the cache.
        spec: the layer's record, see AttnoptConfig.
        lends: whether later layers read this one.
    """

    def __init__(self, config: PretrainedConfig, layer_idx: int, spec: dict[str, Any], lends: bool) -> None:
        super().__init__()
        self.config, self.layer_idx, self.lends = config, layer_idx, lends
        self.heads, self.kv_heads = spec["heads"], spec["kv_heads"]
        self.d_qk, self.d_v, self.scale = spec["d_qk"], spec["d_v"], spec["scale"]
        self.kv_of = list(spec["kv_of"])
        self.is_causal, self.window = spec["causal"], spec["window"]
        self.num_key_value_groups = 1 if self.kv_of else self.heads // self.kv_heads
        share = spec["share"] or {}
        self.edge: str | None = share.get("edge")
        self.source: int | None = share.get("source")
        width = spec["width"]
        if self.edge != "map":
            self.q_proj = nn.Linear(width, self.heads * self.d_qk, bias=spec["q_bias"])
        if self.edge is None:
            self.k_proj = nn.Linear(width, self.kv_heads * self.d_qk, bias=spec["k_bias"])
        if self.edge != "kv":
            self.v_proj = nn.Linear(width, self.kv_heads * self.d_v, bias=spec["v_bias"])
        self.o_proj = nn.Linear(self.heads * self.d_v, width, bias=spec["o_bias"])
        normed = spec["norm_eps"] is not None
        self.q_norm = HeadNorm(self.d_qk, spec["norm_eps"]) if normed and self.edge != "map" else None
        self.k_norm = HeadNorm(self.d_qk, spec["norm_eps"]) if normed and self.edge is None else None
        self.router = HeadRouter(width, self.heads, spec["route"]) if spec["route"] else None
        self.bias = RelativeBias(self.heads, spec["bias_window"]) if spec["bias_window"] else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """The interface of a transformers layer's attention; attention maps are never returned."""
        shared: dict[int, dict[str, Any]] | None = kwargs.get(SHARED)
        if shared is None and (self.lends or self.edge):
            raise RuntimeError("layers that share are run by their model, not one by one")
        lent = shared[self.source] if shared is not None and self.source is not None else {}
        q, k, v = self.project(hidden_states, position_embeddings, lent)
        if past_key_values is not None:
            k, v = self.remember(past_key_values, k, v)
        k, v = k if self.edge else self.spread(k), v if self.edge == "kv" else self.spread(v)
        if self.bias is not None:
            attention_mask = self.windowed(attention_mask, hidden_states.shape[0])
        weights = lent.get("map") if self.edge == "map" else None
        plain = attention_mask is None or isinstance(attention_mask, torch.Tensor)
        plain = plain and not torch.compiler.is_exporting()  # a traced graph serves every length
        if plain and self.lends and q.shape[2] * k.shape[2] <= self.cost(q, k):
            weights = attention_map(q, k, attention_mask, self.scale, self.is_causal)
        if self.lends:
            assert shared is not None
            shared[self.layer_idx] = {"q": q, "k": k, "v": v, "map": weights}
        out = self.attend(q, k, v, attention_mask, weights)
        idle = None
        if self.router is not None:
            gates, idle = self.router(hidden_states, q)
            out = out * gates.unsqueeze(-1)
        result = self.o_proj(out.flatten(-2))
        return result if idle is None else result + idle, None

    def project(
        self, x: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor] | None, lent: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(q [B, H, S, d], k [B, K, S, d], v [B, K, S, d_v]); lent ones `spread`, of all tokens so far."""
        q = lent["q"] if self.edge == "map" else self.turned(self.q_proj(x), self.heads, self.q_norm, positions)
        k = lent["k"] if self.edge else self.turned(self.k_proj(x), self.kv_heads, self.k_norm, positions)
        if self.edge == "kv":
            return q, k, lent["v"]
        return q, k, self.v_proj(x).unflatten(-1, (self.kv_heads, self.d_v)).transpose(1, 2)

    def turned(
        self, flat: torch.Tensor, heads: int, norm: HeadNorm | None, positions: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """[B, S, heads d] as [B, heads, S, d], normalised and rotated."""
        x = flat.unflatten(-1, (heads, self.d_qk))
        x = (x if norm is None else norm(x)).transpose(1, 2)
        return x if positions is None else rotate_half(x, *positions)

    def remember(self, cache: Cache, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put what this layer owns into the cache; returns the keys and values of all tokens."""
        if self.edge == "kv":
            return k, v
        if self.edge == "map":
            # Stored in the place of keys: a cache takes a layer without keys for one without tokens.
            return k, cache.update(v, v[..., :0], self.layer_idx)[0]
        return cache.update(k, v, self.layer_idx)

    def spread(self, heads: torch.Tensor) -> torch.Tensor:
        """Keys or values [B, K, T, d], one for each query head [B, H, T, d] if those are not evenly divided."""
        return torch.cat([heads[:, g : g + 1] for g in self.kv_of], 1) if self.kv_of else heads

    def cost(self, q: torch.Tensor, k: torch.Tensor) -> int:
        """Numbers per head that the map is computed from; a map of more is not handed on."""
        return (q.shape[2] + k.shape[2]) * self.d_qk

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """[B, S, H, d_v], from the map where there is one."""
        if weights is not None:
            return spread_product(weights, v).transpose(1, 2)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        window = {} if self.window is None else {"sliding_window": self.window}
        return function(self, q, k, v, mask, dropout=0.0, scaling=self.scale, **window)[0]

    def windowed(self, mask: torch.Tensor | None, rows: int) -> torch.Tensor:
        """Swin's additive mask: the relative position bias, and what a shift hides [windows, w^2, w^2]."""
        assert self.bias is not None
        bias = self.bias()
        if mask is None:
            return bias
        hidden = mask.unsqueeze(1).unsqueeze(0).expand(rows // mask.shape[0], -1, -1, -1, -1)
        return bias + hidden.reshape(-1, 1, *mask.shape[-2:])


def resize(root: nn.Module, sizes: dict[str, list[int]]) -> None:
    """Replace linear maps by others of the sizes given as [out, in], with a bias where there was one."""
    for path, (out, inside) in sizes.items():
        parent, _, name = path.rpartition(".")
        owner = root.get_submodule(parent)
        old = getattr(owner, name)
        if not isinstance(old, nn.Linear):
            raise ValueError(f"attnopt config: {path} is no linear map that could be resized")
        setattr(owner, name, nn.Linear(inside, out, bias=old.bias is not None))
