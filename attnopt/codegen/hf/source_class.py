"""The source's own class: for results that differ from the source in values, or in sizes that its config can say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from attnopt.codegen.hf.deepseek_v3 import source_dtype
from attnopt.codegen.hf.emission import (
    Emission,
    Refusal,
    bias_of,
    canonical,
    check_complete,
    is_rewritten,
    is_tied,
    outside_attention,
    typed,
    weight_of,
)
from attnopt.codegen.hf.grouped import lenders, resized_maps
from attnopt.errors import UnsupportedError, VerificationError
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite
from attnopt.rewriter.weights import Derived, Value

TARGET = "source"

#: Architectures whose config says how many heads there are, apart from the width, with the projections' names.
_SPLIT = ("q_proj", "k_proj", "v_proj")
_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "llama": _SPLIT, "mistral": _SPLIT, "mixtral": _SPLIT, "qwen2": _SPLIT, "qwen3": _SPLIT, "qwen3_moe": _SPLIT,
    "phi3": ("qkv_proj",),
}  # fmt: skip
#: Of these, those whose output projection has a bias if `attention_bias` is set, as queries, keys and values then have.
_O_BIAS = ("llama", "qwen3", "qwen3_moe")


def can_resize(program: Program) -> bool:
    """Whether the source's config says how many heads there are, apart from the width."""
    return program.model_type in _PROJECTIONS


def can_emit(program: Program) -> Refusal | None:
    """Say why the source's class cannot hold a Program, or None if it can."""
    reasons = tuple(dict.fromkeys(_obstacles(program)))
    return Refusal(f"{program.model_type} (the source's class)", reasons) if reasons else None


def _obstacles(program: Program) -> Iterator[str]:
    changed = [site for site in program.site_list if is_rewritten(program, site)]
    if _model_class(program) is None:
        yield f"transformers has no class for {program.config.get('architectures')}"
    if any(site.latent is not None for site in changed):
        yield "latent attention"
    if lenders(program):
        yield "layers that read another layer's map, or keys and values"
    if any(site.route is not None for site in program.site_list):
        yield "routed heads"
    if any(site.kv_of for site in changed):
        yield "key/value heads that serve different numbers of heads"
    if changed and program.model_type not in _PROJECTIONS:
        yield f"{program.model_type} derives the width of its heads from their number"
        return
    if changed and len({(site.heads, site.kv_heads) for site in program.site_list}) > 1:
        yield "layers that differ in their heads"
    if any(site.o.bias for site in changed) and program.model_type not in _O_BIAS:
        yield f"{program.model_type} has no bias in its output projection (fill=lsq-nobias needs none)"
    sizes = _mlp_widths(program)
    if sizes and (program.model_type not in _PROJECTIONS or len(sizes) > 1):
        yield "MLPs that differ in width"
    if changed:
        yield from _config_obstacles(program)


def _mlp_widths(program: Program) -> set[int]:
    """Hidden widths of MLPs, if any was shrunk."""
    maps = resized_maps(program)
    if not maps:
        return set()
    shrunk = {size[1] for path, size in maps.items() if path.endswith("down_proj")}
    all_shrunk = sum(path.endswith("down_proj") for path in maps) == len(program.sites)
    return shrunk if all_shrunk else shrunk | {int(program.config["intermediate_size"])}


def _config_obstacles(program: Program) -> Iterator[str]:
    """What the config class itself objects to: some want the number of heads to divide the width."""
    try:
        _config(program)
    except Exception as error:  # each config class validates in its own way
        yield f"its config refuses the number of heads: {str(error).strip().splitlines()[-1]}"


def _model_class(program: Program) -> Any:
    import transformers

    named = (program.config.get("architectures") or [None])[0]
    if named is not None:
        return getattr(transformers, named, None)
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return getattr(transformers, mapping.get(program.model_type, ""), None) if program.outputs[0] == "logits" else None


