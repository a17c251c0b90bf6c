"""Planted structure is found: every head that was made special is named, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnopt.profiles.build import profile_program
from attnopt.profiles.profile import Profile
from attnopt.profiles.prompts import Prompts
from attnopt.profiles.settings import Settings
from attnopt.rewriter.capture import capture_module
from attnopt.rewriter.program import Program
from tests import models
from tests.profiles import planted

SETTINGS = Settings(windows=(2, 8), skip=16, needles=4, needle_length=8, needle_context=64)


@pytest.fixture(scope="module")
def program() -> Program:
    return capture_module(planted.planted_model())


@pytest.fixture(scope="module")
def profile(program: Program) -> Profile:
    ids = torch.randint(3, planted.VOCAB, (6, 96), generator=torch.Generator().manual_seed(0))
    return profile_program(program, Prompts.of([{"input_ids": ids}], "random"), SETTINGS)


def strongest(values: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(values.nan_to_num(-1).argmax(), values.shape))


def test_the_local_head(profile: Profile) -> None:
    local = profile.metric("local_mass")[..., 0]
    assert strongest(local) == planted.LOCAL
    assert float(local[planted.LOCAL]) > 0.95
    assert float(profile.metric("distance_histogram")[planted.LOCAL][1]) > 0.9
    assert float(profile.metric("distant_mass")[planted.LOCAL]) < 0.05


def test_the_dead_head(profile: Profile) -> None:
    for name in ("contribution", "michel", "map_influence"):
        values = profile.metric(name)
        assert float(values[planted.DEAD]) == 0
        assert int((values == 0).sum()) == 1, name


def test_the_copying_head(profile: Profile) -> None:
    scores = profile.metric("retrieval")
    assert strongest(scores) == planted.COPY
    assert float(scores[planted.COPY]) > 0.9
    others = scores.clone()
    others[planted.COPY] = 0
    assert float(others.max()) < 0.3


def test_the_duplicate_head(profile: Profile) -> None:
    alike = profile.metric("head_redundancy").clone()
    alike[:, torch.eye(planted.HEADS, dtype=torch.bool)] = 0
    layer, head = planted.DUPLICATE
    assert float(alike[layer, head - 1, head]) == pytest.approx(1, abs=1e-5)
    # Its twin layer holds the copy of both.
    expected = {(layer, head - 1, head), (layer, head, head - 1)}
    found = {tuple(place) for place in (alike[: planted.TWINS[1]] > 0.99).nonzero().tolist()}
    assert found == expected
    assert float(profile.metric("contribution_cosine")[layer, head - 1, head]) == pytest.approx(1, abs=1e-5)


def test_the_twin_layers(profile: Profile) -> None:
    source, consumer = planted.TWINS
    aligned = profile.metric("map_correlation_aligned")
    assert float(aligned[source, consumer]) == pytest.approx(1, abs=1e-3)
    assert float(profile.metric("map_correlation")[source, consumer]) < 0.7
    assert float(profile.metric("map_reuse_error_aligned")[source, consumer]) < 1e-3
    assert float(profile.metric("map_reuse_error")[source, consumer]) > 0.01
    others = aligned.clone()
    others[torch.eye(planted.LAYERS, dtype=torch.bool)] = 0
    others[source, consumer] = others[consumer, source] = 0
    assert float(others.max()) < 0.7
    assert [group.layers for group in profile.groups] == [planted.TWINS]
    order = profile.metric("head_alignment")[source, consumer].long().tolist()
    # Heads 2 and 3 are duplicates: either order of them is right.
    same = {planted.DUPLICATE[1]: planted.DUPLICATE[1] - 1}
    assert [same.get(h, h) for h in order] == [same.get(h, h) for h in planted.ORDER]


def test_every_value_has_a_spread(profile: Profile) -> None:
    for name, info in profile.metrics.items():
        if not info.prompts:
            continue
        assert profile.per_prompt(name).shape[0] == info.prompts
        mean, std = profile.metric(name), profile.std(name)
        values = profile.per_prompt(name)
        torch.testing.assert_close(values.nanmean(0), mean, equal_nan=True)
        assert bool((std.isnan() == mean.isnan()).all()), name
    assert float(profile.std("entropy").max()) > 0
    assert set(profile.metrics["contribution"].stability) == {"spearman", "jaccard@0.25"}


def test_streaming_in_blocks_of_any_size_gives_the_same_profile(
    program: Program, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnopt.profiles.attention.ENTRIES", 1 << 30)
    ids = torch.randint(3, planted.VOCAB, (6, 96), generator=torch.Generator().manual_seed(0))
    again = profile_program(program, Prompts.of([{"input_ids": ids}], "random"), SETTINGS)
    for name in profile.metrics:
        torch.testing.assert_close(
            again.metric(name), profile.metric(name), rtol=1e-4, atol=1e-5, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_padding_never_counts(family: str) -> None:
    program = models.captured(family)[1]
    ids = torch.randint(3, models.VOCAB, (3, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    mask[2, 9:] = 0
    padded = torch.where(mask == 0, 1 if family == "roberta" else 0, ids)
    settings = Settings(windows=(2, 8), skip=4)
    with_padding = profile_program(program, Prompts.of([{"input_ids": padded, "attention_mask": mask}], "x"), settings)
    rows = [{"input_ids": row[:n][None]} for row, n in zip(ids, mask.sum(1).tolist(), strict=True)]
    without = profile_program(program, Prompts.of(rows, "x"), settings)
    for name in with_padding.metrics:
        torch.testing.assert_close(with_padding.metric(name), without.metric(name), equal_nan=True, msg=name)
