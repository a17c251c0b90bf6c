"""`torch.compile(backend="attnopt")`: the same numbers as eager, rewrites on request, never a wrong answer."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import scaled_dot_product_attention

from attnopt.codegen.backend import attnopt as backend
from attnopt.codegen.backend import compiler
from attnopt.codegen.backend.ops import apply_map, attention_map, decode_attention, grouped_sdpa
from attnopt.codegen.backend.options import Options, PlanSpec
from attnopt.errors import OptionError
from tests.models import build, inputs, relative_error

ROOT = Path(__file__).parents[2]
#: Grouped and multi-head decoders, MLA, norms on heads, soft caps with eager masks, encoders, images.
SLOW = ("bert", "llama-mqa", "qwen3", "gpt2", "falcon", "mistral", "vit", "swin")
FAMILIES = ["llama", "deepseek_v3", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture(autouse=True)
def _eager_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewrites are judged without inductor, which takes half a minute a graph; one slow test has it."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiler, "has_compiler", lambda device: False)
    logging.getLogger("attnopt.backend").setLevel(logging.ERROR)


def compile_with(model: Any, reports: list[Any] | None = None, **options: Any) -> Any:
    if reports is not None:
        options["report"] = reports.append
    return torch.compile(model, backend=backend, options=options)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_eager(family: str) -> None:
    model, reports = build(family), []
    model.set_attn_implementation("sdpa")
    compiled = compile_with(model, reports)
    with torch.no_grad():
        for length in (9, 12, 17):
            batch = inputs(family, length=length)
            assert relative_error(compiled(**batch)[0], model(**batch)[0]) < 1e-5
    assert sum(len(r) for r in reports) >= 2


def test_grouped_heads_are_seen_through_the_repetition() -> None:
    model, reports = build("llama"), []
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        compile_with(model, reports)(**inputs("llama"))
    assert [r["form"] for r in reports[0]] == ["grouped", "grouped"]
    assert [r["layer"] for r in reports[0]] == [0, 1]


def test_writes_in_place_are_kept() -> None:
    """They look dead: nothing reads what they return."""

    def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        keys = k.new_empty(k.shape)
        keys[..., :4] = k[..., :4]
        keys[..., 4:].copy_(k[..., 4:] * 2)
        return scaled_dot_product_attention(q, keys[:, :, None].expand(1, 2, 2, 5, 8).reshape(1, 4, 5, 8), q)

    q, k, reports = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), []
    assert torch.allclose(compile_with(attend, reports)(q, k), attend(q, k), atol=1e-6)
    assert reports[0][0]["form"] != ""


def test_gradients_equal_eager() -> None:
    for family in ("llama", "bert"):
        model = build(family)
        model.set_attn_implementation("sdpa")
        batch = inputs(family)
        compiled = compile_with(model)
        grads = []
        for run in (model, compiled):
            model.zero_grad()
            run(**batch)[0].square().mean().backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert set(grads[0]) == set(grads[1])
        for name, grad in grads[0].items():
            assert relative_error(grads[1][name], grad) < 1e-4, name


def test_updates_in_place_are_honoured() -> None:
    model = build("llama")
    model.set_attn_implementation("sdpa")
    batch = inputs("llama")
    compiled = compile_with(model, plan={"dead_heads": {0: [1]}})
    with torch.no_grad():
        before = compiled(**batch)[0]
        for parameter in model.parameters():
            parameter.mul_(1.1)
        after = compiled(**batch)[0]
        torch._dynamo.reset()
        fresh = compile_with(model, plan={"dead_heads": {0: [1]}})(**batch)[0]
    assert relative_error(after, before) > 1e-2
    assert torch.equal(after, fresh)


def test_decoding_does_not_compile_at_every_step() -> None:
    model, reports = build("llama"), []
    model.set_attn_implementation("sdpa")
    compiled = compile_with(model, reports)
    ids = inputs("llama", batch=1, length=24)["input_ids"]
    with torch.no_grad():
        wanted = model(ids)[0]
        out = compiled(ids[:, :4], use_cache=True)
        for step in range(4, 24):
            out = compiled(ids[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
            assert relative_error(out[0][:, 0], wanted[:, step]) < 1e-5
    assert len(reports) <= 4


def test_dead_heads_are_not_computed() -> None:
    model, reports = build("llama-mha"), []
    model.set_attn_implementation("sdpa")
    batch = inputs("llama-mha")
    plan = {"dead_heads": {"1": [0, 2]}}
    with torch.no_grad():
        found = compile_with(model, reports, plan=json.dumps(plan))(**batch)[0]
        weight = model.model.layers[1].self_attn.o_proj.weight
        weight[:, 0:8] = 0
        weight[:, 16:24] = 0
        wanted = model(**batch)[0]
    assert relative_error(found, wanted) < 1e-5
    assert reports[0][1]["form"] == "2 of 4 heads"


def test_an_encoder_layer_uses_the_map_of_another() -> None:
    model, reports = build("bert"), []
    model.set_attn_implementation("sdpa")
    batch = inputs("bert")
    with torch.no_grad():
        found = compile_with(model, reports, plan={"shared_maps": {1: 0}})(**batch)[0]
        plain = model(**batch)[0]
        # By hand: the second layer's attention gets the first one's queries and keys.
        first, second = (layer.attention.self for layer in model.encoder.layer)
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            getattr(first, part).register_forward_hook(lambda m, a, out, part=part: seen.__setitem__(part, out))
            for part in ("query", "key")
        ]
        hooks += [
            getattr(second, part).register_forward_hook(lambda m, a, out, part=part: seen[part])
            for part in ("query", "key")
        ]
        wanted = model(**batch)[0]
        for hook in hooks:
            hook.remove()
    assert relative_error(found, wanted) < 1e-5
    assert relative_error(found, plain) > 1e-3
    assert [r["form"] for r in reports[0]] == ["map owner", "map of layer 0"]


def test_a_decoder_layer_uses_the_map_of_another() -> None:
    model, reports = build("llama"), []
    model.set_attn_implementation("sdpa")
    ids = inputs("llama", length=9)["input_ids"]
    compiled = compile_with(model, reports, plan={"shared_maps": {1: 0}})
    with torch.no_grad():
        out = compiled(ids[:, :7], use_cache=True)
        found = [out.logits]
        for step in (7, 8):
            out = compiled(ids[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
        plain = model(ids)[0]
        # By hand: the second layer's attention gets the first one's queries and keys.
        first, second = (layer.self_attn for layer in model.model.layers)
        seen: dict[str, torch.Tensor] = {}
        for part in ("q_proj", "k_proj"):
            getattr(first, part).register_forward_hook(lambda m, a, out, part=part: seen.__setitem__(part, out))
            getattr(second, part).register_forward_hook(lambda m, a, out, part=part: seen[part])
        wanted = model(ids)[0]
    assert relative_error(torch.cat(found, 1), wanted) < 1e-5
    assert relative_error(torch.cat(found, 1), plain) > 1e-3
    assert [r["form"] for r in reports[0]] == ["map owner", "map of layer 0"]


@pytest.mark.parametrize(
    ("family", "plan", "message"),
    [
        ("llama", {"dead_heads": {7: [0]}}, "names layer 7"),
        ("llama", {"dead_heads": {0: [9]}}, "not a head 9"),
        ("llama", {"dead_heads": {0: [0, 1, 2, 3]}}, "no head in layer 0"),
        ("gemma3", {"shared_maps": {2: 0}}, "do not see the same keys"),
    ],
)
def test_a_plan_that_does_not_fit_stops(family: str, plan: dict[str, Any], message: str) -> None:
    model = build(family)
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=message):
        compile_with(model, plan=plan)(**inputs(family))


def test_dropout_is_left_alone_and_reported() -> None:
    def attend(q: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    reports: list[Any] = []
    compile_with(attend, reports)(torch.randn(1, 2, 4, 8))
    assert reports[0][0]["form"] == "left as it is"
    assert "dropout" in reports[0][0]["reason"]


def test_a_graph_without_attention_names_the_nearest_miss(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("attnopt.backend").setLevel(logging.INFO)

    def attend(q: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ q.transpose(-1, -2), -1) @ q

    x = torch.randn(2, 4, 8)
    with caplog.at_level(logging.INFO, "attnopt.backend"):
        assert torch.allclose(compile_with(attend)(x), attend(x))
    assert "softmax" in caplog.text


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"options": {"kernal": "auto"}}, "no option 'kernal'"),
        ({"options": {"kernels": "cuda"}}, "kernels 'cuda'"),
        ({"options": {"target": "sm_1"}}, "no target 'sm_1'"),
        ({"options": {"report": 3}}, "not callable"),
        ({"options": {"plan": {"heads": {}}}}, "dead_heads and shared_maps"),
        ({"options": {"plan": {"shared_maps": {0: 1}}}}, "cannot take its map"),
        ({"options": {"plan": "/no/such/file.json"}}, "cannot be read"),
        ({"options": {"plan": {"dead_heads": {0: ["x"]}}}}, "numbers of layers"),
        ({"fullgraph": True}, "does not take 'fullgraph'"),
    ],
)
def test_options_are_checked_by_name(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Options.parse(keywords)


def test_a_plan_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"dead_heads": {"3": [5, 0, 5]}, "shared_maps": {"2": 1}}')
    assert PlanSpec.parse(path) == PlanSpec({3: (0, 5)}, {2: 1})


@pytest.mark.parametrize("mask_heads", [0, 1, 4])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_one_query_with_masks(mask_heads: int, kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, s, 8, generator=generator) for h, s in ((4, 1), (2, 9), (2, 9)))
    mask = torch.rand(2, mask_heads, 1, 9, generator=generator) if mask_heads else None
    if mask is not None:
        mask = mask > 0.3 if kind is torch.bool else mask
    found = grouped_sdpa(q, k, v, mask, False, 0.3)
    wanted = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_map_functions() -> None:
    q, k, v = (torch.randn(2, h, 5, 8) for h in (4, 2, 2))
    for causal in (False, True):
        found = apply_map(attention_map(q, k, None, causal, 0.3), v)
        wanted = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3, enable_gqa=True)
        assert torch.allclose(found, wanted, atol=1e-6)


def test_the_decoding_op_obeys_torchs_rules() -> None:
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 6)
    torch.library.opcheck(decode_attention, (q, k, v, 0.3), test_utils=("test_schema", "test_faketensor"))


_SCRIPT = """
import sys, torch, transformers
config = transformers.LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2)
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(config).eval()
assert "attnopt" not in sys.modules
seen = []
compiled = torch.compile(model, backend="attnopt", options={"report": seen.append})
ids = torch.tensor([[5, 9, 11, 40]])
with torch.no_grad():
    assert torch.allclose(compiled(ids).logits, model(ids).logits, atol=1e-5)
assert sys.modules["attnopt"].__file__.startswith(sys.argv[1])
assert [r["form"] for r in seen[0]] == ["grouped", "grouped"], seen
"""


@pytest.mark.slow
def test_the_wheel_alone_is_enough(tmp_path: Path) -> None:
    """Entry point, no import of attnopt, inductor where there is a compiler."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build_wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build_wheel, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{_SCRIPT}", str(site)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
