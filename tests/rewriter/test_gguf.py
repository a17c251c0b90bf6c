"""GGUF import: equal to transformers' own loading, cached, checked, and safe against races and damage."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import gguf
import numpy as np
import pytest
import torch
import transformers as tf

from attnopt.errors import AttnoptError, SourceError, UnsupportedError
from attnopt.progress import Silent
from attnopt.rewriter import gguf as importer
from attnopt.rewriter.gguf import cache_directory, import_gguf
from attnopt.rewriter.source import open_source
from tests import models

Q8 = gguf.GGMLQuantizationType.Q8_0
Q4 = gguf.GGMLQuantizationType.Q4_1
F16 = gguf.GGMLQuantizationType.F16
F32 = gguf.GGMLQuantizationType.F32
BF16 = gguf.GGMLQuantizationType.BF16

#: Our family name, its name in GGUF, and how its matrices are stored.
FAMILIES = {
    "llama": ("llama", Q8),
    "llama-tied": ("llama", Q4),
    "llama-mha": ("llama", F16),
    "llama-mqa": ("llama", BF16),
    "qwen2": ("qwen2", Q8),
    "qwen3": ("qwen3", F32),
    "gpt2": ("gpt2", F16),
    "qwen3_moe": ("qwen3moe", F16),
}
CHANGES: dict[str, dict[str, int]] = {
    "gpt2": {"n_positions": 1024},
    "qwen3": {"intermediate_size": 64, "head_dim": 128},
    "qwen3_moe": {"intermediate_size": 64, "head_dim": 128, "moe_intermediate_size": 768, "norm_topk_prob": True},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(family: str) -> tf.PreTrainedModel:
    """A tiny model whose rows are whole blocks of 32 numbers.

    Where transformers takes no notice of what the file says (head width of Qwen3, width of its experts, positions of
    GPT-2), it has transformers' default.
    """
    return models.build(family, **CHANGES.get(family, {"intermediate_size": 64}))


def write(path: Path, family: str, **changes: object) -> Path:
    """Write a tiny random model as llama.cpp's converter does: its names, its permutation of Llama's q and k."""
    architecture, quantization = FAMILIES[family]
    model = build(family)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if architecture != "gpt2":
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(1e4)
        writer.add_vocab_size(config.vocab_size)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    if "head_dim" in models.FAMILIES[family].options:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if "moe" in architecture:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    _vocabulary(writer, config.vocab_size)
    for change in changes.values():
        assert callable(change)
        change(writer)
    for name, tensor in _tensors(model, architecture):
        _add(writer, name, tensor, quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    letters = [chr(c) for c in range(33, 127)]
    tokens = ["<pad>", "<s>", "</s>", "ab", "bc", *letters[: size - 5]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (size - 3))
    writer.add_token_merges(["a b", "b c"])  # of one merge transformers 5.17 makes a string, and reads letters
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")


def _tensors(model: tf.PreTrainedModel, architecture: str) -> list[tuple[str, torch.Tensor]]:
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], model.config.num_hidden_layers)
    tied = dict(model.all_tied_weights_keys)
    result = []
    for key, tensor in model.state_dict().items():
        if key in tied:
            continue
        stem, _, suffix = key.rpartition(".")
        if key.endswith("experts.gate_up_proj"):
            block = f"blk.{key.split('.')[2]}"
            gate, up = tensor.chunk(2, dim=1)
            result += [(f"{block}.ffn_gate_exps.weight", gate), (f"{block}.ffn_up_exps.weight", up)]
            continue
        if key.endswith("experts.down_proj"):
            result.append((f"blk.{key.split('.')[2]}.ffn_down_exps.weight", tensor))
            continue
        name = f"{names.get_name(stem)}.{suffix}"
        if architecture == "llama" and ".attn_q." in name:
            tensor = _permuted(tensor, model.config.num_attention_heads)
        elif architecture == "llama" and ".attn_k." in name:
            tensor = _permuted(tensor, model.config.num_key_value_heads)
        elif architecture == "gpt2" and tensor.ndim == 2 and not name.startswith(("token", "position")):
            tensor = tensor.T
        result.append((name, tensor))
    return result


def _permuted(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    rows = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, rows, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, quantization: gguf.GGMLQuantizationType) -> None:
    data = np.ascontiguousarray(tensor.detach().float().numpy())
    kind = quantization if data.ndim > 1 else F32
    writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_equal_transformers(family: str, tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", family)
    source = open_source(path)
    reference = tf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    expected = reference.state_dict()
    assert set(source.weights.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(source.weights.get(name), tensor), name
    own = {"architectures", "_name_or_path", "dtype", "quantization_config", "use_cache"}
    config = {key: value for key, value in reference.config.to_dict().items() if key not in own}
    found = source.config.to_dict()
    assert {key: found.get(key) for key in config} == config
    assert source.format == "gguf"
    assert source.name == "tiny.gguf"
    assert source.identity["file_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    original = build(family)
    ids = torch.tensor([[5, 9, 3, 40]])
    with torch.no_grad():
        kept, wanted = reference(ids).logits, original(ids).logits
    tolerance = 0.6 if FAMILIES[family][1] == Q4 else 0.05
    assert models.relative_error(kept, wanted) < tolerance, "the fixture itself is a faithful GGUF of the model"


def test_tokenizer_template_and_generation_config_come_along(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", "llama")
    source = open_source(path)
    reference = tf.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    text = "abcd hello"
    assert source.tokenizer()(text)["input_ids"] == reference(text)["input_ids"]
    assert source.tokenizer().chat_template == "{{ messages[0].content }}"
    assert source.tokenizer().eos_token == "</s>"
    (tmp_path / "out").mkdir()
    copied = source.copy_side_files(tmp_path / "out")
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= set(copied)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


def test_a_broken_tokenizer_costs_only_the_tokenizer(tmp_path: Path) -> None:
    class Warned(Silent):
        lines: ClassVar[list[str]] = []

        def warn(self, line: str) -> None:
            self.lines.append(line)

    def other_merges(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0]["tokenizer.ggml.merges"]
        writer.add_token_merges(["x y"])

    path = write(tmp_path / "tiny.gguf", "llama", merges=other_merges)
    source = open_source(path, reporter=Warned())
    assert "no usable tokenizer" in Warned.lines[0]
    assert source.weights.get("model.norm.weight").shape == (32,)
    with pytest.raises(SourceError, match="no readable tokenizer"):
        source.tokenizer()


def _count(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    parsed: list[Path] = []
    reader = importer._Reader

    def counted(path: Path) -> gguf.GGUFReader:
        parsed.append(path)
        return reader(path)

    monkeypatch.setattr(importer, "_Reader", counted)
    return parsed


def test_the_file_is_parsed_once_and_the_second_time_not_at_all(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "tiny.gguf", "llama")
    parsed = _count(monkeypatch)

    def forbidden(*args: object) -> None:
        raise AssertionError("transformers parsed the file itself")

    monkeypatch.setattr(gguf, "GGUFReader", forbidden)
    first = import_gguf(path)
    assert parsed == [path]
    assert gguf.GGUFReader is forbidden, "what was lent to transformers is taken back"
    copy = tmp_path / "elsewhere.gguf"
    copy.write_bytes(path.read_bytes())
    assert import_gguf(copy) == first, "the cache goes by contents"
    assert parsed == [path]
    assert first.directory.is_relative_to(cache / "gguf")


def test_another_file_is_another_import(tmp_path: Path) -> None:
    assert import_gguf(write(tmp_path / "a.gguf", "llama")) != import_gguf(write(tmp_path / "b.gguf", "qwen2"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "gguf-import.json"])
@pytest.mark.parametrize("damage", ["shorten", "remove", "alter"])
def test_a_damaged_import_is_made_again(
    name: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "tiny.gguf", "llama")
    file = import_gguf(path).directory / name
    good = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(good[:-3] if damage == "shorten" else good[:-1] + bytes([good[-1] ^ 1]))
    parsed = _count(monkeypatch)
    assert (import_gguf(path).directory / name).read_bytes() == good
    assert len(parsed) == 1


def test_a_failed_import_leaves_no_import(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "tiny.gguf", "llama")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(importer, "write_tensors", fail)
    with pytest.raises(AttnoptError, match="no space left"):
        import_gguf(path)
    assert [p.suffix for p in (cache / "gguf").iterdir()] == [".lock"]
    monkeypatch.undo()
    monkeypatch.setenv("ATTNOPT_CACHE", str(cache))
    assert import_gguf(path).directory.is_dir()


def test_leftovers_of_a_killed_import_are_removed(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "tiny.gguf", "llama")
    directory = import_gguf(path).directory
    directory.rename(directory.with_name(f"{directory.name}.123.part"))
    import_gguf(path)
    assert sorted(p.name for p in (cache / "gguf").iterdir()) == [directory.name, f"{directory.name}.lock"]


def test_imports_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "tiny.gguf", "llama")
    parsed = _count(monkeypatch)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(import_gguf(path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(parsed) == 1, "one of them did the work, the others waited"


def test_the_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    assert cache_directory() == cache
    monkeypatch.delenv("ATTNOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "attnopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "attnopt"


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", "llama")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(AttnoptError, match="cannot write"):
        import_gguf(path)


def _refused(path: Path) -> AttnoptError:
    with pytest.raises(AttnoptError) as caught:
        import_gguf(path)
    assert caught.value.hint
    assert not [p for p in (cache_directory() / "gguf").glob("*") if p.is_dir()]
    return caught.value


@pytest.mark.parametrize("keep", [0.0001, 0.02, 0.2, 0.5, 0.97])
def test_truncated_files(keep: float, tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", "llama")
    raw = path.read_bytes()
    path.write_bytes(raw[: max(5, int(len(raw) * keep))])
    assert isinstance(_refused(path), SourceError)


def test_noise_behind_the_magic_bytes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for i in range(20):
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(b"GGUF\3\0\0\0" + generator.bytes(256))
        assert isinstance(_refused(path), SourceError)


def test_unknown_architectures(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "perceptron")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    error = _refused(path)
    assert isinstance(error, UnsupportedError)
    assert "'perceptron'" in error.message
    assert "original Hugging Face directory" in error.hint


def test_parts_of_a_split_file(tmp_path: Path) -> None:
    split: Callable[[gguf.GGUFWriter], None] = lambda writer: writer.add_uint16("split.count", 3)  # noqa: E731
    error = _refused(write(tmp_path / "x.gguf", "llama", split=split))
    assert "one of several parts" in error.message
    assert "llama-gguf-split --merge" in error.hint


def test_missing_and_misshapen_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = _tensors

    def fewer(model: tf.PreTrainedModel, architecture: str) -> list[tuple[str, torch.Tensor]]:
        return [pair for pair in tensors(model, architecture) if pair[0] != "blk.1.attn_q.weight"]

    monkeypatch.setitem(globals(), "_tensors", fewer)
    assert (
        "lacks the weights model.layers.1.self_attn.q_proj.weight"
        in _refused(write(tmp_path / "a.gguf", "llama")).message
    )

    def narrower(model: tf.PreTrainedModel, architecture: str) -> list[tuple[str, torch.Tensor]]:
        return [(n, t[:24] if n == "blk.1.attn_v.weight" else t) for n, t in tensors(model, architecture)]

    monkeypatch.setitem(globals(), "_tensors", narrower)
    wider = write(tmp_path / "b.gguf", "llama-mha")
    assert "'blk.1.attn_v.weight' has shape [24, 32]" in _refused(wider).message


@pytest.mark.slow
@pytest.mark.skipif("ATTNOPT_TEST_GGUF" not in os.environ, reason="ATTNOPT_TEST_GGUF names the GGUF of a real model")
def test_a_real_model(tmp_path: Path) -> None:
    path = Path(os.environ["ATTNOPT_TEST_GGUF"])
    source = open_source(path)
    reference = tf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(source.weights.get(name), tensor), name
