"""share, moh, prune and dimap from the command line: plans are printed, edited, applied and recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.cli.helpers import Outcome

Cli = Callable[..., Outcome]


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=4)


def test_dimap_needs_no_text(cli: Cli, four_layers: Path, tmp_path: Path) -> None:
    document = cli(
        "convert", four_layers, "--to", "dimap", "--sparsity", "0.5", "-o", tmp_path / "out", "--json"
    ).document
    assert document["emitted_as"] == "llama"
    assert document["sites_changed"] == 4
    assert "calibration text" not in document["phases"] or document["phases"]["calibration text"] < 5
    manifest = json.loads((tmp_path / "out" / "attnopt.json").read_text())
    assert set(manifest["plan"]["sites"]) == {f"model.layers.{i}.self_attn" for i in range(4)}
    again = cli("inspect", tmp_path / "out", "--json").document
    assert again["parameters"] == document["parameters"]["before"]


def test_a_plan_is_printed_edited_and_applied(cli: Cli, four_layers: Path, tmp_path: Path) -> None:
    document = cli(
        "convert", four_layers, "--to", "prune", "--keep-heads", "0.5", "--fill", "none", "--dry-run", "--json"
    ).document
    assert document["schema"] == "attnopt.plan/1"
    assert document["cached_numbers_per_token"]["after"] == document["cached_numbers_per_token"]["before"] // 2
    sites: dict[str, Any] = document["sites"]
    assert all(site == {"heads": {"count": 2}} for site in sites.values())
    names = list(sites)
    document["sites"] = {names[1]: {"heads": {"keep": [2, 3]}}}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(document))
    done = cli("convert", four_layers, "--plan", plan, "-o", tmp_path / "out", "--json").document
    assert done["sites_changed"] == 1
    assert done["emitted_as"] == "attnopt"
    assert done["cached_numbers_per_token"] == {"before": 128, "after": 112}
    manifest = json.loads((tmp_path / "out" / "attnopt.json").read_text())
    assert manifest["plan"]["sites"] == document["sites"]
    assert manifest["layers"][0]["keep"] == [2, 3]
    again = cli("inspect", tmp_path / "out", "--json").document
    assert again["cached_numbers_per_token"] == 112
    assert again["model_type"] == "llama"
    assert [site["cached_numbers_per_token"] for site in again["sites"]] == [32, 16, 32, 32]
    assert again["sites"][1]["original_heads"] == [2, 3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"name": "x"}}, "another model"),
        ({"extra": 1}, "unknown keys"),
        ({"pipeline": "nonsense"}, "no pass"),
    ],
)
def test_bad_plans_leave_nothing_behind(
    change: dict[str, Any], words: str, cli: Cli, four_layers: Path, tmp_path: Path
) -> None:
    document = cli("convert", four_layers, "--to", "dimap", "--dry-run", "--json").document
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({**document, **change}))
    outcome = cli("convert", four_layers, "--plan", plan, "-o", tmp_path / "out")
    assert outcome.code == 1
    assert words in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_options_beside_a_plan_and_no_method_are_refused(cli: Cli, four_layers: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(cli("convert", four_layers, "--to", "dimap", "--dry-run", "--json").document))
    outcome = cli("convert", four_layers, "--plan", plan, "--sparsity", "0.3", "-o", tmp_path / "out")
    assert outcome.code == 1
    assert "no effect" in outcome.err
    outcome = cli("convert", four_layers, "-o", tmp_path / "out")
    assert outcome.code == 1
    assert "no method" in outcome.err
    outcome = cli("run", four_layers, "-p", "prune", "--plan", plan, "-o", tmp_path / "out")
    assert outcome.code == 1
    assert "is for the pipeline" in outcome.err


def test_what_no_class_can_hold_is_refused_before_work_starts(cli: Cli, tmp_path: Path) -> None:
    gpt2 = models.save("gpt2", tmp_path / "model")
    outcome = cli("convert", gpt2, "--to", "prune", "--keep-heads", "0.5", "-o", tmp_path / "out")
    assert outcome.code == 1
    assert "gpt2" in outcome.err
    assert "calibration" not in outcome.err
    assert not (tmp_path / "out").exists()
    written = cli("convert", gpt2, "--to", "dimap", "-o", tmp_path / "out", "--json").document
    assert written["emitted_as"] == "gpt2"


def test_what_was_shared_and_routed_is_inspected(cli: Cli, four_layers: Path, tmp_path: Path) -> None:
    layers = [f"model.layers.{i}.self_attn" for i in range(4)]
    route = {"type": "qnorm", "unit": "head", "shared": [1], "k": 2, "gate": "binary"}
    plan = cli("convert", four_layers, "--to", "dimap", "--dry-run", "--json").document
    plan |= {
        "pipeline": "share{fill=none},moh{router=qnorm fill=none}",
        "sites": {
            layers[1]: {"share": {"map_from": layers[0], "head_map": [0, 1, 2, 3]}},
            layers[2]: {"route": route},
        },
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    cli("convert", four_layers, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out", "-q")
    sites = cli("inspect", tmp_path / "out", "--json").document["sites"]
    assert [site["cached_numbers_per_token"] for site in sites] == [32, 16, 32, 32]
    assert sites[1]["share"] == {"edge": "map", "source": layers[0]}
    wanted = {"router": "qnorm", "gate": "binary", "shared": [1], "unit": "head", "units": 3, "active": 2}
    assert sites[2]["route"] == wanted
    shown = cli("inspect", tmp_path / "out").out
    assert "gqa, shared map" in shown
    assert "gqa, routed" in shown


def test_an_illegal_order_is_refused_at_once(cli: Cli, four_layers: Path, tmp_path: Path) -> None:
    outcome = cli("run", four_layers, "-p", "moh,prune", "-o", tmp_path / "out")
    assert outcome.code == 1
    assert "routers are made" in outcome.err


def test_options_of_another_method_are_refused(cli: Cli, four_layers: Path, tmp_path: Path) -> None:
    outcome = cli("convert", four_layers, "--to", "prune", "--sparsity", "0.5", "-o", tmp_path / "out")
    assert outcome.code == 1
    assert "no option" in outcome.err
