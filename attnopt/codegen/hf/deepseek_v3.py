"""Stock DeepSeek-V3: directories that transformers (>= 5.15 for a latent cache) loads without attnopt or remote code.

Layout: lowering section 4.2, mla-conversion section 5.1. The class normalises the latent unconditionally; `lane.py`
says how that is undone. Query biases (Qwen2) go through q_a = [I; 0] with a lane of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from attnopt.codegen.hf.emission import (
    Emission,
    Refusal,
    bias_of,
    check_complete,
    is_tied,
    outside_attention,
    typed,
    weight_of,
)
from attnopt.codegen.hf.grouped import resized_maps
from attnopt.codegen.hf.lane import Lane, largest_norm, make_lane
from attnopt.codegen.hf.rope_tables import stock_rope
from attnopt.errors import UnsupportedError
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite, LatentSpec
from attnopt.rewriter.weights import Derived, Value, derived_op, evaluate

TARGET = "deepseek_v3"
_MOE = ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v2", "deepseek_v3")
# Plain pre-norm blocks: RMSNorm, attention, residual, RMSNorm, gated MLP, residual; no multipliers, no extra norms.
_PLAIN = ("llama", "mistral", "qwen2", "phi3")
_KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# One expert that no layer uses: the class wants numbers here even when every layer is dense.
_UNUSED_EXPERTS = {
    "n_routed_experts": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 8,
}


@derived_op
def with_entry(x: torch.Tensor, *, index: int, value: float) -> torch.Tensor:
    """A vector with one entry set, in float64."""
    result = x.double()
    result[index] = value
    return result


@derived_op
def lane_norm(*, channels: int, weight: float, lane_weight: float) -> torch.Tensor:
    """Norm weight of a latent whose last channel is the lane."""
    return torch.cat((torch.full((channels,), weight), torch.full((1,), lane_weight)))


@derived_op
def lane_columns(x: torch.Tensor, *, channels: float, lane: float) -> torch.Tensor:
    """x [out, n + 1] with its first n columns times `channels` and the last times `lane`, in float64."""
    factors = torch.full((x.shape[1],), channels, dtype=torch.float64, device=x.device)
    factors[-1] = lane
    return x.double() * factors


@derived_op
def scale_rows(x: torch.Tensor, *, heads: int, first: float, rest: float, split: int) -> torch.Tensor:
    """x [heads * n, ...] with the first `split` rows of each head times `first` and the others times `rest`."""
    wide = x.double().unflatten(0, (heads, -1))
    return torch.cat((wide[:, :split] * first, wide[:, split:] * rest), dim=1).flatten(0, 1)


@derived_op
def identity_and_lane(*, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[I; 0]: passes `width` numbers on and leaves room for a lane."""
    return torch.eye(width + 1, width, dtype=dtype)


def can_emit(program: Program, dtype: torch.dtype | None = None) -> Refusal | None:
    """Say why the stock class cannot hold a Program, or None if it can.

    Args:
        program: a converted model.
        dtype: type to be written; None for the source's.
    """
    reasons = list(_obstacles(program))
    if not reasons and (dtype or source_dtype(program)) == torch.float16:
        try:
            for site in program.site_list:
                _latent_lane(program, site, torch.float16)
        except UnsupportedError as error:
            reasons.append(error.message)
    return Refusal(TARGET, tuple(reasons)) if reasons else None


