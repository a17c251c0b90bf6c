"""AttentionSite: what a pass knows of one attention layer. Frozen facts, no torch and no torch.fx.

Everything a pass decides on lives here; graph nodes are evidence and are named by string. A fact that could not be
established is an error at capture time, never None meaning "unknown": None means "there is none".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Kind = Literal["mha", "gqa", "mqa", "mla"]


@dataclass(frozen=True)
class Projection:
    """A linear map that is (part of) one stored matrix.

    Attributes:
        weight: name of the matrix in the WeightStore.
        bias: name of the bias vector, or None if the map has none.
        rows: half-open ranges of output channels that belong to this map, in order; contiguous for separate
            projections, one range per head (or group) for interleaved fused QKV (GPT-NeoX, Falcon).
        in_features: width of the input.
        layout: "linear" for a [out, in] matrix, "conv1d" for the [in, out] matrix of GPT-2.
    """

    weight: str
    bias: str | None
    rows: tuple[tuple[int, int], ...]
    in_features: int
    layout: Literal["linear", "conv1d"] = "linear"

    @property
    def out_features(self) -> int:
        """Number of output channels."""
        return sum(stop - start for start, stop in self.rows)


@dataclass(frozen=True)
class NormSpec:
    """A normalisation between projection and score.

    Attributes:
        kind: "rms" (x / rms(x) * w) or "layer".
        weight: name of the gain in the WeightStore, or None if it has none.
        bias: name of the offset, or None.
        eps: added to the mean square (or variance).
        scope: "head" normalises each head's vector, "all" the whole projection output (OLMo2).
        unit_offset: True if the gain is 1 + w (Gemma).
    """

    kind: Literal["rms", "layer"]
    weight: str | None
    bias: str | None
    eps: float
    scope: Literal["head", "all"] = "head"
    unit_offset: bool = False


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: pair m of the rotary dims turns by position * inv_freq[m] (radians).

    Attributes:
        inv_freq: angle per position of each pair, after any scaling rule, fastest first as stored.
        style: "half" pairs dims (m, m + n), "interleaved" pairs (2m, 2m + 1); n = len(inv_freq).
        offset: first rotary dim within the head (the rest passes unrotated); within the rotary part for kind "mla",
            whose query heads hold the unrotated dims first.
        attention_scaling: factor on cos and sin (YaRN, longrope); 1.0 otherwise.
        rope_type: the config's name of the scaling rule ("default", "llama3", ...), for messages and emission.
    """

    inv_freq: tuple[float, ...]
    style: Literal["half", "interleaved"]
    offset: int = 0
    attention_scaling: float = 1.0
    rope_type: str = "default"

    @property
    def dim(self) -> int:
        """Number of rotary dims, 2 * pairs."""
        return 2 * len(self.inv_freq)


@dataclass(frozen=True)
class MaskSpec:
    """Which keys a query sees, and what is done to its logits.

    Attributes:
        causal: keys after the query are hidden.
        window: only the last `window` keys (the query's own included) are visible; None for all.
        softcap: logits become softcap * tanh(logits / softcap); None for none.
        sinks: name of learned per-head sink logits; None for none.
        bias: names of tensors that make up an additive per-head bias (Swin's relative positions); empty for none.
        alibi: True if a linear distance bias is added (Falcon-RW, BLOOM).
        padding: True if the graph takes a padding mask at this site.
    """

    causal: bool
    window: int | None = None
    softcap: float | None = None
    sinks: str | None = None
    bias: tuple[str, ...] = ()
    alibi: bool = False
    padding: bool = False


@dataclass(frozen=True)
class CacheEntry:
    """One thing kept per token: "key", "value", "latent" or "key_rope", of heads x width numbers."""

    name: str
    heads: int
    width: int


