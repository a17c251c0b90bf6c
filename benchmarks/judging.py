"""What the benchmarks of conversions share: the text's halves, conversions that are kept, and the judging of models."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

#: WikiText's marks for characters that were split off.
MARKS = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
#: Options that a quality depends on.
SETTINGS = ("calib_tokens", "context", "window", "windows", "seed")


def parser(text: str | None, context: int = 1024) -> argparse.ArgumentParser:
    """A parser with the options that all have.

    Args:
        text: the benchmark's description.
        context: of the calibration windows, if not given.
    """
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("model", help="model directory or .gguf file")
    found.add_argument("--text", type=Path, required=True, help="a WikiText file with its marks")
    found.add_argument("--calib-tokens", type=int, default=65536)
    found.add_argument("--context", type=int, default=context, help="tokens in a calibration window")
    found.add_argument("--window", type=int, default=1024, help="tokens in a window that is judged")
    found.add_argument("--windows", type=int, default=16, help="that are judged")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--work", type=Path, help="directory in which to keep conversions, and to find them")
    return found


def add_only(parser: argparse.ArgumentParser) -> None:
    """Add `--only` to a parser."""
    parser.add_argument("--only", action="append", help="rows of this name, or matching this pattern; repeatable")


def asked_for(arguments: argparse.Namespace, row: str) -> bool:
    """True if `--only` names the row, or is not given."""
    return not arguments.only or any(fnmatchcase(row, pattern) for pattern in arguments.only)


@contextmanager
def folder_of(arguments: argparse.Namespace) -> Iterator[Path]:
    """Where conversions go: what `--work` says, or a directory that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="attnopt-benchmark-") as name:
        folder: Path = arguments.work or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def plain(text: str) -> str:
    """WikiText without its marks."""
    for mark, character in MARKS:
        text = text.replace(mark, character)
    return text


def first_half(text: Path, folder: Path) -> Path:
    """The first half of a WikiText file, cut at a line's end, marks undone."""
    content = text.read_text(encoding="utf-8")
    path = folder / "calibration.txt"
    path.write_text(plain(content[: content.index("\n", len(content) // 2) + 1]), encoding="utf-8")
    return path


def calibration(arguments: argparse.Namespace, text: Path, calib: str = "text", beside: Sequence[Path] = ()) -> Any:
    """Calibration options: "text" is the text given, "self" what the model writes, "both" half of each.

    Args:
        arguments: of the benchmark.
        text: the half that is not judged on.
        calib: which text.
        beside: more files, of which each gives as much as any other text.
    """
    from attnopt.conversion import CalibrationOptions

    given = {"text": [text], "self": ["self"], "both": [text, "self"]}[calib]
    texts = [str(each) for each in (*given, *beside)]
    return CalibrationOptions.parse(texts, arguments.calib_tokens, arguments.context, arguments.seed)


def kept_row(
    arguments: argparse.Namespace, out: Path, make: Callable[[Path], dict[str, Any]], **more: Any
) -> dict[str, Any]:
    """The row of a conversion: kept from an earlier run with the same settings, or made now; it goes to stderr.

    Args:
        arguments: of the benchmark.
        out: directory of the conversion.
        make: makes it, and gives its row.
        more: settings beside the benchmark's.
    """
    settings = {n: getattr(arguments, n) for n in ("model", "calib_tokens", "context", "seed")} | more
    note = out.parent / f"{out.name}.json"
    if note.exists() and out.exists():
        kept: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        if kept["settings"] == json.loads(json.dumps(settings)):
            return dict(kept["row"])
    row = make(out)
    note.write_text(json.dumps({"settings": settings, "row": row}), encoding="utf-8")
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def models_of(arguments: argparse.Namespace, outs: list[Path]) -> tuple[Any, ...]:
    """The original, and the directories made from it under their names."""
    from attnopt.evaluate import ModelSpec

    return (ModelSpec("original", arguments.model), *(ModelSpec(out.name, str(out)) for out in outs))


def judged(
    arguments: argparse.Namespace, rows: list[dict[str, Any]], outs: list[Path], own_text: Path | None = None
) -> list[dict[str, Any]]:
    """Rows with the quality of their directories, the original beside, on the second half of the text.

    Args:
        arguments: of the benchmark.
        rows, outs: of the conversions.
        own_text: text that the original wrote, to judge by as well (`own_text` of the rows).
    """
    from attnopt.evaluate import Job, TextSpec, evaluate

    own = () if own_text is None else (TextSpec(str(own_text)),)
    job = Job(
        models=models_of(arguments, outs),
        texts=(TextSpec(str(arguments.text), wikitext=True, start=0.5), *own),
        window=arguments.window,
        windows=arguments.windows,
        sample_tokens=1,
    )
    text, *others = evaluate(job)["texts"]
    result = []
    for row, out in zip(rows, outs, strict=True):
        more = {"own_text": quality(others[0], out.name)} if others else {}
        result.append({**row, **quality(text, out.name), **more})
    return result


def quality(text: dict[str, Any], name: str) -> dict[str, Any]:
    """One model's figures on a text of an evaluation."""
    found = text["converted"][name]
    figures = {key: found[key] for key in ("perplexity", "ln_ratio", "kl", "top1_agreement")}
    return {**figures, "standard_error": found["standard_error"]["paired_difference"], "windows": text["windows"]}


def document(name: str, arguments: argparse.Namespace, rows: list[dict[str, Any]], **more: Any) -> str:
    """What a benchmark prints."""
    settings = {key: getattr(arguments, key) for key in SETTINGS}
    head = {"schema": f"attnopt.{name}/1", "model": arguments.model, **settings, **more}
    return json.dumps({**head, "rows": rows}, indent=2)
