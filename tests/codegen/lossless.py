"""Converted sites that lose nothing, built by hand from a tiny random model.

mla-conversion identity 3: with d_rope = G * d (every frequency once per KV head; a query is zero outside its group) and
kv_lora_rank = G * d (the values) the layer is the source's layer exactly, so logits must match. The value mean is moved
into the constant lane, so that the lane is exercised too. Q/k-norm models get the "normed_kv" encoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from attnopt.rewriter.program import Program
from attnopt.rewriter.site import (
    AttentionSite,
    CacheEntry,
    CacheSpec,
    LatentSpec,
    MaskSpec,
    NormSpec,
    Projection,
    RopeSpec,
    SiteNodes,
)
from attnopt.rewriter.weights import Inline, WeightStore

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
EXTRA: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "phi3": {"original_max_position_embeddings": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def tiny(model_type: str, seed: int = 0, **options: object) -> PreTrainedModel:
    """A random causal model whose attention, norms and biases all matter."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**SIZES, **EXTRA[model_type], **options})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, tensor in model.named_parameters():
        if tensor.dim() == 1:
            tensor.data += 0.3 * torch.randn_like(tensor)
        elif "embed" in name:
            tensor.data.normal_()
        else:
            tensor.data.normal_(std=1.5 / math.sqrt(tensor.shape[-1]))
    return model


@dataclass(frozen=True)
class Converted:
    """Hand-made result of a conversion: what a Program would hold.

    Attributes:
        sites: one per layer, kind "mla".
        weights: all tensors of the model, attention replaced.
        config: the source configuration as a dict.
    """

    sites: dict[str, AttentionSite]
    weights: dict[str, torch.Tensor]
    config: dict


@dataclass(frozen=True)
class Variation:
    """How one layer differs from the plain lossless form, still without loss.

    Attributes:
        spare: latent channels that are always zero.
        reverse: list the rotary pairs backwards.
        skip: leave the layer as the source has it.
    """

    spare: int = 0
    reverse: bool = False
    skip: bool = False


def convert(
    model: PreTrainedModel, d_nope: int = 8, peak: float = 0.0, variations: dict[int, Variation] | None = None
) -> Converted:
    """Rewrite the attention layers of `model` without loss."""
    config = model.config
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    sites = {}
    for index, layer in enumerate(model.model.layers):
        fqn = f"model.layers.{index}.self_attn"
        variation = (variations or {}).get(index, Variation())
        if variation.skip:
            sites[fqn] = _source_site(fqn, index, config, layer.self_attn)
            continue
        attention = layer.self_attn
        own = {name: weights.pop(name) for name in list(weights) if name.startswith(fqn + ".")}
        new, latent, rope = _layer(fqn, attention, own, config, model.model.rotary_emb, d_nope, peak)
        latent, rope = _vary(variation, new, latent, rope, config.num_attention_heads)
        weights |= {f"{fqn}.{name}": tensor for name, tensor in new.items()}
        sites[fqn] = _site(fqn, index, config, latent, rope, new)
    return Converted(sites, weights, config.to_dict())


def _vary(
    variation: Variation, new: dict[str, torch.Tensor], latent: LatentSpec, rope: RopeSpec, heads: int
) -> tuple[LatentSpec, RopeSpec]:
    """Apply a variation to a layer's tensors, in place, and to its specs."""
    rank, spare = latent.kv_lora_rank, variation.spare
    order = torch.arange(latent.d_rope).view(-1, 2)
    order = (order.flip(0) if variation.reverse else order).flatten()
    for part in ("weight", "bias"):
        old = new[f"kv_a_proj.{part}"]
        nothing = torch.zeros(spare, *old.shape[1:])
        new[f"kv_a_proj.{part}"] = torch.cat([old[: rank - 1], nothing, old[rank - 1 : rank], old[rank:][order]])
    old = new["kv_b_proj.weight"]
    new["kv_b_proj.weight"] = torch.cat([old[:, :-1], torch.zeros(old.shape[0], spare), old[:, -1:]], 1)
    queries = ("q_map.weight",) if latent.q_map else ("q_proj.weight", "q_proj.bias")
    for name in queries:
        if name in new:
            wide = new[name].view(heads, latent.d_nope + latent.d_rope, -1)
            wide = torch.cat([wide[:, : latent.d_nope], wide[:, latent.d_nope :][:, order]], 1)
            new[name] = wide.reshape(new[name].shape)
    table = rope.inv_freq[::-1] if variation.reverse else rope.inv_freq
    wider = replace(latent.kv_a, rows=((0, rank + spare + latent.d_rope),))
    decoder = replace(latent.kv_b, in_features=rank + spare)
    return replace(latent, kv_lora_rank=rank + spare, kv_a=wider, kv_b=decoder), replace(rope, inv_freq=table)