@dataclass(frozen=True)
class CacheSpec:
    """What decoding keeps per token and layer. Empty for encoders."""

    entries: tuple[CacheEntry, ...] = ()

    @property
    def numbers_per_token(self) -> int:
        """Cached numbers per token in this layer."""
        return sum(e.heads * e.width for e in self.entries)


@dataclass(frozen=True)
class LatentSpec:
    """The parts of a Multi-head Latent Attention layer (kind "mla").

    The latent c = norm(kv_a(u)[:kv_lora_rank]) and one rotary key kv_a(u)[kv_lora_rank:] are cached; kv_b expands c to
    per-head rows [d_nope; d_v]. For `encoder == "hidden"` u is the attention input x. For "normed_kv" (q/k-norm models)
    u = cat(k_norm(k_proj x), v_proj x), and the query is q_map applied per head to q_norm(q_proj x).

    Attributes:
        kv_lora_rank: width of the latent, constant lane included.
        d_nope, d_rope: unrotated and rotated width of a query head.
        kv_a, kv_b: encoder (rows: latent, then rotary key) and decoder (rows per head: nope, then value).
        kv_a_norm: norm on the latent, or None.
        q: the one query projection if queries are not compressed (rows per head: nope, then rope), else None.
        q_a, q_a_norm, q_b: the compressed query path, all None if `q` is set.
        q_map: name of a [heads, d_nope + d_rope, d] tensor applied per head after q_norm; None for "hidden".
        encoder: what the encoder reads, see above.
        lane: True if the last latent channel is the constant 1 (bias 1, weight row 0).
        peak: largest norm of the latent (lane excluded) seen on calibration text; 0.0 if never measured.
    """

    kv_lora_rank: int
    d_nope: int
    d_rope: int
    kv_a: Projection
    kv_b: Projection
    kv_a_norm: NormSpec | None = None
    q: Projection | None = None
    q_a: Projection | None = None
    q_a_norm: NormSpec | None = None
    q_b: Projection | None = None
    q_map: str | None = None
    encoder: Literal["hidden", "normed_kv"] = "hidden"
    lane: bool = False
    peak: float = 0.0


@dataclass(frozen=True)
class ShareSpec:
    """What a layer takes from an earlier one instead of computing it.

    Attributes:
        source: fqn of the layer it is taken from, which computes its own.
        edge: "map" for the attention map (its queries and keys), "kv" for keys and values.
    """

    source: str
    edge: Literal["map", "kv"]


@dataclass(frozen=True)
class RouteSpec:
    """Which heads work on which tokens (mixture of heads, arXiv 2410.11842).

    Heads that are not in `shared` form units, in the order of their numbers: single heads, or all heads that read one
    key/value head. Per token, the `active` units of highest score work; each of the others adds its row of `fill`.

    Binary gates of working heads are 1. Weighted ones, which need training, are those of the paper's code: with p the
    softmax of the scores and U the units that work, a2 * active * p_u / sum_U p of a unit, and
    a1 * |shared| * softmax(shared_weight x)_i of shared head i; (a1, a2) = 2 softmax(balance x). Zero weights give 1.

    Attributes:
        router: "qnorm" scores a unit by the norm of its rotated queries, "linear" by weight x + bias of the input x.
        shared: heads that always work, ascending.
        active: number of units that work on a token.
        unit: what is switched as a whole.
        weight, bias: names of the linear router's [units, D] and [units]; None for "qnorm".
        fill: name of [units, D]: what an idle unit adds to the layer's output; None for nothing.
        gate: "binary" or "weighted".
        shared_weight: name of [|shared|, D] of weighted gates; None for one shared head or none.
        balance: name of [2, D] of weighted gates; None without shared heads.
    """

    #: Fields that are names of weights.
    WEIGHTS: ClassVar[tuple[str, ...]] = ("weight", "bias", "fill", "shared_weight", "balance")

    router: Literal["qnorm", "linear"]
    shared: tuple[int, ...]
    active: int
    unit: Literal["head", "kv-group"] = "head"
    weight: str | None = None
    bias: str | None = None
    fill: str | None = None
    gate: Literal["binary", "weighted"] = "binary"
    shared_weight: str | None = None
    balance: str | None = None


