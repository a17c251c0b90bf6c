"""convert, run, verify and inspect on a tiny model: documents, files, refusals, crashes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import hostile, models
from tests.cli.helpers import Outcome, Run, entries, spawn

TEXT = ("--calib-tokens", "1024", "--context", "64")


def convert_arguments(model: Path, out: Path, text: Path | None, *more: str | Path) -> list[str | Path]:
    calib = ["--calib", text] if text else []
    return ["convert", model, "--to", "mla", "--kv-keep", "0.5", "-o", out, *calib, *TEXT, *more]


def contents(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in entries(directory)}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, tiny: Path, prose: Path) -> tuple[Path, Outcome]:
    """The tiny model at half its cache, written once for this file, and what the command said."""
    out = tmp_path_factory.mktemp("converted") / "out"
    return out, spawn(*convert_arguments(tiny, out, prose, "--json"))


class TestInspect:
    def test_document(self, cli: Run, tiny: Path) -> None:
        outcome = cli("inspect", tiny, "--json")
        assert outcome.code == 0
        document = outcome.document
        assert document["schema"] == "attnopt.inspect/1"
        assert document["model_type"] == "llama"
        assert document["layers"] == 2
        assert document["cached_numbers_per_token"] == 64
        site = document["sites"][1]
        assert site["fqn"] == "model.layers.1.self_attn"
        assert (site["layer"], site["kind"], site["heads"], site["kv_heads"], site["head_dim"]) == (1, "gqa", 4, 2, 8)
        assert site["cached_numbers_per_token"] == 32
        assert site["rope"]["dim"] == 8
        assert site["rope"]["inv_freq"][0] == 1.0

    def test_view_and_quiet_view(self, cli: Run, tiny: Path) -> None:
        outcome = cli("inspect", tiny)
        assert "0-1" in outcome.out
        assert "gqa" in outcome.out
        assert "64 cached numbers per token" in outcome.out
        assert "capturing" in outcome.err
        quiet = cli("inspect", tiny, "-q")
        assert (quiet.out, quiet.err) == ("64\n", "")

    def test_encoder_keeps_no_cache(self, cli: Run, tmp_path: Path) -> None:
        models.save("bert", tmp_path / "bert")
        outcome = cli("inspect", tmp_path / "bert")
        assert outcome.code == 0
        assert "no cache" in outcome.out


class TestConvert:
    def test_document(self, converted: tuple[Path, Outcome]) -> None:
        out, outcome = converted
        assert outcome.code == 0, outcome.err
        document = outcome.document
        assert document["schema"] == "attnopt.convert/1"
        assert document["output"] == str(out)
        assert document["emitted_as"] == "deepseek_v3"
        assert document["sites_changed"] == 2
        assert document["cached_numbers_per_token"]["before"] == 64
        assert 0 < document["cached_numbers_per_token"]["after"] <= 32
        assert document["parameters"]["before"] == sum(
            p.numel() for p in AutoModelForCausalLM.from_pretrained(document_source(out)).parameters()
        )
        assert document["pipeline"].startswith("to-mla")
        assert document["seconds"] > 0
        assert document["peak_rss_bytes"] > 50e6

    def test_output_holds_manifest_card_and_tokenizer_and_nothing_is_left_beside_it(
        self, converted: tuple[Path, Outcome]
    ) -> None:
        out, outcome = converted
        manifest = json.loads((out / "attnopt.json").read_text())
        assert manifest["pipeline"] == outcome.document["pipeline"]
        assert manifest["cached_numbers_per_token"] == outcome.document["cached_numbers_per_token"]
        assert re.fullmatch(r"[0-9a-f]{64}", manifest["options"]["calibration"]["sha256"])
        assert "cached numbers per token" in (out / "README.md").read_text()
        assert (out / "tokenizer.json").exists()
        assert {path.name for path in out.parent.iterdir()} == {"out"}

    def test_manifest_reproduces_the_output_byte_for_byte(
        self, cli: Run, converted: tuple[Path, Outcome], tiny: Path, prose: Path, tmp_path: Path
    ) -> None:
        out, _ = converted
        pipeline = json.loads((out / "attnopt.json").read_text())["pipeline"]
        again = tmp_path / "again"
        outcome = cli("run", tiny, "-p", pipeline, "-o", again, "--calib", prose, *TEXT, "-q")
        assert (outcome.code, outcome.out, outcome.err) == (0, f"{again}\n", "")
        assert contents(again) == contents(out)

    def test_view_tells_the_change_in_cache_first(self, cli: Run, tiny: Path, tmp_path: Path) -> None:
        outcome = cli(*convert_arguments(tiny, tmp_path / "out", None))
        assert outcome.code == 0, outcome.err
        assert re.match(r"64 -> \d+ cached numbers per token \(\d+ %\)", outcome.out)
        assert outcome.out.splitlines()[-1].endswith(f"written as deepseek_v3: {tmp_path / 'out'}")
        assert "calibration text" in outcome.err

    def test_check_each_reports_what_every_pass_changed(
        self, cli: Run, tiny: Path, prose: Path, tmp_path: Path
    ) -> None:
        outcome = cli(*convert_arguments(tiny, tmp_path / "out", prose, "--check-each", "--json"))
        assert any("changed the logits by" in note for note in outcome.document["notes"])

    def test_weights_can_be_written_in_another_type(self, cli: Run, tiny: Path, prose: Path, tmp_path: Path) -> None:
        outcome = cli(*convert_arguments(tiny, tmp_path / "out", prose, "--dtype", "bfloat16"))
        assert outcome.code == 0, outcome.err
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.dtype == torch.bfloat16

    def test_sizes_by_layer(self, cli: Run, tiny: Path, prose: Path, tmp_path: Path) -> None:
        document = cli(*convert_arguments(tiny, tmp_path / "out", prose, "--sizes", "measured", "--json")).document
        assert document["emitted_as"] == "attnopt"
        assert document["cached_numbers_per_token"] == {"before": 64, "after": 32}
        (summary,) = document["summary"].values()
        assert [set(row["losses"]) for row in summary["sizes"]] == [{"8", "16", "30"}] * 2
        verified = cli("verify", tmp_path / "out", "--text", prose, "--window", "32", "--windows", "2", "--json")
        assert verified.code == 0, verified.err

    def test_text_of_a_file_and_of_the_model(self, cli: Run, tiny: Path, prose: Path, tmp_path: Path) -> None:
        both, alone = (
            cli(*convert_arguments(tiny, tmp_path / name, prose, *more, "--json")).document["calibration"]
            for name, more in (("both", ("--calib", "self")), ("alone", ()))
        )
        assert both["source"] == f"{prose.name}, self"
        assert both["tokens"] == alone["tokens"]
        assert both["sha256"] != alone["sha256"]


def document_source(out: Path) -> str:
    return json.loads((out / "attnopt.json").read_text())["run"]["model"]


class TestDryRun:
    def test_plan_without_reading_weights_or_writing(self, cli: Run, tmp_path: Path) -> None:
        model = hostile.make("nan", tmp_path / "model")
        before = entries(tmp_path)
        outcome = cli("convert", model, "--to", "mla", "--kv-lora-rank", "8", "--qk-rope-head-dim", "4", "--dry-run")
        assert outcome.code == 0, outcome.err
        assert "to-mla{kv-lora-rank=8 qk-rope-head-dim=4}" in outcome.out
        assert "64 -> 24 cached numbers per token" in outcome.out
        assert "model.layers.0.self_attn" in outcome.out
        assert "memory" in outcome.out
        assert entries(tmp_path) == before

    def test_document(self, cli: Run, tiny: Path) -> None:
        document = cli("convert", tiny, "--to", "mla", "--kv-keep", "0.5", "--dry-run", "--json").document
        assert document["schema"] == "attnopt.plan/1"
        assert document["cached_numbers_per_token"] == {"before": 64, "after": 32}
        assert list(document["sites"]) == [f"model.layers.{i}.self_attn" for i in (0, 1)]
        assert document["memory_bytes"] > 50e6

    def test_quiet_prints_the_pipeline(self, cli: Run, tiny: Path) -> None:
        out = cli("convert", tiny, "--to", "mla", "--kv-keep", "0.25", "--dry-run", "-q").out
        assert out == "to-mla{kv-keep=0.25}\n"


REFUSED = [
    (["--to", "mlaa"], "no method 'mlaa'", "mla"),
    (["--to", "mla", "--kv-keep", "1.5"], "cached numbers per token", "--kv-keep"),
    (["--to", "mla", "--kv-keep", "nan"], "kv-keep", "kv-keep"),
    (["--to", "mla", "--kv-lora-rank", "0"], "kv-lora-rank", "kv-lora-rank"),
    (["--to", "mla", "--device", "abacus"], "abacus", "cuda"),
    (["--to", "mla", "--device", "cuda:99"], "cuda:99", "--device cpu"),
    (["--to", "mla", "--dtype", "int3"], "int3", "bfloat16"),
    (["--to", "mla", "--memory-budget", "0.001"], "memory", "--memory-budget"),
    (["--to", "mla", "--calib-tokens", "0"], "calibration tokens", "--calib-tokens"),
    (["--to", "mla", "--context", "2"], "context", "--context"),
    (["--to", "mla", "--calib", "nowhere.txt"], r"nowhere\.txt", "path"),
    (
        ["--to", "mla", "--calib", __file__, "--calib", "self", "--calib-tokens", "60"],
        "30 are the files'",
        "--calib self",
    ),
    (["--to", "mla", "--kv-lora-rank", "64", "--qk-rope-head-dim", "8"], "cache", "--force"),
]


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message", "hint"), REFUSED, ids=lambda v: "_".join(v) if isinstance(v, list) else ""
    )
    def test_wrong_options_exit_with_1_and_write_nothing(
        self, cli: Run, tiny: Path, tmp_path: Path, arguments: list[str], message: str, hint: str
    ) -> None:
        outcome = cli("convert", tiny, "-o", tmp_path / "out", *arguments)
        assert outcome.code == 1, outcome.err
        assert re.search(f"error: .*{message}", outcome.err)
        assert re.search(f"hint: .*{hint}", outcome.err)
        assert outcome.out == ""
        assert entries(tmp_path) == set()

    @pytest.mark.parametrize(
        ("option", "reason"),
        [("lane=false", "constant lane"), ("tables=per-layer", "rope tables"), ("sizes=measured", "differ in size")],
    )
    def test_what_the_stock_class_cannot_hold_is_refused_before_work_starts(
        self, cli: Run, tiny: Path, tmp_path: Path, option: str, reason: str
    ) -> None:
        outcome = cli("run", tiny, "-p", f"to-mla{{{option}}}", "--emit", "deepseek_v3", "-o", tmp_path / "out")
        assert outcome.code == 1
        assert reason in outcome.err
        assert "calibration text" not in outcome.err, "nothing was sampled"
        assert entries(tmp_path) == set()

    def test_output_is_required(self, cli: Run, tiny: Path) -> None:
        outcome = cli("convert", tiny, "--to", "mla")
        assert outcome.code == 1
        assert "-o OUT" in outcome.err

    @pytest.mark.parametrize(
        ("text", "hint"),
        [("to-mla{kv-kep=1}", "kv-keep"), ("to-mla{", "write passes as"), ("to-mlo", "to-mla"), ("mla", "to-mla")],
    )
    def test_wrong_pipelines(self, cli: Run, tiny: Path, tmp_path: Path, text: str, hint: str) -> None:
        outcome = cli("run", tiny, "-p", text, "-o", tmp_path / "out")
        assert outcome.code == 1
        assert hint in outcome.err.split("hint: ")[1]

    def test_empty_calibration_text(self, cli: Run, tiny: Path, tmp_path: Path) -> None:
        text = tmp_path / "empty.txt"
        text.write_text("")
        outcome = cli(*convert_arguments(tiny, tmp_path / "out", text))
        assert outcome.code == 1
        assert "is empty" in outcome.err
        assert entries(tmp_path) == {"empty.txt"}

    def test_larger_cache_can_be_forced(self, cli: Run, tiny: Path, prose: Path, tmp_path: Path) -> None:
        arguments = ["--kv-lora-rank", "60", "--qk-rope-head-dim", "8", "--force", "--calib", prose, *TEXT, "--json"]
        outcome = cli("convert", tiny, "--to", "mla", "-o", tmp_path / "out", *arguments)
        assert outcome.code == 0, outcome.err
        assert outcome.document["cached_numbers_per_token"]["after"] == 136

    def test_encoders_are_refused_with_the_reason(self, cli: Run, tmp_path: Path) -> None:
        models.save("bert", tmp_path / "bert")
        before = entries(tmp_path)
        outcome = cli("convert", tmp_path / "bert", "--to", "mla", "-o", tmp_path / "out")
        assert outcome.code == 1
        assert entries(tmp_path) == before

    def test_output_that_cannot_be_written(self, cli: Run, tiny: Path, prose: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        outcome = cli(*convert_arguments(tiny, tmp_path / "file" / "out", prose))
        assert outcome.code == 1
        assert "file" in outcome.err
        assert entries(tmp_path) == {"file"}

    def test_existing_outputs_are_kept_unless_overwritten(
        self, cli: Run, tiny: Path, prose: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "diary.txt").write_text("mine")
        for more in ([], ["--overwrite"]):  # what attnopt did not write is not replaced even then
            outcome = cli(*convert_arguments(tiny, out, prose, *more))
            assert outcome.code == 1
            assert (out / "diary.txt").read_text() == "mine"
        (out / "diary.txt").unlink()
        assert cli(*convert_arguments(tiny, out, prose, "--overwrite")).code == 0
        first = contents(out)
        assert cli(*convert_arguments(tiny, out, prose)).code == 1
        assert contents(out) == first
        other = ["convert", tiny, "--to", "mla", "--kv-keep", "0.75", "-o", out, "--calib", prose, *TEXT, "--overwrite"]
        assert cli(*other).code == 0
        assert contents(out) != first
        assert {path.name for path in tmp_path.iterdir()} == {"out"}

    def test_the_model_is_not_replaced_by_what_is_made_of_it(self, cli: Run, tmp_path: Path) -> None:
        model = hostile.healthy(tmp_path / "model", vocab_size=256)
        before = contents(model)
        outcome = cli(*convert_arguments(model, model, None, "--overwrite"))
        assert outcome.code == 1
        assert contents(model) == before


KILLED = """
import os, signal, sys
from attnopt.staging import Staging
from attnopt.cli import main
saved, original = [], Staging.save
def save(self, step, tensors, record):
    result = original(self, step, tensors, record)
    saved.append(step)
    if len(saved) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
