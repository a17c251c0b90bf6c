"""Opening models: every family's tensors equal from_pretrained's, and every broken input is refused with a hint."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from attnopt.errors import AttnoptError, SourceError
from attnopt.rewriter.source import open_source
from tests import hostile

DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 5e5,
}

FAMILIES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    "llama tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "llama3 rope": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, rope_parameters=LLAMA3)),
    "yarn rope": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, rope_parameters=YARN)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=8)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=16)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**DECODER)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, num_local_experts=11)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**DECODER, num_experts=4, moe_intermediate_size=16, head_dim=8)
    ),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **{**DECODER, "num_key_value_heads": 4},
            n_routed_experts=4,
            moe_intermediate_size=16,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
        )
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, bos_token_id=1, eos_token_id=2)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**ENCODER, ffn_dim=48, vocab_size=64, max_position_embeddings=64, word_embed_proj_dim=32)
    ),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER, vocab_size=64, max_position_embeddings=64)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**ENCODER, image_size=16, patch_size=4)),
    "swin": lambda: hf.SwinForImageClassification(
        hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4)
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_and_buffers_equal_from_pretrained(family: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    FAMILIES[family]().save_pretrained(tmp_path)
    source = open_source(tmp_path)
    assert source.warnings == ()
    reference = source.model_class.from_pretrained(tmp_path)
    expected = reference.state_dict()
    assert set(source.weights.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(source.weights.get(name), tensor), name
        assert source.weights.meta(name).shape == tuple(tensor.shape)
        assert source.weights.meta(name).dtype == tensor.dtype
    skeleton = source.skeleton()
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    buffers = dict(skeleton.named_buffers())
    for name, tensor in reference.named_buffers():
        assert torch.equal(buffers[name], tensor), name
    assert source.weights.parameters == len(torch.cat([p.flatten() for p in _distinct(reference)]))


def _distinct(model: hf.PreTrainedModel) -> list[torch.Tensor]:
    buffers = [model.get_buffer(n) for n in model.state_dict() if n in dict(model.named_buffers())]
    return [*model.parameters(), *buffers]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_element_types(dtype: torch.dtype, tmp_path: Path) -> None:
    model = FAMILIES["llama"]().to(dtype)
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    for name, tensor in model.state_dict().items():
        assert source.weights.get(name).dtype == dtype
        assert torch.equal(source.weights.get(name), tensor)
    assert source.weights.get(hostile.Q_PROJ, torch.float32).dtype == torch.float32


def test_shards(tmp_path: Path) -> None:
    whole = open_source(hostile.healthy(tmp_path / "whole"))
    parts = open_source(hostile.healthy(tmp_path / "parts", shards=True))
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    for name in whole.weights.names():
        assert torch.equal(whole.weights.get(name), parts.weights.get(name))


def test_a_base_model_checkpoint_opens_under_its_prefix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, tie_word_embeddings=True))
    model.model.save_pretrained(tmp_path)
    hostile.edit_config(tmp_path, architectures=["LlamaForCausalLM"])
    source = open_source(tmp_path)
    assert torch.equal(source.weights.get("lm_head.weight"), model.lm_head.weight)
    assert source.weights["lm_head.weight"] == source.weights["model.embed_tokens.weight"]


def test_head_kept_instead_of_embedding(tmp_path: Path) -> None:
    hostile.healthy(tmp_path, tie_word_embeddings=True)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    source = open_source(hostile.edit_tensors(tmp_path, rename))
    assert source.weights["model.embed_tokens.weight"] == source.weights["lm_head.weight"]


def test_a_tie_the_file_contradicts_is_not_made(tmp_path: Path) -> None:
    hostile.edit_config(hostile.healthy(tmp_path), tie_word_embeddings=True)
    source = open_source(tmp_path)
    assert source.config.tie_word_embeddings is False
    assert "stored with different contents" in source.warnings[0]
    stored = load_file(tmp_path / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(source.weights.get(name), stored[name])
    assert source.skeleton().lm_head.weight is not source.skeleton().model.embed_tokens.weight


def test_equal_copies_of_a_tied_weight_count_once(tmp_path: Path) -> None:
    hostile.healthy(tmp_path, tie_word_embeddings=True)

    def double(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    source = open_source(hostile.edit_tensors(tmp_path, double))
    assert source.warnings == ()
    assert source.weights["lm_head.weight"] == source.weights["model.embed_tokens.weight"]


def test_unused_tensors_are_only_a_warning(tmp_path: Path) -> None:
    hostile.healthy(tmp_path)
    hostile.edit_tensors(tmp_path, lambda tensors: tensors.update(extra=torch.zeros(2)))
    assert open_source(tmp_path).warnings == ("1 stored tensors are not used by LlamaForCausalLM: extra",)
    hostile.edit_tensors(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert "inv_freq" not in str(open_source(tmp_path).warnings)


@pytest.mark.parametrize("case", hostile.CASES, ids=lambda case: case.name)
def test_broken_inputs_are_refused_with_a_hint(case: hostile.Hostile, tmp_path: Path) -> None:
    model = hostile.make(case.name, tmp_path / "model")
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    with pytest.raises(AttnoptError) as caught:  # noqa: PT012 - some damage shows only when the tensor is read
        source = open_source(model)
        assert case.on_read, "only damage inside a tensor's data may pass the first look"
        for name in source.weights.names():
            source.weights.get(name)
    assert re.search(case.message, caught.value.message, re.DOTALL), caught.value.message
    assert re.search(case.hint, caught.value.hint, re.DOTALL), caught.value.hint
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile.healthy(tmp_path)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "model.safetensors"))

    # Permissions do not bind root, who may run the tests.
    monkeypatch.setattr("attnopt.rewriter.safe_tensors.open", refuse, raising=False)
    with pytest.raises(SourceError, match=r"cannot read .*: Permission denied"):
        open_source(tmp_path)


def test_hub_cache_links_are_followed_only_into_its_own_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    hostile.healthy(snapshot)
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "cafe")
    (snapshot / "model.safetensors").symlink_to("../../blobs/cafe")
    source = open_source(snapshot)
    assert source.weights.get(hostile.Q_PROJ).shape == (32, 32)
    (snapshot / "model.safetensors").unlink()
    (blobs / "cafe").rename(tmp_path / "cafe")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "cafe")
    with pytest.raises(SourceError, match="link that leaves"):
        open_source(snapshot)


def test_side_files_are_copied_and_may_not_be_links_out(tmp_path: Path) -> None:
    directory = hostile.healthy(tmp_path / "model")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "out").mkdir()
    assert set(open_source(directory).copy_side_files(tmp_path / "out")) == {
        "chat_template.jinja",
        "generation_config.json",
    }
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    (tmp_path / "secret").write_text("key")
    (directory / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match="link that leaves"):
        open_source(directory).copy_side_files(tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_missing_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no readable tokenizer"):
        open_source(hostile.healthy(tmp_path)).tokenizer()


def test_experts_that_do_not_fit_together(tmp_path: Path) -> None:
    FAMILIES["mixtral"]().save_pretrained(tmp_path)
    key = "model.layers.0.block_sparse_moe.experts.3.w1.weight"

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = tensors[key][:7].contiguous()

    with pytest.raises(SourceError, match=r"experts.gate_up_proj do not fit together"):
        open_source(hostile.edit_tensors(tmp_path, narrow))
    with pytest.raises(SourceError, match=r"experts.gate_up_proj .*fit together|experts.gate_up_proj has shape"):
        open_source(hostile.edit_tensors(tmp_path, lambda tensors: tensors.pop(key)))


def test_identity_follows_contents_not_place(tmp_path: Path) -> None:
    first = open_source(hostile.healthy(tmp_path / "a")).identity
    second = open_source(hostile.healthy(tmp_path / "b")).identity
    assert {**first, "name": ""} == {**second, "name": ""}
    path = tmp_path / "b" / "model.safetensors"
    tensors = load_file(path)
    tensors[hostile.Q_PROJ] += 1
    save_file(tensors, path, {"format": "pt"})
    assert open_source(tmp_path / "b").identity["weights_digest"] != first["weights_digest"]


def test_hub_ids_without_a_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import errors

    def unreachable(*args: object, local_files_only: bool = False, **kwargs: object) -> str:
        raise errors.LocalEntryNotFoundError("nothing cached") if local_files_only else ConnectionError("no route")

    monkeypatch.setattr("attnopt.rewriter.hub.snapshot_download", unreachable)
    with pytest.raises(SourceError, match="no local path, and the hub cannot be reached") as caught:
        open_source("org/name")
    assert "give its directory" in caught.value.hint
    hostile.healthy(tmp_path)
    monkeypatch.setattr("attnopt.rewriter.hub.snapshot_download", lambda *args, **kwargs: str(tmp_path))
    assert open_source("org/name").name == "org/name"
