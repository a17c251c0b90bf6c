"""What a profile suggests: each finding follows from its metric, and commands only name methods that exist."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnopt.profiles.build import profile_program
from attnopt.profiles.profile import MetricInfo, Profile, SharingGroup
from attnopt.profiles.prompts import Prompts
from attnopt.profiles.report.summary import findings
from attnopt.profiles.settings import Settings
from tests import models


@pytest.fixture(scope="module")
def profile() -> Profile:
    program = models.captured("llama")[1]
    prompts = Prompts.of([models.inputs("llama", 4, 24)], "random")
    return profile_program(program, prompts, Settings(windows=(2, 8), skip=4))


def with_metric(profile: Profile, name: str, values: torch.Tensor, axes: tuple[str, ...]) -> Profile:
    info = MetricInfo(1, axes, help="x", source="x")
    tensors = {key: value for key, value in profile.tensors.items() if not key.startswith(f"{name}/")}
    return replace(profile, metrics={**profile.metrics, name: info}, tensors={**tensors, f"{name}/mean": values})


def said(profile: Profile, **options: object) -> str:
    found = findings(profile, "MODEL", **options)  # type: ignore[arg-type]
    return "\n".join(f"{finding.text} {finding.command}" for finding in found)


def test_low_rank(profile: Profile) -> None:
    cached = int(profile.sites[0]["cached_numbers_per_token"])
    left = torch.zeros(2, cached + 1)
    left[:, : cached // 4] = 0.5
    low = with_metric(profile, "spectrum_joint_rope", left, ("site", "rank"))
    assert "--to mla --kv-keep 0.5 " in said(low)
    high = with_metric(profile, "spectrum_joint_rope", torch.full_like(left, 0.3), ("site", "rank"))
    assert "high rank" in said(high)
    assert "--to mla" not in said(high)


def test_sharing(profile: Profile) -> None:
    shared = replace(profile, groups=(SharingGroup((0, 1), 0.9, 0.02),))
    assert "groups 0-1" in said(shared)
    assert "--to share --edge map" in said(shared)
    assert "--to share" not in said(shared, methods=("mla",))
    assert "groups 0-1" in said(shared, methods=("mla",))
    errors = torch.tensor([[0.0, 0.25], [torch.nan, 0.0]])
    apart = with_metric(replace(profile, groups=()), "map_reuse_error_aligned", errors, ("source", "consumer"))
    assert "layer 1 with the maps of layer 0 loses least (25.0%" in said(apart)
    alternating = replace(profile, groups=(SharingGroup((0, 2, 4), 0.9, 0.02), SharingGroup((5, 6), 0.9, 0.02)))
    assert "3 layers" in said(alternating)
    assert "groups 0, 2, 4; 5-6" in said(alternating)


def test_weak_groups(profile: Profile) -> None:
    weak = with_metric(profile, "kv_contribution", torch.tensor([[1.0, 0.01], [1.0, 1.0]]), ("site", "kv_head"))
    assert "1 of 4 KV groups" in said(weak)
    assert "0.1)" in said(weak)
    assert "--to prune --keep-heads 0.75" in said(weak)
    equal = with_metric(profile, "kv_contribution", torch.ones(2, 2), ("site", "kv_head"))
    assert "--to prune" not in said(equal)


def test_unequal_heads(profile: Profile) -> None:
    unequal = torch.tensor([[10.0, 5.0, 5.0, 0.1], [10.0, 5.0, 5.0, 0.1]])
    assert "--to moh" in said(with_metric(profile, "contribution", unequal, ("site", "head")))
    assert "--to moh" not in said(with_metric(profile, "contribution", torch.ones(2, 4), ("site", "head")))


def test_retrieval_sinks_and_duplicates(profile: Profile) -> None:
    scores = torch.zeros(2, 4)
    assert "No head copies" in said(with_metric(profile, "retrieval", scores, ("site", "head")))
    scores[1, 2] = 0.5
    assert "(layer.head: 1.2)" in said(with_metric(profile, "retrieval", scores, ("site", "head")))
    sinks = torch.full((2, 4), 0.75)
    assert "75% of all attention" in said(with_metric(profile, "sink_mass", sinks, ("site", "head")))
    assert "of all attention" not in said(with_metric(profile, "sink_mass", sinks / 10, ("site", "head")))
    alike = torch.eye(4).repeat(2, 1, 1)
    alike[1, 0, 3] = alike[1, 3, 0] = 0.99
    found = said(with_metric(profile, "head_redundancy", alike, ("site", "head", "head")))
    assert "1 pair of heads of a layer has nearly the same maps (layer.head: 1.0 = 1.3)" in found
