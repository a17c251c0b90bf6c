"""Our own class `attnopt`: what stock classes cannot say (free tables, sizes per layer, shared and routed heads)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from attnopt.codegen.hf.deepseek_v3 import scale_rows, source_dtype
from attnopt.codegen.hf.emission import (
    Emission,
    Refusal,
    bias_of,
    check_complete,
    is_rewritten,
    is_tied,
    outside_attention,
    typed,
    weight_of,
)
from attnopt.codegen.hf.grouped import grouped_layer, grouped_obstacles, lenders, resized_maps, route_record
from attnopt.errors import UnsupportedError
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite, LatentSpec, NormSpec, Projection
from attnopt.rewriter.weights import Derived, Value, meta_of

TARGET = "attnopt"
FILES = ("configuration_attnopt.py", "modeling_attnopt.py", "heads_attnopt.py")


def can_emit(program: Program) -> Refusal | None:
    """Say why our class cannot hold a Program, or None if it can. Layers that were not converted stay as they were."""
    reasons = tuple(_obstacles(program))
    return Refusal(TARGET, reasons) if reasons else None


def source_obstacles(program: Program) -> Iterator[str]:
    """What in a model, converted or not, our class cannot hold."""
    from attnopt.codegen.hf.configuration_attnopt import BACKBONES, ENCODERS

    if program.model_type not in (*BACKBONES, *ENCODERS):
        yield f"architecture {program.model_type} is not one of {', '.join((*BACKBONES, *ENCODERS))}"
    elif program.model_type in ENCODERS and _encoder_class(program) is None:
        yield f"of {program.model_type} only the encoder and image classifiers can be written"


def _encoder_class(program: Program) -> str | None:
    """Class of ours that holds an encoder: by the class it was captured from."""
    named = (program.config.get("architectures") or [""])[0]
    classifies = program.outputs[0] == "logits" and "pixel_values" in program.inputs
    if named.endswith("ForImageClassification") or classifies:
        return "AttnoptForImageClassification"
    return "AttnoptModel" if program.outputs[0] == "last_hidden_state" else None


def _obstacles(program: Program) -> Iterator[str]:
    yield from source_obstacles(program)
    if not any(is_rewritten(program, site) for site in program.site_list) and not resized_maps(program):
        yield "no attention layer was rewritten"
    for site in program.site_list:
        latent, mask = site.latent, site.mask
        if latent is None:
            if is_rewritten(program, site) or site.fqn in lenders(program):
                yield from grouped_obstacles(program, site, _window_of(program.config, site.layer))
            continue
        if (latent.q is None and site.q is None) or latent.q_a is not None or latent.kv_a_norm is not None:
            yield f"layer {site.layer}: queries are compressed or the latent is normalised"
        # One pair is the same in both styles, and is read back as the other.
        style = "interleaved" if latent.d_rope == 2 else site.rope and site.rope.style
        if site.rope is None or style != "interleaved" or site.rope.dim != latent.d_rope:
            yield f"layer {site.layer}: the rotary part is not interleaved or not of the declared width"
        if not mask.causal or mask.softcap or mask.sinks or mask.bias or mask.alibi:
            yield f"layer {site.layer}: a softcap, sinks, bias or a mask that is not causal"
        if mask.window != _window_of(program.config, site.layer):
            yield f"layer {site.layer}: window {mask.window} is not the one the source architecture applies"
        norms = (site.q_norm, site.k_norm)
        if latent.encoder == "normed_kv" and not all(_is_head_norm(norm) for norm in norms):
            yield f"layer {site.layer}: q/k norms other than an RMS norm per head"


def _is_head_norm(norm: NormSpec | None) -> bool:
    return (
        norm is not None and norm.kind == "rms" and norm.scope == "head" and norm.weight is not None
        and norm.bias is None and not norm.unit_offset
    )  # fmt: skip


def _window_of(config: Mapping[str, Any], layer: int) -> int | None:
    """The window the backbone's own mask has in a layer; our class relies on that mask."""
    types, window = config.get("layer_types"), config.get("sliding_window")
    if types:
        return window if types[layer] == "sliding_attention" else None
    return window if config.get("use_sliding_window", True) else None