def program_of(model: PreTrainedModel, **options: object) -> Program:
    """A Program that holds `convert(model)`. Its graph only names the weights: emission reads no more of it."""
    made = convert(model, **options)
    graph = fx.Graph()
    reads = [graph.create_node("get_attr", name) for name in made.weights]
    sites = {}
    for fqn, site in made.sites.items():
        anchor = graph.create_node("get_attr", site.o.weight, name=f"attention_{site.layer}")
        if site.latent is not None:
            anchor.meta["attnopt"] = {"pass": "by hand", "site": fqn}
        sites[fqn] = replace(site, nodes=SiteNodes("", anchor.name, ""))
    graph.output(tuple(reads))
    store = WeightStore({name: Inline(tensor) for name, tensor in made.weights.items()})
    return Program(graph, store, sites, made.config, model.config.model_type, ("input_ids",), ("logits",))


def grafted(captured: Program, made: Program) -> Program:
    """A captured program with the sites of `made`, whose attention nodes say that a pass has made them."""
    copy = captured.clone()
    sites = {fqn: replace(site, nodes=captured.sites[fqn].nodes) for fqn, site in made.sites.items()}
    for fqn, site in sites.items():
        if site.latent is not None:
            copy.node(site.nodes.attention).meta["attnopt"] = {"pass": "by hand", "site": fqn}
    return copy.replace(sites=sites)


def _projections(fqn: str, own: dict, heads: int, groups: int, d: int) -> dict[str, tuple]:
    """q, k, v as (weight, bias), fused or not."""
    if f"{fqn}.qkv_proj.weight" in own:
        parts = own[f"{fqn}.qkv_proj.weight"].split((heads * d, groups * d, groups * d))
        return {name: (part, None) for name, part in zip("qkv", parts, strict=True)}
    return {n: (own[f"{fqn}.{n}_proj.weight"], own.get(f"{fqn}.{n}_proj.bias")) for n in "qkv"}


