"""Calibration text: shares, pools, prefixes, sampling."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from attnopt.errors import OptionError, SourceError, UnsupportedError
from attnopt.profiles import calibration
from attnopt.profiles.calibration import divide, from_files, known_words, sample, self_sampled, sequence_starts

BOS, EOS = 300, 301


class Bytes:
    """A tokenizer whose tokens are bytes, with or without a BOS token, and with or without an EOS token."""

    all_special_ids = (13, BOS)

    def __len__(self) -> int:
        return 256

    def __init__(self, bos: bool = False, eos: bool = False) -> None:
        self.bos, self.eos = [BOS] * bos, [EOS] * eos

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        ids = list(text.encode())
        return {"input_ids": [*self.bos, *ids, *self.eos] if add_special_tokens else ids}


def text_file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def rows(pool: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in pool.tolist()}


class TestDivide:
    def test_pools_are_disjoint_and_complete(self) -> None:
        ids = torch.arange(17 * 4).view(17, 4)
        made = divide(ids, "text", seed=3)
        assert made.windows.shape == (15, 4)
        assert made.selection.shape == (2, 4)
        assert rows(made.windows) | rows(made.selection) == rows(ids)
        assert not rows(made.windows) & rows(made.selection)
        assert made.tokens == ids.numel()
        assert made.context == 4
        assert made.seed == 3

    @pytest.mark.parametrize("n", range(2, 40))
    def test_some_windows_are_held_out_of_any_number(self, n: int) -> None:
        made = divide(torch.arange(n).view(n, 1), "text", seed=0)
        assert len(made.selection) == max(1, n // calibration.SELECTION_EVERY)
        assert len(made.windows) == n - len(made.selection)

    def test_one_window_is_refused(self) -> None:
        with pytest.raises(OptionError, match="two windows") as caught:
            divide(torch.zeros(1, 8), "text", seed=0)
        assert "--calib" in caught.value.hint

    def test_hash_follows_contents_and_division(self) -> None:
        ids = torch.arange(64).view(8, 8)
        same, again = divide(ids, "a", 0), divide(ids.clone(), "b", 1)
        assert same.sha256 == again.sha256
        changed = ids.clone()
        changed[3, 3] += 1
        assert divide(changed, "a", 0).sha256 != same.sha256
        assert divide(ids.view(16, 4), "a", 0).sha256 != same.sha256


class TestFromFiles:
    def test_windows_are_text_of_the_file(self, tmp_path: Path) -> None:
        text = "".join(chr(97 + i % 26) for i in range(1000))
        made = from_files(Bytes(), [text_file(tmp_path, "a.txt", text)], tokens=320, context=32)
        assert made.tokens == 320
        for row in torch.cat([made.windows, made.selection]).tolist():
            assert bytes(row).decode() in text
        assert made.source == "a.txt"

    def test_short_files_leave_their_share_to_long_ones(self, tmp_path: Path) -> None:
        files = [text_file(tmp_path, "long", "l" * 4000), text_file(tmp_path, "short", "s" * 70)]
        made = from_files(Bytes(), files, tokens=640, context=32)
        everything = torch.cat([made.windows, made.selection])
        assert made.tokens == 640
        assert (everything == ord("s")).sum() == 64

    def test_windows_are_spread_over_the_file(self, tmp_path: Path) -> None:
        text = "".join(chr(48 + i // 100) for i in range(1000))
        made = from_files(Bytes(), [text_file(tmp_path, "a", text)], tokens=80, context=10)
        starts = sorted(torch.cat([made.windows, made.selection])[:, 0].tolist())
        assert starts[0] == ord("0")
        assert starts[-1] == ord("9")

    def test_each_window_starts_as_the_tokenizer_starts_a_text(self, tmp_path: Path) -> None:
        made = from_files(Bytes(bos=True), [text_file(tmp_path, "a", "x" * 500)], tokens=160, context=16)
        everything = torch.cat([made.windows, made.selection])
        assert (everything[:, 0] == BOS).all()
        assert (everything[:, 1:] == ord("x")).all()

    def test_each_window_ends_as_the_tokenizer_ends_a_text(self, tmp_path: Path) -> None:
        text = text_file(tmp_path, "a", "x" * 500)
        made = from_files(Bytes(bos=True, eos=True), [text], tokens=160, context=16)
        everything = torch.cat([made.windows, made.selection])
        assert everything.shape == (10, 16)
        assert (everything[:, 0] == BOS).all()
        assert (everything[:, -1] == EOS).all()
        assert (everything[:, 1:-1] == ord("x")).all()

    @pytest.mark.parametrize("text", ["", " \n\t\n"])
    def test_empty_text_is_refused(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(SourceError, match="empty"):
            from_files(Bytes(), [text_file(tmp_path, "a", text)], tokens=64, context=16)

    def test_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"nowhere\.txt"):
            from_files(Bytes(), [tmp_path / "nowhere.txt"], tokens=64, context=16)

    def test_directory_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="cannot read"):
            from_files(Bytes(), [tmp_path], tokens=64, context=16)

    def test_binary_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "model.bin"
        path.write_bytes(bytes(range(256)))
        with pytest.raises(SourceError, match="UTF-8"):
            from_files(Bytes(), [path], tokens=64, context=16)

    def test_a_long_file_is_cut_between_characters(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for limit in range(60, 70):
            monkeypatch.setattr(calibration, "MAX_FILE_BYTES", limit)
            made = from_files(Bytes(), [text_file(tmp_path, "a", "aé€😀" * 100)], tokens=640, context=8)
            assert limit - 16 < made.tokens <= limit

    def test_too_little_text_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match="two windows"):
            from_files(Bytes(), [text_file(tmp_path, "a", "only this")], tokens=64, context=8)

    @pytest.mark.parametrize(("tokens", "context"), [(10, 8), (1000, 4), (0, 16), (-5, 16)])
    def test_sizes_that_make_no_sense_are_refused(self, tmp_path: Path, tokens: int, context: int) -> None:
        with pytest.raises(OptionError, match=r"context|tokens"):
            from_files(Bytes(), [text_file(tmp_path, "a", "x" * 500)], tokens=tokens, context=context)


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


class TestSampling:
    def test_same_seed_same_text_other_seed_other_text(self) -> None:
        source = source_of(tiny_llama())
        one = self_sampled(source, tokens=8 * 16, context=16, seed=5)
        two = self_sampled(source, tokens=8 * 16, context=16, seed=5)
        other = self_sampled(source, tokens=8 * 16, context=16, seed=6)
        assert one.sha256 == two.sha256 != other.sha256
        assert one.source == "self"
        assert one.windows.shape == (7, 16)
        assert one.selection.shape == (1, 16)

    def test_sequences_start_with_any_word(self) -> None:
        made = self_sampled(source_of(tiny_llama(bos_token_id=7)), tokens=32 * 8, context=8)
        first = torch.cat([made.windows, made.selection])[:, 0]
        assert len(first.unique()) > 20
        assert made.windows.min() >= 0
        assert made.windows.max() < 97

    def test_what_the_tokenizer_puts_before_a_text_comes_first_and_special_words_are_not_drawn(self) -> None:
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

    def test_follows_the_model_s_distribution(self) -> None:
        """Second tokens after a fixed first one are distributed as the model says (total variation, 4096 draws)."""
        model = tiny_llama(bos_token_id=7, vocab_size=11)
        with torch.no_grad():
            model.lm_head.weight *= 40
            expected = torch.softmax(model(input_ids=torch.tensor([[7]])).logits[0, -1], dim=-1)
        drawn = sample(model, torch.full((4096, 1), 7), 2, seed=0)[:, 1]
        measured = torch.bincount(drawn, minlength=11) / len(drawn)
        assert expected.max() > 0.15
        assert 0.5 * (measured - expected).abs().sum() < 0.03

    def test_cache_and_prefill_agree_on_what_was_sampled(self) -> None:
        """A near-deterministic model samples its own argmax, position by position."""
        model = tiny_llama(bos_token_id=7)
        with torch.no_grad():
            model.lm_head.weight *= 1e4
        ids = sample(model, torch.tensor([[7], [8], [9]]), 12, seed=0)
        with torch.no_grad():
            again = model(input_ids=ids).logits.argmax(-1)
        assert torch.equal(ids[:, 1:], again[:, :-1])

    def test_batches_follow_the_memory_of_their_caches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_llama(bos_token_id=7)
        per_window = 2 * 2 * 2 * 8 * 4 * 16  # keys and values, layers, heads, width, bytes, tokens
        assert calibration.sampling_batch(model.config, 16, 4) == calibration.SAMPLING_BATCH
        monkeypatch.setattr(calibration, "SAMPLING_CACHE_BYTES", 3 * per_window)
        assert calibration.sampling_batch(model.config, 16, 4) == 3
        monkeypatch.setattr(calibration, "SAMPLING_CACHE_BYTES", 1)
        assert calibration.sampling_batch(model.config, 16, 4) == 1
        assert sample(model, torch.full((5, 2), 7), 16, seed=0).shape == (5, 16)

    def test_models_with_learned_positions_work(self) -> None:
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
        )
        made = self_sampled(source_of(GPT2LMHeadModel(config).eval()), tokens=4 * 16, context=16)
        assert made.tokens == 64

    def test_encoder_is_refused(self) -> None:
        source = SimpleNamespace(model_class=SimpleNamespace(can_generate=lambda: False, __name__="BertModel"))
        with pytest.raises(UnsupportedError, match="does not generate") as caught:
            self_sampled(source, tokens=64, context=16)  # type: ignore[arg-type]  # only what is looked at is given
        assert "--calib FILE" in caught.value.hint

    def test_model_beyond_the_memory_budget_is_refused(self) -> None:
        with pytest.raises(UnsupportedError, match="memory budget"):
            self_sampled(source_of(tiny_llama()), tokens=64, context=16, memory_budget=1000)

    def test_broken_weights_are_refused(self) -> None:
        model = tiny_llama(bos_token_id=7)
        with torch.no_grad():
            model.model.norm.weight.fill_(float("nan"))
        with pytest.raises(UnsupportedError, match="not finite"):
            self_sampled(source_of(model), tokens=64, context=16)
