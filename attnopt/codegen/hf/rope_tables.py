"""Which `rope_parameters` make the stock class turn its pairs by a given table. mla-conversion section 5.2."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

TOLERANCE = 2e-6  # relative, per angle; the class computes its table in float32


def stock_rope(table: tuple[float, ...], config: Mapping[str, Any], context: int) -> tuple[dict[str, Any], str] | None:
    """Find parameters under which DeepSeek-V3's own rotary module has the table `table`.

    Tried in order: the source's own rule on every c-th frequency (table A) or on the fastest (table B), any other
    geometric table (B with a fitted base), and free factors (C, spelled as longrope). Each candidate is built and
    compared with the class's own rotary module; the first that agrees is taken.

    Args:
        table: inverse frequencies, one per pair.
        config: the source's configuration (its rope_parameters and head_dim).
        context: longest promised context; only names the point where longrope would switch tables (both are equal).

    Returns:
        (rope_parameters, short description), or None if no table of the class is this one.
    """
    for parameters, how in _candidates(table, config, context):
        if parameters_give(parameters, table, context):
            return parameters, how
    return None


def _candidates(
    table: tuple[float, ...], config: Mapping[str, Any], context: int
) -> Iterator[tuple[dict[str, Any], str]]:
    source = dict(config.get("rope_parameters") or {})
    base = float(source.get("rope_theta") or config.get("rope_theta") or 10000.0)
    width = 2 * len(table)
    head = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    head = int(head * float(source.get("partial_rotary_factor") or 1.0))
    rules = [({"rope_type": "default"}, "")]
    if source.get("rope_type") in ("llama3", "linear"):
        kept = {key: value for key, value in source.items() if key not in ("rope_theta", "partial_rotary_factor")}
        rules.insert(0, (kept, f" with the source's {source['rope_type']} rule"))
    for rule, suffix in rules:
        yield {**rule, "rope_theta": base}, f"evenly spaced frequencies of the source{suffix}"
        yield {**rule, "rope_theta": base ** (width / head)}, f"the {len(table)} fastest frequencies{suffix}"
    if len(table) > 1 and 0 < table[1] < table[0]:
        fitted = math.exp(math.log(table[0] / table[-1]) * width / (width - 2))
        yield {"rope_type": "default", "rope_theta": fitted}, "a geometric table"
    if all(value > 0 for value in table):
        shape = [base ** (2 * m / width) for m in range(len(table))]
        factors = [1.0 / (value * step) for value, step in zip(table, shape, strict=True)]
        longrope = {
            "rope_type": "longrope",
            "rope_theta": base,
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": context,
        }
        yield longrope, f"a free table of {len(table)} frequencies"


def parameters_give(parameters: dict[str, Any], table: tuple[float, ...], context: int) -> bool:
    """True if the class's rotary module, built from `parameters`, turns pair m by table[m] and scales by 1."""
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    config = DeepseekV3Config(
        hidden_size=8,
        num_attention_heads=1,
        num_key_value_heads=1,
        qk_rope_head_dim=2 * len(table),
        max_position_embeddings=context,
        rope_parameters=dict(parameters),
    )
    rotary = DeepseekV3RotaryEmbedding(config)
    wanted = torch.tensor(table, dtype=torch.float64)
    got = rotary.inv_freq.double()
    near = bool(((got - wanted).abs() <= TOLERANCE * wanted.abs()).all())
    return near and rotary.attention_scaling == 1.0