def _layer(
    fqn: str, attention: nn.Module, own: dict, config: object, rotary: nn.Module, d_nope: int, peak: float
) -> tuple[dict[str, torch.Tensor], LatentSpec, RopeSpec]:
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    pairs, d_rope, rank = d // 2, groups * d, groups * d + 1
    table = rotary.inv_freq.double()
    maps = _projections(fqn, own, heads, groups, d)
    normed = hasattr(attention, "q_norm")
    # Order of a head's dims as interleaved pairs: 0, pairs, 1, pairs + 1, ...
    pairwise = torch.arange(d).view(2, pairs).T.flatten()
    gain = math.sqrt((d_nope + d_rope) / d)

    q_map = torch.zeros(heads, d_nope + d_rope, d)
    for head in range(heads):
        start = d_nope + (head * groups // heads) * d
        q_map[head, start : start + d] = gain * torch.eye(d)[pairwise]
    select_v, select_k = torch.eye(groups * d), torch.eye(groups * d).view(groups, d, -1)[:, pairwise].flatten(0, 1)
    mean = torch.linspace(-1, 1, groups * d)
    kv_b = torch.zeros(heads, d_nope + d, rank)
    for head in range(heads):
        rows = slice((head * groups // heads) * d, (head * groups // heads + 1) * d)
        kv_b[head, d_nope:, :-1] = torch.eye(groups * d)[rows]
        kv_b[head, d_nope:, -1] = mean[rows]

    def bias(name: str) -> torch.Tensor:
        stored = maps[name][1]
        return torch.zeros(maps[name][0].shape[0]) if stored is None else stored

    new: dict[str, torch.Tensor] = {"kv_b_proj.weight": kv_b.flatten(0, 1)}
    new |= {name.removeprefix(fqn + "."): t for name, t in own.items() if ".o_proj." in name}
    if normed:
        nothing = torch.zeros(groups * d, groups * d)
        latent_rows, rope_rows = torch.cat([nothing, select_v], 1), torch.cat([select_k, nothing], 1)
        encoder = torch.cat([latent_rows, torch.zeros(1, 2 * groups * d), rope_rows])
        offset = torch.cat([-mean, torch.ones(1), torch.zeros(d_rope)])
        new |= {n.removeprefix(fqn + "."): t for n, t in own.items() if any(p in n for p in ("q_", "k_", "v_"))}
        new["q_map.weight"] = q_map
    else:
        width = maps["v"][0].shape[1]
        encoder = torch.cat([maps["v"][0], torch.zeros(1, width), select_k @ maps["k"][0]])
        offset = torch.cat([bias("v") - mean, torch.ones(1), select_k @ bias("k")])
        new["q_proj.weight"] = torch.einsum("hmn,hnd->hmd", q_map, maps["q"][0].view(heads, d, -1)).flatten(0, 1)
        if maps["q"][1] is not None:
            new["q_proj.bias"] = torch.einsum("hmn,hn->hm", q_map, maps["q"][1].view(heads, d)).flatten()
    new |= {"kv_a_proj.weight": encoder, "kv_a_proj.bias": offset}

    def projection(name: str) -> Projection:
        out, width = new[f"{name}.weight"].shape
        stored = f"{fqn}.{name}.bias" if f"{name}.bias" in new else None
        return Projection(f"{fqn}.{name}.weight", stored, ((0, out),), width)

    latent = LatentSpec(
        kv_lora_rank=rank,
        d_nope=d_nope,
        d_rope=d_rope,
        kv_a=projection("kv_a_proj"),
        kv_b=projection("kv_b_proj"),
        q=projection("q_proj"),
        q_map=f"{fqn}.q_map.weight" if normed else None,
        encoder="normed_kv" if normed else "hidden",
        lane=True,
        peak=peak,
    )
    rope = RopeSpec(tuple(table.repeat(groups).tolist()), "interleaved", offset=d_nope)
    return new, latent, rope


def _site(
    fqn: str, index: int, config: object, latent: LatentSpec, rope: RopeSpec, new: dict[str, torch.Tensor]
) -> AttentionSite:
    normed = latent.encoder == "normed_kv"
    groups, d = config.num_key_value_heads, config.head_dim

    def kept(name: str) -> Projection | None:
        if not normed:
            return None
        out, width = new[f"{name}.weight"].shape
        stored = f"{fqn}.{name}.bias" if f"{name}.bias" in new else None
        return Projection(f"{fqn}.{name}.weight", stored, ((0, out),), width)

    def norm(name: str) -> NormSpec | None:
        return NormSpec("rms", f"{fqn}.{name}.weight", None, config.rms_norm_eps) if normed else None

    o_out, o_in = new["o_proj.weight"].shape
    o_bias = f"{fqn}.o_proj.bias" if "o_proj.bias" in new else None
    return AttentionSite(
        fqn=fqn,
        layer=index,
        kind="mla",
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        d_qk=latent.d_nope + latent.d_rope,
        d_v=d,
        q=latent.q if normed else None,
        k=kept("k_proj"),
        v=kept("v_proj"),
        o=Projection(f"{fqn}.o_proj.weight", o_bias, ((0, o_out),), o_in),
        q_norm=norm("q_norm"),
        k_norm=norm("k_norm"),
        rope=rope,
        mask=MaskSpec(causal=True, window=_window(config, index)),
        cache=CacheSpec((CacheEntry("latent", 1, latent.kv_lora_rank), CacheEntry("key_rope", 1, groups * d))),
        scale=1 / math.sqrt(latent.d_nope + latent.d_rope),
        latent=latent,
        nodes=SiteNodes("", "", ""),
    )


def _window(config: object, index: int) -> int | None:
    types = getattr(config, "layer_types", None)
    if types is not None and types[index] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _source_site(fqn: str, index: int, config: object, attention: nn.Module) -> AttentionSite:
    """A layer that was not converted."""
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def projection(name: str) -> Projection:
        matrix = getattr(attention, name)
        bias = f"{fqn}.{name}.bias" if matrix.bias is not None else None
        return Projection(f"{fqn}.{name}.weight", bias, ((0, matrix.out_features),), matrix.in_features)

    return AttentionSite(
        fqn=fqn,
        layer=index,
        kind="gqa",
        heads=heads,
        kv_heads=groups,
        d_qk=d,
        d_v=d,
        q=projection("q_proj"),
        k=projection("k_proj"),
        v=projection("v_proj"),
        o=projection("o_proj"),
        q_norm=None,
        k_norm=None,
        rope=None,
        mask=MaskSpec(causal=True, window=_window(config, index)),
        cache=CacheSpec((CacheEntry("key", groups, d), CacheEntry("value", groups, d))),
        scale=d**-0.5,
        latent=None,
        nodes=SiteNodes("", "", ""),
    )
