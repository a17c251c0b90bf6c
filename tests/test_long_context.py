"""Loss by position, one model in memory at a time, and the gates: each with a failure planted."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import attnopt
from attnopt.errors import AttnoptError, OptionError
from attnopt.evaluate import Job, ModelSpec, TextSpec, apply_gates, measure, verify_report
from attnopt.evaluate.measure import run
from attnopt.evaluate.recording import Original
from attnopt.evaluate.report import position_buckets
from attnopt.evaluate.text import windows_of
from tests.test_evaluate import WORDS, save_model, silent

CYCLE = 8  # words of the text that the planted model knows by heart
CONTEXT = 64


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained on a text that goes in circles, and one whose positions from 32 on are broken."""
    folder = tmp_path_factory.mktemp("long")
    save_model(folder / "good", 0)  # for the tokenizer
    save_model(folder / "broken", 0)
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "n_positions": CONTEXT, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    ids = (torch.arange(4)[:, None] + torch.arange(CONTEXT)) % CYCLE + 3
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "good")
    with torch.no_grad():
        model.transformer.wpe.weight[32:] = 5 * torch.randn(CONTEXT - 32, 16)
    model.save_pretrained(folder / "broken")
    (folder / "text.txt").write_text(" ".join(WORDS[i % CYCLE] for i in range(200)) + "\n")
    return folder


def job_of(place: Path, **options: Any) -> Job:
    models = (ModelSpec("original", str(place / "good")), ModelSpec("converted", str(place / "broken")))
    return Job(models, (TextSpec(str(place / "text.txt")),), **{"window": 16, "long_context": CONTEXT, **options})


def test_buckets_double() -> None:
    assert position_buckets(8192) == ((0, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096, 8192))
    assert position_buckets(3000) == ((0, 512), (512, 1024), (1024, 2048), (2048, 3000))
    assert position_buckets(64) == ((0, 16), (16, 32), (32, 64))
    assert position_buckets(17) == ((0, 4), (4, 8), (8, 16), (16, 17))


