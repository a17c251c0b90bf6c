"""The bench: what it times, counts and refuses. Times themselves are not judged, their bookkeeping is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from attnopt import api
from attnopt.errors import AttnoptError, OptionError
from attnopt.evaluate import ModelSpec
from attnopt.timing import BenchJob, bench_report
from attnopt.timing.measure import _bytes_per_step, _load, run
from attnopt.timing.report import bench_view
from tests import models


def silent(what: str, amount: int) -> None:
    pass


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> BenchJob:
    """A grouped-query and a multi-query model: 2 layers, 8 wide heads, 2 and 1 of them cached."""
    folder = tmp_path_factory.mktemp("pair")
    small = {"vocab_size": 256, "max_position_embeddings": 64}
    specs = [
        ModelSpec(name, str(models.save(family, folder / name, **small)))
        for name, family in (("original", "llama"), ("converted", "llama-mqa"))
    ]
    return BenchJob(tuple(specs), contexts=(8, 24), batches=(1, 3), steps=2, runs=2, dtype="float32")


def test_cases_and_counts(pair: BenchJob) -> None:
    seen: list[int] = []
    result = run(pair, lambda what, amount: seen.append(amount))
    assert sum(seen) == pair.tokens
    assert [(c["context"], c["batch"]) for c in result["cases"]] == [(8, 1), (8, 3), (24, 1), (24, 3)]
    for case in result["cases"]:
        for row, numbers in zip(case["models"], (2 * 2 * 2 * 8, 2 * 2 * 1 * 8), strict=True):
            assert row["cached_numbers_per_token"] == numbers
            assert row["cache_bytes"] == 4 * numbers * case["context"] * case["batch"]
            assert (len(row["prefill_seconds"]), len(row["decode_seconds"])) == (2, 2)
            assert row["decode_tokens_per_second"] > 0
    document = bench_report(result)
    assert {case["ratio"]["cache_bytes"] for case in document["cases"]} == {0.5}


def test_ratios_pair_neighbours() -> None:
    def row(prefill: list[float], decode: list[float], read: int) -> dict[str, Any]:
        return {
            "prefill_seconds": prefill, "decode_seconds": decode, "predicted_bytes_per_step": read, "cache_bytes": read,
            "prefill_tokens_per_second": 1.0, "decode_tokens_per_second": 2.0,
        }  # fmt: skip

    described = [
        {"name": n, "loaded_as": "X", "dtype": "float32", "weight_bytes": 1, "peak_bytes": 1}
        for n in ("original", "converted")
    ]
    rows = [row([4.0, 8.0, 1.0], [3.0], 10), row([2.0, 4.0, 8.0], [2.0], 4)]
    document = bench_report(
        {
            "models": described,
            "cases": [{"context": 8, "batch": 1, "models": rows}],
            "machine": {"device": "cpu", "threads": 1, "torch": "2"},
        }
    )
    ratio = document["cases"][0]["ratio"]
    assert ratio["prefill_speed"] == 2.0  # of 2, 2 and 1/8; the medians of each alone would say 4 / 4
    assert ratio["decode_speed"] == 1.5
    assert ratio["predicted_decode_speed"] == 2.5
    assert bench_view(document, quiet=True) == "1.500"


def test_bytes_per_step(tmp_path: Path) -> None:
    """All weights once; of an embedding that is not tied, the rows that are read; of experts, those expected."""
    for family, tied in (("llama", False), ("llama-tied", True), ("mixtral", False)):
        job = BenchJob((ModelSpec("m", str(models.save(family, tmp_path / family))),), dtype="float32")
        loaded = _load(job, 0)
        model, config = loaded.model, loaded.model.config
        total = sum(p.numel() for p in model.parameters())
        table = model.get_input_embeddings().weight
        expected: float = total if tied else total - table.numel() + 2 * table.shape[1]
        if family == "mixtral":
            experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
            assert experts
            missed = (1 - config.num_experts_per_tok / config.num_local_experts) ** 2
            expected -= experts * missed
        assert _bytes_per_step(loaded, 2) == pytest.approx(4 * expected, abs=1)


def test_decoding_is_timed_with_the_cache(pair: BenchJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step reads one token behind the whole prompt: the last one sees context + steps tokens."""
    kept: list[int] = []
    kind = type(AutoModelForCausalLM.from_pretrained(pair.models[0].path))
    forward = kind.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        kept.append(out.past_key_values.get_seq_length())
        assert kwargs["input_ids"].shape[1] > 1 or "past_key_values" in kwargs
        return out

    monkeypatch.setattr(kind, "forward", watched)
    run(replace(pair, models=pair.models[:1], contexts=(8,), batches=(1,), runs=1), silent)
    assert kept[-4:] == [8, 9, 10, 11]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contexts": (64,)}, "made for 64 tokens"),
        ({"contexts": ()}, "no context"),
        ({"batches": (0,)}, "batch of 0"),
        ({"steps": 0}, "step count"),
        ({"dtype": "int8"}, "unknown type"),
    ],
)
def test_refusals(pair: BenchJob, change: dict[str, Any], message: str) -> None:
    with pytest.raises(AttnoptError, match=message):
        run(replace(pair, **change), silent)


def test_lack_of_memory_is_told(pair: BenchJob, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnopt.timing import measure

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(measure, "_case", full)
    with pytest.raises(AttnoptError, match="1 x 8 tokens do not fit"):
        run(pair, silent)


def test_lists_of_numbers() -> None:
    assert api.numbers("1024,4096", "--context") == (1024, 4096)
    with pytest.raises(OptionError, match="--context '1k' is no list"):
        api.numbers("1k", "--context")


def test_jobs_travel(pair: BenchJob) -> None:
    assert BenchJob.from_json(pair.to_json()) == pair
    with pytest.raises(OptionError, match="no job of the bench"):
        BenchJob.from_json({"schema": "x"})
