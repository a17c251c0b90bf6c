"""One function per verb. Each returns a result from `attnopt.results` and raises `AttnoptError` for what a user can fix.

Nothing heavy is imported until a function is called.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.errors import AttnoptError, OptionError
from attnopt.progress import Reporter, Silent
from attnopt.results import Conversion, Inspection, PassList, PlanPreview, Verification

if TYPE_CHECKING:
    from attnopt.rewriter.program import Program
    from attnopt.rewriter.source import ModelSource

#: The English text that every CPython ships: the help topics of `help()`.
PYTHON_TOPICS = "pydoc_data.topics"


def inspect(model: str | Path, *, trust_remote_code: bool = False, reporter: Reporter | None = None) -> Inspection:
    """Find the attention layers of a model. Weights are not read.

    Args:
        model: a Hugging Face model directory, a `.gguf` file or a hub id.
        trust_remote_code: run Python code that the directory brings.
        reporter: told what goes on.

    Raises:
        SourceError: the model cannot be read.
        UnsupportedError: one of its attention layers cannot be represented.
    """
    source, program = _open(model, trust_remote_code, reporter or Silent())
    return Inspection(
        model=source.name,
        model_type=program.model_type,
        parameters=program.parameters,
        sites=program.site_list,
        identity=source.identity,
    )


def _open(model: str | Path, trust_remote_code: bool, reporter: Reporter) -> tuple[ModelSource, Program]:
    from attnopt.rewriter.capture import capture
    from attnopt.rewriter.source import open_source

    reporter.say(f"opening {model}")
    source = open_source(model, trust_remote_code=trust_remote_code)
    for warning in source.warnings:
        reporter.warn(warning)
    reporter.say("capturing the graph")
    return source, capture(source)


def verify(
    output: str | Path,
    *,
    against: str | Path | None = None,
    texts: Sequence[str | Path] = (),
    window: int = 1024,
    windows: int = 16,
    wikitext: bool = False,
    gate: float | None = None,
    prompt: str | None = None,
    sample_tokens: int = 40,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> Verification:
    """Reload a written model in a fresh process through its stock runtime and compare it with the original.

    Args:
        output: the directory written.
        against: the original; by default the one its manifest names.
        texts: held-out text files; by default the English text that Python ships.
        window: tokens in a window, of which window - 1 are predicted.
        windows: at most this many windows per text.
        wikitext: undo WikiText's marks in the texts.
        gate: largest allowed ratio of perplexities; the result's exit code is 3 if it is missed.
        prompt: text that both models continue greedily, or None.
        sample_tokens: how far they continue it.
        trust_remote_code: run Python code that the directories bring.
        reporter: told of the tokens measured.

    Raises:
        AttnoptError: a model or text cannot be read, or the text is too short.
    """
    from attnopt.evaluate import Job, ModelSpec, TextSpec, evaluate, verify_report

    if not Path(output).is_dir():
        raise AttnoptError(f"{output} is not a directory", "give the directory that attnopt convert wrote")
    original = str(against) if against is not None else _original_of(Path(output))
    with tempfile.TemporaryDirectory(prefix="attnopt-verify-") as folder:
        files = [str(text) for text in texts] or [str(_python_topics(Path(folder)))]
        job = Job(
            models=(
                ModelSpec("original", original, trust_remote_code),
                ModelSpec("converted", str(output), trust_remote_code),
            ),
            texts=tuple(TextSpec(file, wikitext=wikitext) for file in files),
            window=window,
            windows=windows,
            prompt=prompt,
            sample_tokens=sample_tokens,
        )
        document = verify_report(evaluate(job, reporter), gate)
    if not texts:
        document["texts"][0]["file"] = PYTHON_TOPICS
    return Verification(document)


def _python_topics(folder: Path) -> Path:
    from pydoc_data.topics import topics

    path = folder / "topics.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


def _original_of(output: Path) -> str:
    from attnopt.staging import MANIFEST_NAME

    raise OptionError(
        f"{output / MANIFEST_NAME} does not say what it was made from", "name the original with --against"
    )
