"""`python -m attnopt.evaluate JOB.json [RESULT.json]`: carry out a job in this process.

Progress goes to stdout as JSON lines. The report goes to RESULT.json, or else to stdout as the last line. Exit code 1
and {"error": …, "hint": …} in place of the report mean something that the user can fix.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from attnopt.errors import AttnoptError
from attnopt.evaluate.job import Job


def main(arguments: list[str]) -> int:
    """Run the job named on the command line; returns the exit code."""
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
        job = Job.from_json(json.loads(source.read_text()))
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        from attnopt.evaluate.measure import run

        finish(run(job, progress))
    except AttnoptError as error:
        finish({"error": error.message, "hint": error.hint})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
