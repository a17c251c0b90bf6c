"""Distillation: nothing to learn from an equal, the teacher stays, what must stay stays, and a killed run goes on."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.errors import OptionError
from attnopt.passes.common.free import lane_of
from attnopt.passes.common.positions import reach_of, spaced
from attnopt.passes.repair.distill import Distill
from attnopt.passes.repair.loss import divergence
from attnopt.passes.repair.parameters import select, step_size
from attnopt.passes.repair.student import Head, Model, output_of
from attnopt.passes.repair.training import RATE_PER_NAT, RATES, Settings, Training, _since_lowest, merged
from attnopt.profiles.calibration import RecoveryText
from attnopt.rewriter.interpret import run
from attnopt.rewriter.passes import PassContext, PassResult
from attnopt.rewriter.printer import short_print
from attnopt.rewriter.program import Program
from tests import models
from tests.passes.helpers import apply, with_weights
from tests.passes.repair.helpers import KilledError, KilledSteps, context, converted, loss, text

QUICK: dict[str, Any] = {"tokens": 1280, "batch": 128, "rate": 0.01, "checks": 2}


def distil(program: Program, original: Program, how: dict[str, Any] | None = None, **changes: Any) -> PassResult:
    item = Distill(**{**QUICK, **(how or {})})
    return item.apply(program, item.plan(program, {}), context(original, **changes))


def head_of(model: Model, batch: dict[str, Tensor]) -> Head:
    with torch.no_grad():
        found: Head = model(batch, lambda head: head)
    return found


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("gpt2", "mixtral", "qwen3", "deepseek_v3")]


@pytest.mark.parametrize("family", ["llama-tied", "gemma2", "bert", *SLOW])
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(family: str) -> None:
    _, program = models.captured(family)
    batch = models.inputs(family)
    student, teacher = Model(program, {}, select(program, "all", None), recompute=True), Model(program, {})
    value = student(batch, lambda head: divergence(head, head_of(teacher, batch), "kl"))
    value.backward()
    trained = [p for p in student.parameters() if p.requires_grad]
    assert float(value.detach()) == 0
    assert trained
    assert all(p.grad is not None and not p.grad.any() for p in trained)


@pytest.mark.parametrize("family", ["llama-tied", "gemma2"])
def test_the_loss_by_chunks_is_that_of_whole_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.passes.repair.loss.LOGIT_BYTES", 1)  # 16 tokens at a time, the least
    program = models.captured(family)[1]
    values = {
        n: program.weights.get(n) * 1.1 for n in program.weight_names if n.endswith(("q_proj.weight", "norm.weight"))
    }
    other = with_weights(program, values)
    batch = models.inputs(family, 3, 11)
    how: Any = {"dtype": torch.float64}
    student, teacher = Model(other, {}, select(other, "all", None), **how), Model(program, {}, **how)
    value = student(batch, lambda head: divergence(head, head_of(teacher, batch), "kl"))
    value.backward()
    found = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    ours, theirs = output_of(student, batch).log_softmax(-1), output_of(teacher, batch).detach().log_softmax(-1)
    direct = (theirs.exp() * (theirs - ours)).sum()
    direct.backward()
    torch.testing.assert_close(value.detach(), direct.detach())
    assert set(found) == {n for n, p in student.named_parameters() if p.grad is not None}
    for name, parameter in student.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_student_computes_what_its_program_does(recompute: bool) -> None:
    _, program = converted()
    batch = models.inputs("llama")
    student = Model(program, {}, select(program, "lora", None), recompute=recompute)
    assert torch.equal(output_of(student, batch), run(program, **batch)["logits"])


def test_distillation_brings_the_model_back_and_leaves_the_teacher_alone() -> None:
    original, program = converted()
    before = (original.weights.digest(), program.weights.digest(), short_print(original))
    result = distil(program, original, {"tokens": 6400, "batch": 64})
    summary = result.summary
    assert (original.weights.digest(), program.weights.digest(), short_print(original)) == before
    assert summary["held_out_after"] < 0.95 * summary["held_out_before"]
    assert result.changed_sites == tuple(program.sites)
    assert loss(original, result.program) < 0.97 * loss(original, program)
    assert summary["calibration_text_repeated"]  # its own text is used up
    assert distil(program, original, {"tokens": 768}).summary["calibration_text_repeated"] is False


def test_lane_zeros_and_everything_else_stay() -> None:
    original, program = converted()
    name = "model.layers.0.self_attn.o_proj.weight"
    pruned = next(n for n in program.weight_names if n.endswith(name))
    holes = program.weights.get(pruned)
    holes[:, ::3] = 0
    program = with_weights(program, {pruned: holes})
    after = distil(program, original).program
    for site in program.site_list:
        assert site.latent is not None
        lane = lane_of(site)
        assert lane is not None
        for stored in (site.latent.kv_a.weight, site.latent.kv_a.bias):
            assert stored is not None
            old, new = program.weights.get(stored), after.weights.get(stored)
            assert torch.equal(old[lane], new[lane])
            assert not torch.equal(old, new)
        found = after.sites[site.fqn].latent
        assert found is not None
        assert found.peak > 0
        assert found.peak != site.latent.peak
    assert not after.weights.get(pruned)[:, ::3].any()
    assert after.weights.get(pruned)[:, 1::3].all()
    beside = [n for n in program.weight_names if ".self_attn." not in n]
    assert beside
    assert all(after.weights[n] == program.weights[n] for n in beside)


def test_a_run_that_only_harms_changes_nothing() -> None:
    original, program = converted()
    result = distil(program, original, {"rate": 50.0, "patience": 1, "checks": 8})
    assert result.changed_sites == ()
    assert result.program is program
    assert result.summary["held_out_after"] == result.summary["held_out_before"]
    _, *ways, end = [loss for _, loss, _ in result.summary["curve"]["held_out"]]
    assert all(later < earlier for earlier, later in pairwise(ways))
    assert bool(result.summary["curve"]["stopped"]) == (end >= ways[-1])


def test_the_rate_follows_from_the_distance() -> None:
    original, program = converted()
    result = distil(program, original, {"rate": None}).summary
    assert result["rate"] == pytest.approx(RATE_PER_NAT * result["held_out_before"])
    near = distil(original, original, {"rate": None}).summary
    assert near["rate"] == RATES[0]
    assert distil(program, original, {"rate": 0.02, "tokens": 128}).summary["rate"] == 0.02


def test_windows_are_learned_from_at_long_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher and student see every second window with a gap, held-out ones too, and other gaps when it comes again."""
    seen: list[Tensor] = []
    forward = Model.forward

    def watched(self: Model, inputs: dict[str, Tensor], then: Any) -> Any:
        seen.append(inputs["position_ids"])
        return forward(self, inputs, then)

    monkeypatch.setattr(Model, "forward", watched)
    original, program = converted()
    reach = reach_of(program)
    assert reach > 64
    distil(program, original, {"tokens": 3 * 768, "checks": 1})  # the text has 768 tokens
    theirs, ours = seen[::2], seen[1::2]
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    gaps = [bool((row.diff() > 1).any()) for part in ours for row in part]
    assert sum(gaps) in (len(gaps) // 2, len(gaps) // 2 - 1)  # of an odd number of held-out windows fewer have one
    assert max(int(part.max()) for part in ours) < reach
    held_out, epoch = 1, 768 // 128
    learned = torch.cat(ours[held_out : held_out + 3 * epoch])
    assert torch.equal(learned, spaced(len(learned), learned.shape[1], reach))
    first, second = learned[: len(learned) // 3], learned[len(learned) // 3 : 2 * len(learned) // 3]
    assert not torch.equal(first, second)


def test_nothing_is_as_long_as_the_run() -> None:
    original, program = converted()
    windows = torch.zeros(2, 32, dtype=torch.long)
    learner, teacher = Model(program, {}, select(program, "attention", None)), Model(original, {})
    how = Settings(tokens=10**15, rate=0.01)
    training = Training(learner, teacher, windows, windows, how, PassContext(), reach_of(program))
    assert training.steps * training.per_step * 32 >= 10**15
    training.step = training.steps - 1
    assert training._one_step() > 0


def test_patience_does_not_count_from_the_start() -> None:
    """Long steps raise the loss before the schedule's short ones lower it."""
    assert _since_lowest([]) == 0
    assert _since_lowest([0.5, 0.4, 0.3]) == 0
    assert _since_lowest([0.3, 0.4, 0.5]) == 2
    original, program = converted()
    curve = distil(program, original, {"rate": 0.05, "checks": 8, "patience": 3, "tokens": 8 * 128}).summary["curve"]
    losses = [loss for _, loss, _ in curve["held_out"]]
    assert min(losses[1:4]) > losses[0]
    assert len(losses) > 4


def test_merged_adapters_are_the_adapters() -> None:
    _, program = converted()
    student = Model(program, {}, select(program, "lora", 3), seed=1)
    generator = torch.Generator().manual_seed(0)
    weights = student.changed()
    low = [w for w in weights.values() if w.low]
    assert low
    with torch.no_grad():
        for weight in weights.values():
            for key, parameter in weight.named_parameters():
                if key != "start":
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    batch = models.inputs("llama")
    with torch.no_grad():
        adapted = output_of(student, batch)
    other = with_weights(program, merged(student))
    assert models.relative_error(adapted, run(program, **batch)["logits"]) > 0.01
    assert torch.equal(run(other, **batch)["logits"], adapted)
    name = next(n for n, w in weights.items() if w.low)
    size = (other.weights.get(name) - program.weights.get(name)).double()
    assert int(torch.linalg.matrix_rank(size, rtol=1e-5)) <= 3


def test_windows_to_learn_from_may_be_longer_than_calibration_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    original, program = converted()
    given = text()
    windows, seen, selection = (torch.arange(64 * n).view(n, 64) % models.VOCAB for n in (6, 3, 2))
    recovery = RecoveryText(windows, seen, selection)
    lengths: list[tuple[int, ...]] = []
    of = Training._loss
    monkeypatch.setattr(Training, "_loss", lambda self, *ids: (lengths.append(tuple(ids[0].shape)), of(self, *ids))[1])
    how = {"tokens": 8 * 64, "batch": 128, "checks": 1}
    result = distil(program, original, how, calibration=replace(given, recovery=recovery))
    assert lengths == [(2, 64)] * 6  # the selection, four steps, and the selection
    assert result.summary["text_tokens"] == 8 * 64
    assert result.summary["calibration_text_repeated"]


def test_weights_are_chosen_by_name() -> None:
    original, program = converted()
    result = distil(program, original, {"parameters": ("*mlp*", "lm_head*"), "tokens": 256})
    moved = {n for n in program.weight_names if program.weights[n] != result.program.weights[n]}
    assert moved == {n for n in program.weight_names if ".mlp." in n or n.startswith("lm_head")}
    with pytest.raises(OptionError, match="no weight is named"):
        distil(program, original, {"parameters": "nothing*"})


def test_tied_weights_stay_tied() -> None:
    program = models.captured("llama-tied")[1]
    after = apply(
        program,
        'share{layers="1" fill=none},distill{tokens=2560 batch=128 parameters=all rate=0.002}',
        context(program),
    ).program
    names = ("model.embed_tokens.weight", "lm_head.weight")
    known = [n for n in names if n in after.weights]
    assert len({after.weights[n] for n in known}) == 1
    assert program.weights[known[0]] != after.weights[known[0]]


def test_sixteen_bit_products_train_as_well() -> None:
    original, program = converted()
    losses = {p: distil(program, original, {"precision": p}).summary["held_out_after"] for p in ("float32", "bfloat16")}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


def test_a_stopped_run_goes_on_as_if_it_had_not_been() -> None:
    original, program = converted()
    how = {"checkpoint_minutes": 0.0, "decay": 0.1}
    whole = distil(program, original, how)
    for saves in (1, 4, 7):
        steps = KilledSteps(saves)
        with pytest.raises(KilledError):
            distil(program, original, how, workdir=steps)
        steps.saves = 1000
        again = distil(program, original, how, workdir=steps, resume=True)
        assert again.summary["curve"]["loss"] == whole.summary["curve"]["loss"]
        held = [[point[:2] for point in r.summary["curve"]["held_out"]] for r in (again, whole)]
        assert held[0] == held[1]
        for name in program.weight_names:
            assert torch.equal(again.program.weights.get(name), whole.program.weights.get(name))


def test_another_teacher_must_speak_the_same_words(tmp_path: Path) -> None:
    original, program = converted()
    wide = models.save("llama", tmp_path / "wide", hidden_size=48, num_attention_heads=6, num_hidden_layers=3)
    result = distil(program, original, {"teacher": str(wide), "tokens": 256})
    own = distil(program, original, {"tokens": 256}).summary["held_out_before"]
    assert result.summary["held_out_before"] > 2 * own
    other = models.save("llama", tmp_path / "other", vocab_size=models.VOCAB + 2)
    with pytest.raises(OptionError, match="words"):
        distil(program, original, {"teacher": str(other)})


def test_without_text_it_says_so() -> None:
    original, program = converted()
    with pytest.raises(OptionError, match="text"):
        distil(program, original, calibration=None)


def test_steps_of_a_vector_are_relative_to_each_number() -> None:
    # A stock class's latent norm: the lane's number is far from the others', and absent biases are zeros among them.
    size = step_size(torch.tensor([2e5, 1.0, -2.0, 3.0, 0.0]))
    assert size.tolist() == [2e5, 1.0, 2.0, 3.0, 2.0]
    assert step_size(torch.full((2, 2), 3.0)).tolist() == pytest.approx(3.0)
    assert step_size(torch.zeros(4)).item() > 0
