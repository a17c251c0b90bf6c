"""SourceLayer: one attention layer of the source, in the coordinates that the conversion works in.

Heads are brought to one form whatever the checkpoint's: rotary pair f is (f, f + F) of F = d/2 pairs, unrotated dims
are pairs of angle 0, factors on cos and sin are folded into queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.rewriter.ops.attention import fused_attention
from attnopt.rewriter.precision import quick_now
from attnopt.rewriter.site import AttentionSite, NormSpec, Projection

Reader = Callable[[str], Tensor]


@dataclass(frozen=True)
class HeadNorm:
    """x / rms(x) * gain over the last axis (Qwen 3), computed in float32 at least.

    Attributes:
        gain: [d].
        eps: added to the mean square.
    """

    gain: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@dataclass(frozen=True)
class SourceLayer:
    """An attention layer with grouped keys and values, G <= H.

    Attributes:
        w_q, w_k, w_v: [H, d, D], [G, d, D], [G, d_v, D], rows of q and k in the paired order.
        b_q, b_k, b_v: [H, d], [G, d], [G, d_v]; None without biases.
        w_o, b_o: [D, H, d_v] and [D] or None.
        q_norm, k_norm: norms between projection and rotation, or None.
        turn: [d] factor on queries and keys after the norm (attention scaling of the rope).
        inv_freq: [F] float64, angle per position of each pair, 0 for unrotated pairs.
        scale: factor on q.k.
        order: [d] the source's index of each dim in the paired order.
        by_outputs: True if the encoder reads y = [k_0 ... k_{G-1}; v_0 ... v_{G-1}] (after norm and bias), False if it
            reads the attention input x. y is shorter when 2Gd < D, and the only way if there are norms or biases.
    """

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_o: Tensor
    b_q: Tensor | None
    b_k: Tensor | None
    b_v: Tensor | None
    b_o: Tensor | None
    q_norm: HeadNorm | None
    k_norm: HeadNorm | None
    turn: Tensor
    inv_freq: Tensor
    scale: float
    order: Tensor
    by_outputs: bool

    @property
    def heads(self) -> int:
        """H."""
        return self.w_q.shape[0]

    @property
    def groups(self) -> int:
        """G, the number of key/value heads."""
        return self.w_k.shape[0]

    @property
    def d(self) -> int:
        """Width of a query or key head."""
        return self.w_q.shape[1]

    @property
    def d_v(self) -> int:
        """Width of a value head."""
        return self.w_v.shape[1]

    @property
    def width(self) -> int:
        """D, the hidden size."""
        return self.w_q.shape[2]

    @property
    def normed(self) -> bool:
        """True if queries and keys are normalised."""
        return self.q_norm is not None or self.k_norm is not None

    @property
    def group_of(self) -> Tensor:
        """[H] group of each head."""
        return torch.arange(self.heads, device=self.w_q.device) * self.groups // self.heads

    @property
    def input_width(self) -> int:
        """p, width of what the encoder reads."""
        return self.groups * (self.d + self.d_v) if self.by_outputs else self.width

    def queries(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, H, S, d], after norm and before rotation."""
        return self._heads(x, self.w_q, self.b_q, self.q_norm, self.turn)

    def keys(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, G, S, d], after norm and before rotation."""
        return self._heads(x, self.w_k, self.b_k, self.k_norm, self.turn)

    def values(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, G, S, d_v]."""
        return self._heads(x, self.w_v, self.b_v, None, None)

    def encoder_input(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What the encoder reads, [B, S, p]: x itself, or the keys and values one after the other."""
        if not self.by_outputs:
            return x
        return torch.cat([keys.transpose(1, 2).flatten(2), values.transpose(1, 2).flatten(2)], dim=-1)

    def key_rows(self) -> Tensor:
        """A_K [G, d, p] float64 with k_g = A_K[g] u for the encoder's input u."""
        if not self.by_outputs:
            return self.w_k.double() * self.turn.double()[:, None]
        return self._selector(0, self.d)

    def value_rows(self) -> Tensor:
        """A_V [G, d_v, p] float64 with v_g = A_V[g] u for the encoder's input u."""
        if not self.by_outputs:
            return self.w_v.double()
        return self._selector(self.groups * self.d, self.d_v)

    def output_map(self) -> tuple[Tensor, Tensor]:
        """(T [p, D], t [p]) in float64 with u = T x + t, for layers without norms."""
        if not self.by_outputs:
            return torch.eye(self.width, dtype=torch.float64), torch.zeros(self.width, dtype=torch.float64)
        turn = self.turn.double()
        rows = torch.cat([(self.w_k.double() * turn[:, None]).flatten(0, 1), self.w_v.double().flatten(0, 1)])
        nothing_k, nothing_v = torch.zeros(self.groups, self.d), torch.zeros(self.groups, self.d_v)
        b_k = (nothing_k if self.b_k is None else self.b_k).double() * turn
        b_v = (nothing_v if self.b_v is None else self.b_v).double()
        return rows, torch.cat([b_k.flatten(), b_v.flatten()])

    def rotate(self, heads: Tensor, positions: Tensor | None = None) -> Tensor:
        """Turn [B, N, S, d] by positions [B, S]; by default 0 ... S-1."""
        cos, sin = turns(self.inv_freq, heads, positions)
        a, b = heads.chunk(2, dim=-1)
        return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], dim=-1)

    def attend(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """The layer's output before the residual addition, [B, S, D], for rising positions and a causal mask.

        Args:
            x: attention input [B, S, D].
            positions: [B, S]; by default 0 ... S-1.
        """
        q, k, v = self.rotate(self.queries(x), positions), self.rotate(self.keys(x), positions), self.values(x)
        mixed = causal_attention(q, k, v, self.scale)
        out = F.linear(mixed.transpose(1, 2).flatten(2), self.w_o.flatten(1))
        return out if self.b_o is None else out + self.b_o

    def _heads(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, norm: HeadNorm | None, turn: Tensor | None
    ) -> Tensor:
        flat = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
        heads = flat.unflatten(-1, weight.shape[:2]).transpose(1, 2)
        if norm is not None:
            heads = norm(heads)
        if turn is not None and bool((turn != 1).any()):
            heads = heads * turn
        return heads

    def _selector(self, start: int, width: int) -> Tensor:
        eye = torch.eye(self.input_width, dtype=torch.float64)
        return eye[start : start + self.groups * width].view(self.groups, width, -1)


def turns(inv_freq: Tensor, heads: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B or 1, 1, S, F] of the angles by which heads turn, computed in float64.

    Args:
        inv_freq: [F] angle per position.
        heads: [B, N, S, ...], what is to be turned.
        positions: [B, S]; by default 0 ... S-1.
    """
    positions = torch.arange(heads.shape[2])[None] if positions is None else positions
    angle = positions.to(heads.device, torch.float64)[:, None, :, None] * inv_freq.to(heads.device)
    return angle.cos().to(heads.dtype), angle.sin().to(heads.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal softmax attention of [B, H, S, d], [B, G, T, d], [B, G, T, d_v] -> [B, H, S, d_v].

    The queries are those of the last S of the T positions.
    """
    asked, seen, dtype = q.shape[2], k.shape[2], q.dtype
    if quick_now(q):  # a pass without gradients, which multiplies 16-bit factors everywhere else, too
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    some = None if asked == seen else torch.ones(asked, seen, dtype=torch.bool, device=q.device).tril(seen - asked)
    return fused_attention(q, k, v, some is None, scale, some).to(dtype)


def paired_order(d: int, rotary: int, offset: int, style: str) -> Tensor:
    """Index of each head dim so that pair f becomes (f, f + d/2): rotary pairs first, then the rest in order.

    Args:
        d: width of a head, even.
        rotary: number of rotary dims, even.
        offset: the first of them.
        style: "half" or "interleaved", as in `RopeSpec`.
    """
    pairs = torch.arange(offset, offset + rotary)
    pairs = pairs.view(2, -1) if style == "half" else pairs.view(-1, 2).T
    rest = torch.tensor([i for i in range(d) if not offset <= i < offset + rotary], dtype=torch.long).view(2, -1)
    return torch.cat([pairs, rest], dim=1).flatten()


def read_source(site: AttentionSite, read: Reader) -> SourceLayer:
    """Read a layer that `support.obstacle` does not object to.

    Args:
        site: its facts.
        read: gives a weight by name, in the type to compute in.
    """
    rope = site.rope
    assert site.q and site.k and site.v and rope  # checked by support.obstacle
    order = paired_order(site.d_qk, rope.dim, rope.offset, rope.style)
    turn = torch.ones(site.d_qk)
    turn[rope.offset : rope.offset + rope.dim] = rope.attention_scaling
    inv_freq = torch.zeros(site.d_qk // 2, dtype=torch.float64)
    inv_freq[: len(rope.inv_freq)] = torch.tensor(rope.inv_freq, dtype=torch.float64)
    w_q, b_q = _matrix(site.q, read)
    w_k, b_k = _matrix(site.k, read)
    w_v, b_v = _matrix(site.v, read)
    w_o, b_o = _matrix(site.o, read)
    heads, groups, d, d_v = site.heads, site.kv_heads, site.d_qk, site.d_v
    biased = any(b is not None for b in (b_q, b_k, b_v))
    normed = site.q_norm is not None or site.k_norm is not None

    def bias(b: Tensor | None, n: int, width: int, paired: bool) -> Tensor | None:
        if b is None:
            return None
        return b.view(n, width)[:, order] if paired else b.view(n, width)

    return SourceLayer(
        w_q=w_q.view(heads, d, -1)[:, order],
        w_k=w_k.view(groups, d, -1)[:, order],
        w_v=w_v.view(groups, d_v, -1),
        w_o=w_o.view(-1, heads, d_v),
        b_q=bias(b_q, heads, d, True),
        b_k=bias(b_k, groups, d, True),
        b_v=bias(b_v, groups, d_v, False),
        b_o=b_o,
        q_norm=_norm(site.q_norm, read, order),
        k_norm=_norm(site.k_norm, read, order),
        turn=turn[order].to(w_q.dtype),
        inv_freq=inv_freq,
        scale=site.scale,
        order=order,
        by_outputs=normed or biased or groups * (d + d_v) <= w_q.shape[1],
    )


def _matrix(projection: Projection, read: Reader) -> tuple[Tensor, Tensor | None]:
    """(weight [out, in], bias or None) of a projection."""
    weight = read(projection.weight)
    if projection.layout == "conv1d":
        weight = weight.T
    bias = None if projection.bias is None else read(projection.bias)
    if projection.rows == ((0, weight.shape[0]),):
        return weight, bias
    index = torch.cat([torch.arange(start, stop) for start, stop in projection.rows])
    return weight[index], None if bias is None else bias[index]


def _norm(spec: NormSpec | None, read: Reader, order: Tensor) -> HeadNorm | None:
    if spec is None:
        return None
    assert spec.weight is not None  # checked by support.obstacle
    return HeadNorm(read(spec.weight)[order], spec.eps)
