"""Passkey retrieval: prompts, a model that remembers and one that forgets, scores against greedy decoding."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from attnopt.errors import OptionError, UnsupportedError
from attnopt.evaluate import PasskeySpec, apply_gates
from attnopt.evaluate.passkey import prompts_of
from attnopt.evaluate.report import retrieval
from attnopt.evaluate.scores import score_answer
from tests.cli.helpers import save_byte_tokenizer
from tests.test_evaluate import save_model

SPEC = PasskeySpec(lengths=(400, 900), depths=(0.0, 0.5, 1.0), trials=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One token per byte."""
    folder = tmp_path_factory.mktemp("bytes")
    save_byte_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


class Reader:
    """A model that finds the number, if it was told in the last `memory` tokens. It is given text in pieces."""

    def __init__(self, tokenizer: Any, memory: int) -> None:
        self.tokenizer = tokenizer
        self.memory = memory

    def forward(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool, logits_to_keep: int = 0) -> Any:
        seen = [*(past_key_values or []), *input_ids[0].tolist()]
        logits = torch.zeros(1, input_ids.shape[1], len(self.tokenizer))
        for position in range(input_ids.shape[1]):
            text = self.tokenizer.decode(seen[: len(seen) - input_ids.shape[1] + position + 1][-self.memory :])
            told = re.search(r"The pass key is (\d{5})\.", text)
            asked = re.search(r"\? The pass key is( ?\d*)$", text)
            if told and asked:
                (following,) = self.tokenizer(f" {told[1]} "[len(asked[1])])["input_ids"]
                logits[0, position, following] = 9.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:], past_key_values=seen)

    __call__ = forward


def ask(model: Any, prompts: list[Any]) -> list[tuple[bool, float]]:
    return [score_answer(model, torch.tensor(p.ids), torch.tensor(p.answer)) for p in prompts]


def test_prompts_are_what_was_asked_for(tokenizer: Any) -> None:
    prompts = prompts_of(SPEC, tokenizer)
    assert [(p.length, p.depth) for p in prompts] == [(n, d) for n in SPEC.lengths for d in SPEC.depths for _ in "ab"]
    assert len({p.key for p in prompts}) == len(prompts)
    for prompt in prompts:
        text = tokenizer.decode(prompt.ids)
        assert prompt.length - 120 < len(prompt.ids) + len(prompt.answer) <= prompt.length  # less than a sentence
        assert tokenizer.decode(prompt.answer) == f" {prompt.key}"
        assert text.count(prompt.key) == 2  # told in one place
        assert text.endswith("The pass key is")
        before, after = text.split(f"The pass key is {prompt.key}")
        assert (before.count("\n\n") == 1 and before.endswith("\n\n")) == (prompt.depth == 0.0)
        assert after.endswith("is the pass key.\n\nWhat is the pass key? The pass key is") == (prompt.depth == 1.0)
    filler = re.findall(r"[A-Z][^.?]*\.", tokenizer.decode(prompts[-1].ids))
    assert len(set(filler)) == len(filler)


def test_prompts_depend_on_the_seed_only(tokenizer: Any) -> None:
    assert prompts_of(SPEC, tokenizer) == prompts_of(SPEC, tokenizer)
    other = prompts_of(PasskeySpec(SPEC.lengths, SPEC.depths, SPEC.trials, seed=1), tokenizer)
    assert all(a.key != b.key for a, b in zip(prompts_of(SPEC, tokenizer), other, strict=True))
    # A length's prompts are its own: others asked for beside it change nothing.
    assert prompts_of(PasskeySpec((900,), SPEC.depths, SPEC.trials), tokenizer) == prompts_of(SPEC, tokenizer)[6:]


def test_a_leading_token_is_given_if_the_tokenizer_gives_it(tokenizer: Any) -> None:
    class Leading:
        bos_token_id = 7

        def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [7] * add_special_tokens + ids}

        def decode(self, ids: Any) -> str:
            return tokenizer.decode(ids)

    (prompt,) = prompts_of(PasskeySpec((400,), (0.5,), 1), Leading())
    assert prompt.ids[0] == 7
    assert 7 not in prompt.ids[1:]
    assert len(prompt.ids) + len(prompt.answer) <= 400


def test_what_cannot_be_asked(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="100 tokens has no room") as caught:
        prompts_of(PasskeySpec((100,)), tokenizer)
    (least,) = re.findall(r"at least (\d+)", caught.value.hint)
    assert prompts_of(PasskeySpec((int(least),), trials=1), tokenizer)
    save_model(tmp_path, 0)
    with pytest.raises(UnsupportedError, match="numbers"):
        prompts_of(PasskeySpec((400,)), PreTrainedTokenizerFast.from_pretrained(tmp_path))
    for bad in ({"lengths": ()}, {"lengths": (5, 5)}, {"depths": (1.5,)}, {"depths": ()}, {"trials": 0}, {"digits": 0}):
        with pytest.raises(OptionError):
            PasskeySpec(**{"lengths": (512,), **bad})


def test_a_model_that_forgets_is_found_out(tokenizer: Any) -> None:
    """Planted: the converted model sees 300 tokens, so it finds the number near the end and nowhere else."""
    prompts = prompts_of(SPEC, tokenizer)
    whole, short = ask(Reader(tokenizer, 10_000), prompts), ask(Reader(tokenizer, 300), prompts)
    told = retrieval(SPEC, [(p.length, p.depth) for p in prompts], whole, short)
    assert [row["accuracy"]["original"] for row in told["lengths"]] == [1.0, 1.0]
    found = {(cell["length"], cell["depth"]): cell["accuracy"]["converted"] for cell in told["cells"]}
    assert found[400, 1.0] == found[900, 1.0] == 1.0
    assert found[900, 0.0] == found[900, 0.5] == 0.0
    assert told["lengths"][1]["accuracy"]["converted"] == pytest.approx(1 / 3)
    assert told["lengths"][1]["nll"]["converted"] > told["lengths"][1]["nll"]["original"] + 1
    gate = apply_gates({"texts": [], "passkey": told}, None, 0.5)
    assert gate is not None
    assert not gate["passed"]
    assert gate["checks"][0]["worst"] == pytest.approx(1 / 3)
    same = retrieval(SPEC, [(p.length, p.depth) for p in prompts], whole, whole)
    assert apply_gates({"texts": [], "passkey": same}, None, 1.0)["passed"]


@torch.no_grad()
def test_scores_equal_greedy_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path, 3)
    prompt = torch.randint(3, 60, (41,), generator=torch.Generator().manual_seed(1))
    options = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4, "pad_token_id": 0}
    answer = model.generate(prompt[None], attention_mask=torch.ones(1, 41), **options)[0, 41:]
    monkeypatch.setattr("attnopt.evaluate.scores.PIECE", 16)
    right, nll = score_answer(model, prompt, answer)
    assert right
    log_q = model(torch.cat([prompt, answer])[None]).logits[0, 40:-1].log_softmax(-1)
    assert nll == pytest.approx(float(torch.nn.functional.nll_loss(log_q, answer)), rel=1e-4)
    for position in range(4):
        wrong = answer.clone()
        wrong[position] = (answer[position] - 2) % 57 + 3
        assert not score_answer(model, prompt, wrong)[0]
    assert score_answer(model, prompt, answer[:1])[0]
