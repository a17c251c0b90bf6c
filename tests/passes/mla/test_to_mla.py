"""The pass on whole tiny models: exact at full width, refusals, resume, and what it promises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnopt.errors import OptionError, UnsupportedError
from attnopt.passes.mla.to_mla import ToMla
from attnopt.passes.registry import REGISTRY
from attnopt.profiles.calibration import Calibration, divide
from attnopt.progress import Silent
from attnopt.rewriter.capture import capture_module
from attnopt.rewriter.interpret import run
from attnopt.rewriter.passes import PassContext, PassResult
from attnopt.rewriter.pipeline import Pipeline
from attnopt.rewriter.program import Program
from attnopt.rewriter.verify import violations
from attnopt.staging import Staging
from tests import models

FAMILIES = (
    "llama", "llama-mha", "llama-mqa", "llama-llama3", "llama-tied", "mistral-full", "qwen2", "qwen3", "phi3",
    "phi3-partial", "mixtral", "qwen3_moe",
)  # fmt: skip


def calibration(windows: int = 10, context: int = 40, seed: int = 0) -> Calibration:
    generator = torch.Generator().manual_seed(seed)
    return divide(torch.randint(3, models.VOCAB, (windows, context), generator=generator), "random", seed)


def convert(program: Program, context: PassContext | None = None, **options: Any) -> PassResult:
    item = ToMla(**options)
    item.check(program)
    context = context or PassContext(calibration=calibration())
    result = item.apply(program, item.plan(program, {}), context)
    assert violations(result.program) == []
    assert item.ensures(program, result.program) == []
    return result


def change(before: Program, after: Program, length: int = 17) -> float:
    """Relative change of the logits on text that was not calibrated on."""
    batch = models.inputs("llama", 2, length, seed=77)
    return models.relative_error(run(after, **batch)["logits"], run(before, **batch)["logits"])


def full_width(program: Program) -> dict[str, int]:
    site = program.site_list[0]
    assert site.rope is not None
    lane = int(site.q_norm is None)
    latent = site.kv_heads * (site.d_v + site.d_qk - site.rope.dim) + lane
    return {"kv_lora_rank": latent, "qk_rope_head_dim": site.kv_heads * site.rope.dim}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tables", ["shared", "per-layer"])
def test_full_width_changes_nothing(family: str, tables: str) -> None:
    _, program = models.captured(family)
    result = convert(program, **full_width(program), force=True, tables=tables)
    assert change(program, result.program) < 1e-5
    assert change(program, result.program, length=1) < 1e-5
    assert result.changed_sites == tuple(program.sites)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral"])
@pytest.mark.parametrize("keep", [0.75, 0.5])
def test_the_cache_shrinks_by_what_was_asked(family: str, keep: float) -> None:
    _, program = models.captured(family)
    result = convert(program, kv_keep=keep)
    assert result.program.cached_numbers_per_token == pytest.approx(keep * program.cached_numbers_per_token, abs=8)
    assert 1e-3 < change(program, result.program) < 2
    planned = ToMla(kv_keep=keep).plan(program, {})
    assert [e.cached_numbers_per_token[1] for e in planned.edits] == [
        site.cached_numbers_per_token for site in result.program.site_list
    ]
    for site in result.program.site_list:
        assert site.latent is not None
        assert site.latent.lane == (site.q_norm is None)
        assert site.latent.peak > 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_refit_reports_errors_that_do_not_grow(family: str) -> None:
    _, program = models.captured(family)
    result = convert(program, kv_keep=0.5, recover="refit", epochs=3)
    for record in result.layers:
        assert record["error_after_refit"] <= record["error_before_refit"]


@pytest.mark.parametrize("follow", [0.0, 0.5, 1.0])
def test_targets_may_lead_back_to_the_source(follow: float) -> None:
    _, program = models.captured("llama")
    result = convert(program, kv_keep=0.75, follow=follow)
    assert change(program, result.program) < 1
    assert change(program, convert(program, **full_width(program), force=True, follow=follow).program) < 1e-5


def test_without_a_lane_the_value_mean_goes_into_the_output_bias() -> None:
    _, program = models.captured("llama")
    sizes = full_width(program)
    sizes["kv_lora_rank"] -= 1
    result = convert(program, **sizes, force=True, lane=False)
    site = result.program.site_list[0]
    assert site.latent is not None
    assert not site.latent.lane
    assert site.o.bias is not None
    assert change(program, result.program) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3", pytest.param("phi3-partial", marks=pytest.mark.slow)])
def test_measured_sizes_go_where_the_model_needs_them(family: str) -> None:
    model = models.build(family, num_hidden_layers=3)
    with torch.no_grad():  # little depends on what the second layer attends to
        model.model.layers[1].self_attn.o_proj.weight.mul_(0.02)
    program = capture_module(model)
    result = convert(program, kv_keep=0.5, sizes="measured")
    sizes = [site.cached_numbers_per_token for site in result.program.site_list]
    tried = [list(map(int, row["losses"])) for row in result.summary["sizes"]]
    least, mean, most = tried[0]
    assert tried == [[least, mean, most]] * 3
    assert sizes[1] == least, "it is worth little"
    assert sum(sizes) == 3 * mean
    assert all(least < size <= most for size in (sizes[0], sizes[2]))
    for row, site in zip(result.summary["sizes"], result.program.site_list, strict=True):
        losses = list(row["losses"].values())
        assert losses == sorted(losses, reverse=True)
        assert site.latent is not None
        assert not site.latent.lane
        assert (site.latent.kv_lora_rank, site.latent.d_rope) == (row["kv_lora_rank"], row["qk_rope_head_dim"])
    assert [row["kv_lora_rank"] + row["qk_rope_head_dim"] for row in result.layers] == sizes
    first, second = (row["losses"][str(least)] for row in result.summary["sizes"][:2])
    assert second < 0.01 * first


def test_only_attention_is_touched() -> None:
    _, program = models.captured("mixtral")
    after = convert(program, kv_keep=0.5).program
    outside = [n for n in program.weight_names if "self_attn" not in n]
    assert outside
    assert all(after.weights[name] is program.weights[name] for name in outside)
    assert not any("k_proj" in name for name in after.weight_names)


def test_the_same_seed_gives_the_same_weights() -> None:
    _, program = models.captured("llama")
    runs = [convert(program, kv_keep=0.5, recover="refit", epochs=1).program for _ in range(2)]
    for name in runs[0].weight_names:
        assert torch.equal(runs[0].weights.get(name), runs[1].weights.get(name)), name


@pytest.mark.parametrize(
    ("family", "words"),
    [("mistral", "last 5 tokens"), ("gemma2", "soft-capped|last 5"), ("gpt2", "not rotary"), ("bert", "encoder"),
     ("deepseek_v3", "already"), ("olmo2", "spans all heads"), ("swin", "encoder|causal|bias")],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_with_the_reason(family: str, words: str) -> None:
    _, program = models.captured(family)
    with pytest.raises(UnsupportedError, match=words):
        ToMla(kv_keep=0.5).check(program)


def test_layers_that_cannot_be_converted_are_left_alone() -> None:
    model = models.build(
        "qwen2", use_sliding_window=True, sliding_window=5, layer_types=["full_attention", "sliding_attention"]
    )
    program = capture_module(model)
    plan = ToMla(kv_keep=0.5).plan(program, {})
    assert [edit.site for edit in plan.edits] == ["model.layers.0.self_attn"]
    assert "last 5 tokens" in plan.misses[0].reason
    result = convert(program, kv_keep=0.5)
    assert result.changed_sites == ("model.layers.0.self_attn",)
    assert result.program.site_list[1] == program.site_list[1]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kv_lora_rank": 20}, OptionError, "belong together"),
        ({"kv_lora_rank": 20, "qk_rope_head_dim": 8, "kv_keep": 0.5}, OptionError, "exclude"),
        ({"kv_lora_rank": 20, "qk_rope_head_dim": 7}, OptionError, "even"),
        ({"kv_lora_rank": 24, "qk_rope_head_dim": 8}, UnsupportedError, "no fewer than the 32"),
        ({"kv_keep": 1.0}, UnsupportedError, "no fewer"),
        ({"kv_lora_rank": 20, "qk_rope_head_dim": 8, "sizes": "measured"}, OptionError, "finds the sizes itself"),
        ({"sizes": "measured", "tables": "shared"}, OptionError, "share no rope table"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, error: type[Exception], words: str) -> None:
    _, program = models.captured("llama")
    with pytest.raises(error, match=words):
        ToMla(**options).check(program)


def test_without_calibration_text_it_says_what_to_give() -> None:
    _, program = models.captured("llama")
    item = ToMla(kv_keep=0.5)
    with pytest.raises(OptionError, match="calibration text"):
        item.apply(program, item.plan(program, {}), PassContext())


def test_too_little_text_is_refused() -> None:
    _, program = models.captured("llama-wide-heads")
    with pytest.raises(UnsupportedError, match="fewer than a head has channels"):
        convert(program, PassContext(calibration=calibration(2, 8)), kv_keep=0.5)


def test_a_model_that_is_not_finite_is_refused() -> None:
    model = models.build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 3] = torch.nan
    with pytest.raises(UnsupportedError, match="not finite"):
        convert(capture_module(model), kv_keep=0.5)


def test_progress_is_reported() -> None:
    class Counting(Silent):
        total = 0
        done = 0

        def start(self, title: str, total: int, unit: str) -> int:
            self.total += total
            return 0

        def advance(self, handle: int, amount: int = 1) -> None:
            self.done += amount

    _, program = models.captured("llama")
    for sizes, more in (("equal", 0), ("measured", 3 * len(program.sites))):
        reporter = Counting()
        convert(program, PassContext(calibration=calibration(), reporter=reporter), kv_keep=0.5, sizes=sizes)
        assert reporter.done == reporter.total == 2 * len(program.sites) + more


def test_it_runs_from_pipeline_text_and_leaves_a_history() -> None:
    _, program = models.captured("llama")
    pipeline = Pipeline.parse("to-mla{kv-keep=0.5}", REGISTRY)
    result = pipeline.run(program, PassContext(calibration=calibration()))
    assert result.changed_sites == tuple(program.sites)
    summary = result.program.history[-1].summary
    assert summary["kv_lora_rank"] + summary["qk_rope_head_dim"] == 16
    assert [entry["error"] > 0 for entry in summary["split_errors"]]


CRASHING = """
import sys, os, signal
from pathlib import Path
from attnopt.passes.mla.to_mla import ToMla
from attnopt.rewriter.passes import PassContext
from attnopt.staging import Staging
from tests import models
from tests.passes.mla.test_to_mla import calibration, convert

