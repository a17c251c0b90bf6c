"""`python -m attnopt.evaluate JOB.json [RESULT.json]`: carry out a job in this process, see `serve`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from attnopt.evaluate.job import Job
from attnopt.evaluate.serve import Progress, serve


def _work(document: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    job = Job.from_json(document)
    from attnopt.evaluate.measure import run

    return run(job, progress)


def main(arguments: list[str]) -> int:
    """Run the job named on the command line; returns the exit code."""
    return serve(_work, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
