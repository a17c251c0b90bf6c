"""`python -m attnopt.timing JOB.json [RESULT.json]`: carry out a job in this process, see `evaluate.serve`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from attnopt.evaluate.serve import Progress, serve
from attnopt.timing.job import BenchJob


def _work(document: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    job = BenchJob.from_json(document)
    from attnopt.timing.measure import run

    return run(job, progress)


if __name__ == "__main__":
    sys.exit(serve(_work, sys.argv[1:]))
