"""Stock DeepSeek-V3 emission: logits of the source, honest cache, and every obstacle named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attnopt.codegen.hf import deepseek_v3
from attnopt.codegen.hf.emission import check_complete
from attnopt.errors import UnsupportedError, VerificationError
from attnopt.evaluate.measure import count_cached_numbers, measure_cache
from attnopt.rewriter.capture import capture
from attnopt.rewriter.interpret import run
from attnopt.rewriter.program import Program
from attnopt.rewriter.source import open_source
from attnopt.rewriter.weights import Derived
from tests.codegen.loading import module_of, tokens
from tests.codegen.lossless import Variation, program_of, tiny

STOCK = ("llama", "mistral", "qwen2", "phi3")


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("model_type", STOCK)
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_logits_equal_the_source(model_type: str, tied: bool) -> None:
    source = tiny(model_type, tie_word_embeddings=tied)
    program = program_of(source, peak=5.0)
    assert deepseek_v3.can_emit(program) is None
    emission = deepseek_v3.build(program)
    assert ("lm_head.weight" in emission.values) == (not tied)
    model = module_of(emission)
    assert type(model).__module__.startswith("transformers.models.deepseek_v3")
    for batch, length in ((1, 1), (2, 23)):
        ids = tokens(batch, length)
        assert error(model(ids).logits, source(ids).logits) < 2e-5
    assert emission.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (8, 4), (16, 4), (4, 4), (8, 1), (9, 3)])
@torch.no_grad()
def test_head_grids(heads: int, groups: int) -> None:
    source = tiny("llama", num_attention_heads=heads, num_key_value_heads=groups, hidden_size=144)
    model = module_of(deepseek_v3.build(program_of(source, d_nope=4)))
    ids = tokens(2, 11)
    assert error(model(ids).logits, source(ids).logits) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_narrow_types_cost_no_more_than_they_cost_the_source(dtype: torch.dtype) -> None:
    for model_type in ("llama", "qwen2"):
        source = tiny(model_type)
        ids = tokens(4, 30)
        exact = source(ids).logits
        program = program_of(source, peak=20.0)
        own = error(module_of(deepseek_v3.build(program, dtype), dtype)(ids).logits.float(), exact)
        loaded = error(module_of(deepseek_v3.build(program), dtype)(ids).logits.float(), exact)
        reference = error(tiny(model_type).to(dtype)(ids).logits.float(), exact)
        assert own < 1.5 * reference
        assert dtype == torch.float16 or loaded < 1.5 * reference, "written in float32, loaded in a narrow type"


@torch.no_grad()
def test_query_biases_travel_through_a_lane() -> None:
    source = tiny("qwen2")
    emission = deepseek_v3.build(program_of(source))
    assert emission.config["q_lora_rank"] == source.config.hidden_size + 1
    ids = tokens(1, 12)
    expected = source(ids).logits
    for layer in source.model.layers:
        layer.self_attn.q_proj.bias.zero_()
    assert error(source(ids).logits, expected) > 1e-2, "the biases must matter in this test"
    assert error(module_of(emission)(ids).logits, expected) < 2e-5


@torch.no_grad()
def test_cache_holds_what_was_predicted_and_decodes_like_prefill() -> None:
    for model_type in ("llama", "qwen2"):
        program = program_of(tiny(model_type))
        emission = deepseek_v3.build(program)
        model = module_of(emission)
        for batch in (1, 2):
            cached, worst = measure_cache(model, batch)
            assert cached == emission.cached_numbers_per_token == program.cached_numbers_per_token == 2 * (17 + 16)
            assert worst < 1e-5
        ids = tokens(2, 9)
        out = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=-1, return_dict_in_generate=True)
        assert count_cached_numbers(out.past_key_values, 2) == program.cached_numbers_per_token
        text = out.sequences
        for step in range(9, text.shape[1]):
            assert torch.equal(model(text[:, :step], use_cache=False).logits[:, -1].argmax(-1), text[:, step])


@torch.no_grad()
def test_llama3_scaling_and_long_positions() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    source = tiny("llama", rope_parameters=rope, max_position_embeddings=256)
    model = module_of(deepseek_v3.build(program_of(source)))
    ids = tokens(1, 200)
    assert error(model(ids).logits, source(ids).logits) < 1e-4


def test_capture_understands_free_tables(tmp_path: Path) -> None:
    """`attnopt inspect` reads what `attnopt convert` wrote; factors that differ by length are still refused."""
    model = module_of(deepseek_v3.build(program_of(tiny("llama"))))
    assert model.config.rope_parameters["rope_type"] == "longrope"
    model.save_pretrained(tmp_path)
    program = capture(open_source(tmp_path))
    assert [(s.kind, s.cached_numbers_per_token) for s in program.site_list] == [("mla", 33)] * 2
    ids = tokens(2, 9)
    got = run(program, input_ids=ids, position_ids=torch.arange(9).expand(2, -1))["logits"]
    assert error(got, model(ids).logits.detach()) < 1e-5
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["long_factor"] = [2 * f for f in config["rope_parameters"]["long_factor"]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="longrope"):
        capture(open_source(tmp_path))


@torch.no_grad()
def test_scales_are_folded_into_the_queries() -> None:
    source = tiny("llama")
    program = program_of(source)
    sites = {}
    for fqn, site in program.sites.items():
        # Half the scale and sqrt(2) on cos and sin of both sides make the same score: only rotary rows are not zero.
        rope = replace(site.rope, attention_scaling=2.0**0.5)
        sites[fqn] = replace(site, scale=site.scale / 2, rope=rope)
    model = module_of(deepseek_v3.build(program.replace(sites=sites)))
    ids = tokens(1, 12)
    assert error(model(ids).logits, source(ids).logits) < 2e-5


def changed(program: Program, layer: int = 1, **changes: Any) -> Program:
    site = program.site_list[layer]
    latent = replace(site.latent, **changes.pop("latent", {}))
    return program.replace(sites={**program.sites, site.fqn: replace(site, latent=latent, **changes)})


def obstacles() -> dict[str, Program]:
    llama = program_of(tiny("llama"))
    site = llama.site_list[1]
    return {
        "mixture-of-experts": program_of(tiny("mixtral")),
        "normalises queries and keys": program_of(tiny("qwen3")),
        "block structure of gpt2": llama.replace(model_type="gpt2"),
        "MLP has biases": llama.replace(config={**llama.config, "mlp_bias": True}),
        "2 attention layers in a model of 3": llama.replace(config={**llama.config, "num_hidden_layers": 3}),
        "layer 1: attention is gqa": program_of(tiny("llama"), variations={1: Variation(skip=True)}),
        "layer 1: queries or keys are normalised": changed(llama, latent={"encoder": "normed_kv"}),
        "layer 1: queries are compressed": changed(llama, latent={"q": None}),
        "layer 1: the latent has no constant lane": changed(llama, latent={"lane": False}),
        "layer 1: the rotary part": changed(llama, rope=replace(site.rope, style="half")),
        "window": program_of(tiny("mistral", sliding_window=4)),
        "softcap": changed(llama, mask=replace(site.mask, softcap=5.0)),
        "latent ranks differ": program_of(tiny("llama"), variations={1: Variation(spare=2)}),
        "2 different rope tables": program_of(tiny("llama"), variations={1: Variation(reverse=True)}),
        "value widths differ": changed(llama, d_v=4),
    }


def test_every_obstacle_is_named() -> None:
    for reason, program in obstacles().items():
        refusal = deepseek_v3.can_emit(program)
        assert refusal is not None, reason
        assert reason in str(refusal)
        with pytest.raises(UnsupportedError) as caught:
            deepseek_v3.build(program)
        assert "--emit attnopt" in caught.value.hint


def test_float16_is_refused_where_the_lane_would_overflow() -> None:
    program = program_of(tiny("llama"), peak=0.0)
    name = program.site_list[0].latent.kv_a.weight
    huge = Derived.of("scale", program.weights[name], factor=1e3)
    program = program.replace(weights=program.weights.with_values({name: huge}))
    refusal = deepseek_v3.can_emit(program, torch.float16)
    assert refusal is not None
    assert "float16" in str(refusal)
    assert deepseek_v3.can_emit(program, torch.bfloat16) is None


def test_a_lane_that_is_not_constant_is_refused() -> None:
    program = program_of(tiny("llama"))
    weight, bias = program.site_list[0].latent.kv_a.weight, program.site_list[0].latent.kv_a.bias
    shifted = Derived.of("add", program.weights[weight], Derived.of("full", shape=(1,), value=1.0, dtype=torch.float32))
    with pytest.raises(UnsupportedError, match="not constant"):
        deepseek_v3.build(program.replace(weights=program.weights.with_values({weight: shifted})))
    zero = Derived.of("scale", program.weights[bias], factor=0.0)
    with pytest.raises(UnsupportedError, match="not constant"):
        deepseek_v3.build(program.replace(weights=program.weights.with_values({bias: zero})))


def test_a_forgotten_tensor_is_noticed() -> None:
    program = program_of(tiny("llama"))
    emission = deepseek_v3.build(program)
    expected = module_of(emission).state_dict()
    check_complete(emission, expected, set())
    fewer = replace(emission, values={k: v for k, v in emission.values.items() if "norm.weight" not in k})
    with pytest.raises(VerificationError, match="no tensor"):
        check_complete(fewer, expected, set())
    more = replace(emission, values={**emission.values, "model.extra": emission.values["model.norm.weight"]})
    with pytest.raises(VerificationError, match=r"model\.extra has no place"):
        check_complete(more, expected, set())
    values = {**emission.values, "model.norm.weight": emission.values["model.embed_tokens.weight"]}
    with pytest.raises(VerificationError, match=r"model\.norm\.weight is"):
        check_complete(replace(emission, values=values), expected, set())
