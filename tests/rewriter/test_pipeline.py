"""Running pipelines: order, conditions, analyses on demand, instruments, history."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from attnopt.errors import OptionError, UnsupportedError, VerificationError
from attnopt.rewriter.instruments import NumericCheck, PrintBetween, StopAfter, Time, Verify, relative_change
from attnopt.rewriter.interpret import run
from attnopt.rewriter.passes import PassContext
from attnopt.rewriter.pipeline import Between, Instrument, Pipeline, PipelineResult, replay
from attnopt.rewriter.program import Program
from attnopt.rewriter.steps import MemorySteps, ScopedSteps
from tests import models
from tests.rewriter.toys import CALLS, REGISTRY, Everything, Negate, Scale


@pytest.fixture
def program() -> Program:
    return models.captured("llama")[1]


@pytest.fixture(autouse=True)
def _no_calls() -> Iterator[None]:
    CALLS.clear()
    yield
    CALLS.clear()


def go(program: Program, text: str, *instruments: Instrument, context: PassContext | None = None) -> PipelineResult:
    return Pipeline.parse(text, REGISTRY).run(program, context or PassContext(), instruments)


def test_a_run_reports_what_changed(program: Program) -> None:
    result = go(program, "scale{layers=[1]}")
    assert result.changed_sites == (program.site_list[1].fqn,)
    assert result.results[0].misses[0].reason == "asked to leave it alone"
    assert not result.stopped
    assert result.program.history[0].text == "scale{factor=1.5 layers=[1]}"
    assert result.program.history[0].summary == {"factor": 1.5}
    assert program.history == ()


def test_analyses_run_on_demand_once_and_again_after_a_change(program: Program) -> None:
    go(program, "scale,scale{factor=2}")
    assert CALLS == [
        "norms(2.0)",
        "scale(1.5) seeing ['norms']",
        "norms(2.0)",
        "scale(2.0) seeing ['norms', 'scaled']",
    ]


def test_preserved_analyses_are_kept(program: Program) -> None:
    go(program, "norms,negate,scale")
    assert CALLS == ["norms(2.0)", "scale(1.5) seeing ['norms']"]


def test_a_listed_analysis_keeps_its_options_when_it_is_run_again(program: Program) -> None:
    go(program, "norms{power=1},scale,scale")
    assert [call for call in CALLS if call.startswith("norms")] == ["norms(1.0)", "norms(1.0)"]


def test_given_profiles_are_used(program: Program) -> None:
    go(program, "scale", context=PassContext(profiles={"norms": {}}))
    assert CALLS == ["scale(1.5) seeing ['norms']"]


def test_providers_come_first(program: Program) -> None:
    assert Pipeline.parse("scale,norms{power=3}", REGISTRY).to_text() == "norms{power=3.0},scale"
    assert Pipeline.parse("negate,may-do-nothing,scale", REGISTRY).to_text() == "negate,scale,may-do-nothing"
    with pytest.raises(OptionError, match="first and second require each other"):
        Pipeline.parse("first,second", REGISTRY)
    with pytest.raises(OptionError, match="nothing provides 'scaled'"):
        Pipeline.parse("may-do-nothing", REGISTRY)


def test_what_a_pass_established_outlives_later_changes(program: Program) -> None:
    result = go(program, "scale,negate,may-do-nothing")
    assert [r.changed_sites for r in result.results][2] == ()


def test_changing_nothing_is_an_error_that_names_the_nearest_miss(program: Program) -> None:
    with pytest.raises(UnsupportedError, match="nothing changed no attention layer; the nearest miss: the moon"):
        go(program, "nothing")
    with pytest.raises(UnsupportedError, match=r"everything changed no attention layer$"):
        go(program, "everything{needed=1}")


def test_a_report_that_disagrees_with_the_program_is_a_bug(program: Program) -> None:
    with pytest.raises(VerificationError, match=r"liar reports changes at model.layers.0.self_attn, but .*layers.1"):
        go(program, "liar")


def test_conditions_before_and_promises_after(program: Program) -> None:
    with pytest.raises(UnsupportedError, match="no attention"):
        go(replace(program, sites={}), "scale")
    with pytest.raises(UnsupportedError, match="no attention"):
        Pipeline.parse("scale", REGISTRY).plan(replace(program, sites={}))
    with pytest.raises(VerificationError, match="breaker promised: the scale stays"):
        go(program, "breaker{promise=true}")


def test_plans_are_made_without_running_anything(program: Program) -> None:
    ((item, plan),) = Pipeline.parse("norms,scale{factor=3}", REGISTRY).plan(program)
    assert item.to_text() == "scale{factor=3.0}"
    assert [edit.site for edit in plan.edits] == [site.fqn for site in program.site_list]
    assert plan.edits[0].cached_numbers_per_token == (32, 32)
    assert plan.notes == ("0 profiles",)
    assert CALLS == []


def test_each_pass_has_its_own_steps(program: Program) -> None:
    store = MemorySteps()
    go(program, "negate,negate", context=PassContext(workdir=store))
    assert store.steps_done() == ("00-negate.layer-0000", "01-negate.layer-0000")
    scoped = ScopedSteps(store, "01-negate.")
    assert scoped.layers_done() == (0,)
    assert scoped.load_layer(0)[1] == {"by": "negate"}


def test_verify_names_the_pass_that_broke_the_program(program: Program) -> None:
    with pytest.raises(VerificationError, match=r"after breaker: \[scale\] model.layers.1.self_attn: the scale -1.0"):
        go(program, "negate,breaker", Verify())
    broken = replace(program, outputs=("logits", "more"))
    with pytest.raises(VerificationError, match=r"before the first pass: \[outputs\]"):
        go(broken, "negate", Verify())
    go(program, "negate,scale", Verify())


def test_print_time_and_stop(program: Program) -> None:
    printed: list[str] = []
    time = Time()
    result = go(program, "negate,scale,negate", PrintBetween(printed.append), StopAfter(2), time)
    assert [text.split("\n")[0] for text in printed] == ["== start", "== after negate", "== after scale"]
    assert "model.layers.0.self_attn" in printed[0]
    assert result.stopped
    assert len(result.results) == 2
    assert [name for name, _ in time.seconds] == ["negate", "scale"]
    assert all(seconds > 0 for _, seconds in time.seconds)
    none = go(program, "negate", StopAfter(0), PrintBetween(printed.append, long=True))
    assert none.results == ()
    assert none.program is program
    assert "attnopt::attention" in printed[-1] or "attnopt.attention" in printed[-1]


def test_every_instrument_sees_every_event(program: Program) -> None:
    seen: list[Between] = []
    go(program, "negate,negate", lambda event: event.index == 1, lambda event: seen.append(event))
    assert [(e.index, e.text) for e in seen] == [(0, None), (1, "negate")]
    assert seen[1].before is program
    assert seen[1].item == Negate()
    assert seen[1].result is not None


def test_the_numeric_check_names_the_first_offender(program: Program) -> None:
    inputs = models.inputs("llama")
    check = NumericCheck(inputs)
    go(program, "negate,scale{factor=1.01}", check)
    assert [change.bound for change in check.changes] == [1e-5, 0.5]
    assert check.changes[0].relative < 1e-6
    assert 0 < check.changes[1].relative < 0.1
    assert check.first_offender is None
    check = NumericCheck(inputs)
    with pytest.raises(
        VerificationError, match=r"scale\{factor=-8.0 layers=\[1\]\} changed .* first at model.layers.1"
    ):
        go(program, "negate,scale{factor=-8 layers=[1]},negate", check)
    assert check.first_offender is check.changes[1]
    assert len(check.changes) == 2
    with pytest.raises(VerificationError, match=r"its bound is 1\.00e-09"):
        go(program, "scale", NumericCheck(inputs, bound=1e-9))


def test_what_is_compared_equals_running_the_programs(program: Program) -> None:
    inputs = models.inputs("llama")
    check = NumericCheck(inputs, bound=10.0)
    result = go(program, "scale", check)
    before, after = run(program, **inputs)["logits"], run(result.program, **inputs)["logits"]
    assert check.changes[0].relative == pytest.approx(relative_change(before, after), rel=1e-4)
    assert relative_change(before, before[:1]) == float("inf")
    assert not relative_change(before, before * torch.nan) <= 1


def test_history_replays_to_the_same_program(program: Program) -> None:
    result = go(program, "norms{power=3},scale{factor=2 layers=[0]},negate").program
    assert [entry.text for entry in result.history] == ["norms{power=3.0}", "scale{factor=2.0 layers=[0]}", "negate"]
    again = replay(program, result.history, REGISTRY, PassContext())
    assert again.history == result.history
    inputs = models.inputs("llama")
    assert torch.equal(run(again, **inputs)["logits"], run(result, **inputs)["logits"])
    assert replay(program, (), REGISTRY, PassContext()) is program


def test_passes_are_values() -> None:
    assert Scale(factor=2.0) == Scale(factor=2)
    assert hash(Everything(needed=1)) == hash(Everything(needed=1))
    assert Scale.summary() == "Multiply what the attention layers put out."
