"""The text of a conversion: from files, or written by the model and kept in the staging directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from attnopt.errors import UnsupportedError
from attnopt.progress import Reporter

if TYPE_CHECKING:
    import torch

    from attnopt.conversion import CalibrationOptions, RunOptions
    from attnopt.profiles.calibration import Calibration
    from attnopt.rewriter.passes import LearningText, Pass
    from attnopt.rewriter.source import ModelSource
    from attnopt.rewriter.steps import StepStore

#: Names under which text that the model wrote is kept in the staging directory, so that it need not write it again.
CALIBRATION_STEP, RECOVERY_STEP = "calibration", "recovery-text"


def to_learn_from(passes: Sequence[Pass]) -> LearningText:
    """The text that passes learn from: they share it, so it is what the one that asks for most says."""
    from attnopt.rewriter.passes import LearningText

    return max((item.learns_from for item in passes), key=lambda text: text.tokens, default=LearningText())


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


@dataclass(frozen=True)
class Author:
    """The model as a writer of text, which is kept while the run is not finished.

    Attributes:
        source: the model that is changed; it writes unless `learned` names another author.
        learned: text to learn from beside the calibration text.
        calibration, options, device: of the run.
        steps: keeps what is written.
        reporter: told of the tokens.
    """

    source: ModelSource
    learned: LearningText
    calibration: CalibrationOptions
    options: RunOptions
    device: torch.device
    steps: StepStore
    reporter: Reporter

    def complete(self, text: Calibration | None, needed: bool) -> Calibration | None:
        """The text of the run, with what the model writes of it, or wrote before the run was interrupted.

        Args:
            text: of files, with what was left of them in `recovery`; None if there are none.
            needed: whether the run needs calibration text.

        Raises:
            SourceError: the author asked for cannot be read.
            UnsupportedError: calibration text is needed and the model cannot write.
        """
        if text is None and needed:
            text = self._calibration()
        return None if text is None else self._with_text_to_learn_from(text)

    def _calibration(self) -> Calibration:
        from attnopt.profiles.calibration import Calibration
        from attnopt.profiles.writing import self_sampled
        from attnopt.rewriter.weights import WeightStore

        if CALIBRATION_STEP in self.steps.steps_done():
            values, record = self.steps.load(CALIBRATION_STEP)
            saved = WeightStore(values)
            return Calibration(saved.get("windows"), saved.get("selection"), **record)
        wanted = self.calibration
        self.reporter.say(f"the model writes {wanted.tokens:,} tokens of calibration text")
        text = self_sampled(self._writer, wanted.tokens, wanted.context, wanted.seed, **self._how)
        pools = {"windows": text.windows, "selection": text.selection}
        self.steps.save(CALIBRATION_STEP, pools, {"source": text.source, "sha256": text.sha256, "seed": text.seed})
        return text

    def _with_text_to_learn_from(self, text: Calibration) -> Calibration:
        """With what is missing of it, once what was left of the files and their calibration windows have been read."""
        own, tokens = text.recovery, self.learned.tokens
        missing = tokens if own is None else tokens - own.numel() - text.windows.numel()
        if missing <= 0 or (own is not None and self.learned.again):
            return text
        self.reporter.say(f"the model writes {missing:,} tokens to learn from")
        try:
            written = self._written(missing)
        except UnsupportedError as reason:
            if own is None:
                raise
            self.reporter.warn(f"the files have too little text to learn from, so it will come again: {reason}")
            return text
        return text.with_recovery(written)

    def _written(self, tokens: int) -> torch.Tensor:
        from attnopt.profiles.writing import self_written
        from attnopt.rewriter.weights import evaluate

        def kept(part: int, write: Callable[[], torch.Tensor]) -> torch.Tensor:
            step = f"{RECOVERY_STEP}-{part:04d}"
            if step in self.steps.steps_done():
                return evaluate(self.steps.load(step)[0]["windows"])
            windows = write()
            self.steps.save(step, {"windows": windows}, {})
            return windows

        return self_written(self._writer, tokens, self.calibration.context, self.calibration.seed, kept, **self._how)

    @cached_property
    def _writer(self) -> ModelSource:
        from attnopt.rewriter.source import open_source

        return self.source if self.learned.author is None else open_source(self.learned.author)

    @property
    def _how(self) -> dict[str, Any]:
        gigabytes = self.options.memory_budget
        budget = gigabytes * 1e9 if gigabytes else None
        return {"device": str(self.device), "memory_budget": budget, "reporter": self.reporter}


def describe(calibration: CalibrationOptions, text: Calibration | None) -> dict[str, Any]:
    """The text as plain data. What the model will write is determined by the rest."""
    found: dict[str, Any] = {"source": "self", "tokens": calibration.tokens, "context": calibration.context}
    if text is not None:
        found |= {"source": text.source, "tokens": text.tokens, "sha256": text.sha256}
        if text.recovery is not None:
            found["recovery_tokens"] = text.recovery.numel()
            found["recovery_tokens_written"] = text.recovery_written * text.context
    return found
