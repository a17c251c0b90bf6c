"""Evaluation: windows, pooled numbers and gates by hand; the measuring process against direct computation."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attnopt.errors import AttnoptError, OptionError, SourceError, UnsupportedError
from attnopt.evaluate import Job, ModelSpec, TextSpec, apply_gate, evaluate, launch, peak_rss_bytes, verify_report
from attnopt.evaluate.__main__ import main
from attnopt.evaluate.loading import load
from attnopt.evaluate.measure import count_cached_numbers, measure_cache, run
from attnopt.evaluate.report import WindowScores, compare, mean, standard_error
from attnopt.evaluate.scores import score_windows
from attnopt.evaluate.text import read_text, undo_wikitext_marks, windows_of
from tests import hostile, models

WORDS = [f"w{i}" for i in range(57)]


def save_model(directory: Path, seed: int, words: list[str] | None = None, **changes: Any) -> LlamaForCausalLM:
    """A tiny random Llama with a tokenizer that knows a few words."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 60,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
    for tensor in model.parameters():
        if tensor.dim() == 2:
            tensor.data.normal_(std=2 / math.sqrt(tensor.shape[1]))
    model.save_pretrained(directory)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(words or WORDS)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(directory)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and a text of 100 words on ten lines."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_model(folder / "a", 0)
    save_model(folder / "b", 1)
    generator = torch.Generator().manual_seed(0)
    words = [WORDS[i] for i in torch.randint(0, 57, (100,), generator=generator)]
    lines = [" ".join(words[i : i + 10]) for i in range(0, 100, 10)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    return folder


def job_of(place: Path, **options: Any) -> Job:
    models = (ModelSpec("original", str(place / "a")), ModelSpec("converted", str(place / "b")))
    return Job(models, **{"texts": (TextSpec(str(place / "text.txt")),), "window": 16, **options})


def silent(what: str, amount: int) -> None: ...


# Text and windows


def test_wikitext_marks() -> None:
    assert undo_wikitext_marks("a 1 @,@ 200 @.@ 5 well @-@ known @ x") == "a 1,200.5 well-known @ x"


def test_windows_are_disjoint_and_whole(place: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place / "a")
    spec = TextSpec(str(place / "text.txt"))
    ids = tokenizer((place / "text.txt").read_text(), add_special_tokens=False)["input_ids"]
    windows = windows_of(spec, tokenizer, 16, None)
    assert len(ids) == 100
    assert windows == [ids[i : i + 16] for i in range(0, 96, 16)]
    assert windows_of(spec, tokenizer, 16, 2) == windows[:2]
    with pytest.raises(AttnoptError, match="100 tokens") as caught:
        windows_of(spec, tokenizer, 101, None)
    assert "100" in caught.value.hint


def test_parts_of_a_text_are_disjoint(place: Path) -> None:
    file = str(place / "text.txt")
    first, second = read_text(TextSpec(file, stop=0.5)), read_text(TextSpec(file, start=0.5))
    assert first + second == Path(file).read_text()
    assert first.endswith("\n")
    assert abs(len(first) - len(second)) < 80


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AttnoptError, match=r"nowhere\.txt"):
        read_text(TextSpec(str(tmp_path / "nowhere.txt")))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(AttnoptError, match="UTF-8"):
        read_text(TextSpec(str(tmp_path / "latin.txt")))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(AttnoptError, match="no text"):
        read_text(TextSpec(str(tmp_path / "empty.txt")))


# Jobs


def test_job_round_trip_and_refusals(place: Path) -> None:
    job = job_of(place, windows=3, prompt="w1", logits_ids=((1, 2),), logits_file="x")
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job
    document = job.to_json()
    with pytest.raises(OptionError, match="schema"):
        Job.from_json({**document, "schema": "other/1"})
    with pytest.raises(OptionError, match="colour"):
        Job.from_json({**document, "colour": "red"})
    with pytest.raises(OptionError, match="different names"):
        Job((ModelSpec("a", "x"), ModelSpec("a", "y")))
    for bad in ({"window": 1}, {"windows": 0}, {"dtype": "int8"}, {"logits_file": "x"}):
        with pytest.raises(OptionError):
            job_of(place, **bad)
    with pytest.raises(OptionError, match="no text between"):
        job_of(place, texts=(TextSpec("f", start=0.5, stop=0.5),))


# Numbers


