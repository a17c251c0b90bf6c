"""Text that a model writes: sampled as the model says, with its cache, from any first word."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from attnopt.errors import UnsupportedError
from attnopt.profiles import writing
from attnopt.profiles.writing import (
    RoomyLayer,
    SingleQueries,
    known_words,
    roomy_cache,
    sample,
    self_sampled,
    sequence_starts,
)
from tests import models
from tests.profiles.test_calibration import BOS, Bytes


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


class Weights:
    def __init__(self, model: torch.nn.Module) -> None:
        self.state = model.state_dict()

    def get(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self.state[name].to(dtype, copy=True)


def source_of(model: Any) -> Any:
    """What `self_sampled` needs of a ModelSource, for a model in memory."""

    def skeleton(dtype: torch.dtype) -> Any:
        return type(model)(model.config).to(dtype).eval()

    return SimpleNamespace(
        model_class=type(model), config=model.config, skeleton=skeleton, weights=Weights(model), has_tokenizer=False
    )


def test_same_seed_same_text_other_seed_other_text() -> None:
    source = source_of(tiny_llama())
    one = self_sampled(source, tokens=8 * 16, context=16, seed=5)
    two = self_sampled(source, tokens=8 * 16, context=16, seed=5)
    other = self_sampled(source, tokens=8 * 16, context=16, seed=6)
    assert one.sha256 == two.sha256 != other.sha256
    assert one.source == "self"
    assert one.windows.shape == (7, 16)
    assert one.selection.shape == (1, 16)


def test_sequences_start_with_any_word() -> None:
    made = self_sampled(source_of(tiny_llama(bos_token_id=7)), tokens=32 * 8, context=8)
    first = torch.cat([made.windows, made.selection])[:, 0]
    assert len(first.unique()) > 20
    assert made.windows.min() >= 0
    assert made.windows.max() < 97


def test_what_the_tokenizer_puts_before_a_text_comes_first_and_special_words_are_not_drawn() -> None:
    source = source_of(tiny_llama(vocab_size=BOS + 1))
    source.has_tokenizer, source.tokenizer = True, lambda: Bytes(bos=True)
    prompts = sequence_starts(*known_words(source), 500, seed=1)
    assert prompts.shape == (500, 2)
    assert set(prompts[:, 0].tolist()) == {BOS}
    assert int(prompts[:, 1].max()) < len(Bytes())
    assert Bytes.all_special_ids[0] not in prompts[:, 1]
    made = self_sampled(source, tokens=8 * 16, context=16)
    assert set(made.windows[:, 0].tolist()) == {BOS}
    assert made.windows.shape == (7, 16)


def test_follows_the_model_s_distribution() -> None:
    """Second tokens after a fixed first one are distributed as the model says (total variation, 4096 draws)."""
    model = tiny_llama(bos_token_id=7, vocab_size=11)
    with torch.no_grad():
        model.lm_head.weight *= 40
        expected = torch.softmax(model(input_ids=torch.tensor([[7]])).logits[0, -1], dim=-1)
    drawn = sample(model, torch.full((4096, 1), 7), 2, seed=0)[:, 1]
    measured = torch.bincount(drawn, minlength=11) / len(drawn)
    assert expected.max() > 0.15
    assert 0.5 * (measured - expected).abs().sum() < 0.03


def test_cache_and_prefill_agree_on_what_was_sampled() -> None:
    """A near-deterministic model samples its own argmax, position by position."""
    model = tiny_llama(bos_token_id=7)
    with torch.no_grad():
        model.lm_head.weight *= 1e4
    ids = sample(model, torch.tensor([[7], [8], [9]]), 12, seed=0)
    with torch.no_grad():
        again = model(input_ids=ids).logits.argmax(-1)
    assert torch.equal(ids[:, 1:], again[:, :-1])


def test_batches_follow_the_memory_of_their_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(bos_token_id=7)
    per_window = 2 * 2 * 2 * 8 * 4 * 16  # keys and values, layers, heads, width, bytes, tokens
    assert writing.sampling_batch(model.config, 16, 4) == writing.SAMPLING_BATCH
    monkeypatch.setattr(writing, "SAMPLING_CACHE_BYTES", 3 * per_window)
    assert writing.sampling_batch(model.config, 16, 4) == 3
    monkeypatch.setattr(writing, "SAMPLING_CACHE_BYTES", 1)
    assert writing.sampling_batch(model.config, 16, 4) == 1
    assert sample(model, torch.full((5, 2), 7), 16, seed=0).shape == (5, 16)


def test_models_with_learned_positions_work() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    made = self_sampled(source_of(GPT2LMHeadModel(config).eval()), tokens=4 * 16, context=16)
    assert made.tokens == 64


def test_encoder_is_refused() -> None:
    source = SimpleNamespace(model_class=SimpleNamespace(can_generate=lambda: False, __name__="BertModel"))
    with pytest.raises(UnsupportedError, match="does not generate") as caught:
        self_sampled(source, tokens=64, context=16)  # type: ignore[arg-type]  # only what is looked at is given
    assert "--calib FILE" in caught.value.hint


def test_model_beyond_the_memory_budget_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="memory budget"):
        self_sampled(source_of(tiny_llama()), tokens=64, context=16, memory_budget=1000)


def test_broken_weights_are_refused() -> None:
    model = tiny_llama(bos_token_id=7)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UnsupportedError, match="not finite"):
        self_sampled(source_of(model), tokens=64, context=16)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mistral", "deepseek_v3", "qwen3"])
def test_a_cache_with_room_holds_what_a_growing_one_does(family: str) -> None:
    model = models.build(family).eval()
    ids = models.inputs(family, 2, 24)["input_ids"]
    roomy, growing = roomy_cache(model.config, 24), DynamicCache(config=model.config)
    plain = [type(layer).__name__ == "DynamicLayer" for layer in growing.layers]
    assert [isinstance(layer, RoomyLayer) for layer in roomy.layers] == plain
    with torch.no_grad():
        for part in ids.split([9, 1, 14], dim=1):
            ours, theirs = (model(input_ids=part, past_key_values=c, use_cache=True).logits for c in (roomy, growing))
            assert torch.equal(ours, theirs)
    assert [layer.get_seq_length() for layer in roomy.layers] == [layer.get_seq_length() for layer in growing.layers]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [9, 3])
def test_attention_of_one_token_is_what_it_is_in_float32(heads: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, 1, 16, generator=generator).bfloat16()
    k, v = (torch.randn(2, 3, 40, 16, generator=generator).bfloat16() for _ in range(2))
    mask = torch.zeros(2, 1, 1, 40, dtype=torch.bfloat16).masked_fill_(torch.arange(40) < 7, -1e4) if masked else None
    options = {"enable_gqa": True, "scale": 0.3}
    expected = scaled_dot_product_attention(
        q.float(), k.float(), v.float(), attn_mask=None if mask is None else mask.float(), **options
    )
    with SingleQueries():
        found = scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    assert found.shape == q.shape and found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected, atol=0.01)


class Seen(TorchFunctionMode):
    """Keeps the shapes of the queries that attention gets."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("heads", "tokens", "dtype", "options", "given"),
    [
        (9, 1, torch.bfloat16, {}, (2, 3, 3, 16)),  # heads that share keys side by side
        (3, 1, torch.bfloat16, {}, (2, 3, 2, 16)),  # two at least
        (9, 1, torch.float32, {}, (2, 9, 1, 16)),  # its kernel is as fast for one query
        (9, 5, torch.bfloat16, {}, (2, 9, 5, 16)),
        (9, 1, torch.bfloat16, {"is_causal": True}, (2, 9, 1, 16)),  # the second row would see what the first does not
        (9, 1, torch.bfloat16, {"attn_mask": torch.zeros(2, 9, 1, 40).bfloat16()}, (2, 9, 1, 16)),  # of each head
        (3, 1, torch.bfloat16, {"attn_mask": torch.zeros(2, 3, 1, 40).bfloat16()}, (2, 3, 2, 16)),  # none shares keys
    ],
)
def test_only_single_queries_that_see_the_same_go_side_by_side(
    heads: int, tokens: int, dtype: torch.dtype, options: dict[str, Any], given: tuple[int, ...]
) -> None:
    q = torch.randn(2, heads, tokens, 16).to(dtype)
    k, v = (torch.randn(2, 3, 40, 16).to(dtype) for _ in range(2))
    with Seen() as seen, SingleQueries():
        found = scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    assert seen.shapes == [given] and found.shape == q.shape