def source_obstacles(program: Program) -> Iterator[str]:
    """What in a model, converted or not, the stock class cannot hold, whatever becomes of its attention layers."""
    config, sites = program.config, program.site_list
    if program.model_type in _MOE:
        yield f"the mixture-of-experts blocks of {program.model_type} are not DeepSeek-V3's"
    elif program.model_type.startswith(("qwen3", "gemma3")):
        yield f"{program.model_type} normalises queries and keys, which DeepSeek-V3 does not"
    elif program.model_type not in _PLAIN:
        yield f"the block structure of {program.model_type} is not the plain pre-norm block of DeepSeek-V3"
    if config.get("mlp_bias"):
        yield "the MLP has biases"
    if len(sites) != config.get("num_hidden_layers"):
        yield f"{len(sites)} attention layers in a model of {config.get('num_hidden_layers')} layers"
    for site in sites:
        mask = site.mask
        if not mask.causal or mask.window or mask.softcap or mask.sinks or mask.bias or mask.alibi:
            yield f"layer {site.layer}: the mask is not plain causal (a window, softcap, sinks or bias)"
            break


def _obstacles(program: Program) -> Iterator[str]:
    yield from source_obstacles(program)
    config, sites = program.config, program.site_list
    for site in sites:
        reasons = [f"layer {site.layer}: {reason}" for reason in _site_obstacles(site)]
        yield from reasons
        if reasons:
            return
    if resized_maps(program):
        yield "MLPs were shrunk"
    if not sites:
        return
    latents = [_latent_of(site) for site in sites]
    widths = {
        "latent ranks": {latent.kv_lora_rank for latent in latents},
        "unrotated query widths": {latent.d_nope for latent in latents},
        "rotary widths": {latent.d_rope for latent in latents},
        "value widths": {site.d_v for site in sites},
        "numbers of heads": {site.heads for site in sites},
    }
    for what, sizes in widths.items():
        if len(sizes) > 1:
            yield f"{what} differ between layers ({', '.join(map(str, sorted(sizes)))})"
    tables = {s.rope.inv_freq for s in sites if s.rope}
    if len(tables) > 1:
        yield f"{len(tables)} different rope tables, the class has one"
    elif stock_rope(next(iter(tables)), config, _context(config)) is None:
        yield "the rope table holds an angle of zero"


def _site_obstacles(site: AttentionSite) -> Iterator[str]:
    latent = site.latent
    if latent is None:
        yield f"attention is {site.kind}, not mla"
        return
    if latent.encoder != "hidden" or site.q_norm or site.k_norm:
        yield "queries or keys are normalised"
    if latent.q is None or latent.kv_a_norm is not None:
        yield "queries are compressed or the latent is normalised already"
    if site.route is not None:
        yield "its heads are routed"
    if not latent.lane:
        yield "the latent has no constant lane to neutralise the class's norm"
    if site.rope is None or site.rope.style != "interleaved" or site.rope.dim != latent.d_rope:
        yield "the rotary part is not the class's"


def build(program: Program, dtype: torch.dtype | None = None) -> Emission:
    """Configuration and tensors of the stock class.

    Args:
        program: a Program that `can_emit` accepts.
        dtype: type to be written; None for the source's.

    Raises:
        UnsupportedError: if `can_emit` refuses it.
    """
    dtype = dtype or source_dtype(program)
    refusal = can_emit(program, dtype)
    if refusal:
        raise UnsupportedError(str(refusal), "use --emit attnopt, the model class that comes with attnopt")
    values = _other_values(program)
    queries = [_latent_of(site).q for site in program.site_list]
    biased = any(query.bias is not None for query in queries if query)
    shortfall = 0.0
    for site in program.site_list:
        tensors, worst = _layer(program, site, dtype, biased)
        values |= {f"model.layers.{site.layer}.self_attn.{name}": value for name, value in tensors.items()}
        shortfall = max(shortfall, worst)
    config, how = _config(program, dtype, biased)
    values = typed(values, dtype)
    cached = sum(site.cached_numbers_per_token for site in program.site_list)
    notes = (
        f"rope: {how}",
        f"the latent norm shrinks a latent by at most {shortfall:.1e} of its size, for any text (constant lane)",
    )
    emission = Emission(TARGET, "DeepseekV3ForCausalLM", config.to_diff_dict(), values, cached, notes)
    return replace(emission, config=_checked(emission, config))


