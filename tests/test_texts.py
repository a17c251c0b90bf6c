"""What text a run is given: of files, like files, or of any kind; and written once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnopt.conversion import CalibrationOptions, RunOptions
from attnopt.profiles import writing
from attnopt.profiles.calibration import Calibration, divide
from attnopt.progress import Silent
from attnopt.rewriter.steps import MemorySteps, StepStore
from attnopt.texts import Author
from tests.profiles.test_writing import source_of, tiny_llama

CONTEXT = 16


def author(steps: StepStore) -> Author:
    sizes = CalibrationOptions((), 8 * CONTEXT, CONTEXT, 0)
    source = source_of(tiny_llama(vocab_size=300))
    return Author(source, sizes, RunOptions(), torch.device("cpu"), steps, Silent())


def of_a_file() -> Calibration:
    """Eight windows that count up, so that a piece of them is told from other text; one is left to learn from."""
    ids = torch.arange(9 * CONTEXT).view(9, CONTEXT)
    text = divide(ids[:8], "file.txt", 0)
    return text.with_recovery(ids[8:])


def goes_on_from(window: torch.Tensor, text: torch.Tensor) -> bool:
    piece = window[: CONTEXT // writing.PIECE_EVERY]
    places = text.unfold(1, len(piece), 1).flatten(0, 1)
    return bool((places == piece).all(1).any())


def test_what_files_lack_is_written_like_them() -> None:
    given = of_a_file()
    text = author(MemorySteps()).complete(given, True, 20 * CONTEXT)
    assert text is not None
    assert text.recovery is not None
    assert text.recovery_written == 20 - 1 - 7
    assert torch.equal(text.recovery[:1], torch.arange(8 * CONTEXT, 9 * CONTEXT)[None])
    written = text.recovery[1:]
    assert all(goes_on_from(window, text.windows) for window in written)
    assert not any(goes_on_from(window, text.selection) for window in written)


def test_without_files_all_of_it_begins_with_any_word() -> None:
    text = author(MemorySteps()).complete(None, True, 20 * CONTEXT)
    assert text is not None
    assert text.recovery is not None
    assert text.recovery_written == 20
    assert not all(goes_on_from(window, text.windows) for window in text.recovery)
    assert len(text.recovery[:, 0].unique()) > 10


def test_enough_text_stays_as_it_is() -> None:
    given = of_a_file()
    assert author(MemorySteps()).complete(given, True, 8 * CONTEXT) is given


@pytest.mark.parametrize("files", [True, False])
def test_text_is_written_once(files: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = MemorySteps()
    given = of_a_file() if files else None
    first = author(steps).complete(given, True, 20 * CONTEXT)

    def again(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("written again")

    monkeypatch.setattr(writing, "sample", again)
    second = author(steps).complete(given, True, 20 * CONTEXT)
    assert first is not None
    assert second is not None
    assert first.sha256 == second.sha256
    assert first.recovery is not None
    assert second.recovery is not None
    assert torch.equal(first.recovery, second.recovery)
