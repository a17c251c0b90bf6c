"""The text of a conversion: from files, or written by the model and kept in the staging directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from attnopt.progress import Reporter

if TYPE_CHECKING:
    import torch

    from attnopt.conversion import CalibrationOptions, RunOptions
    from attnopt.profiles.calibration import Calibration
    from attnopt.rewriter.passes import Pass
    from attnopt.rewriter.source import ModelSource
    from attnopt.rewriter.steps import StepStore

#: Names under which text that the model wrote is kept in the staging directory, so that it need not write it again.
CALIBRATION_STEP, RECOVERY_STEP = "calibration", "recovery-text"


def wanted_tokens(passes: Sequence[Pass]) -> int:
    """Tokens to learn from, beside the calibration text; passes that learn share them."""
    return max((item.text_tokens for item in passes), default=0)


def from_files(source: ModelSource, calibration: CalibrationOptions, recovery: int) -> Calibration:
    """Text of the files given.

    Args:
        source: whose tokenizer is used.
        calibration: the files, and how much of them.
        recovery: tokens to learn from, beside the calibration text.
    """
    from attnopt.profiles.calibration import from_files

    return from_files(
        source.tokenizer(), calibration.files, calibration.tokens, calibration.context, calibration.seed, recovery
    )


def self_written(
    source: ModelSource,
    calibration: CalibrationOptions,
    options: RunOptions,
    device: torch.device,
    steps: StepStore,
    recovery: int,
    reporter: Reporter,
) -> Calibration:
    """Text that the model writes, or wrote before the run was interrupted."""
    from dataclasses import replace

    from attnopt.profiles.calibration import Calibration, self_sampled
    from attnopt.profiles.recovery import self_written
    from attnopt.rewriter.weights import WeightStore, evaluate

    budget = options.memory_budget * 1e9 if options.memory_budget else None
    if CALIBRATION_STEP in steps.steps_done():
        values, record = steps.load(CALIBRATION_STEP)
        saved = WeightStore(values)
        text = Calibration(saved.get("windows"), saved.get("selection"), **record)
    else:
        reporter.say(f"the model writes {calibration.tokens:,} tokens of calibration text")
        text = self_sampled(
            source, calibration.tokens, calibration.context, calibration.seed,
            device=str(device), memory_budget=budget, reporter=reporter,
        )  # fmt: skip
        pools = {"windows": text.windows, "selection": text.selection}
        steps.save(CALIBRATION_STEP, pools, {"source": text.source, "sha256": text.sha256, "seed": text.seed})
    if not recovery:
        return text

    def kept(part: int, write: Callable[[], torch.Tensor]) -> torch.Tensor:
        step = f"{RECOVERY_STEP}-{part:04d}"
        if step in steps.steps_done():
            return evaluate(steps.load(step)[0]["windows"])
        windows = write()
        steps.save(step, {"windows": windows}, {})
        return windows

    reporter.say(f"the model writes {recovery:,} tokens to learn from")
    windows = self_written(
        source, recovery, calibration.context, calibration.seed, kept,
        device=str(device), memory_budget=budget, reporter=reporter,
    )  # fmt: skip
    return replace(text, recovery=windows)


def describe(calibration: CalibrationOptions, text: Calibration | None) -> dict[str, Any]:
    """The text as plain data. What the model will write is determined by the rest."""
    found: dict[str, Any] = {"source": "self", "tokens": calibration.tokens, "context": calibration.context}
    if text is not None:
        found |= {"source": text.source, "tokens": text.tokens, "sha256": text.sha256}
        if text.recovery is not None:
            found["recovery_tokens"] = text.recovery.numel()
    return found