def _checked(emission: Emission, config: Any) -> dict[str, Any]:
    """Compare with the class's own declaration, and return the configuration as it is to be written."""
    from transformers import DeepseekV3ForCausalLM

    with torch.device("meta"):
        declared = DeepseekV3ForCausalLM(config).state_dict()
    check_complete(emission, declared, {"lm_head.weight"} if config.tie_word_embeddings else set())
    return {**emission.config, "architectures": [emission.architecture]}


def source_dtype(program: Program) -> torch.dtype:
    """Type of the source's weights, as its configuration says; float32 if it says nothing."""
    name = str(program.config.get("dtype") or program.config.get("torch_dtype") or "float32").removeprefix("torch.")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)


def _context(config: Any) -> int:
    return int(config["max_position_embeddings"])


def _other_values(program: Program) -> dict[str, Value]:
    """Everything outside attention, under the stock names; fused gate and up matrices (Phi-3) are split."""
    values: dict[str, Value] = {}
    for name, value in outside_attention(program).items():
        if name.endswith(".mlp.gate_up_proj.weight"):
            prefix, half = name.removesuffix("gate_up_proj.weight"), program.weights.meta(name).shape[0] // 2
            values[prefix + "gate_proj.weight"] = Derived.of("rows", value, start=0, stop=half)
            values[prefix + "up_proj.weight"] = Derived.of("rows", value, start=half, stop=2 * half)
        else:
            values[name] = value
    return values


def _latent_of(site: AttentionSite) -> LatentSpec:
    if site.latent is None:
        raise UnsupportedError(f"{site.fqn} is not an mla layer", "convert the model first")
    return site.latent


def _input_gain(program: Program, site: AttentionSite) -> torch.Tensor:
    return program.weights.get(f"model.layers.{site.layer}.input_layernorm.weight", torch.float64)


def _latent_lane(program: Program, site: AttentionSite, dtype: torch.dtype) -> Lane:
    latent = _latent_of(site)
    channels = latent.kv_lora_rank - 1
    encoder = evaluate(Derived.of("rows", weight_of(program.weights, latent.kv_a), start=0, stop=channels))
    offset = bias_of(program.weights, latent.kv_a)
    bound = largest_norm(encoder, None if offset is None else evaluate(offset)[:channels], _input_gain(program, site))
    if dtype == torch.float16 and latent.peak:
        # No room for the bound over all texts: twice what calibration text showed must do.
        bound = min(bound, 2 * latent.peak)
    typical = latent.peak / latent.kv_lora_rank**0.5
    return make_lane(channels, bound, dtype, typical)