def _config(program: Program) -> Any:
    from transformers import AutoConfig

    dropped = ("dtype", "torch_dtype", "architectures", "transformers_version", "_name_or_path", "model_type")
    fields = {name: value for name, value in program.config.items() if name not in dropped}
    first = program.site_list[0]
    if any(is_rewritten(program, site) for site in program.site_list):
        fields |= {"num_attention_heads": first.heads, "num_key_value_heads": first.kv_heads, "head_dim": first.d_qk}
        if first.o.bias is not None:
            fields["attention_bias"] = True
    widths = _mlp_widths(program)
    if widths:
        (fields["intermediate_size"],) = widths
    fields["tie_word_embeddings"] = is_tied(program)
    return AutoConfig.for_model(program.model_type, **fields)


def build(program: Program, dtype: torch.dtype | None = None) -> Emission:
    """Configuration and tensors of the source's class.

    Args:
        program: a Program that `can_emit` accepts.
        dtype: type to be written; None for the source's.

    Raises:
        UnsupportedError: if `can_emit` refuses it.
        VerificationError: the class declares other tensors than there are.
    """
    refusal = can_emit(program)
    if refusal:
        raise UnsupportedError(str(refusal), "use --emit auto or attnopt")
    dtype = dtype or source_dtype(program)
    config = _config(program)
    config.dtype = dtype
    cls = _model_class(program)
    values = dict(outside_attention(program))
    for site in program.site_list:
        inside = f"{site.fqn}."
        if is_rewritten(program, site):
            tensors = _layer(program, site, bool(getattr(config, "attention_bias", False)))
            values |= {inside + name: value for name, value in tensors.items()}
        else:
            names = [name for name in program.weight_names if canonical(name).startswith(inside)]
            values |= {n: program.weights[n] for n in names if program.weights.meta(n).dtype.is_floating_point}
    cached = program.cached_numbers_per_token
    emission = Emission(program.model_type, cls.__name__, config.to_diff_dict(), typed(values, dtype), cached)
    with torch.device("meta"):
        model = cls(config)
    buffers = {name for name, _ in model.named_buffers()}
    stored = {
        name: value for name, value in emission.values.items() if name not in buffers or name in model.state_dict()
    }
    aliases: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    aliases = aliases if config.tie_word_embeddings else {}
    for alias, name in aliases.items():
        if name not in stored and alias in stored:
            stored[name] = stored.pop(alias)
    tied = set(aliases)
    emission = Emission(emission.target, emission.architecture, emission.config, stored, cached)
    try:
        check_complete(emission, model.state_dict(), tied | {"lm_head.weight"} if config.tie_word_embeddings else tied)
    except VerificationError as error:
        raise VerificationError([f"{cls.__name__}: {line}" for line in error.violations]) from error
    emission.config.update(architectures=[emission.architecture], model_type=program.model_type)
    return emission


def _layer(program: Program, site: AttentionSite, biased: bool) -> Mapping[str, Value]:
    """Tensors of a rewritten layer under the source's names."""
    store = program.weights
    tensors: dict[str, Value] = {}
    for name, projection in (("q_proj", site.q), ("k_proj", site.k), ("v_proj", site.v), ("o_proj", site.o)):
        assert projection is not None
        tensors[f"{name}.weight"] = weight_of(store, projection)
        bias = bias_of(store, projection)
        if bias is None and biased and program.model_type in _O_BIAS:
            bias = Derived.of("zeros", shape=(projection.out_features,), dtype=torch.float32)
        if bias is not None:
            tensors[f"{name}.bias"] = bias
    for name, norm in (("q_norm", site.q_norm), ("k_norm", site.k_norm)):
        if norm is not None:
            tensors[f"{name}.weight"] = store[str(norm.weight)]
    if _PROJECTIONS[program.model_type] == ("qkv_proj",):
        fused = [tensors.pop(f"{name}.weight") for name in _SPLIT]
        tensors["qkv_proj.weight"] = Derived.of("cat", *fused, dim=0)
    return tensors
