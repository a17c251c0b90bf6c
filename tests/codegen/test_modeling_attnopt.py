"""The `attnopt` model class computes what the source computes, whatever way the tokens come in."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from attnopt.codegen.hf import deepseek_v3, own_class
from attnopt.codegen.hf.configuration_attnopt import SEMANTICS, AttnoptConfig
from attnopt.errors import UnsupportedError
from attnopt.rewriter.capture import capture
from attnopt.rewriter.interpret import run
from attnopt.rewriter.source import open_source
from tests.codegen.loading import module_of, tokens
from tests.codegen.lossless import EXTRA, Variation, program_of, tiny

pytestmark = pytest.mark.usefixtures("_no_grad")


@pytest.fixture
def _no_grad():
    with torch.no_grad():
        yield


def close(a: torch.Tensor, b: torch.Tensor, relative: float = 2e-5) -> bool:
    return float((a - b).norm() / b.norm()) < relative


@pytest.mark.parametrize("model_type", EXTRA)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_the_source(model_type: str, tied: bool) -> None:
    source = tiny(model_type, tie_word_embeddings=tied)
    model = module_of(own_class.build(program_of(source)))
    for batch, length in ((1, 1), (1, 17), (2, 9)):
        ids = tokens(batch, length)
        assert close(model(ids).logits, source(ids).logits), (batch, length)


@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (8, 4), (4, 4), (8, 1), (9, 3)])
def test_head_grids(heads: int, groups: int) -> None:
    source = tiny("llama", num_attention_heads=heads, num_key_value_heads=groups, hidden_size=72)
    model = module_of(own_class.build(program_of(source)))
    ids = tokens(2, 11)
    assert close(model(ids).logits, source(ids).logits)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mixtral"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_chunks_and_steps_equal_one_pass(model_type: str, attention: str) -> None:
    model = module_of(own_class.build(program_of(tiny(model_type))))
    model.config.text_config._attn_implementation = attention
    ids = tokens(2, 13)
    whole = model(ids, use_cache=False).logits
    out = model(ids[:, :5], use_cache=True)
    pieces, cache = [out.logits], out.past_key_values
    for start, stop in ((5, 9), (9, 10), (10, 11), (11, 13)):
        pieces.append(model(ids[:, start:stop], past_key_values=cache).logits)
    assert close(torch.cat(pieces, 1), whole)
    for layer, spec in zip(cache.layers, model.config.layers, strict=True):
        assert layer.keys.shape == (2, 1, 13, spec["kv_lora_rank"])
        assert layer.values.shape == (2, 1, 13, spec["d_rope"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padding(attention: str) -> None:
    source = tiny("llama")
    model = module_of(own_class.build(program_of(source)))
    model.config.text_config._attn_implementation = attention
    ids = tokens(2, 10)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = source(ids, attention_mask=mask).logits
    got = model(ids, attention_mask=mask).logits
    assert close(got[mask.bool()], expected[mask.bool()])
    assert got.isfinite().all()
    generated = [m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in (source, model)]
    assert torch.equal(*generated)
    alone = model.generate(ids[1:, 4:], max_new_tokens=6, do_sample=False)
    assert torch.equal(generated[1][1:, 10:], alone[:, 6:])


def test_generation_with_the_fixed_size_cache() -> None:
    model = module_of(own_class.build(program_of(tiny("llama"))))
    ids = tokens(1, 6)
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=16)
    pieces = [model(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in ((0, 3), (3, 5), (5, 6))]
    assert close(torch.cat(pieces, 1), model(ids).logits)


@pytest.mark.parametrize("model_type", ["mistral", "qwen3"])
def test_windowed_layers_keep_their_window(model_type: str) -> None:
    options: dict[str, Any] = {"sliding_window": 5}
    if model_type == "qwen3":
        options |= {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
    source = tiny(model_type, **options)
    program = program_of(source)
    assert program.site_list[0].mask.window == 5
    model = module_of(own_class.build(program))
    ids = tokens(1, 14)
    assert close(model(ids).logits, source(ids).logits)
    full = tiny(model_type)
    assert not close(full(ids).logits, source(ids).logits), "the window must matter in this test"
    assert torch.equal(*(m.generate(ids, max_new_tokens=6, do_sample=False) for m in (source, model)))


def test_ranks_tables_and_unconverted_layers_may_differ() -> None:
    source = tiny("llama", num_hidden_layers=3)
    variations = {0: Variation(spare=3), 1: Variation(reverse=True), 2: Variation(skip=True)}
    emission = own_class.build(program_of(source, variations=variations))
    assert [layer and layer["kv_lora_rank"] for layer in emission.config["layers"]] == [20, 17, None]
    assert len(emission.config["rope_tables"]) == 2
    model = module_of(emission)
    ids = tokens(2, 9)
    assert close(model(ids).logits, source(ids).logits)
    assert torch.equal(*(m.generate(ids, max_new_tokens=6, do_sample=False) for m in (source, model)))


class LargestOverTokens(TorchDispatchMode):
    """Remembers the largest tensor made that has an axis of the given length."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.numel = length, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and self.length in tensor.shape:
                self.numel = max(self.numel, tensor.numel())
        return out


