"""Starts a measuring process and passes its progress on."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attnopt.errors import AttnoptError
from attnopt.evaluate.job import Job
from attnopt.progress import Reporter, Silent, bar


def evaluate(job: Job, reporter: Reporter | None = None) -> dict[str, Any]:
    """Carry out a job in a fresh Python process; returns its report.

    The report: schema "attnopt.evaluate/1"; `models`, each with the class it was loaded as, its parameters, the cached
    numbers per token counted on the real cache, the error of decoding with it, tokens per second and the sample;
    `texts`, each with the original's perplexity and, per converted model, what `report.compare` gives; if asked for,
    `long_context` (`report.by_position`), `passkey` (`report.retrieval`) and `tasks` (`report.task_scores`); seconds
    and peak resident bytes of the process.

    Raises:
        AttnoptError, RuntimeError: see `in_fresh_process`.
    """
    reporter = reporter or Silent()
    with bar(reporter, "measuring", job.tokens, "tokens") as handle:
        return in_fresh_process("attnopt.evaluate", job.to_json(), lambda n: reporter.advance(handle, n))


def in_fresh_process(module: str, job: Mapping[str, Any], advance: Callable[[int], None]) -> dict[str, Any]:
    """Run `python -m MODULE JOB.json RESULT.json` (see `serve`) and return the result.

    Args:
        module: whose `__main__` serves jobs.
        job: plain data.
        advance: called with the amounts done.

    Raises:
        AttnoptError: what the user can fix (a damaged directory, a text that is too short).
        RuntimeError: the process failed otherwise; the message holds the end of its error output.
    """
    with tempfile.TemporaryDirectory(prefix="attnopt-evaluate-") as folder:
        source, target, errors = (Path(folder) / name for name in ("job.json", "result.json", "stderr"))
        source.write_text(json.dumps(job))
        command = [sys.executable, "-m", module, str(source), str(target)]
        with errors.open("w") as stderr:
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
                try:
                    for line in process.stdout or ():
                        advance(int(json.loads(line)["tokens"]))
                except BaseException:
                    process.kill()
                    raise
            code = process.wait()
        if code == 0:
            result: dict[str, Any] = json.loads(target.read_text())
            return result
        if code == 1 and target.exists():
            told = json.loads(target.read_text())
            raise AttnoptError(told["error"], told["hint"])
        raise RuntimeError(f"the measuring process ended with code {code}:\n{errors.read_text()[-4000:]}")
