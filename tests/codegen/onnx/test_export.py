"""ONNX export: what is in the graph, and that the saved file computes what the model does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from attnopt.codegen.decoding import decoding_graph
from attnopt.codegen.onnx.decoder import OnnxDecoder
from attnopt.codegen.onnx.emit import check, emit_onnx
from attnopt.codegen.onnx.forms import OnnxLane
from attnopt.codegen.onnx.graph import MODULE_KEY, SITE_KEY
from attnopt.codegen.onnx.pairs import complex_to_pairs
from attnopt.codegen.target import find_target
from attnopt.errors import AttnoptError, OptionError, SourceError, UnsupportedError
from attnopt.exporting import ExportOptions, export_model
from attnopt.progress import Silent
from attnopt.rewriter.weights import Inline
from tests.codegen.exports import exported_once
from tests.codegen.variants import variant
from tests.models import FAMILIES, VOCAB, build, captured, eager_output

DECODERS = [name for name, family in FAMILIES.items() if family.inputs == "text"]
ENCODERS = [name for name, family in FAMILIES.items() if family.inputs != "text"]
#: Families that stand for the others where a case takes long: grouped, MLA with and without experts, windows, softcap.
FEW = ["llama", "deepseek_v3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "mixtral"))]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directories of exported families, by "family" or "family/form"."""

    def find(name: str) -> Path:
        family, _, form = name.partition("/")
        return exported_once(tmp_path_factory, family, ExportOptions("onnx", attention=form or "auto"))

    return find


def graph_of(directory: Path) -> onnx.GraphProto:
    return onnx.load(directory / "model.onnx").graph


def greedy_reference(name: str, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """What the torch model says, without a cache and one row at a time."""
    model, result = build(name), []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(steps):
            ids = torch.cat([ids, eager_output(model, {"input_ids": ids})[:, -1:].argmax(-1)], 1)
        result.append(ids[0, len(prompt) :].tolist())
    return result


#: Cases of the next test that are quick: a mask without a row per query, and rotations by complex factors.
QUICK = [("bert", "operator"), ("deepseek_v2", "operator")]


@pytest.mark.parametrize(
    ("family", "form"),
    [
        pytest.param(family, form, marks=[] if (family, form) in QUICK else pytest.mark.slow)
        for family in [*DECODERS, *ENCODERS]
        for form in ("matmul", "operator")
    ],
)
def test_every_family_passes_its_own_check(family: str, form: str, tmp_path: Path) -> None:
    result = emit_onnx(captured(family)[1], tmp_path, find_target("cpu"), form, Silent())
    assert max(result.checks.values()) < 1e-5
    assert result.cached_numbers_per_token == captured(family)[1].cached_numbers_per_token


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(-4, 3), st.integers(0, 99))
def test_pairs_compute_what_complex_numbers_do(shape: list[int], dim: int, seed: int) -> None:
    dim = max(-len(shape) - 1, min(dim, len(shape)))
    generator = torch.Generator().manual_seed(seed)
    x, angle, gain = (torch.randn(*shape, *end, generator=generator, dtype=torch.float64) for end in ((2,), (), ()))

    def turned(x: torch.Tensor, angle: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        factor = gain * (torch.polar(torch.ones_like(angle), angle) * 1.5)
        return torch.view_as_real(torch.view_as_complex(x).unsqueeze(dim) * factor.unsqueeze(dim))

    class Real(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            assert not isinstance(value, torch.Tensor) or not value.is_complex()
            return value

    traced = make_fx(turned, tracing_mode="fake")(x, angle, gain)
    complex_to_pairs(traced.graph)
    assert torch.allclose(Real(traced).run(x, angle, gain), turned(x, angle, gain), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_32_cached_steps_at_two_batch_sizes(family: str, exported: Callable[[str], Path]) -> None:
    model, decoder = captured(family)[0], OnnxDecoder(exported(family), providers=["CPUExecutionProvider"], block=16)
    generator = torch.Generator().manual_seed(5)
    for batch, prompt in ((1, 5), (2, 21)):
        ids = torch.randint(3, VOCAB, (batch, prompt + 32), generator=generator)
        wanted = eager_output(model, {"input_ids": ids}).numpy()
        decoder.reset(batch)
        found = [decoder.forward(ids[:, :prompt].numpy())]
        found += [decoder.forward(ids[:, i : i + 1].numpy()) for i in range(prompt, prompt + 32)]
        assert np.abs(np.concatenate(found, 1) - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "deepseek_v3"])
def test_ragged_batches_generate_what_torch_does(family: str, exported: Callable[[str], Path]) -> None:
    prompts = [[5, 9, 11, 40, 3, 8, 71], [17], [4, 4, 90]]
    decoder = OnnxDecoder(exported(family), block=4)
    wanted = greedy_reference(family, prompts, 6)
    assert decoder.greedy(prompts, 6) == wanted
    stop = wanted[0][2]
    assert decoder.greedy(prompts, 6, eos=[stop])[0] == wanted[0][: wanted[0].index(stop) + 1]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 7))
