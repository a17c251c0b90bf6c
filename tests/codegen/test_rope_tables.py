"""Rope tables of the stock class: the right kind is found and the class's own module agrees."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from attnopt.codegen.hf.rope_tables import parameters_give, stock_rope

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def source(parameters: dict, head_dim: int = 64) -> tuple[dict, torch.Tensor]:
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        rope_parameters=dict(parameters),
        max_position_embeddings=131072,
    )
    return config.to_dict(), LlamaRotaryEmbedding(config).inv_freq.double()


@pytest.mark.parametrize("parameters", [{"rope_type": "default", "rope_theta": 1e5}, LLAMA3])
@pytest.mark.parametrize(
    ("pick", "rope_type"),
    [
        (slice(None, None, 2), None),  # A: every second frequency
        (slice(None, 24), None),  # B: the fastest
        (slice(None), None),
        (slice(3, 11), "longrope"),
    ],
)
def test_the_source_rule_is_kept_where_it_can_be(parameters: dict, pick: slice, rope_type: str | None) -> None:
    config, frequencies = source(parameters)
    table = tuple(frequencies[pick].tolist())
    found, _ = stock_rope(table, config, 131072)
    assert found["rope_type"] == (rope_type or parameters["rope_type"])
    assert parameters_give(found, table, 131072)


def test_any_list_is_possible_with_repeats() -> None:
    config, frequencies = source(LLAMA3)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))[:10]
    table = tuple(frequencies[torch.cat([order, order[:5]])].tolist())
    found, how = stock_rope(table, config, 4096)
    assert found["rope_type"] == "longrope"
    assert found["attention_factor"] == 1.0
    assert "15 frequencies" in how


def test_one_slot() -> None:
    config, frequencies = source({"rope_type": "default", "rope_theta": 1e4})
    for index in (0, 5):
        table = (float(frequencies[index]),)
        found, _ = stock_rope(table, config, 4096)
        assert parameters_give(found, table, 4096)


def test_an_angle_of_zero_has_no_table() -> None:
    config, _ = source({"rope_type": "default", "rope_theta": 1e4})
    assert stock_rope((1.0, 0.0), config, 4096) is None


def test_a_wrong_table_is_noticed() -> None:
    config, frequencies = source({"rope_type": "default", "rope_theta": 1e4})
    table = frequencies[:8].tolist()
    found, _ = stock_rope(tuple(table), config, 4096)
    table[3] *= 1 + 1e-5
    assert not parameters_give(found, tuple(table), 4096)
    every = tuple(frequencies.tolist())
    assert parameters_give({"rope_type": "default", "rope_theta": 1e4}, every, 131072)
    assert not parameters_give({**LLAMA3, "rope_theta": 1e4}, every, 131072)
    stretched = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0] * 8,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    }
    scaled = tuple((1e4 ** (-torch.arange(8).double() / 8)).tolist())
    assert not parameters_give(stretched, scaled, 4096), "cos and sin scaled by more than 1 are another table"