class Dying(Staging):
    def save(self, step, tensors, record):
        values = super().save(step, tensors, record)
        if step == sys.argv[2]:
            os.kill(os.getpid(), signal.SIGKILL)
        return values

_, program = models.captured("llama")
with Dying(Path(sys.argv[1]), key="k") as staging:
    context = PassContext(calibration=calibration(), workdir=staging)
    convert(program, context, kv_keep=0.5, sizes=sys.argv[3], recover="refit", epochs=1)
"""


@pytest.mark.parametrize(
    ("step", "sizes"),
    [pytest.param("probe", "equal", marks=pytest.mark.slow), ("layer-0000", "equal"), ("probe", "measured")],
)
def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path, step: str, sizes: str) -> None:
    _, program = models.captured("llama")
    options: dict[str, Any] = {"kv_keep": 0.5, "sizes": sizes, "recover": "refit", "epochs": 1}
    whole = convert(program, **options).program
    root = Path(__file__).parents[3]
    died = subprocess.run(
        [sys.executable, "-c", CRASHING, str(tmp_path / "out"), step, sizes],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL, died.stderr
    with Staging(tmp_path / "out", key="k", resume=True) as staging:
        assert step in staging.steps_done()
        context = PassContext(calibration=calibration(), workdir=staging, resume=True)
        resumed = convert(program, context, **options).program
        names = [name for name in whole.weight_names if "inv_freq" not in name]
        assert set(names) <= set(resumed.weight_names)
        for name in names:
            assert torch.equal(whole.weights.get(name), resumed.weights.get(name)), name
