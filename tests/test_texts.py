"""What text a run is given: of files, or written, and that once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attnopt.conversion import CalibrationOptions, RunOptions
from attnopt.profiles import writing
from attnopt.profiles.calibration import Calibration, RecoveryText, divide
from attnopt.progress import Silent
from attnopt.rewriter.passes import LearningText
from attnopt.rewriter.steps import MemorySteps, StepStore
from attnopt.texts import RECOVERY_STEP, Author, _window, describe, to_learn_from
from tests.profiles.test_writing import source_of, tiny_llama

CONTEXT = 16


def author(steps: StepStore, again: bool = False) -> Author:
    sizes = CalibrationOptions((), 8 * CONTEXT, CONTEXT, 0)
    source = source_of(tiny_llama(vocab_size=300))
    learned = LearningText(20 * CONTEXT, None, again)
    return Author(source, learned, sizes, RunOptions(), torch.device("cpu"), steps, Silent())


def of_a_file() -> Calibration:
    """Seven windows to calibrate on, one to choose by, and one that is left to learn from."""
    ids = torch.arange(9 * CONTEXT).view(9, CONTEXT)
    text = divide(ids[:8], "file.txt", 0)
    return replace(text, recovery=RecoveryText(ids[8:], text.windows, text.selection))


def test_what_files_lack_is_written_and_all_of_it_without_files() -> None:
    given = of_a_file()
    mixed = author(MemorySteps()).complete(given, True)
    alone = author(MemorySteps()).complete(None, True)
    assert mixed is not None
    assert mixed.recovery is not None
    assert mixed.recovery.written == len(mixed.recovery.windows) - 1 == 20 - 1 - 7
    assert torch.equal(mixed.recovery.windows[:1], torch.arange(8 * CONTEXT, 9 * CONTEXT)[None])
    assert alone is not None
    assert alone.recovery is not None
    assert alone.recovery.written == len(alone.recovery.windows) == 20
    assert len(alone.recovery.windows[:, 0].unique()) > 10
    assert not (alone.recovery.windows[:, None] == alone.windows[None]).all(-1).any()
    assert alone.recovery.selection is alone.selection


def test_the_model_writes_its_share_beside_files(tmp_path: Path) -> None:
    sizes = CalibrationOptions((tmp_path / "a", tmp_path / "b"), 24 * CONTEXT, CONTEXT, 0, own=True)
    assert sizes.of_files(24 * CONTEXT) == 16 * CONTEXT
    assert replace(sizes, own=False).of_files(24 * CONTEXT) == 24 * CONTEXT
    given = of_a_file()
    mixed = replace(author(steps := MemorySteps()), calibration=sizes).complete(given, True)
    assert mixed is not None
    assert mixed.source == "file.txt, self"
    assert mixed.sha256 != given.sha256
    assert (len(mixed.windows), len(mixed.selection)) == (7 + 7, 1 + 1)
    assert torch.equal(mixed.windows[:7], given.windows)
    assert torch.equal(mixed.selection[:1], given.selection)
    assert mixed.recovery is not None
    assert given.recovery is not None
    # 20 are to be learned from, 1 + 7 of the file are there; it also judges as much as the file does.
    assert mixed.recovery.written == 12
    assert torch.equal(mixed.recovery.windows[:1], given.recovery.windows)
    assert mixed.recovery.selection.shape == (2, CONTEXT)
    again = replace(author(steps), calibration=sizes).complete(given, True)
    assert again is not None
    assert again.sha256 == mixed.sha256
    assert again.recovery is not None
    assert torch.equal(again.recovery.windows, mixed.recovery.windows)


def test_the_model_learns_from_its_share_even_if_the_files_have_enough() -> None:
    sizes = CalibrationOptions((Path("file.txt"),), 16 * CONTEXT, CONTEXT, 0, own=True)
    enough = replace(author(MemorySteps()), learned=LearningText(8 * CONTEXT), calibration=sizes)
    mixed = enough.complete(of_a_file(), True)
    assert mixed is not None
    assert mixed.recovery is not None
    assert mixed.recovery.written == 4


def test_longer_windows_are_written_with_others_to_judge_by() -> None:
    learned = LearningText(64 * CONTEXT, window=2 * CONTEXT)
    sizes = CalibrationOptions((), 32 * CONTEXT, CONTEXT, 0)
    text = replace(author(MemorySteps()), learned=learned, calibration=sizes).complete(None, True)
    assert text is not None
    assert text.recovery is not None
    assert text.windows.shape == (28, CONTEXT)
    assert text.recovery.windows.shape == (32, 2 * CONTEXT)
    assert text.recovery.selection.shape == (2, 2 * CONTEXT)
    pools = text.recovery.windows, text.recovery.selection
    assert not (pools[0][:, None] == pools[1][None]).all(-1).any()
    assert describe(sizes, text)["recovery_tokens_written"] == 64 * CONTEXT
    assert describe(sizes, text)["recovery_window"] == 2 * CONTEXT


def test_what_files_lack_is_written_in_windows_of_the_same_length() -> None:
    ids = torch.arange(8 * CONTEXT).view(4, 2 * CONTEXT)
    given = replace(of_a_file(), recovery=RecoveryText(ids[:1], ids[1:3], ids[3:]))
    mixed = author(MemorySteps()).complete(given, True)
    assert mixed is not None
    assert mixed.recovery is not None
    assert mixed.recovery.windows.shape == (1 + 7, 2 * CONTEXT)
    assert mixed.recovery.written == 7
    assert torch.equal(mixed.recovery.selection, ids[3:])


@pytest.mark.parametrize(("asked", "reach", "expected"), [(100, 64, 64), (48, 64, 48), (0, 64, 0)])
def test_windows_are_no_longer_than_the_models_read(asked: int, reach: int, expected: int) -> None:
    long, short = source_of(tiny_llama(vocab_size=300)), source_of(tiny_llama(vocab_size=300))
    short.config.max_position_embeddings = reach
    assert _window(LearningText(1, window=asked), long, short) == expected
    assert _window(LearningText(1, window=asked), short, long) == expected


def test_enough_text_stays_as_it_is() -> None:
    given = of_a_file()
    enough = replace(author(MemorySteps()), learned=LearningText(8 * CONTEXT))
    assert enough.complete(given, True) is given


def test_files_are_read_again_if_that_is_asked_for_and_without_files_there_is_nothing_to_read() -> None:
    given = of_a_file()
    assert author(MemorySteps(), again=True).complete(given, True) is given
    alone = author(MemorySteps(), again=True).complete(None, True)
    assert alone is not None
    assert alone.recovery is not None
    assert alone.recovery.written == 20


class Asks:
    """A pass, as far as its text goes."""

    def __init__(self, text: LearningText) -> None:
        self.learns_from = text


def test_the_pass_that_learns_from_most_says_what_text() -> None:
    most, less, nothing = LearningText(9, "a"), LearningText(5, "b", True), LearningText()
    passes: Any = [Asks(nothing), Asks(less), Asks(most)]
    assert to_learn_from(passes) == most
    assert to_learn_from([]) == nothing


def test_what_is_written_side_by_side_is_kept_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is cut off writes no more than that again, however long the windows are."""
    whole = author(steps := MemorySteps()).complete(None, True)
    itemsize = writing.sampling_dtype("cpu").itemsize
    monkeypatch.setattr(writing, "SAMPLING_CACHE_BYTES", 8 * CONTEXT * itemsize * 2 * 2 * 2 * 8)
    assert writing.sampling_batch(tiny_llama().config, CONTEXT, itemsize) == 8
    parts = author(few := MemorySteps()).complete(None, True)
    assert [len(text.recovery.windows) for text in (whole, parts) if text and text.recovery] == [20, 20]
    assert [sum(name.startswith(RECOVERY_STEP) for name in s.steps_done()) for s in (steps, few)] == [1, 3]


@pytest.mark.parametrize("files", [True, False])
def test_text_is_written_once(files: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = MemorySteps()
    given = of_a_file() if files else None
    first = author(steps).complete(given, True)

    def again(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("written again")

    monkeypatch.setattr(writing, "sample", again)
    second = author(steps).complete(given, True)
    assert first is not None
    assert second is not None
    assert first.sha256 == second.sha256
    assert first.recovery is not None
    assert second.recovery is not None
    assert torch.equal(first.recovery.windows, second.recovery.windows)
