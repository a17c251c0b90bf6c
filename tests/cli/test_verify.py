"""verify's long contexts, passkeys and tasks: documents, tables, gates, refusals. The numbers are tested elsewhere."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from attnopt.session import Session
from attnopt.verification import Verification
from tests import hostile
from tests.cli.helpers import Outcome, Run, save_byte_tokenizer


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that promises a context of 512 bytes."""
    directory = hostile.healthy(tmp_path_factory.mktemp("roomy") / "model", vocab_size=256, max_position_embeddings=512)
    save_byte_tokenizer(directory)
    return directory


def verify(cli: Run, model: Path, prose: Path, *more: str) -> Outcome:
    return cli("verify", model, "--against", model, "--text", prose, "--window", "32", "--windows", "1", *more)


def test_document_and_gates(cli: Run, roomy: Path, prose: Path) -> None:
    asked = ("--long-context", "256", "--long-windows", "2", "--passkey", "300,400", "--passkey-trials", "1")
    outcome = verify(cli, roomy, prose, *asked, "--gate", "1.1", "--json")
    document = outcome.document
    assert document["schema"] == "attnopt.verify/1"
    (long,) = document["long_context"]
    assert (long["file"], long["windows"], long["window"]) == (str(prose), 2, 256)
    assert [(b["from"], b["to"]) for b in long["buckets"]] == [(0, 64), (64, 128), (128, 256)]
    assert all(b["perplexity"]["ratio"] == 1.0 for b in long["buckets"])
    assert [row["length"] for row in document["passkey"]["lengths"]] == [300, 400]
    assert len(document["passkey"]["cells"]) == 10
    # The model against itself passes on perplexity; but it finds no passkey, so nothing is known of that.
    checks = {check["of"]: check["passed"] for check in document["gate"]["checks"]}
    assert checks == {"perplexity": True, "perplexity by position": True, "passkey": False}
    assert document["gate"]["passed"] is False
    assert outcome.code == 3


@pytest.mark.parametrize(
    ("more", "message", "hint"),
    [
        (["--passkey", "300,many"], "--passkey '300,many' is no list of whole numbers", "--passkey 1024,4096"),
        (["--passkey-gate", "0.9"], "needs a passkey test", "--passkey"),
        (["--passkey", "300", "--passkey-gate", "95"], "a passkey gate of 95.0 is no share", "from 0 to 1"),
        (["--gate", "0"], "a gate of 0.0 is no ratio", "--gate 1.1"),
        (["--gate", "nan"], "a gate of nan is no ratio", "--gate 1.1"),
        (["--passkey", "0"], "passkey lengths [0]", "512,2048"),
        (["--long-context", "4"], "a context of 4 tokens is not long", "8192"),
        (["--lm-eval", ""], "no lm-eval tasks named", "arc_easy"),
    ],
)
def test_refusals_before_a_process_is_started(
    cli: Run, roomy: Path, prose: Path, more: list[str], message: str, hint: str
) -> None:
    outcome = verify(cli, roomy, prose, *more)
    assert outcome.code == 1
    assert message in outcome.err
    assert hint in outcome.err


def test_a_damaged_model_is_no_bug(cli: Run, roomy: Path, prose: Path, tmp_path: Path) -> None:
    outcome = cli("verify", hostile.make("truncated", tmp_path / "model"), "--against", roomy, "--text", prose)
    assert outcome.code == 1
    assert "model.safetensors is truncated" in outcome.err
    assert "copy or download it again" in outcome.err


def test_json_has_null_for_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    with Session(json=True, quiet=True, verbose=False) as session:
        session.show(Verification({"ratio": math.nan, "rows": [{"x": math.inf}, (1.5, 2)], "passed": True}))
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "ratio": None, "rows": [{"x": None}, [1.5, 2]], "passed": True,
    }  # fmt: skip


@pytest.mark.slow
def test_lm_eval_that_cannot_be_imported(
    cli: Run, roomy: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lm_eval.py").write_text("raise ImportError('nothing here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    outcome = verify(cli, roomy, prose, "--lm-eval", "arc_easy")
    assert outcome.code == 1
    assert "the lm-eval harness cannot be imported: nothing here" in outcome.err
    assert 'pip install "attnopt[lm-eval]"' in outcome.err


def test_tables() -> None:
    quality = {"perplexity": {"original": 19.0, "converted": 20.9, "ratio": 1.1}, "kl": 0.05, "top1_agreement": 0.9}
    both = {"original": 0.95, "converted": 0.6}
    cell = {"length": 2048, "prompts": 4, "accuracy": both, "nll": {"original": 0.1, "converted": 1.25}}
    error = {"original": 0.01, "converted": None}
    task = {"task": "arc_easy", "metric": "acc", "filter": "none", "examples": 200, "standard_error": error}
    checks = [
        {"of": "perplexity", "limit": 1.2, "worst": 1.1, "passed": True},
        {"of": "perplexity by position", "limit": 1.2, "worst": 1.3, "passed": False},
        {"of": "passkey", "limit": 0.95, "worst": 0.6316, "passed": False, "not_judged": [8192]},
    ]
    document = {
        "texts": [{"file": "wiki.txt", "windows": 16, "window": 1024, **quality}],
        "long_context": [
            {
                "file": "wiki.txt",
                "windows": 4,
                "window": 1024,
                "buckets": [{"from": 512, "to": 1024, "tokens": 2048, **quality}],
                "cache_bytes": {"original": 40_000_000, "converted": 20_000_000},
            }
        ],
        "passkey": {"digits": 5, "trials": 4, "cells": [{**cell, "depth": 0.5}], "lengths": [cell]},
        "tasks": [{**task, "original": 0.5, "converted": 0.45, "difference": -0.05}],
        "lm_eval_version": "0.4.13",
        "cached_numbers_per_token": {"original": 11520, "converted": 5760},
        "reloaded_as": "DeepseekV3ForCausalLM",
        "gate": {"ratio": 1.2, "worst": 1.1, "passed": False, "checks": checks},
    }
    stream = io.StringIO()
    result = Verification(document)
    Console(file=stream, width=200).print(result.view(quiet=False))
    shown = " ".join(stream.getvalue().split())
    for part in (
        "perplexity by position: wiki.txt, 4 x 1,024",
        "512-1,024 2,048 19.000 20.900 1.1000 0.0500 90.0%",
        "cache after 1,024 tokens: 40 MB -> 20 MB (50 %)",
        "passkey retrieval, original and converted: 5 digits, 4 prompts each",
        "tokens depth 50% all loss (nats) 2,048 95% 60% 95% 60% 0.100 1.250",
        "arc_easy acc 200 0.5000 ± 0.0100 0.4500 -0.0500",
        "at 16 bits 23,040 -> 11,520 bytes",
        "gate 1.2 passed: the worst ratio is 1.1000",
        "gate 1.2 missed: the worst ratio by position is 1.3000",
        "passkey gate 0.95 missed: 63.2% of the original's accuracy (not judged at 8,192 tokens",
    ):
        assert part in shown
    assert result.exit_code == 3
    assert result.view(quiet=True) == "1.1000"
