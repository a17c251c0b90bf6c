"""Emission end to end: class choice, files on disk, and the directory in a fresh process that has no attnopt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from attnopt import artifact
from attnopt.artifact import Staging
from attnopt.codegen.hf import emission as emission_module
from attnopt.codegen.hf import emit as emit_module
from attnopt.codegen.hf import own_class
from attnopt.codegen.hf.emit import EmittedAs, check_source, choose, emit
from attnopt.errors import AttnoptError, OptionError, UnsupportedError
from attnopt.rewriter.capture import capture
from attnopt.rewriter.program import Program, copy_graph
from attnopt.rewriter.source import open_source
from attnopt.rewriter.weights import Derived
from tests.codegen.loading import module_of, tokens
from tests.codegen.lossless import Variation, grafted, program_of, tiny


class Source:
    """Stands for a ModelSource that has two side files."""

    def copy_side_files(self, destination: Path) -> tuple[str, ...]:
        (destination / "tokenizer.json").write_text("{}")
        (destination / "generation_config.json").write_text('{"eos_token_id": 2}')
        return ("tokenizer.json", "generation_config.json")


def written(program: Program, out: Path, target: str = "auto", **options: Any) -> EmittedAs:
    with Staging(out, key="test") as staging:
        result = emit(program, Source(), staging, target, **options)
        staging.finish()
    return result


@pytest.mark.parametrize(
    ("model_type", "target"),
    [
        ("llama", "deepseek_v3"),
        ("qwen2", "deepseek_v3"),
        ("phi3", "deepseek_v3"),
        ("qwen3", "attnopt"),
        ("mixtral", "attnopt"),
    ],
)
def test_auto_takes_the_stock_class_where_it_can(model_type: str, target: str) -> None:
    emission, refused = choose(program_of(tiny(model_type)))
    assert emission.target == target
    assert (refused is None) == (target == "deepseek_v3")
    assert choose(program_of(tiny(model_type)), "attnopt")[0].target == "attnopt"


def test_choices_that_cannot_be() -> None:
    with pytest.raises(OptionError, match="gguf"):
        choose(program_of(tiny("llama")), "gguf")
    with pytest.raises(UnsupportedError, match="mixture-of-experts"):
        choose(program_of(tiny("mixtral")), "deepseek_v3")
    nothing = program_of(tiny("llama"), variations={i: Variation(skip=True) for i in (0, 1)})
    with pytest.raises(UnsupportedError, match="no attention layer was rewritten"):
        choose(nothing, "attnopt")


def test_what_can_never_be_written_is_refused_before_the_work() -> None:
    plain = {i: Variation(skip=True) for i in (0, 1)}
    llama, mixtral = (program_of(tiny(name), variations=plain) for name in ("llama", "mixtral"))
    for target in ("auto", "deepseek_v3", "attnopt"):
        check_source(llama, target)
    for target in ("auto", "attnopt"):
        check_source(mixtral, target)
    with pytest.raises(UnsupportedError, match="mixture-of-experts") as caught:
        check_source(mixtral, "deepseek_v3")
    assert "--emit attnopt" in caught.value.hint
    windowed = program_of(tiny("mistral", sliding_window=4), variations=plain)
    check_source(windowed, "auto")
    with pytest.raises(UnsupportedError, match="window"):
        check_source(windowed, "deepseek_v3")
    for target in ("auto", "attnopt", "deepseek_v3"):
        with pytest.raises(UnsupportedError, match="gpt2"):
            check_source(llama.replace(model_type="gpt2"), target)
    with pytest.raises(OptionError):
        check_source(llama, "onnx")


def logits_without_attnopt(directory: Path, cache: Path, remote: bool) -> torch.Tensor:
    """Load a directory with stock transformers in a process that cannot import attnopt."""
    program = f"""
import sys, torch
class NoAttnopt:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "attnopt":
            raise ImportError("attnopt must not be needed")
sys.meta_path.insert(0, NoAttnopt())
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(
    {str(directory)!r}, trust_remote_code={remote}, output_loading_info=True)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
ids = torch.tensor({tokens(2, 15).tolist()})
torch.save(model(ids).logits, {str(directory / "logits.pt")!r})
out = model.generate(ids, max_new_tokens=4, do_sample=False)
assert out.shape[1] > 15
assert "attnopt" not in sys.modules
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    return torch.load(directory / "logits.pt")


@pytest.mark.parametrize(("model_type", "remote"), [("llama", False), ("qwen3", True)])
@torch.no_grad()
def test_the_directory_works_without_attnopt(model_type: str, remote: bool, tmp_path: Path) -> None:
    source = tiny(model_type, tie_word_embeddings=True)
    result = written(program_of(source), tmp_path / "out")
    assert result.target == ("attnopt" if remote else "deepseek_v3")
    assert sorted(result.files) == sorted(p.name for p in (tmp_path / "out").iterdir())
    got = logits_without_attnopt(tmp_path / "out", tmp_path / "modules", remote)
    expected = source(tokens(2, 15)).logits
    assert float((got - expected).norm() / expected.norm()) < 2e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [result.architecture]
    assert config["tie_word_embeddings"]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": 2}