def test_means_and_errors() -> None:
    assert mean([1.0, 2.0, 6.0]) == 3.0
    assert standard_error([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt(14 / 2 / 3))
    assert standard_error([1.0]) is None


def test_comparison_is_pooled_and_paired() -> None:
    before = WindowScores(nll=[1.0, 3.0], kl=[[0.0] * 4] * 2, agree=[[1.0] * 4] * 2)
    after = WindowScores(nll=[1.5, 3.7], kl=[[0.0, 0.0, 0.0, 0.4], [0.2] * 4], agree=[[1.0] * 4, [0.5] * 4])
    got = compare(before, after)
    assert got["perplexity"]["original"] == pytest.approx(math.exp(2.0))
    assert got["perplexity"]["ratio"] == pytest.approx(math.exp(0.6))
    assert got["ln_ratio"] == pytest.approx(0.6)
    assert got["standard_error"]["paired_difference"] == pytest.approx(0.1)
    assert got["kl"] == pytest.approx(0.15)
    assert got["by_quarter"][3]["kl"] == pytest.approx(0.3)
    assert got["top1_agreement"] == pytest.approx(0.75)


def test_gate_takes_the_worst_text() -> None:
    texts = [{"perplexity": {"ratio": 1.01}}, {"perplexity": {"ratio": 1.2}}]
    assert apply_gate(texts, None) is None
    assert apply_gate(texts, 1.2) == {"ratio": 1.2, "worst": 1.2, "passed": True}
    assert not apply_gate(texts, 1.19)["passed"]
    assert not apply_gate([{"perplexity": {"ratio": math.nan}}], 10.0)["passed"]
    assert not apply_gate([], 10.0)["passed"]


def test_scores_equal_direct_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 60, (3, 21))
    p, q = 2 * torch.randn(3, 21, 60), 2 * torch.randn(3, 21, 60)
    monkeypatch.setattr("attnopt.evaluate.scores._SLICE", 7)
    pieces = [slice(0, 12), slice(12, 20), slice(20, 21)]  # the last one predicts nothing
    positions = score_windows(ids, [q[:, part] for part in pieces], [p[:, part] for part in pieces])
    scores = positions.windows(0, 21)
    for row in range(3):
        log_p, log_q = p[row, :-1].double().log_softmax(-1), q[row, :-1].double().log_softmax(-1)
        nll = torch.nn.functional.nll_loss(log_q, ids[row, 1:])
        assert scores.nll[row] == pytest.approx(float(nll), rel=1e-6)
        kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        assert mean(scores.kl[row]) == pytest.approx(float(kl), rel=1e-5)  # 20 positions: equal quarters
        same = (p[row, :-1].argmax(-1) == q[row, :-1].argmax(-1)).double()
        assert mean(scores.agree[row]) == pytest.approx(float(same.mean()))


def test_a_model_agrees_with_itself(place: Path) -> None:
    models = tuple(ModelSpec(name, str(place / "a")) for name in ("original", "copy"))
    (text,) = run(Job(models, (TextSpec(str(place / "text.txt")),), 16), silent)["texts"]
    got = text["converted"]["copy"]
    assert got["perplexity"]["ratio"] == 1.0
    assert got["kl"] == pytest.approx(0.0, abs=1e-7)
    assert got["top1_agreement"] == 1.0


def test_batches_do_not_change_the_numbers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = run(job_of(place), silent)["texts"][0]["converted"]["converted"]["nll"]
    monkeypatch.setattr("attnopt.evaluate.measure._BATCH_TOKENS", 16)
    single = run(job_of(place), silent)["texts"][0]["converted"]["converted"]["nll"]
    assert together["converted"] == pytest.approx(single["converted"], rel=1e-6)


# Loading and the cache


def test_cache_is_counted_on_the_real_object(place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "a")
    for batch in (1, 2):
        cached, error = measure_cache(model, batch)
        assert cached == 2 * 2 * 2 * 4  # layers, keys and values, KV heads, head width
        assert error < 1e-5
    with pytest.raises(AttnoptError, match="no cache"):
        count_cached_numbers(None, 1)
    cache = model(torch.ones(1, 5, dtype=torch.long), use_cache=True).past_key_values
    cache.layers[1].keys = cache.layers[1].keys[..., :3]
    cache.layers[1].values = cache.layers[1].values.flatten()[:7]
    with pytest.raises(AttnoptError, match="whole tokens"):
        count_cached_numbers(cache, 1)


def test_a_wrong_decode_is_noticed(place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "a")
    attention = model.model.layers[0].self_attn
    whole = attention.forward
    # An error only steps with a past can show: forget the oldest token.
    attention.forward = lambda hidden_states, **kw: whole(
        hidden_states, **{**kw, "past_key_values": kw["past_key_values"] if hidden_states.shape[1] > 1 else None}
    )
    assert measure_cache(model)[1] > 1e-3


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in hostile.CASES])
def test_damaged_models_are_refused(case: hostile.Hostile, tmp_path: Path) -> None:
    model = hostile.make(case.name, tmp_path / "model")
    with pytest.raises(AttnoptError, match=case.message):
        load(ModelSpec("x", str(model)), torch.float32, "cpu")


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_models_that_predict_no_words_are_refused(family: str, tmp_path: Path) -> None:
    models.save(family, tmp_path)
    with pytest.raises(UnsupportedError, match="predicts no next words"):
        load(ModelSpec("x", str(tmp_path)), torch.float32, "cpu")


