"""Capture: what a Program says of each family, that it computes what the model computes, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from attnopt.errors import UnsupportedError
from attnopt.rewriter import anchor
from attnopt.rewriter.capture import capture_module
from attnopt.rewriter.interpret import LayerRunner, run
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite
from attnopt.rewriter.verify import violations
from tests import models

# Facts that must be found, from the configs in tests/models.py. `layer` is the layer they are checked on.
FACTS: dict[str, dict[str, Any]] = {
    "llama": {"kind": "gqa", "heads": 4, "kv_heads": 2, "d_qk": 8, "rope": ("half", 8), "cache": 2 * 32},
    "llama-mha": {"kind": "mha", "heads": 4, "kv_heads": 4, "cache": 2 * 64},
    "llama-mqa": {"kind": "mqa", "heads": 4, "kv_heads": 1, "cache": 2 * 16},
    "llama-llama3": {"rope": ("half", 8), "rope_type": "llama3"},
    "llama-tied": {"kind": "gqa"},
    "llama-wide-heads": {"d_qk": 16, "d_v": 16, "scale": 16**-0.5},
    "mistral": {"window": 5, "causal": True},
    "mistral-full": {"window": None},
    "qwen2": {"q_bias": True, "o_bias": False},
    "qwen3": {"q_norm": ("rms", "head", False), "k_norm": ("rms", "head", False)},
    "gemma2": {"layer": 0, "window": 5, "softcap": 2.0, "scale": 12**-0.5},
    "gemma3": {"layer": 1, "window": 5, "q_norm": ("rms", "head", True), "scale": 12**-0.5, "rope_theta": 1e4},
    "phi3": {"q_rows": ((0, 32),), "k_rows": ((32, 48),), "v_rows": ((48, 64),)},
    "phi3-partial": {"rope": ("half", 4), "d_qk": 8},
    "olmo2": {"q_norm": ("rms", "all", False)},
    "mixtral": {"kind": "gqa"},
    "qwen3_moe": {"q_norm": ("rms", "head", False)},
    "deepseek_v2": {"kind": "mla", "rank": 16, "d_nope": 8, "d_rope": 4, "d_v": 6, "q_a": 12, "cache": 2 * 20},
    "deepseek_v2-lite": {"kind": "mla", "q_a": None, "rope": ("interleaved", 4)},
    "deepseek_v2-yarn": {"attention_scaling": 1.138629436, "rope_type": "yarn"},
    "deepseek_v3": {"kind": "mla", "rank": 16, "rope": ("interleaved", 4), "scale": 12**-0.5},
    "deepseek_v3-yarn": {"attention_scaling": 1.138629436, "rope": ("interleaved", 4)},
    "deepseek_v3-half": {"rope": ("half", 4)},
    "gpt2": {"rope": None, "k_rows": ((32, 64),), "layout": "conv1d", "q_bias": True},
    "gpt_neox": {"rope": ("half", 2), "q_rows": ((0, 8), (24, 32), (48, 56), (72, 80)), "q_bias": True},
    "opt": {"rope": None, "q_bias": True, "o_bias": True},
    "falcon": {"kind": "mqa", "rope": ("half", 8), "k_rows": ((32, 40),)},
    "falcon-new": {"kind": "gqa", "q_rows": ((0, 16), (32, 48)), "k_rows": ((16, 24), (48, 56)), "o_bias": True},
    "bert": {"causal": False, "padding": True, "cache": 0},
    "roberta": {"causal": False, "padding": True},
    "vit": {"causal": False, "padding": False, "cache": 0},
    "swin": {"causal": False, "bias": 1, "cache": 0, "heads": 4},
}


def fact(site: AttentionSite, program: Program, name: str) -> Any:
    assert site.latent is not None or (site.q and site.k and site.v)
    readers: dict[str, Any] = {
        "rope": lambda: site.rope and (site.rope.style, site.rope.dim),
        "rope_type": lambda: site.rope.rope_type,
        "rope_theta": lambda: pytest.approx(site.rope.inv_freq[1] ** -(site.d_rope / 2), rel=1e-4),
        "attention_scaling": lambda: pytest.approx(site.rope.attention_scaling, rel=1e-6),
        "scale": lambda: pytest.approx(site.scale, rel=1e-6),
        "window": lambda: site.mask.window,
        "softcap": lambda: site.mask.softcap,
        "causal": lambda: site.mask.causal,
        "padding": lambda: site.mask.padding,
        "bias": lambda: len(site.mask.bias),
        "cache": lambda: program.cached_numbers_per_token,
        "q_norm": lambda: (site.q_norm.kind, site.q_norm.scope, site.q_norm.unit_offset),
        "k_norm": lambda: (site.k_norm.kind, site.k_norm.scope, site.k_norm.unit_offset),
        "q_bias": lambda: site.q.bias is not None,
        "o_bias": lambda: site.o.bias is not None,
        "q_rows": lambda: site.q.rows,
        "k_rows": lambda: site.k.rows,
        "v_rows": lambda: site.v.rows,
        "layout": lambda: site.q.layout,
        "rank": lambda: site.latent.kv_lora_rank,
        "d_nope": lambda: site.latent.d_nope,
        "q_a": lambda: site.latent.q_a and site.latent.q_a.out_features,
    }
    return readers[name]() if name in readers else getattr(site, name)


# Variants of a family that test nothing the fast ones do not test too; all are tracings, which take seconds.
VARIANTS = {
    "llama-llama3", "llama-wide-heads", "mistral-full", "phi3-partial", "deepseek_v2-yarn", "deepseek_v2-lite",
    "deepseek_v3",
    "deepseek_v3-half", "falcon", "roberta",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in VARIANTS else ()) for n in models.FAMILIES]
)
def test_family(name: str) -> None:
    """Facts, sizes and values at once, because capturing is what takes the time."""
    model, program = models.captured(name)
    expected = dict(FACTS[name])
    site = program.site_list[expected.pop("layer", -1)]
    assert {key: fact(site, program, key) for key in expected} == expected
    assert violations(program, "captured") == []

    assert [s.layer for s in program.site_list] == list(range(len(program.sites)))
    assert program.parameters == sum(p.numel() for p in model.parameters())
    program.graph.lint()
    anchors = [n for n in program.graph.nodes if n.target is torch.ops.attnopt.attention.default]
    assert [n.name for n in anchors] == [s.nodes.attention for s in program.site_list]
    names = {node.name for node in program.graph.nodes}
    for s in program.site_list:
        assert {s.nodes.input, s.nodes.output} <= names
        for projection in (s.q, s.k, s.v, s.o, s.latent and s.latent.kv_b):
            if projection:
                shape = program.weights.meta(projection.weight).shape
                out, width = shape[::-1] if projection.layout == "conv1d" else shape
                assert width == projection.in_features
                assert projection.rows[-1][1] <= out

    for batch, length in ((1, 1), (1, 9), (2, 1), (2, 33)):
        x = models.inputs(name, batch, length)
        found = run(program, **x)[program.outputs[0]]
        assert models.relative_error(found, models.eager_output(model, x)) < 5e-6
    torch.testing.assert_close(in_two_parts(program, x), found, rtol=0, atol=0)


def in_two_parts(program: Program, x: dict[str, torch.Tensor]) -> torch.Tensor:
    """The output when every layer is stopped before and behind its attention, as calibration does."""
    runner = LayerRunner(program)
    env = runner.start(x)
    for segment in runner.layers:
        assert segment.site is not None
        nodes = segment.site.nodes
        with runner.load(segment) as layer:
            into = layer.evaluate(env, nodes.input)
            out = layer.evaluate(env, nodes.output, {nodes.input: into})
            assert into.ndim == out.ndim == 3
            assert into.shape[:2] == out.shape[:2]
            env = layer.advance(env, {nodes.output: out})
    return runner.finish(env)


@pytest.mark.parametrize(
    ("name", "changes", "kinds"),
    [
        pytest.param("llama", {"num_hidden_layers": 3}, 1, marks=pytest.mark.slow),
        ("gemma3", {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}, 2),
        pytest.param("deepseek_v3", {"num_hidden_layers": 4}, 2, marks=pytest.mark.slow),
        pytest.param("gpt2", {"n_layer": 3, "scale_attn_by_inverse_layer_idx": True}, 3, marks=pytest.mark.slow),
    ],
)
def test_stamped_layers_are_what_tracing_them_all_gives(
    name: str, changes: dict[str, Any], kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnopt.rewriter import capture, stamp

    model = models.build(name, **changes)
    cuts: list[Any] = []

    def watch(skeleton: nn.Module) -> Any:
        cuts.append(stamp.cut_layers(skeleton))
        return cuts[-1]

    monkeypatch.setattr(capture, "cut_layers", watch)
    stamped = capture_module(model)
    assert (len(cuts[0].chosen) if cuts[0] else len(stamped.sites)) == kinds
    monkeypatch.setattr(capture, "cut_layers", lambda skeleton: None)
    full = capture_module(model)

    def without_nodes(program: Program) -> list[AttentionSite]:
        return [dataclasses.replace(site, nodes=full.site_list[0].nodes) for site in program.site_list]

    assert without_nodes(stamped) == without_nodes(full)
    assert set(stamped.weight_names) == set(full.weight_names)
    assert stamped.config == full.config
    x = models.inputs(name, 2, 11)
    found, expected = run(stamped, **x)["logits"], run(full, **x)["logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert models.relative_error(found, models.eager_output(model, x)) < 5e-6


def test_capture_leaves_model_and_registries_alone() -> None:
    model = models.build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = model.config.to_dict()
    mapping = tf.AttentionInterface._global_mapping.copy()
    masks = tf.AttentionMaskInterface._global_mapping.copy()
    program = capture_module(model)
    assert model.config.to_dict() == settings
    assert model.config._attn_implementation != anchor.NAME
    assert tf.AttentionInterface._global_mapping == mapping
    assert tf.AttentionMaskInterface._global_mapping == masks
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    name = program.site_list[0].o.weight
    shared = program.weights[name].tensor  # type: ignore[union-attr]  # in-memory captures hold Inline values
    assert shared.data_ptr() == model.get_parameter(name).data_ptr()


def test_half_precision_models_are_captured_in_float32() -> None:
    model = models.build("qwen2").to(torch.bfloat16)
    program = capture_module(model)
    x = models.inputs("qwen2")
    expected = models.eager_output(model.float(), x)
    assert models.relative_error(run(program, **x)["logits"], expected) < 5e-6


def test_tied_weights_count_once() -> None:
    tied, untied = models.captured("llama-tied")[1], models.captured("llama")[1]
    assert untied.parameters - tied.parameters == models.VOCAB * 32


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_dependent_rope_is_refused_by_name(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = models.build("llama", rope_parameters=rope)
    with pytest.raises(UnsupportedError, match=f"rope type '{kind}'"):
        capture_module(model)


def test_chunked_masks_are_refused_by_name() -> None:
    config = tf.Llama4TextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_chunk_size=4, num_local_experts=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="neither full, causal nor a causal window"):
        capture_module(tf.Llama4ForCausalLM(config).eval())


def test_alibi_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="ALiBi"):
        capture_module(models.build("falcon", alibi=True))


def test_training_mode_does_not_leak_into_the_program() -> None:
    model = models.build("gpt2", attn_pdrop=0.5, resid_pdrop=0.5).train()
    program = capture_module(model)
    assert model.training
    x = models.inputs("gpt2")
    found = run(program, **x)["logits"]
    assert models.relative_error(found, models.eager_output(model.eval(), x)) < 5e-6


def test_models_outside_transformers_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="not a transformers model"):
        capture_module(nn.Linear(2, 2))


def test_models_without_attention_are_refused() -> None:
    config = tf.MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UnsupportedError):
        capture_module(tf.MambaForCausalLM(config).eval())