def test_types_and_counts(tmp_path: Path) -> None:
    program = program_of(tiny("llama"))
    result = written(program, tmp_path / "out", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert result.parameters == sum(t.numel() for t in tensors.values())
    assert result.cached_numbers_per_token == program.cached_numbers_per_token
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert any("constant lane" in note for note in result.notes)


def test_shards_and_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole"
    written(program_of(tiny("llama")), whole)
    original = artifact.write_checkpoint
    monkeypatch.setattr(emit_module, "write_checkpoint", lambda d, t: original(d, t, max_shard_bytes=30_000))
    split = tmp_path / "split"
    result = written(program_of(tiny("llama")), split)
    names = [name for name in result.files if name.startswith("model-")]
    assert len(names) > 2
    index = json.loads((split / "model.safetensors.index.json").read_text())
    together = {key: tensor for name in names for key, tensor in load_file(split / name).items()}
    expected = load_file(whole / "model.safetensors")
    assert set(index["weight_map"]) == set(together) == set(expected)
    assert all(torch.equal(together[key], expected[key]) for key in expected)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(directory: Path, tensors: Any) -> None:
        (directory / "model.safetensors").write_text("half")
        raise AttnoptError("no space left")

    monkeypatch.setattr(emit_module, "write_checkpoint", full)
    with pytest.raises(AttnoptError, match="no space"):
        written(program_of(tiny("llama")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_the_tensors(tmp_path: Path) -> None:
    class Counting:
        total = done = 0

        def start(self, title: str, total: int, unit: str) -> int:
            self.total = total
            return 0

        def advance(self, handle: int, amount: int = 1) -> None:
            self.done += amount

        def finish(self, handle: int) -> None: ...

        def say(self, line: str) -> None: ...

        def warn(self, line: str) -> None: ...

    reporter = Counting()
    written(program_of(tiny("llama")), tmp_path / "out", reporter=reporter)
    assert reporter.done == reporter.total == len(load_file(tmp_path / "out" / "model.safetensors"))


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        written(program_of(tiny("qwen2")), tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_fused_and_transposed_projections_are_cut_out() -> None:
    from attnopt.rewriter.site import Projection
    from attnopt.rewriter.weights import Inline, WeightStore, evaluate

    matrix, bias = torch.randn(12, 5), torch.randn(12)
    store = WeightStore({"w": Inline(matrix), "b": Inline(bias), "t": Inline(matrix.T.contiguous())})
    rows = ((2, 4), (8, 9))
    expected = torch.cat([matrix[2:4], matrix[8:9]])
    for projection in (Projection("w", "b", rows, 5), Projection("t", "b", rows, 5, layout="conv1d")):
        assert torch.equal(evaluate(emission_module.weight_of(store, projection)), expected)
        assert torch.equal(evaluate(emission_module.bias_of(store, projection)), torch.cat([bias[2:4], bias[8:9]]))
    assert emission_module.bias_of(store, Projection("w", None, rows, 5)) is None
    assert own_class.FILES == ("configuration_attnopt.py", "modeling_attnopt.py", "heads_attnopt.py")


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_captured_program_keeps_its_other_weights(model_type: str, tied: bool, tmp_path: Path) -> None:
    """Names, tied matrices and fused experts as capture really has them, read lazily from the source's files."""
    source = tiny(model_type, tie_word_embeddings=tied)
    source.save_pretrained(tmp_path)
    captured = capture(open_source(tmp_path))
    made = program_of(source)
    weights = captured.weights.with_values({n: made.weights[n] for n in made.weight_names if ".self_attn." in n})
    program = grafted(captured, made).replace(weights=weights)
    ids = tokens(2, 9)
    expected = source(ids).logits
    for target in ("auto", "attnopt"):
        emission, _ = choose(program, target)
        got = module_of(emission)(ids).logits
        assert float((got - expected).norm() / expected.norm()) < 2e-5


def test_a_head_that_is_no_longer_tied_is_written(tmp_path: Path) -> None:
    source = tiny("llama", tie_word_embeddings=True)
    source.save_pretrained(tmp_path)
    captured = capture(open_source(tmp_path))
    made = program_of(source)
    values = {n: made.weights[n] for n in made.weight_names if ".self_attn." in n}
    program = grafted(captured, made)
    graph = copy_graph(program.graph)
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        graph.create_node("get_attr", "model.embed_tokens.weight")
    values["model.embed_tokens.weight"] = Derived.of("scale", captured.weights["lm_head.weight"], factor=2.0)
    program = program.replace(graph=graph, weights=captured.weights.with_values(values))
    for target in ("deepseek_v3", "attnopt"):
        emission, _ = choose(program, target)
        model = module_of(emission)
        assert torch.equal(model.lm_head.weight * 2, model.model.embed_tokens.weight)
