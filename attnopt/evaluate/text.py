"""Text to token windows, exactly as the command line's contract says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnopt.errors import AttnoptError
from attnopt.evaluate.job import TextSpec

#: The English text that every CPython ships: the help topics of `help()`.
PYTHON_TOPICS = "pydoc_data.topics"

_MARKS = {" @-@ ": "-", " @,@ ": ",", " @.@ ": "."}


def undo_wikitext_marks(text: str) -> str:
    """Undo the marks WikiText's tokeniser put around hyphens and inside numbers."""
    for mark, original in _MARKS.items():
        text = text.replace(mark, original)
    return text


def write_python_topics(folder: Path) -> Path:
    """Write `PYTHON_TOPICS` into a folder and return the file."""
    from pydoc_data.topics import topics

    path = folder / "topics.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


def read_text(spec: TextSpec) -> str:
    """The chosen part of a file.

    Raises:
        AttnoptError: the file cannot be read, is not UTF-8, or the part is empty.
    """
    try:
        text = Path(spec.file).read_text(encoding="utf-8")
    except OSError as error:
        raise AttnoptError(f"cannot read {spec.file}: {error.strerror}", "give a readable text file") from error
    except UnicodeDecodeError as error:
        raise AttnoptError(f"{spec.file} is not UTF-8 text: {error.reason}", "convert it to UTF-8") from error
    text = text[_line_end(text, spec.start) : _line_end(text, spec.stop)]
    if spec.wikitext:
        text = undo_wikitext_marks(text)
    if not text.strip():
        raise AttnoptError(f"{spec.file} holds no text", "give a file with text")
    return text


def _line_end(text: str, fraction: float) -> int:
    """Position after the line in which the fraction falls; 0 and 1 are the ends of the text."""
    position = round(fraction * len(text))
    if position in (0, len(text)):
        return position
    found = text.find("\n", position)
    return len(text) if found < 0 else found + 1


def windows_of(
    spec: TextSpec, tokenizer: Any, window: int, windows: int | None, option: str = "--window"
) -> list[list[int]]:
    """The first disjoint windows of a text tokenised whole, without special tokens.

    `option` is what the window's length was given with.

    Raises:
        AttnoptError: the text is shorter than one window.
    """
    ids = tokenizer(read_text(spec), add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // window
    if count == 0:
        hint = "give a longer text" + (f" or {option} {len(ids)} or less" if len(ids) > 1 else "")
        raise AttnoptError(f"{spec.file} has {len(ids)} tokens, less than one window of {window}", hint)
    count = min(count, windows) if windows is not None else count
    return [ids[i * window : (i + 1) * window] for i in range(count)]