Staging.save = save
sys.exit(main(sys.argv[2:]))
"""


class TestCrash:
    @pytest.mark.parametrize(
        "saves", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
    )
    def test_kill_then_resume_gives_the_same_bytes(self, cli: Run, tiny: Path, tmp_path: Path, saves: int) -> None:
        whole, out = tmp_path / "whole", tmp_path / "out"
        assert cli(*convert_arguments(tiny, whole, None)).code == 0
        arguments = convert_arguments(tiny, out, None)
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(saves), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert killed.returncode == -9, killed.stderr
        assert not out.exists()

        refused = cli(*arguments)
        assert refused.code == 1
        assert "--resume" in refused.err.split("hint: ")[1]
        other = cli(*convert_arguments(tiny, out, None, "--resume", "--seed", "1"))
        assert other.code == 1
        assert "other options" in other.err

        resumed = cli(*arguments, "--resume")
        assert resumed.code == 0, resumed.err
        assert "calibration text" not in resumed.err  # the text is not sampled again
        assert contents(out) == contents(whole)
        assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


class TestVerify:
    def test_document(self, cli: Run, converted: tuple[Path, Outcome], prose: Path) -> None:
        out, outcome = converted
        checked = cli("verify", out, "--text", prose, "--window", "64", "--windows", "3", "--json")
        assert checked.code == 0, checked.err
        document = checked.document
        assert document["schema"] == "attnopt.verify/1"
        assert document["reloaded_as"] == "DeepseekV3ForCausalLM"
        assert document["cached_numbers_per_token"] == {
            "original": 64,
            "converted": outcome.document["cached_numbers_per_token"]["after"],
        }
        (text,) = document["texts"]
        assert (text["file"], text["windows"], text["window"]) == (str(prose), 3, 64)
        quality = text["perplexity"]
        assert quality["ratio"] == pytest.approx(quality["converted"] / quality["original"])
        assert 0 <= text["top1_agreement"] <= 1
        assert "gate" not in document

    def test_text_of_python_by_default(self, cli: Run, converted: tuple[Path, Outcome]) -> None:
        outcome = cli("verify", converted[0], "--window", "64", "--windows", "2", "--gate", "1000")
        assert outcome.code == 0, outcome.err
        assert "gate 1000 passed" in outcome.out
        assert "pydoc_data.topics" in outcome.out
        assert "DeepseekV3ForCausalLM" in outcome.out

    def test_missed_gate_exits_with_3(self, cli: Run, converted: tuple[Path, Outcome], prose: Path) -> None:
        arguments = ["verify", converted[0], "--text", prose, "--window", "64", "--windows", "2", "--gate"]
        missed = cli(*arguments, "0.001")
        assert missed.code == 3
        assert "gate 0.001 missed" in missed.out
        passed = cli(*arguments, "1000", "--json")
        assert passed.code == 0
        assert passed.document["gate"]["passed"] is True

    def test_original_must_be_known(self, cli: Run, tiny: Path, tmp_path: Path) -> None:
        outcome = cli("verify", tiny)
        assert outcome.code == 1
        assert "--against" in outcome.err
        assert cli("verify", tmp_path / "nothing").code == 1


class TestPasses:
    def test_lists_passes_methods_and_options(self, cli: Run) -> None:
        document = cli("passes", "--json").document
        assert document["schema"] == "attnopt.passes/1"
        (to_mla,) = [entry for entry in document["passes"] if entry["name"] == "to-mla"]
        options = {option["name"]: option for option in to_mla["options"]}
        assert {"kv-keep", "kv-lora-rank", "qk-rope-head-dim", "recover"} <= set(options)
        assert all(option["help"] for option in options.values())
        assert {method["name"] for method in document["methods"]} == {"mla", "share", "moh", "prune", "dimap"}

    def test_view(self, cli: Run) -> None:
        outcome = cli("passes")
        assert "--to mla" in outcome.out
        assert "kv-keep" in outcome.out
        assert {"to-mla", "share", "moh", "prune", "dimap"} <= set(cli("passes", "-q").out.split())