def build(program: Program, dtype: torch.dtype | None = None) -> Emission:
    """Configuration and tensors of our class.

    Args:
        program: a Program that `can_emit` accepts.
        dtype: type to be written; None for the source's.

    Raises:
        UnsupportedError: if `can_emit` refuses it.
    """
    refusal = can_emit(program)
    if refusal:
        raise UnsupportedError(str(refusal), "convert a model of a listed architecture")
    dtype = dtype or source_dtype(program)
    encoder = _encoder_class(program)
    # Our class holds an encoder as `model`; of one that was read back, the names say so already.
    prefix = "" if encoder is None or program.site_list[0].fqn.startswith("model.") else "model."
    tables: list[tuple[float, ...]] = []
    records: list[dict[str, Any] | None] = []
    values = {prefix + name: value for name, value in outside_attention(program).items()}
    lending = lenders(program)
    for site in program.site_list:
        tensors: Mapping[str, Value]
        if site.latent is not None:
            table = site.rope.inv_freq if site.rope else ()
            if table not in tables:
                tables.append(table)
            tensors, record = _layer(program, site, site.latent)
            records.append({**record, "kind": "latent", "rope_table": tables.index(table)})
        elif is_rewritten(program, site) or site.fqn in lending:
            tensors, record = grouped_layer(program, site)
            records.append(record)
        else:
            inside = f"{site.fqn}."
            tensors = {n.removeprefix(inside): program.weights[n] for n in program.weight_names if n.startswith(inside)}
            tensors = {n: v for n, v in tensors.items() if meta_of(v).dtype.is_floating_point}
            records.append(None)
        values |= {f"{prefix}{site.fqn}.{name}": value for name, value in tensors.items()}
    for beside in [one["instead_of"] for one in records if one and one.get("instead_of")]:
        if beside:
            gone = f"model.{beside}."
            values = {name: value for name, value in values.items() if not name.startswith(gone)}
    paths = [site.fqn.removeprefix("model.") for site in program.site_list]
    head_ids = {p: list(site.head_ids) for p, site in zip(paths, program.site_list, strict=True) if site.head_ids}
    if encoder is None:
        everywhere = range(program.config["num_hidden_layers"])
        by_path = dict(zip(paths, records, strict=True))
        records, paths = [by_path.get(f"layers.{i}.self_attn") for i in everywhere], []
    resized = {name.removeprefix("model."): size for name, size in resized_maps(program).items()}
    config = _config(program, records, tables, dtype, paths or None, resized, head_ids)
    cached = sum(site.cached_numbers_per_token for site in program.site_list)
    architecture = encoder or "AttnoptForCausalLM"
    auto = architecture.replace("Attnopt", "AutoModel", 1).replace("AutoModelModel", "AutoModel")
    emission = Emission(
        TARGET, architecture, config.to_diff_dict(), typed(values, dtype), cached, _notes(program, tables)
    )
    _check(emission, config)
    emission.config.update(
        architectures=[emission.architecture],
        auto_map={"AutoConfig": "configuration_attnopt.AttnoptConfig", auto: f"modeling_attnopt.{architecture}"},
    )
    return emission


def _notes(program: Program, tables: list[tuple[float, ...]]) -> tuple[str, ...]:
    notes = []
    if tables:
        notes.append(f"{len(tables)} rope table{'s' if len(tables) > 1 else ''}, no latent norm, absorbed decode")
    shared = [site.share.edge for site in program.site_list if site.share is not None]
    if shared:
        what = "attention map" if shared[0] == "map" else "keys and values"
        notes.append(f"{len(shared)} layers read an earlier layer's {what}")
    if any(site.route is not None for site in program.site_list):
        notes.append(
            "routed heads are computed and then left out: fewer heads cost less only where a kernel skips them"
        )
    return tuple(notes)


def _check(emission: Emission, config: Any) -> None:
    from attnopt.codegen.hf import modeling_attnopt

    with torch.device("meta"):
        declared = getattr(modeling_attnopt, emission.architecture)(config).state_dict()
    check_complete(emission, declared, {"lm_head.weight"} if config.tie_word_embeddings else set())