def _layer(program: Program, site: AttentionSite, dtype: torch.dtype, biased: bool) -> tuple[dict[str, Value], float]:
    """Tensors of one attention layer by their names below `self_attn.`, and the worst relative shrink by a norm."""
    store, latent, rope = program.weights, _latent_of(site), site.rope
    rank, d_q = latent.kv_lora_rank, latent.d_nope + latent.d_rope
    turn = rope.attention_scaling if rope else 1.0
    # The class divides by sqrt(d_q) and does not scale cos and sin: both go into the rows that feed them.
    stretch = site.scale * d_q**0.5
    lane = _latent_lane(program, site, dtype)
    width = program.config["hidden_size"]

    bias = bias_of(store, latent.kv_a)
    if bias is None:
        raise UnsupportedError(f"{site.fqn}: a constant lane needs a bias", "this Program was not made by to-mla")
    one = float(evaluate(bias)[rank - 1])
    encoder = weight_of(store, latent.kv_a)
    if one == 0.0 or evaluate(Derived.of("rows", encoder, start=rank - 1, stop=rank)).any():
        raise UnsupportedError(f"{site.fqn}: its lane is not constant", "refit must leave the lane alone")
    if turn != 1.0:
        encoder = Derived.of("scale_rows", encoder, heads=1, first=1.0, rest=turn, split=rank)
        bias = Derived.of("scale_rows", bias, heads=1, first=1.0, rest=turn, split=rank)
    tensors: dict[str, Value] = {
        "kv_a_proj_with_mqa.weight": encoder,
        "kv_a_proj_with_mqa.bias": Derived.of("with_entry", bias, index=rank - 1, value=lane.bias),
        "kv_a_layernorm.weight": Derived.of(
            "lane_norm", channels=rank - 1, weight=lane.weight, lane_weight=lane.lane_weight
        ),
        "kv_b_proj.weight": Derived.of(
            "lane_columns", weight_of(store, latent.kv_b), channels=1 / lane.gain, lane=one / lane.value
        ),
        "o_proj.weight": weight_of(store, site.o),
        "o_proj.bias": bias_of(store, site.o) or Derived.of("zeros", shape=(width,), dtype=torch.float32),
    }
    shortfall = lane.shortfall

    def query(value: Value) -> Value:
        if stretch == 1.0 and turn == 1.0:
            return value
        rows = {"heads": site.heads, "first": stretch, "rest": stretch * turn, "split": latent.d_nope}
        return Derived.of("scale_rows", value, **rows)

    projection = latent.q
    if projection is None:
        raise UnsupportedError(f"{site.fqn}: queries are compressed", "use --emit attnopt")
    if not biased:
        tensors["q_proj.weight"] = query(weight_of(store, projection))
        return tensors, shortfall
    # The attention input is a normalised vector times the norm's weight: its length has a limit, too.
    gain = _input_gain(program, site)
    limit = float(gain.abs().max()) * width**0.5
    q_lane = make_lane(width, limit, dtype, typical=limit / width**0.5)
    q_bias = bias_of(store, projection) or Derived.of("zeros", shape=(site.heads * d_q,), dtype=torch.float32)
    column = Derived.of("reshape", query(q_bias), shape=(site.heads * d_q, 1))
    rows = Derived.of("cat", query(weight_of(store, projection)), column, dim=1)
    zero = Derived.of("zeros", shape=(width + 1,), dtype=torch.float32)
    tensors |= {
        "q_a_proj.weight": Derived.of("identity_and_lane", width=width, dtype=dtype),
        "q_a_proj.bias": Derived.of("with_entry", zero, index=width, value=q_lane.bias),
        "q_a_layernorm.weight": Derived.of(
            "lane_norm", channels=width, weight=q_lane.weight, lane_weight=q_lane.lane_weight
        ),
        "q_b_proj.weight": Derived.of("lane_columns", rows, channels=1 / q_lane.gain, lane=1 / q_lane.value),
    }
    return tensors, max(shortfall, q_lane.shortfall)


def _config(program: Program, dtype: torch.dtype, biased: bool) -> tuple[Any, str]:
    from transformers import DeepseekV3Config

    source, site = program.config, program.site_list[0]
    latent = _latent_of(site)
    found = stock_rope(site.rope.inv_freq if site.rope else (), source, _context(source))
    if found is None:
        raise UnsupportedError("no rope table of the stock class is this one", "use --emit attnopt")
    fields: dict[str, Any] = {name: source[name] for name in _KEPT if name in source}
    fields |= {**_UNUSED_EXPERTS, "tie_word_embeddings": is_tied(program)}
    config = DeepseekV3Config(
        **fields,
        num_attention_heads=site.heads,
        num_key_value_heads=site.heads,
        q_lora_rank=source["hidden_size"] + 1 if biased else None,
        kv_lora_rank=latent.kv_lora_rank,
        qk_nope_head_dim=latent.d_nope,
        qk_rope_head_dim=latent.d_rope,
        v_head_dim=site.d_v,
        attention_bias=True,
        rope_interleave=True,
        rope_parameters=found[0],
        first_k_dense_replace=source["num_hidden_layers"],
        num_mtp_layers=0,
        dtype=dtype,
    )
    return config, found[1]
