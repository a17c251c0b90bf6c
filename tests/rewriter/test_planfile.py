"""Plan files: round trip, and everything that must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnopt.errors import OptionError
from attnopt.passes.registry import REGISTRY
from attnopt.rewriter.pipeline import Pipeline
from attnopt.rewriter.planfile import PlanFile
from tests.passes.helpers import apply, change, program_of

IDENTITY = {"name": "tiny", "config_sha256": "c", "weights_digest": "w", "format": "safetensors"}
TEXT = "share{layers=2},prune{keep-heads=0.5},moh{active=0.5},dimap"


def made(tmp_path: Path, **changes: Any) -> Path:
    document = {**PlanFile(IDENTITY, "prune", {"model.layers.0.self_attn": {"heads": {"keep": [0, 1]}}}).to_json()}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**document, **changes}))
    return path


def test_a_plan_applied_again_gives_the_same_program(tmp_path: Path) -> None:
    program = program_of("llama")
    pipeline = Pipeline.parse(TEXT, REGISTRY)
    first = apply(program, TEXT)
    plans = [(item, result.plan) for item, result in zip(pipeline.passes, first.results, strict=True) if result.plan]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(PlanFile.of(IDENTITY, pipeline.to_text(), plans, 0).to_json()))
    loaded = PlanFile.load(path)
    assert loaded.to_json() == json.loads(path.read_text())
    given = loaded.given(IDENTITY, program, Pipeline.parse(loaded.pipeline, REGISTRY).passes)
    second = apply(program, loaded.pipeline, given=given)
    assert change(first.program, second.program) == 0
    again = [(item, result.plan) for item, result in zip(pipeline.passes, second.results, strict=True) if result.plan]
    assert PlanFile.of(IDENTITY, pipeline.to_text(), again, 0) == PlanFile.of(IDENTITY, pipeline.to_text(), plans, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"schema": "attnopt.plan/2"}, "no plan of schema"), ({"sitez": {}}, "unknown keys sitez"),
     ({"sites": []}, "malformed at sites"), ({"sites": {"a": 3}}, "malformed at a"), ({"seed": "x"}, "seed")],
)  # fmt: skip
def test_unknown_and_malformed_files_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=words):
        PlanFile.load(made(tmp_path, **changes))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        PlanFile.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(OptionError, match="cannot be read"):
        PlanFile.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("changes", "pipeline", "words"),
    [({"model": {**IDENTITY, "weights_digest": "other"}}, "prune", "another model"),
     ({"sites": {"model.layers.9.self_attn": {"heads": {}}}}, "prune", "no attention layer"),
     ({"sites": {"model.layers.0.self_attn": {"route": {}}}}, "prune", "belongs to no pass"),
     ({}, "prune,prune{unit=head}", "two passes")],
)  # fmt: skip
def test_plans_of_another_model_or_pipeline_are_refused(
    changes: dict[str, Any], pipeline: str, words: str, tmp_path: Path
) -> None:
    file = PlanFile.load(made(tmp_path, **changes))
    with pytest.raises(OptionError, match=words):
        file.given(IDENTITY, program_of("llama"), Pipeline.parse(pipeline, REGISTRY).passes)


@pytest.mark.parametrize(
    ("pipeline", "rule"),
    [("to-mla,share", "no map or keys"), ("moh,prune", "routers are made"), ("moh,share", "leaves out heads"),
     ("dimap,prune", "fill its zeros"), ("dimap,moh", "fill its zeros"), ("moh,to-mla", "routers score"),
     ("dimap,to-mla", "fill its zeros"), ("dimap,share", "fill its zeros")],
)  # fmt: skip
def test_illegal_orders_are_refused_with_the_rule(pipeline: str, rule: str) -> None:
    with pytest.raises(OptionError, match=rule):
        Pipeline.parse(pipeline, REGISTRY)


@pytest.mark.parametrize(
    "pipeline",
    ["share{layers=2},prune{keep-heads=0.5},moh{active=0.5},dimap", "prune{keep-heads=0.5 unit=head},share{layers=2}",
     "prune{keep-heads=0.5 unit=head},to-mla{kv-keep=0.75},moh{active=0.5}", "share{layers=2},to-mla{kv-keep=0.75}",
     "to-mla{kv-keep=0.75},prune{keep-heads=0.5},dimap", "share{layers=2 edge=kv},prune{keep-heads=0.5}"],
)  # fmt: skip
def test_legal_orders_compose(pipeline: str) -> None:
    program = program_of("llama")
    result = apply(program, pipeline)
    assert len(result.results) == pipeline.count(",") + 1
    assert change(program, result.program) < 3