@dataclass(frozen=True)
class SiteNodes:
    """Names of the graph nodes that bound a site.

    Attributes:
        input: the tensor read by the q/k/v (or kv_a) projections: [B, S, D], after the layer's norm.
        attention: the anchor (a dialect op).
        output: result of the output projection [B, S, D], before the residual addition.
    """

    input: str
    attention: str
    output: str


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer.

    Attributes:
        fqn: module path of the attention module, e.g. "model.layers.0.self_attn"; unique in a Program.
        layer: index in forward order, from 0.
        kind: "mha" (kv_heads == heads), "mqa" (kv_heads == 1 < heads), "gqa" or "mla".
        heads, kv_heads: query heads and key/value heads (kv_heads == heads for "mla").
        d_qk, d_v: width of a head's query/key and of its value.
        q, k, v: projections; for "mla" those of a normed_kv encoder, else None.
        o: output projection.
        q_norm, k_norm: norms between projection and rope, or None.
        rope: rotary embedding, or None for learned or absent positions.
        mask, cache: see MaskSpec and CacheSpec.
        scale: factor on q.k before the softmax.
        latent: the MLA parts if kind == "mla", else None.
        nodes: the graph nodes that bound the site.
        kv_of: key/value head that each query head reads, ascending; empty if they are evenly divided.
        head_ids: number of each query head in the original model; empty if no head was removed or moved.
        share: what it takes from an earlier layer, or None. What is shared has no projections here.
        route: how its heads are switched per token, or None if all always work.
    """

    fqn: str
    layer: int
    kind: Kind
    heads: int
    kv_heads: int
    d_qk: int
    d_v: int
    q: Projection | None
    k: Projection | None
    v: Projection | None
    o: Projection
    q_norm: NormSpec | None
    k_norm: NormSpec | None
    rope: RopeSpec | None
    mask: MaskSpec
    cache: CacheSpec
    scale: float
    latent: LatentSpec | None
    nodes: SiteNodes
    kv_of: tuple[int, ...] = ()
    head_ids: tuple[int, ...] = ()
    share: ShareSpec | None = None
    route: RouteSpec | None = None

    @property
    def kv_head_of(self) -> tuple[int, ...]:
        """Key/value head that each query head reads."""
        return self.kv_of or tuple(h * self.kv_heads // self.heads for h in range(self.heads))

    @property
    def original_heads(self) -> tuple[int, ...]:
        """Number of each query head in the original model."""
        return self.head_ids or tuple(range(self.heads))

    @property
    def routed_units(self) -> tuple[tuple[int, ...], ...]:
        """Heads of each unit that `route` switches; empty without a route."""
        if self.route is None:
            return ()
        rest = [h for h in range(self.heads) if h not in self.route.shared]
        if self.route.unit == "head":
            return tuple((h,) for h in rest)
        groups: dict[int, list[int]] = {}
        for h in rest:
            groups.setdefault(self.kv_head_of[h], []).append(h)
        return tuple(tuple(group) for group in groups.values())

    @property
    def d_rope(self) -> int:
        """Rotary width of a head; 0 without rope."""
        return self.rope.dim if self.rope else 0

    @property
    def cached_numbers_per_token(self) -> int:
        """Cached numbers per token in this layer."""
        return self.cache.numbers_per_token

    def facts(self) -> dict[str, Any]:
        """What every document says of a layer, as JSON values."""
        return {
            "fqn": self.fqn,
            "layer": self.layer,
            "kind": self.kind,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.d_qk,
            "value_dim": self.d_v,
            "causal": self.mask.causal,
            "window": self.mask.window,
            "cached_numbers_per_token": self.cached_numbers_per_token,
        }