def test_a_prompt_may_be_read_in_any_pieces(exported: Callable[[str], Path], lengths: list[int], chunk: int) -> None:
    prompts = [[3 + (7 * i + n) % 90 for i in range(n)] for n in lengths]
    decoder = OnnxDecoder(exported("deepseek_v3"), block=4)
    whole = decoder.prefill(prompts, chunk=64)
    pieces = decoder.prefill(prompts, chunk=chunk)
    assert np.abs(whole - pieces).max() < 1e-4 * np.abs(whole).max()


def test_the_cache_is_written_in_place(exported: Callable[[str], Path]) -> None:
    decoder = OnnxDecoder(exported("llama"), providers=["CPUExecutionProvider"], block=8)
    decoder.reset(1, 8)
    before = [buffer.data_ptr() for buffer in decoder._buffers]
    decoder.forward(np.array([[5, 6, 7]]))
    assert [buffer.data_ptr() for buffer in decoder._buffers] == before
    held = decoder._buffers[0].numpy()
    assert np.abs(held[:, :, :3]).min(initial=1.0, where=held[:, :, :3] != 0) > 0
    assert np.abs(held[:, :, 3:]).max() == 0


def test_what_lies_behind_the_end_is_not_seen(exported: Callable[[str], Path]) -> None:
    decoder = OnnxDecoder(exported("deepseek_v3"), providers=["CPUExecutionProvider"], block=8)
    decoder.reset(1, 8)
    decoder.forward(np.array([[5, 6, 7]]))
    clean = decoder.forward(np.array([[9]]))
    decoder.reset(1, 8)
    for buffer, entry in zip(decoder._buffers, decoder._cache, strict=True):
        buffer.update_inplace(np.full(decoder._shape(entry, 8), 1e3, np.float32))
    decoder.forward(np.array([[5, 6, 7]]))
    assert np.array_equal(decoder.forward(np.array([[9]])), clean)


def test_mla_keeps_the_latent_and_is_absorbed(exported: Callable[[str], Path]) -> None:
    graph = graph_of(exported("deepseek_v3"))
    cached = [i.name for i in graph.input if i.name.startswith("past_latent")]
    assert cached == ["past_latent.0", "past_latent.1"]
    assert not any("key_values" in i.name for i in graph.input)
    ops = [node.op_type for node in graph.node]
    assert ops.count("Softmax") == 2
    assert ops.count("TensorScatter") == 2
    names = {t.name: list(t.dims) for t in graph.initializer}
    assert names["model.layers.0.self_attn.kv_b_proj.weight__w_uk"] == [4, 8, 16]
    assert names["model.layers.0.self_attn.kv_b_proj.weight__w_uv"] == [4, 20, 6]
    assert "model.layers.0.self_attn.kv_b_proj.weight" not in names


@pytest.mark.slow
def test_the_operator_form_uses_the_operator(exported: Callable[[str], Path]) -> None:
    for family in ("llama", "deepseek_v3"):
        ops = [node.op_type for node in graph_of(exported(f"{family}/operator")).node]
        assert ops.count("Attention") == 2
        assert "Softmax" not in ops


def test_nodes_tell_where_they_come_from_and_nothing_of_this_machine(exported: Callable[[str], Path]) -> None:
    graph = graph_of(exported("llama"))
    facts = [{p.key: p.value for p in node.metadata_props} for node in graph.node]
    by_site = {f[SITE_KEY] for f in facts if SITE_KEY in f}
    assert by_site == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    softmax = [f for f, node in zip(facts, graph.node, strict=True) if node.op_type == "Softmax"]
    assert [f[SITE_KEY] for f in softmax] == sorted(by_site)
    assert any(f.get(MODULE_KEY) == "model.layers.1.mlp" or "mlp" in f.get(MODULE_KEY, "") for f in facts)
    assert str(Path.home()).encode() not in (exported("llama") / "model.onnx").read_bytes()
    assert b"site-packages" not in (exported("llama") / "model.onnx").read_bytes()


def test_dimensions_have_names(exported: Callable[[str], Path]) -> None:
    shapes = {
        i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in graph_of(exported("llama")).input
    }
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["past_length"] == ["batch"]
    assert shapes["past_key_values.0.key"] == ["batch", 2, "capacity", 8]