def test_decoding_never_expands_the_cache() -> None:
    program = program_of(tiny("llama"))
    site = program.site_list[0]
    cached = 41  # a length no weight has
    ids = tokens(1, cached)
    smallest_expanded = cached * site.heads * min(site.latent.d_nope, site.d_v)
    largest = {}
    for target in (own_class, deepseek_v3):
        model = module_of(target.build(program))
        cache = model(ids[:, : cached - 1], use_cache=True).past_key_values
        with LargestOverTokens(cached) as seen:
            model(ids[:, cached - 1 :], past_key_values=cache)
        largest[target.TARGET] = seen.numel
    assert largest["attnopt"] < smallest_expanded
    assert largest["deepseek_v3"] >= smallest_expanded, "the check must see an expansion where there is one"


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mixtral"])
def test_save_and_load(model_type: str, tmp_path: Any) -> None:
    model = module_of(own_class.build(program_of(tiny(model_type))))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    ids = tokens(2, 7)
    assert torch.equal(again(ids).logits, model(ids).logits)
    for cast in (again.bfloat16().float(), model):
        assert cast.model.layers[1].self_attn.angles.inv_freq.tolist() == pytest.approx(
            model.config.rope_tables[0], rel=1e-7
        ), "a cast must not round the angles"
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert float((narrow(ids).logits - model(ids).logits).norm() / model(ids).logits.norm()) < 0.1


def test_capture_understands_the_class(tmp_path: Any) -> None:
    """`attnopt inspect` reads what `attnopt convert` wrote."""
    model = module_of(own_class.build(program_of(tiny("llama"), variations={1: Variation(spare=2)})))
    model.save_pretrained(tmp_path)
    program = capture(open_source(tmp_path))
    assert [site.kind for site in program.site_list] == ["mla", "mla"]
    assert [site.latent.kv_lora_rank for site in program.site_list] == [17, 19]
    assert [site.d_rope for site in program.site_list] == [16, 16]


def test_capture_understands_normalised_keys_in_the_latent(tmp_path: Any) -> None:
    source = program_of(tiny("qwen3"))
    model = module_of(own_class.build(source))
    model.save_pretrained(tmp_path)
    program = capture(open_source(tmp_path))
    for found, expected in zip(program.site_list, source.site_list, strict=True):
        assert found.latent.encoder == "normed_kv"
        assert found.latent.q_map == f"{found.fqn}.q_map.weight"
        for field in ("heads", "d_qk", "d_v", "scale", "cache"):
            assert getattr(found, field) == getattr(expected, field)
        assert (found.k.out_features, found.v.out_features) == (expected.k.out_features, expected.v.out_features)
        assert (found.q_norm.kind, found.k_norm.eps) == ("rms", expected.k_norm.eps)
    ids = tokens(2, 7)
    positions = torch.arange(7).expand(2, -1)
    assert close(run(program, input_ids=ids, position_ids=positions)["logits"], model(ids).logits)


