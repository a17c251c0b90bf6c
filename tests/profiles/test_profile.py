"""The file: round trip, same bytes, and everything that makes it be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attnopt.errors import AttnoptError, OptionError, SourceError
from attnopt.profiles.build import Options, profile_program
from attnopt.profiles.profile import JSON_NAME, TENSORS_NAME, Profile, spread
from attnopt.profiles.prompts import Prompts
from attnopt.profiles.settings import Settings
from attnopt.rewriter.capture import capture_module
from attnopt.rewriter.program import HistoryEntry, Program
from tests import models


def profiled(family: str = "llama", **changes: Any) -> Profile:
    program = models.captured(family)[1]
    prompts = Prompts.of([models.inputs(family, 4, 24)], "random")
    return profile_program(program, prompts, Settings(windows=(2, 8), skip=4), Options(**changes))


@pytest.fixture(scope="module")
def profile() -> Profile:
    return profiled()


@pytest.fixture(scope="module")
def other() -> Program:
    """A model of the same layers with other weights."""
    return capture_module(models.build("llama", seed=1))


@pytest.fixture
def saved(profile: Profile, tmp_path: Path) -> Path:
    profile.save(tmp_path)
    return tmp_path


def test_round_trip(profile: Profile, saved: Path) -> None:
    for path in (saved, saved / JSON_NAME):
        again = Profile.load(path)
        assert again.metrics == profile.metrics
        assert again.groups == profile.groups
        assert again.sites == profile.sites
        assert again.absent == profile.absent
        for name in profile.metrics:
            torch.testing.assert_close(again.metric(name), profile.metric(name), rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(again.std(name), profile.std(name), rtol=0, atol=0, equal_nan=True)
            assert again.per_prompt(name).shape == profile.per_prompt(name).shape


def test_the_same_inputs_give_the_same_bytes(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    profiled().save(other)
    for name in (JSON_NAME, TENSORS_NAME):
        assert (saved / name).read_bytes() == (other / name).read_bytes()


def test_document(saved: Path) -> None:
    document = json.loads((saved / JSON_NAME).read_text())
    assert document["schema"] == "attnopt.profile/1"
    assert len(document["calibration"]["prompt_sha256"]) == 4
    assert document["calibration"]["seed"] == 0
    assert document["metrics"]["contribution"]["version"] == 1
    assert document["metrics"]["contribution"]["direction"] == "high_keep"
    assert document["metrics"]["contribution"]["n"] == 4
    assert len(document["metrics"]["contribution"]["values"]) == 2
    assert len(document["metrics"]["contribution"]["spread"][0]) == 4
    methods = document["predictions"]["methods"]
    site = models.captured("llama")[1].site_list[0]
    assert methods["original"]["cached_numbers"]["1024"] == [1024 * site.cached_numbers_per_token] * 2
    assert methods["mla 0.5"]["cached_numbers"]["1024"] == [512 * site.cached_numbers_per_token] * 2


def test_another_model_is_refused(profile: Profile, other: Program) -> None:
    profile.require(models.captured("llama")[1])
    with pytest.raises(OptionError, match="weights are not those"):
        profile.require(other)
    with pytest.raises(OptionError):
        profile.require(models.captured("bert")[1])


def test_a_rewritten_program_is_compared_by_its_layers(profile: Profile, other: Program) -> None:
    profile.require(other.replace(history=(HistoryEntry("to-x"),)))
    bert = models.captured("bert")[1].replace(history=(HistoryEntry("to-x"),))
    with pytest.raises(OptionError, match="layers are not those"):
        profile.require(bert)


def test_what_is_not_there_says_why() -> None:
    encoder = profiled("bert", gradients=False)
    with pytest.raises(SourceError, match="only causal layers can stream"):
        encoder.metric("streaming_error")
    with pytest.raises(SourceError, match="gradients were not asked for"):
        encoder.metric("michel")
    with pytest.raises(SourceError, match="no metric 'nonsense'"):
        encoder.std("nonsense")


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        document = json.loads((directory / JSON_NAME).read_text())
        change(document)
        (directory / JSON_NAME).write_text(json.dumps(document))

    return damage


def _swap_tensors(directory: Path) -> None:
    path = directory / TENSORS_NAME
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda d: (d / JSON_NAME).unlink(), "cannot read the profile"),
    "no tensors": (lambda d: (d / TENSORS_NAME).unlink(), "cannot read"),
    "not json": (lambda d: (d / JSON_NAME).write_text("{") and None, "not JSON"),
    "not an object": (lambda d: (d / JSON_NAME).write_text("[]") and None, "schema None"),
    "schema": (edited(lambda x: x.update(schema="attnopt.profile/2")), "profile/2"),
    "unknown key": (edited(lambda x: x.update(more=1)), "more"),
    "missing key": (edited(lambda x: x.pop("groups")), "groups"),
    "other tensors": (_swap_tensors, "is not the file"),
    "metric without arrays": (edited(lambda x: x["metrics"].update(new=x["metrics"]["entropy"])), "do not belong"),
    "wrong axes": (edited(lambda x: x["metrics"]["entropy"].update(axes=["site"])), "do not fit its axes"),
    "wrong number of prompts": (edited(lambda x: x["metrics"]["entropy"].update(n=3)), "do not fit its axes"),
    "wrong number of layers": (edited(lambda x: x["sites"].pop()), "layers"),
    "damaged metric": (edited(lambda x: x["metrics"]["entropy"].pop("version")), "damaged"),
    "no digest": (edited(lambda x: x["model"].pop("program_digest")), "which model"),
}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_damaged_files_are_refused(saved: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(saved)
    with pytest.raises(SourceError, match=message) as caught:
        Profile.load(saved)
    assert caught.value.hint


def test_nothing_is_half_written(profile: Profile, tmp_path: Path) -> None:
    with pytest.raises(AttnoptError):
        profile.save(tmp_path / "not there")


def test_prompts_with_holes_are_refused() -> None:
    ids = torch.ones(1, 6, dtype=torch.long)
    with pytest.raises(OptionError, match="between"):
        Prompts.of([{"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 0]])}], "x")
    with pytest.raises(OptionError, match="all padding"):
        Prompts.of([{"input_ids": ids, "attention_mask": torch.zeros(1, 6)}], "x")
    with pytest.raises(OptionError, match="no prompt"):
        Prompts.of([], "x")


def test_spread_leaves_gaps_out() -> None:
    values = torch.tensor([[1.0, torch.nan, torch.nan], [3.0, 2.0, torch.nan]], dtype=torch.float64)
    found = spread(values)
    assert found[0] == pytest.approx(2**0.5)
    assert float(found[1]) == 0
    assert bool(found[2].isnan())


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "deepseek_v3", "bert", "vit", "swin"])
def test_every_family_is_profiled(family: str) -> None:
    found = profiled(family)
    for name in found.metrics:
        values = found.metric(name)
        assert not bool(values.isinf().any()), name
        assert not bool(values.isnan().all()), name
    assert {"entropy", "contribution", "michel", "head_redundancy"} <= set(found.metrics)
    # Of two layers, one with a window or a shifted one: no map can serve the other.
    assert ("map_reuse_error" in found.metrics) == (family not in ("gemma2", "swin"))
    assert found.groups == () or "map_reuse_error" in found.metrics
    assert ("streaming_error" in found.metrics) == (family not in ("bert", "vit", "swin"))
    assert ("lamp" in found.metrics) == (family != "deepseek_v3")