@pytest.mark.parametrize("family", ["llama", pytest.param("llama-tied", marks=pytest.mark.slow)])
def test_no_weight_is_in_the_file_twice(family: str, exported: Callable[[str], Path]) -> None:
    stored = sum(int(np.prod(t.dims)) for t in graph_of(exported(family)).initializer)
    assert abs(stored - captured(family)[1].parameters) < 64  # rope table and constants


def test_large_weights_are_external_and_the_directory_is_whole(exported: Callable[[str], Path]) -> None:
    directory = exported("llama")
    assert (directory / "model.onnx.data").stat().st_size > 4 * 96 * 32
    raw = onnx.load(directory / "model.onnx", load_external_data=False)
    assert any(t.data_location == onnx.TensorProto.EXTERNAL for t in raw.graph.initializer)
    manifest = json.loads((directory / "attnopt.json").read_text())
    assert manifest["format"] == "onnx"
    assert [s["form"] for s in manifest["sites"]] == ["matmul", "matmul"]
    assert manifest["cached_numbers_per_token"] == 64
    assert max(manifest["checks"].values()) < 1e-4
    assert {"config.json", "README.md"} <= {p.name for p in directory.iterdir()}


def test_a_file_that_computes_something_else_fails_its_check(exported: Callable[[str], Path]) -> None:
    program, directory = captured("llama")[1], exported("llama")
    cache = decoding_graph(program, OnnxLane({site.fqn: "matmul" for site in program.site_list})).cache
    assert max(check(program, cache, ("logits",), directory).values()) < 1e-5
    name = program.site_list[1].o.weight
    scaled = Inline(program.weights.get(name) * 1.01)
    other = program.replace(weights=program.weights.with_values({name: scaled}))
    with pytest.raises(UnsupportedError, match="differs from the model"):
        check(other, cache, ("logits",), directory)
    assert (directory / "attnopt.json").exists()


def test_a_file_that_is_not_onnx_fails_its_check(exported: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(exported("llama"), tmp_path / "copy")
    loaded = onnx.load(tmp_path / "copy" / "model.onnx", load_external_data=False)
    loaded.graph.node[3].op_type = "NoSuchOperator"
    onnx.save(loaded, tmp_path / "copy" / "model.onnx")
    with pytest.raises(UnsupportedError, match="not valid"):
        check(captured("llama")[1], (), ("logits",), tmp_path / "copy")


def test_mistakes_are_named(exported: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="form 'fast'"):
        emit_onnx(captured("llama")[1], tmp_path, find_target("cpu"), "fast", Silent())
    with pytest.raises(OptionError, match="no format 'tflite'"):
        export_model(tmp_path, tmp_path / "out", ExportOptions("tflite"), Silent())
    with pytest.raises(SourceError, match="no exported model"):
        OnnxDecoder(tmp_path)
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "attnopt.json").write_text('{"cache": []}')
    with pytest.raises(SourceError, match="an encoder"):
        OnnxDecoder(encoder)
    with pytest.raises(AttnoptError, match="empty prompt"):
        OnnxDecoder(exported("llama")).prefill([[]])
    with pytest.raises(AttnoptError, match="2 rows given"):
        OnnxDecoder(exported("llama")).forward(np.zeros((2, 1), np.int64))
    (tmp_path / "attnopt.json").write_text(json.dumps({"cache": [{"past": "x"}]}))
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(SourceError, match="cannot load"):
        OnnxDecoder(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "numbers"), [("shared-map", 48), ("shared-kv", 32), ("uneven", 64), ("routed", 64)])
def test_layers_cache_what_they_really_store(name: str, numbers: int, tmp_path: Path) -> None:
    """emit checks prompt and cached steps against the program, which differs from the plain model's."""
    program = variant(name)
    result = emit_onnx(program, tmp_path, find_target("cpu"), "auto", Silent())
    assert max(result.checks.values()) < 1e-5
    assert result.cached_numbers_per_token == program.cached_numbers_per_token == numbers
    inputs = [i.name for i in graph_of(tmp_path).input if i.name.startswith("past_key_values.1")]
    assert inputs == [c.past for c in result.cache if c.past.startswith("past_key_values.1")]
    assert len(inputs) == {"shared-map": 1, "shared-kv": 0}.get(name, 2)
    assert bool(result.notes) == (name == "routed")
    assert [n.op_type for n in graph_of(tmp_path).node].count("Softmax") == (1 if name == "shared-map" else 2)


@pytest.mark.parametrize("name", ["shared-map", "routed"])
def test_the_operator_cannot_share_or_route(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="neither takes a map"):
        emit_onnx(variant(name), tmp_path, find_target("cpu"), "operator", Silent())
    assert not list(tmp_path.iterdir())
