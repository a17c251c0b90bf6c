"""The inner end of a measuring process: reads a job, tells progress, writes the result. No torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attnopt.errors import AttnoptError

Progress = Callable[[str, int], None]


def serve(work: Callable[[Mapping[str, Any], Progress], dict[str, Any]], arguments: list[str]) -> int:
    """Carry out the job of `[JOB.json, RESULT.json]` or `[JOB.json]`; returns the exit code.

    Progress goes to stdout as JSON lines. The result goes to RESULT.json, or else to stdout as the last line. Exit code
    1 and {"error": …, "hint": …} in place of the result mean something that the user can fix.

    Args:
        work: makes the result of a job, and calls its second argument with (what, amount done).
        arguments: of the command line.
    """
    source, target = Path(arguments[0]), Path(arguments[1]) if len(arguments) > 1 else None

    def finish(document: dict[str, Any]) -> None:
        text = json.dumps(document)
        if target is None:
            sys.stdout.write(text + "\n")
        else:
            target.write_text(text)

    def progress(what: str, amount: int) -> None:
        sys.stdout.write(json.dumps({"text": what, "tokens": amount}) + "\n")
        sys.stdout.flush()

    try:
        job = json.loads(source.read_text())
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        finish(work(job, progress))
    except AttnoptError as error:
        finish({"error": error.message, "hint": error.hint})
        return 1
    return 0