def test_loading_refuses_a_damaged_checkpoint(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    module_of(own_class.build(program_of(tiny("llama")))).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.self_attn.kv_a_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys.*kv_a_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lora_rnk": 3}, "unknown fields"),
        ({"heads": None}, "missing fields"),
        ({"heads": True}, "not of type int"),
        ({"d_v": 0}, "not positive"),
        ({"d_rope": 6}, "table has 8 pairs"),
        ({"rope_table": 1}, "rope_table 1 of 1"),
        ({"scale": -1.0}, "scale"),
        ({"encoder": "guess"}, "neither"),
    ],
)
def test_config_refuses_what_the_class_cannot_compute(change: dict[str, Any], message: str) -> None:
    config = own_class.build(program_of(tiny("llama"))).config
    layer = {**config["layers"][0], **change}
    layer = {key: value for key, value in layer.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        AttnoptConfig(config["text_config"], [layer, None], config["rope_tables"])


def test_config_refuses_other_semantics_architectures_and_counts() -> None:
    config = own_class.build(program_of(tiny("llama"))).config
    text, tables = config["text_config"], config["rope_tables"]
    with pytest.raises(ValueError, match=r"unknown fields \['layer_gates'\]"):
        AttnoptConfig(text, config["layers"], tables, layer_gates=[1, 2])
    with pytest.raises(ValueError, match="latent_norm"):
        AttnoptConfig(text, config["layers"], tables, semantics={**SEMANTICS, "latent_norm": "rms"})
    with pytest.raises(ValueError, match="gpt2"):
        AttnoptConfig({"model_type": "gpt2"})
    with pytest.raises(ValueError, match="1 layer records for 2 layers"):
        AttnoptConfig(text, config["layers"][:1], tables)


def test_what_the_class_cannot_hold_is_refused() -> None:
    program = program_of(tiny("llama"))
    site = program.site_list[0]

    def with_site(**changes: Any) -> Any:
        return program.replace(sites={**program.sites, site.fqn: replace(site, **changes)})

    assert own_class.can_emit(program) is None
    cases = {
        "softcap": with_site(mask=replace(site.mask, softcap=30.0)),
        "window 7": with_site(mask=replace(site.mask, window=7)),
        "interleaved": with_site(rope=replace(site.rope, style="half")),
        "gpt2": program.replace(model_type="gpt2"),
        "no attention layer was rewritten": program_of(
            tiny("llama"), variations={i: Variation(skip=True) for i in (0, 1)}
        ),
    }
    for reason, case in cases.items():
        refusal = own_class.can_emit(case)
        assert refusal is not None
        assert reason in str(refusal)
        with pytest.raises(UnsupportedError, match=reason):
            own_class.build(case)


def test_rope_scaling_factor_is_folded_into_the_weights() -> None:
    for model_type in ("llama", "qwen3"):
        program = program_of(tiny(model_type))
        sites = {f: replace(s, rope=replace(s.rope, attention_scaling=1.2)) for f, s in program.sites.items()}
        scaled = module_of(own_class.build(program.replace(sites=sites)))
        plain = module_of(own_class.build(program))
        ids = tokens(1, 9)
        for layer in plain.model.layers:
            layer.self_attn.scale *= 1.2**2  # d_nope rows are zero here, so the whole score is rotary
        assert close(scaled(ids).logits, plain(ids).logits)


def test_registration_needs_no_torch_and_loads_from_disk(tmp_path: Any) -> None:
    model = module_of(own_class.build(program_of(tiny("llama"))))
    model.save_pretrained(tmp_path)
    program = f"""
import sys
import attnopt.codegen.hf
assert "torch" not in sys.modules and "transformers" not in sys.modules
from transformers import AutoConfig, AutoModelForCausalLM
assert type(AutoConfig.from_pretrained({str(tmp_path)!r})).__name__ == "AttnoptConfig"
assert type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__ == "AttnoptForCausalLM"
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)


def test_an_old_transformers_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import attnopt.codegen.hf.registration as registration

    def too_old(module: Any) -> None:
        raise ImportError("cannot import name 'initialization'")

    monkeypatch.setitem(registration._ACTIONS, "json", too_old)
    monkeypatch.delitem(sys.modules, "json")
    with pytest.warns(UserWarning, match="not available"):
        module = importlib.import_module("json")
    assert module.loads("[1]") == [1]


def test_registration_where_transformers_is_loaded_already() -> None:
    import attnopt.codegen.hf.registration as registration

    registration.install()
    registration.install()
    assert sum(isinstance(f, registration._Finder) for f in sys.meta_path) == 1
    assert AutoConfig.for_model("attnopt").model_type == "attnopt"
