"""DIMAP on whole tiny models: exact sparsity per module, nothing else touched, no data read, structure removed."""

from __future__ import annotations

import pytest
import torch

from attnopt.errors import OptionError
from attnopt.passes.dimap.lamp import scores
from attnopt.passes.dimap.modules import find_mlps, ranked_layers
from attnopt.rewriter.interpret import run
from attnopt.rewriter.passes import PassContext
from attnopt.rewriter.program import Program
from tests import models
from tests.passes.helpers import apply, program_of, with_weights


class Untouchable:
    """Calibration text that must not be looked at."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"calibration.{name} was read")


NO_DATA = PassContext(calibration=Untouchable())


def module_names(program: Program) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for one in ranked_layers(program, "fused"):
        found.setdefault(one.module, set()).update(one.weights)
    return found


@pytest.mark.parametrize(
    "family",
    [
        "swin",
        "llama",
        "mixtral",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("vit", "bert", "phi3", "qwen3_moe", "gpt2", "deepseek_v3")),
    ],
)
def test_modules_lose_exactly_the_share_asked_for(family: str) -> None:
    _, program = models.captured(family)
    result = apply(program, "dimap{sparsity=0.5 mlp=0.25 shares=equal}", NO_DATA)
    names = module_names(program)
    for module, ratio in (("qkv", 0.5), ("prj", 0.5), ("mlp", 0.25)):
        if family == "deepseek_v3" and module == "mlp":
            continue  # one of its layers has experts as well: counted below
        total = sum(program.weights.meta(n).numel for n in names[module])
        zeros = sum(int((result.program.weights.get(n) == 0).sum()) for n in names[module])
        assert abs(zeros - ratio * total) <= 1
        assert result.results[0].summary["zeroed"][module] == zeros
    rest = set(program.weight_names) - set().union(*names.values())
    assert rest
    assert all(result.program.weights[n] is program.weights[n] for n in rest)
    assert result.program.parameters == program.parameters


def test_modules_share_one_threshold() -> None:
    """No weight that is gone scores higher than one that is left, of whatever module; modules lose different shares."""
    _, program = models.captured("swin")
    torch.manual_seed(0)
    skewed = {n: torch.nn.functional.dropout(program.weights.get(n), 0.4) for n in module_names(program)["mlp"]}
    program = with_weights(program, skewed)
    result = apply(program, "dimap{sparsity=0.6}", NO_DATA)
    gone, left, total, lost = [0.0], [1.0], 0, 0
    for name in set().union(*module_names(program).values()):
        before, after = program.weights.get(name).flatten(), result.program.weights.get(name).flatten()
        order = before.abs().argsort(descending=True, stable=True)
        score = scores(before)
        kept = after[order] != 0
        gone.append(float(score[~kept].max()))
        left.append(float(score[kept].min()))
        total, lost = total + len(before), lost + int((~kept).sum())
    assert max(gone) <= min(left)
    assert lost == round(0.6 * total)
    sparsity = result.results[0].summary["sparsity"]
    assert sparsity["mlp"] > sparsity["qkv"] + 0.02


def test_a_module_with_its_own_share_is_ranked_alone() -> None:
    _, program = models.captured("swin")
    result = apply(program, "dimap{sparsity=0.5 mlp=0.25}", NO_DATA)
    sizes = {m: sum(program.weights.meta(n).numel for n in names) for m, names in module_names(program).items()}
    zeroed = result.results[0].summary["zeroed"]
    assert abs(zeroed["mlp"] - 0.25 * sizes["mlp"]) <= 1
    assert abs(zeroed["qkv"] + zeroed["prj"] - 0.5 * (sizes["qkv"] + sizes["prj"])) <= 1


def test_swin_modules_are_those_of_the_paper() -> None:
    _, program = models.captured("swin")
    names = module_names(program)
    assert len(names["qkv"]) == 12
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in names["mlp"]} == {"fc1", "fc2"}
    assert not any("reduction" in n or "patch" in n or "bias_table" in n for group in names.values() for n in group)


def test_every_expert_is_a_layer_of_its_own() -> None:
    _, program = models.captured("mixtral")
    experts = [one for one in ranked_layers(program, "fused") if one.module == "mlp"]
    assert len(experts) == 2 * 2 * 4
    values = {n: program.weights.get(n) for n in module_names(program)["mlp"]}
    for value in values.values():
        value[0] *= 1e-3  # a small expert keeps as much as the others
    after = apply(with_weights(program, values), "dimap{sparsity=0.5}", NO_DATA).program
    for name in values:
        kept = (after.weights.get(name) != 0).flatten(1).double().mean(1)
        assert float(kept.max() - kept.min()) < 0.2


def test_fused_and_split_storage_lose_the_same_weights() -> None:
    _, split = models.captured("llama-mha")
    _, fused = models.captured("phi3")
    layer = "model.layers.0.self_attn"
    values = {}
    for i in (0, 1):
        parts = [
            split.weights.get(f"model.layers.{i}.self_attn.{n}_proj.weight")[: 32 if n == "q" else 16] for n in "qkv"
        ]
        values[f"model.layers.{i}.self_attn.qkv_proj.weight"] = torch.cat(parts)
    gqa = program_of("llama", 2, 4, 2)
    same = {}
    for i in (0, 1):
        whole = values[f"model.layers.{i}.self_attn.qkv_proj.weight"]
        for n, rows in (("q", slice(0, 32)), ("k", slice(32, 48)), ("v", slice(48, 64))):
            same[f"model.layers.{i}.self_attn.{n}_proj.weight"] = whole[rows].clone()
    paper = "dimap{shares=equal granularity=fused}"
    one = apply(with_weights(fused, values), paper, NO_DATA).program
    two = apply(with_weights(gqa, same), paper, NO_DATA).program
    joined = torch.cat([two.weights.get(f"{layer}.{n}_proj.weight") for n in "qkv"])
    assert torch.equal(one.weights.get(f"{layer}.qkv_proj.weight"), joined)


@pytest.mark.parametrize(
    "family", ["swin", "llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("vit", "bert", "gpt2"))]
)
def test_structured_removal_equals_a_mask(family: str) -> None:
    _, program = models.captured(family)
    result = apply(program, "dimap{structured=true sparsity=0.4}", NO_DATA)
    after, plan = result.program, result.results[0].plan
    assert plan is not None
    assert after.parameters < program.parameters
    assert result.results[0].summary["mlp_channels_removed"] > 0
    values = {}
    for edit in plan.edits:
        site = program.sites[edit.site]
        weight = program.weights.get(site.o.weight)
        view = weight.T if site.o.layout == "conv1d" else weight
        for h in set(range(site.heads)) - set(edit.edit.get("heads", range(site.heads))):
            view[:, h * site.d_v : (h + 1) * site.d_v] = 0
        values[site.o.weight] = weight
        mlps = {mlp.out.weight: mlp for mlp in find_mlps(program)}
        for name, kept in edit.edit.get("channels", {}).items():
            weight = program.weights.get(name)
            view = weight.T if mlps[name].out.layout == "conv1d" else weight
            gone = sorted(set(range(mlps[name].out.in_features)) - set(kept))
            view[:, gone] = 0
            values[name] = weight
    batch = models.inputs(family)
    expected = run(with_weights(program, values), **batch)[program.outputs[0]]
    assert models.relative_error(run(after, **batch)[program.outputs[0]], expected) < 1e-5
    assert all(edit.edit.get("heads", [0]) for edit in plan.edits)


def test_a_plan_is_applied_as_it_is() -> None:
    _, program = models.captured("llama")
    plan = apply(program, "dimap{structured=true}", NO_DATA).results[0].plan
    assert plan is not None
    assert all("shares" not in edit.edit for edit in plan.edits)
    sections = {edit.site: dict(edit.edit) for edit in plan.edits}
    again = apply(program, "dimap{structured=true}", NO_DATA, given={"weights": sections})
    assert again.results[0].plan is not None
    assert [e.edit for e in again.results[0].plan.edits] == [e.edit for e in plan.edits]
    wrong = {next(iter(sections)): {"kind": "structured", "heads": [0, 99]}}
    with pytest.raises(OptionError, match="do not fit"):
        apply(program, "dimap{structured=true}", NO_DATA, given={"weights": wrong})
