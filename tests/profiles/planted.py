"""A small Llama with structure planted in its heads, for the profiler to find.

Four layers of six query heads in three groups. The hidden state holds, in parts of its own: a constant, the token, and
the token before (written by a head of layer 0). The rotary table turns half of a head's pairs quickly and half so
slowly that they count as unrotated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, D_HEAD, HEADS, GROUPS, LAYERS = 64, 32, 6, 3, 4
HIDDEN = 192
CONSTANT = 0
TOKEN = slice(32, 48)
BEFORE = slice(64, 80)

#: (layer, head) of what is planted.
LOCAL = (0, 0)  # looks at the token before, and writes it into BEFORE
DEAD = (1, 4)
COPY = (1, 0)
DUPLICATE = (2, 3)  # the same as (2, 2)
TWINS = (2, 3)  # layers with equal maps, heads in another order
ORDER = (5, 4, 1, 0, 3, 2)  # head i of layer 3 is head ORDER[i] of layer 2


def planted_model() -> LlamaForCausalLM:
    """The model, in float32 and eval mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=D_HEAD, max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8}, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.fill_(1.0)
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3 * p.shape[-1] ** -0.5)
        _embed(model, generator)
        for layer in model.model.layers:
            # The stream stays as it is but for what heads write: then what is planted is exact enough to be named.
            layer.mlp.down_proj.weight.mul_(0.01)
            layer.self_attn.o_proj.weight.mul_(0.02)
            layer.self_attn.o_proj.weight[CONSTANT] = 0
            layer.self_attn.q_proj.weight.mul_(6.0)
        _plant_local(model)
        _plant_copy(model)
        attention = model.model.layers[DEAD[0]].self_attn
        attention.o_proj.weight[:, _head(DEAD[1])] = 0
        _plant_duplicate(model)
        _plant_twins(model)
    return model


def _head(index: int) -> slice:
    return slice(index * D_HEAD, (index + 1) * D_HEAD)


def _embed(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    codes = torch.randn(VOCAB, TOKEN.stop - TOKEN.start, generator=generator)
    embedding = 0.05 * torch.randn(VOCAB, HIDDEN, generator=generator)
    embedding[:, BEFORE] = 0
    embedding[:, CONSTANT] = 2.0
    embedding[:, TOKEN] = 2 * codes / codes.norm(dim=1, keepdim=True)
    model.model.embed_tokens.weight.copy_(embedding)


def _inv_freq(model: LlamaForCausalLM) -> Tensor:
    return model.model.rotary_emb.inv_freq


def _plant_local(model: LlamaForCausalLM) -> None:
    """Queries turned on by one position against keys, both from the constant: the largest logit is at distance one."""
    attention = model.model.layers[LOCAL[0]].self_attn
    pairs, strength = D_HEAD // 2, 30.0
    angle = -_inv_freq(model)  # a query turned back by one position meets the key before it
    query, key, value = torch.zeros(D_HEAD, HIDDEN), torch.zeros(D_HEAD, HIDDEN), torch.zeros(D_HEAD, HIDDEN)
    query[:pairs, CONSTANT], query[pairs:, CONSTANT] = strength * angle.cos(), strength * angle.sin()
    key[:pairs, CONSTANT] = 1.0
    value[: TOKEN.stop - TOKEN.start, TOKEN] = torch.eye(TOKEN.stop - TOKEN.start)
    attention.q_proj.weight[_head(LOCAL[1])] = query
    attention.k_proj.weight[_head(0)] = key
    attention.v_proj.weight[_head(0)] = value
    out = torch.zeros(HIDDEN, D_HEAD)
    out[BEFORE, : TOKEN.stop - TOKEN.start] = torch.eye(TOKEN.stop - TOKEN.start)
    attention.o_proj.weight[:, _head(LOCAL[1])] = out
    # What the group's other head adds must not reach the part that holds the token before.
    attention.o_proj.weight[BEFORE] *= 0
    attention.o_proj.weight[BEFORE, : TOKEN.stop - TOKEN.start] = torch.eye(TOKEN.stop - TOKEN.start)


def _plant_copy(model: LlamaForCausalLM) -> None:
    """Queries hold the token, keys the token before, in pairs that hardly turn: it looks at what came next."""
    attention = model.model.layers[COPY[0]].self_attn
    slow = _inv_freq(model).argsort()[:8]
    query, key = torch.zeros(D_HEAD, HIDDEN), torch.zeros(D_HEAD, HIDDEN)
    places = torch.cat([slow, slow + D_HEAD // 2])
    query[places, TOKEN] = 25.0 * torch.eye(16)
    key[places, BEFORE] = torch.eye(16)
    attention.q_proj.weight[_head(COPY[1])] = query
    attention.k_proj.weight[_head(0)] = key


def _plant_duplicate(model: LlamaForCausalLM) -> None:
    attention = model.model.layers[DUPLICATE[0]].self_attn
    for weight, columns in ((attention.q_proj.weight, False), (attention.o_proj.weight, True)):
        view = weight.T if columns else weight
        view[_head(DUPLICATE[1])] = view[_head(DUPLICATE[1] - 1)].clone()


def _plant_twins(model: LlamaForCausalLM) -> None:
    """Layer 3 holds layer 2's queries and keys, its heads in another order, and sees nearly the same stream."""
    source, consumer = (model.model.layers[index].self_attn for index in TWINS)
    size = HEADS // GROUPS
    for place, head in enumerate(ORDER):
        consumer.q_proj.weight[_head(place)] = source.q_proj.weight[_head(head)]
        consumer.k_proj.weight[_head(place // size)] = source.k_proj.weight[_head(head // size)]
        consumer.v_proj.weight[_head(place // size)] = source.v_proj.weight[_head(head // size)]
    for index in TWINS[:1]:
        layer = model.model.layers[index]
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.o_proj.weight.mul_(1e-3)
