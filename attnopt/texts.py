"""The text of a conversion: from files, or written by the model and kept in the staging directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from attnopt.errors import UnsupportedError
from attnopt.progress import Reporter

if TYPE_CHECKING:
    import torch

    from attnopt.conversion import CalibrationOptions, RunOptions
    from attnopt.profiles.calibration import Calibration, RecoveryText
    from attnopt.rewriter.passes import LearningText, Pass
    from attnopt.rewriter.source import ModelSource
    from attnopt.rewriter.steps import StepStore

#: Names under which text that the model wrote is kept in the staging directory, so that it need not write it again.
CALIBRATION_STEP, RECOVERY_STEP = "calibration", "recovery-text"


def to_learn_from(passes: Sequence[Pass]) -> LearningText:
    """The text that passes learn from: they share it, so it is what the one that asks for most says."""
    from attnopt.rewriter.passes import LearningText

    return max((item.learns_from for item in passes), key=lambda text: text.tokens, default=LearningText())


def from_files(source: ModelSource, calibration: CalibrationOptions, learned: LearningText) -> Calibration:
    """Text of the files given, as much as is theirs if the model writes, too.

    Args:
        source: whose tokenizer is used.
        calibration: the files, and how much of them.
        learned: text to learn from, beside the calibration text.
    """
    from attnopt.profiles.calibration import from_files

    calibration.check_shares()
    return from_files(
        source.tokenizer(), calibration.files, calibration.of_files(calibration.tokens), calibration.context,
        calibration.seed, calibration.of_files(learned.tokens), _window(learned, source, _author(source, learned)),
    )  # fmt: skip


def _window(learned: LearningText, source: ModelSource, author: ModelSource) -> int:
    """Tokens in a window to learn from: what was asked for, as far as both models read."""
    window = learned.window
    for model in (source, author):
        if not model.model_class.can_generate():
            return 0  # encoders cannot use all of `max_position_embeddings`; they learn in calibration windows
        reach = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        window = min(window, reach) if isinstance(reach, int) else window
    return window


def _author(source: ModelSource, learned: LearningText) -> ModelSource:
    """The model that writes."""
    from attnopt.rewriter.source import open_source

    return source if learned.author is None else open_source(learned.author)


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
        from attnopt.profiles.calibration import together

        if text is None:
            text = self._calibration() if needed else None
        elif needed and self.calibration.own:
            text = together(text, self._calibration())
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
        tokens = wanted.of_model(wanted.tokens)
        self.reporter.say(f"the model writes {tokens:,} tokens of calibration text")
        text = self_sampled(self._writer, tokens, wanted.context, wanted.seed, **self._how)
        pools = {"windows": text.windows, "selection": text.selection}
        self.steps.save(CALIBRATION_STEP, pools, {"source": text.source, "sha256": text.sha256, "seed": text.seed})
        return text

    def _with_text_to_learn_from(self, text: Calibration) -> Calibration:
        """With what is missing of it, once what was left of the files and their calibration windows have been read.

        Where the model writes beside the files, at least its share.
        """
        there, tokens = text.recovery, self.learned.tokens
        missing = tokens if there is None else tokens - there.windows.numel() - there.seen.numel()
        missing = max(missing, self.calibration.of_model(tokens)) if self.calibration.own else missing
        if missing <= 0 or (there is not None and self.learned.again):
            return text
        self.reporter.say(f"the model writes {missing:,} tokens to learn from")
        try:
            if there is None:
                return replace(text, recovery=self._all_written(text, missing))
            # Where the model is to serve its own text as well, that judges, too: as much of it as of the files.
            held_out = len(there.selection) if self.calibration.own else 0
            written = self._written(missing + held_out * there.window, there.window)
            return replace(text, recovery=there.with_written(written, held_out))
        except UnsupportedError as reason:
            if there is None:
                raise
            self.reporter.warn(f"the files have too little text to learn from, so it will come again: {reason}")
            return text

    def _all_written(self, text: Calibration, tokens: int) -> RecoveryText:
        """Text to learn from where there are no files, with some more to judge by if its windows are longer."""
        from attnopt.profiles.calibration import SELECTION_EVERY, RecoveryText, joined_windows

        joined = joined_windows(text.context, _window(self.learned, self.source, self._writer), tokens, text.tokens)
        length = joined * text.context
        seen = text.windows.new_empty(0, length)
        if joined == 1:
            windows = self._written(tokens, length)
            return RecoveryText(windows, seen, text.selection, len(windows))
        held_out = max(1, min(text.selection.numel(), tokens // SELECTION_EVERY) // length)
        windows = self._written(tokens + held_out * length, length)
        return RecoveryText(windows[:-held_out], seen, windows[-held_out:], len(windows) - held_out)

    def _written(self, tokens: int, window: int) -> torch.Tensor:
        from attnopt.profiles.writing import self_written
        from attnopt.rewriter.weights import evaluate

        def kept(part: int, write: Callable[[], torch.Tensor]) -> torch.Tensor:
            step = f"{RECOVERY_STEP}-{part:04d}"
            if step in self.steps.steps_done():
                return evaluate(self.steps.load(step)[0]["windows"])
            windows = write()
            self.steps.save(step, {"windows": windows}, {})
            return windows

        return self_written(self._writer, tokens, window, self.calibration.seed, kept, **self._how)

    @cached_property
    def _writer(self) -> ModelSource:
        return _author(self.source, self.learned)

    @property
    def _how(self) -> dict[str, Any]:
        gigabytes = self.options.memory_budget
        budget = gigabytes * 1e9 if gigabytes else None
        return {"device": str(self.device), "memory_budget": budget, "reporter": self.reporter}


def describe(calibration: CalibrationOptions, text: Calibration | None) -> dict[str, Any]:
    """The text as plain data. What the model will write is determined by the rest."""
    found: dict[str, Any] = {"source": "self", "tokens": calibration.tokens, "context": calibration.context}
    if calibration.own:
        found["own"] = True
    if text is not None:
        found |= {"source": text.source, "tokens": text.tokens, "sha256": text.sha256}
        if text.recovery is not None:
            found["recovery_tokens"] = text.recovery.windows.numel()
            found["recovery_tokens_written"] = text.recovery.written * text.recovery.window
            found["recovery_window"] = text.recovery.window
    return found
