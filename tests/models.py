"""Tiny random models of every family attnopt knows: fixed configs, fixed seeds, made in milliseconds.

`FAMILIES` lists the names; `build(name)` makes a model, `inputs(name)` its inputs, `captured(name)` its Program, and
`save(name, directory)` writes a model directory as transformers does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from attnopt.rewriter.capture import capture_module
from attnopt.rewriter.program import Program

VOCAB = 96


@dataclass(frozen=True)
class Family:
    """How to make one tiny model.

    Attributes:
        config, model: names of transformers classes.
        options: arguments of the config.
        inputs: "text", "padded" (encoder with a padding mask) or "image".
    """

    config: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: str = "text"


_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_BASE, "num_key_value_heads": 2}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "mscale": 1.0, "mscale_all_dim": 0.0, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
_MLA = {
    **_BASE, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 12, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 6, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_BERT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM", _GQA),
    "llama-mha": Family("LlamaConfig", "LlamaForCausalLM", {**_BASE, "num_key_value_heads": 4}),
    "llama-mqa": Family("LlamaConfig", "LlamaForCausalLM", {**_BASE, "num_key_value_heads": 1}),
    "llama-llama3": Family("LlamaConfig", "LlamaForCausalLM", {**_GQA, "rope_parameters": _LLAMA3}),
    "llama-tied": Family("LlamaConfig", "LlamaForCausalLM", {**_GQA, "tie_word_embeddings": True}),
    "llama-wide-heads": Family("LlamaConfig", "LlamaForCausalLM", {**_GQA, "head_dim": 16}),
    "mistral": Family("MistralConfig", "MistralForCausalLM", {**_GQA, "sliding_window": 5}),
    "mistral-full": Family("MistralConfig", "MistralForCausalLM", {**_GQA, "sliding_window": None}),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM", _GQA),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", {**_GQA, "head_dim": 8}),
    "gemma2": Family(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**_GQA, "head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 12},
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **_GQA,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "sliding_window": 5,
            "query_pre_attn_scalar": 12,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "phi3": Family("Phi3Config", "Phi3ForCausalLM", {**_GQA, "sliding_window": None}),
    "phi3-partial": Family(
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            **_GQA,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "olmo2": Family("Olmo2Config", "Olmo2ForCausalLM", _GQA),
    "mixtral": Family("MixtralConfig", "MixtralForCausalLM", {**_GQA, "num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_GQA, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "deepseek_v2": Family("DeepseekV2Config", "DeepseekV2ForCausalLM", _MLA),
    "deepseek_v2-lite": Family("DeepseekV2Config", "DeepseekV2ForCausalLM", {**_MLA, "q_lora_rank": None}),
    "deepseek_v3": Family("DeepseekV3Config", "DeepseekV3ForCausalLM", _MLA),
    "deepseek_v3-yarn": Family("DeepseekV3Config", "DeepseekV3ForCausalLM", {**_MLA, "rope_parameters": _YARN}),
    "deepseek_v3-half": Family("DeepseekV3Config", "DeepseekV3ForCausalLM", {**_MLA, "rope_interleave": False}),
    "deepseek_v2-yarn": Family("DeepseekV2Config", "DeepseekV2ForCausalLM", {**_MLA, "rope_parameters": _YARN}),
    "gpt2": Family(
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": Family("GPTNeoXConfig", "GPTNeoXForCausalLM", _BASE),
    "opt": Family("OPTConfig", "OPTForCausalLM", {**_BASE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon": Family("FalconConfig", "FalconForCausalLM", {**_BASE, "multi_query": True}),
    "falcon-new": Family(
        "FalconConfig",
        "FalconForCausalLM",
        {**_BASE, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "bert": Family("BertConfig", "BertModel", _BERT, "padded"),
    "roberta": Family("RobertaConfig", "RobertaModel", {**_BERT, "pad_token_id": 1}, "padded"),
    "vit": Family(
        "ViTConfig",
        "ViTModel",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
        "image",
    ),
    "swin": Family(
        "SwinConfig",
        "SwinModel",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2},
        "image",
    ),
}


def config(name: str, **changes: Any) -> tf.PretrainedConfig:
    """The config of a family, with some of its options changed."""
    family = FAMILIES[name]
    return getattr(tf, family.config)(**{**family.options, **changes})


def build(name: str, seed: int = 0, **changes: Any) -> tf.PreTrainedModel:
    """A tiny random model in eval mode, in float32.

    Weights are larger than transformers' own initialisation and norm gains and biases are random, so that every
    weight matters in the output.

    Args:
        name: one of `FAMILIES`.
        seed: of the weights.
        changes: options of the config to change.
    """
    torch.manual_seed(seed)
    make: Callable[[Any], tf.PreTrainedModel] = getattr(tf, FAMILIES[name].model)
    model = make(config(name, **changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim >= 2:
                p.copy_(noise * p.shape[-1] ** -0.5)
            else:
                p.add_(noise * 0.2)
    return model


def inputs(name: str, batch: int = 2, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of a family. Padded families get right padding in every row but the first."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    if family.inputs == "image":
        size = family.options["image_size"]
        return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator)}
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    if family.inputs == "text":
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, max(1, length - 2 * row) :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def save(name: str, directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny model as a Hugging Face directory and return it."""
    build(name, seed, **changes).save_pretrained(directory)
    return directory


@functools.cache
def captured(name: str) -> tuple[tf.PreTrainedModel, Program]:
    """A family's model and its Program, captured once per process. Neither may be modified."""
    model = build(name)
    return model, capture_module(model)


def eager_output(model: tf.PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The first output of the model itself, with transformers' plain attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model(**batch)[0]
    finally:
        model.set_attn_implementation(before)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