def test_tensors_that_nobody_reads_are_refused(tmp_path: Path) -> None:
    model = hostile.edit_tensors(hostile.healthy(tmp_path / "model"), lambda tensors: tensors.update(x=torch.ones(2)))
    with pytest.raises(SourceError, match="unexpected keys: x"):
        load(ModelSpec("x", str(model)), torch.float32, "cpu")


def test_another_tokenizer_is_refused(place: Path, tmp_path: Path) -> None:
    save_model(tmp_path, 1, ["It", "costs", *WORDS[2:]])
    models = (ModelSpec("original", str(place / "a")), ModelSpec("converted", str(tmp_path)))
    with pytest.raises(AttnoptError, match="another tokenizer"):
        run(Job(models, (TextSpec(str(place / "text.txt")),), 16), silent)


def test_peak_memory_is_this_process_only() -> None:
    # In a process of its own: what other tests took before would hide the growth.
    grow = "import torch; from attnopt.evaluate import peak_rss_bytes as peak; "
    grow += "before = peak(); block = torch.ones(16_000_000); print(peak() - before)"
    grown = subprocess.run([sys.executable, "-c", grow], capture_output=True, text=True, check=True)
    assert int(grown.stdout) > 0.5 * 64_000_000
    block = torch.ones(64_000_000)  # the child below has nothing of it
    program = "from attnopt.evaluate import peak_rss_bytes; print(peak_rss_bytes())"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(child.stdout) < peak_rss_bytes() - 0.5 * block.nbytes


# The process


def test_fresh_process_equals_direct_computation(place: Path, tmp_path: Path) -> None:
    class Counting:
        done = 0

        def start(self, title: str, total: int, unit: str) -> int:
            return 0

        def advance(self, handle: int, amount: int = 1) -> None:
            self.done += amount

        def finish(self, handle: int) -> None: ...

        def say(self, line: str) -> None: ...

        def warn(self, line: str) -> None: ...

    reporter = Counting()
    ids = ((3, 4, 5, 6), (7, 8, 9, 10))
    job = job_of(place, prompt="w1 w2", sample_tokens=3, logits_ids=ids, logits_file=str(tmp_path / "logits"))
    report = evaluate(job, reporter)
    assert reporter.done == 2 * 96
    document = verify_report(report, gate=1e9)
    a, b = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("a", "b"))
    tokens = torch.tensor(
        PreTrainedTokenizerFast.from_pretrained(place / "a")((place / "text.txt").read_text())["input_ids"]
    )[:96].view(6, 16)
    with torch.no_grad():
        expected = {
            name: math.exp(
                float(torch.nn.functional.cross_entropy(m(tokens).logits[:, :-1].mT.double(), tokens[:, 1:]))
            )
            for name, m in (("original", a), ("converted", b))
        }
        direct = b(torch.tensor(ids)).logits
    (text,) = document["texts"]
    assert (text["windows"], text["window"], text["tokens"]) == (6, 16, 90)
    for name, value in expected.items():
        assert text["perplexity"][name] == pytest.approx(value, rel=1e-6)
    assert text["perplexity"]["ratio"] == pytest.approx(expected["converted"] / expected["original"], rel=1e-6)
    assert document["reloaded_as"] == "LlamaForCausalLM"
    assert document["cached_numbers_per_token"] == {"original": 32, "converted": 32}
    assert document["gate"]["passed"]
    assert len(document["samples"]["converted"].split()) == 3
    assert document["peak_rss_bytes"] > 1e7
    from safetensors.torch import load_file

    assert torch.allclose(load_file(tmp_path / "logits")["converted"], direct, atol=1e-6)


def test_errors_come_back_from_the_process(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AttnoptError, match="100 tokens") as caught:
        evaluate(job_of(place, window=200))
    assert "--window" in caught.value.hint
    crash = tmp_path / "crash"
    crash.write_text("#!/bin/sh\necho lost my mind >&2\nexit 9\n")
    crash.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(crash))
    with pytest.raises(RuntimeError, match=r"(?s)code 9.*lost my mind"):
        evaluate(job_of(place))


def test_report_on_standard_output(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job_of(place, texts=()).to_json()))
    assert main([str(file)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["schema"] == "attnopt.evaluate/1"
    assert [m["name"] for m in report["models"]] == ["original", "converted"]
    file.write_text("{}")
    assert main([str(file)]) == 1
    assert "no evaluation job" in json.loads(capsys.readouterr().out)["error"]


def test_importing_evaluate_is_light() -> None:
    program = "import sys, attnopt.evaluate; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