def _layer(program: Program, site: AttentionSite, latent: LatentSpec) -> tuple[dict[str, Value], dict[str, Any]]:
    """Tensors of one layer by their names below `self_attn.`, and its record (without the table's index)."""
    store = program.weights
    turn = site.rope.attention_scaling if site.rope else 1.0
    d_q = latent.d_nope + latent.d_rope
    named: dict[str, Projection | None] = {"kv_a_proj": latent.kv_a, "kv_b_proj": latent.kv_b, "o_proj": site.o}
    named |= {"q_proj": latent.q} if latent.encoder == "hidden" else {}
    record: dict[str, Any] = {
        "heads": site.heads,
        "d_nope": latent.d_nope,
        "d_rope": latent.d_rope,
        "d_v": site.d_v,
        "kv_lora_rank": latent.kv_lora_rank,
        "scale": site.scale,
        "encoder": latent.encoder,
    }
    tensors: dict[str, Value] = {}
    if latent.encoder == "normed_kv":
        q, k, v = latent.q or site.q, site.k, site.v
        if q is None or k is None or v is None or latent.q_map is None or not (site.q_norm and site.k_norm):
            raise UnsupportedError(f"{site.fqn}: a normed_kv encoder without its parts", "this is not a to-mla result")
        named |= {"q_proj": q, "k_proj": k, "v_proj": v}
        groups = k.out_features // store.meta(str(site.k_norm.weight)).shape[0]
        record |= {
            "kv_heads": groups,
            "d_qk": k.out_features // groups,
            "d_kv_value": v.out_features // groups,
            "norm_eps": site.k_norm.eps,
            "kv_bias": k.bias is not None,
        }
        tensors["q_norm.weight"] = store[str(site.q_norm.weight)]
        tensors["k_norm.weight"] = store[str(site.k_norm.weight)]
        tensors["q_map.weight"] = store[latent.q_map]
    for name, projection in named.items():
        if projection is None:
            raise UnsupportedError(f"{site.fqn}: no {name}", "this is not a to-mla result")
        tensors[f"{name}.weight"] = weight_of(store, projection)
        bias = bias_of(store, projection)
        if bias is not None:
            tensors[f"{name}.bias"] = bias
    record |= {f"{short}_bias": f"{short}_proj.bias" in tensors for short in ("q", "kv_a", "o")}
    if turn != 1.0:
        _fold_scaling(tensors, site.heads, latent, d_q, turn)
    if site.route is not None:
        record["route"], routed = route_record(program, site)
        tensors |= routed
    return tensors, record


def _fold_scaling(tensors: dict[str, Value], heads: int, latent: LatentSpec, d_q: int, turn: float) -> None:
    """Move the factor on cos and sin (YaRN, longrope) into the rows that are rotated."""

    def scaled(value: Value, groups: int, split: int) -> Value:
        return Derived.of(scale_rows.__name__, value, heads=groups, first=1.0, rest=turn, split=split)

    for part in ("weight", "bias"):
        if f"kv_a_proj.{part}" in tensors:
            tensors[f"kv_a_proj.{part}"] = scaled(tensors[f"kv_a_proj.{part}"], 1, latent.kv_lora_rank)
        if latent.encoder == "hidden" and f"q_proj.{part}" in tensors:
            tensors[f"q_proj.{part}"] = scaled(tensors[f"q_proj.{part}"], heads, latent.d_nope)
    if latent.encoder == "normed_kv":
        d = meta_of(tensors["q_map.weight"]).shape[-1]
        flat = Derived.of("reshape", tensors["q_map.weight"], shape=(heads * d_q, d))
        tensors["q_map.weight"] = Derived.of("reshape", scaled(flat, heads, latent.d_nope), shape=(heads, d_q, d))


def _config(
    program: Program,
    records: list[dict[str, Any] | None],
    tables: list[tuple[float, ...]],
    dtype: torch.dtype,
    paths: list[str] | None,
    resized: dict[str, list[int]],
    head_ids: dict[str, list[int]],
) -> Any:
    from attnopt.codegen.hf.configuration_attnopt import AttnoptConfig

    dropped = ("dtype", "torch_dtype", "architectures", "transformers_version", "_name_or_path", "auto_map")
    text = {name: value for name, value in program.config.items() if name not in dropped}
    return AttnoptConfig(
        text_config={**text, "model_type": program.model_type, "tie_word_embeddings": is_tied(program)},
        layers=records,
        rope_tables=[list(table) for table in tables],
        paths=paths,
        resized=resized,
        head_ids=head_ids,
        dtype=dtype,
    )