def test_broken_positions_are_shown_where_they_are(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short windows see nothing of it: their gate passes, and that of the positions is missed."""
    monkeypatch.setattr(measure, "PIECE", 24)
    document = verify_report(run(job_of(place), silent), gate=1.1)
    assert document["texts"][0]["perplexity"]["ratio"] == 1.0
    (long,) = document["long_context"]
    assert (long["windows"], long["window"]) == (3, CONTEXT)
    buckets = {(b["from"], b["to"]): b for b in long["buckets"]}
    assert list(buckets) == [(0, 16), (16, 32), (32, 64)]
    assert [b["tokens"] for b in buckets.values()] == [3 * 15, 3 * 16, 3 * 32]
    for span in ((0, 16), (16, 32)):
        assert buckets[span]["perplexity"]["original"] < 1.5
        assert buckets[span]["perplexity"]["ratio"] == 1.0
        assert buckets[span]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert buckets[32, 64]["perplexity"]["original"] < 1.5
    assert buckets[32, 64]["perplexity"]["ratio"] > 2
    assert buckets[32, 64]["kl"] > 0.5
    assert buckets[32, 64]["top1_agreement"] < 0.9
    first, second = document["gate"]["checks"]
    assert (first["of"], first["passed"]) == ("perplexity", True)
    assert (second["of"], second["passed"]) == ("perplexity by position", False)
    assert not document["gate"]["passed"]


def test_numbers_equal_direct_computation(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PIECE", 24)
    (long,) = run(job_of(place, long_windows=2), silent)["long_context"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place / "good")
    ids = torch.tensor(tokenizer((place / "text.txt").read_text())["input_ids"])[: 2 * CONTEXT].view(2, CONTEXT)
    with torch.no_grad():
        p, q = (
            AutoModelForCausalLM.from_pretrained(place / name)(ids).logits[:, :-1].double().log_softmax(-1)
            for name in ("good", "broken")
        )
    nll = -q.gather(-1, ids[:, 1:, None]).squeeze(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    for bucket, (start, stop) in zip(long["converted"]["converted"]["buckets"], position_buckets(CONTEXT), strict=True):
        part = slice(max(start, 1) - 1, stop - 1)
        assert bucket["perplexity"]["converted"] == pytest.approx(math.exp(float(nll[:, part].mean())), rel=1e-4)
        assert bucket["kl"] == pytest.approx(float(kl[:, part].mean()), rel=1e-4, abs=1e-6)
    size = 2 * 16 * 4 * CONTEXT  # keys and values of one layer, 16 numbers in 4 bytes each, per sequence
    assert long["converted"]["converted"]["cache_bytes"] == {"original": size, "converted": size}


def test_more_than_the_model_promises_is_refused(place: Path) -> None:
    with pytest.raises(OptionError, match=f"promises a context of {CONTEXT} tokens, 65 were asked for"):
        run(job_of(place, long_context=65), silent)
    with pytest.raises(OptionError, match="not long"):
        job_of(place, long_context=8)
    with pytest.raises(OptionError, match="0 long windows"):
        job_of(place, long_windows=0)
    with pytest.raises(AttnoptError, match="200 tokens, less than one window of 300") as caught:
        windows_of(
            TextSpec(str(place / "text.txt")),
            PreTrainedTokenizerFast.from_pretrained(place / "good"),
            300,
            None,
            "--long-context",
        )
    assert "--long-context 200 or less" in caught.value.hint
    with pytest.raises(OptionError, match="no device 'abacus'"):
        run(job_of(place, device="abacus"), silent)


def test_verify_reports_positions_and_exits_with_3(place: Path) -> None:
    options: dict[str, Any] = {"against": place / "good", "texts": [place / "text.txt"], "window": 16, "windows": 2}
    result = attnopt.verify(place / "broken", **options, long_context=CONTEXT, gate=1.1)
    assert result.exit_code == 3
    assert len(result.to_json()["long_context"][0]["buckets"]) == 3


# One model in memory


FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=64, n_embd=16, n_layer=1, n_head=2)),
    "gemma2": lambda: Gemma2ForCausalLM(  # it bends its logits after the head
        Gemma2Config(
            vocab_size=60,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            final_logit_softcapping=3.0,
        )
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_logits_come_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    body = weakref.ref(model.base_model)
    head = model.get_output_embeddings().weight
    file = torch.empty(100_000)  # a loaded weight is a view of its file
    head.data = file[: head.numel()].view_as(head).copy_(head)
    ids = torch.randint(0, 60, (2, 21))
    original = Original(model, tmp_path, ids[:, :9])
    assert original.recordable
    whole = [out.logits for out in original.run("a", ids, None)]
    pieces = [out.logits for out in original.run("b", ids, 8)]
    assert len(pieces) == 3
    assert torch.allclose(torch.cat(pieces, 1), whole[0], atol=1e-5)
    original.let_go()
    measure.gc.collect()
    assert body() is None
    assert head.untyped_storage().nbytes() == head.nbytes  # the rest of the file is not kept
    for key, piece, expected in (("b", 8, pieces), ("a", None, whole)):
        again = list(original.logits(key, ids, piece))
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@torch.inference_mode()
def test_a_model_whose_head_wants_more_stays(tmp_path: Path) -> None:
    """Planted: logits that also depend on the tokens, past the states."""

    class Odd(GPT2LMHeadModel):
        def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
            out = super().forward(input_ids=input_ids, **options)
            out.logits = out.logits + self.transformer.wte(input_ids).sum(-1, keepdim=True)
            return out

    model = Odd(GPT2Config(vocab_size=60, n_positions=64, n_embd=16, n_layer=1, n_head=2)).eval()
    ids = torch.randint(0, 60, (1, 21))
    original = Original(model, tmp_path, ids)
    assert not original.recordable
    expected = [out.logits for out in original.run("a", ids, 8)]
    original.let_go()
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(a, b) for a, b in zip(original.logits("a", ids, 8), expected, strict=True))


def test_one_model_at_a_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[weakref.ref[Any]] = []
    real = measure.load

    def watched(*arguments: Any) -> Any:
        assert not [body for body in bodies if body() is not None], "another model is in memory"
        loaded = real(*arguments)
        bodies.append(weakref.ref(loaded.model.base_model))
        return loaded

    monkeypatch.setattr(measure, "load", watched)
    run(job_of(place, windows=2), silent)
    assert len(bodies) == 3  # the converted one is first looked at, then the original is measured, then it


# Gates


def accuracy(length: int, original: float, converted: float) -> dict[str, Any]:
    return {"length": length, "accuracy": {"original": original, "converted": converted}}


def test_gates() -> None:
    texts = [{"perplexity": {"ratio": 1.05}}]
    assert apply_gates({"texts": texts}, None, None) is None
    only = apply_gates({"texts": texts}, 1.1, None)
    assert only is not None
    assert (only["ratio"], only["worst"], only["passed"], len(only["checks"])) == (1.1, 1.05, True, 1)
    passkey = {"lengths": [accuracy(512, 1.0, 1.0), accuracy(2048, 0.8, 0.75)]}
    document = {"texts": texts, "passkey": passkey}
    assert not apply_gates(document, 1.1, None)["passed"]  # 0.95 by default
    assert apply_gates(document, 1.1, 0.9)["passed"]
    assert apply_gates(document, None, None) is None
    alone = apply_gates(document, None, 0.95)
    assert (alone["ratio"], alone["passed"], alone["checks"][0]["worst"]) == (None, False, pytest.approx(0.9375))


def test_what_the_original_cannot_do_is_no_evidence() -> None:
    some = {"texts": [], "passkey": {"lengths": [accuracy(512, 1.0, 1.0), accuracy(2048, 0.0, 0.0)]}}
    judged = apply_gates(some, None, 0.95)
    assert judged["passed"]
    assert judged["checks"][0]["not_judged"] == [2048]
    nothing = {"texts": [], "passkey": {"lengths": [accuracy(512, 0.0, 0.0)]}}
    assert not apply_gates(nothing, None, 0.95)["passed"]


def test_a_ratio_that_is_no_number_fails() -> None:
    texts = [{"perplexity": {"ratio": 1.0}}]
    broken = {"texts": texts, "long_context": [{"buckets": [{"perplexity": {"ratio": r}} for r in (1.0, math.nan)]}]}
    gate = apply_gates(broken, 1.1, None)
    assert [check["passed"] for check in gate["checks"]] == [True, False]
