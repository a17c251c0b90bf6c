"""Starts the measuring process and passes its progress on."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from attnopt.errors import AttnoptError
from attnopt.evaluate.job import Job
from attnopt.progress import Reporter, Silent, bar


def evaluate(job: Job, reporter: Reporter | None = None) -> dict[str, Any]:
    """Carry out a job in a fresh Python process; returns its report.

    The report: schema "attnopt.evaluate/1"; `models`, each with the class it was loaded as, its parameters, the cached
    numbers per token counted on the real cache, the error of decoding with it, tokens per second and the sample;
    `texts`, each with the original's perplexity and, per converted model, what `report.compare` gives; seconds and peak
    resident bytes of the process.

    Raises:
        AttnoptError: what the user can fix (a damaged directory, a text that is too short).
        RuntimeError: the process failed otherwise; the message holds the end of its error output.
    """
    reporter = reporter or Silent()
    with tempfile.TemporaryDirectory(prefix="attnopt-evaluate-") as folder:
        source, target, errors = (Path(folder) / name for name in ("job.json", "result.json", "stderr"))
        source.write_text(json.dumps(job.to_json()))
        command = [sys.executable, "-m", "attnopt.evaluate", str(source), str(target)]
        per_text = (job.windows or 0) * job.window * len(job.models)
        with errors.open("w") as stderr, bar(reporter, "measuring", per_text * len(job.texts), "tokens") as handle:
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
                try:
                    for line in process.stdout or ():
                        reporter.advance(handle, int(json.loads(line)["tokens"]))
                except BaseException:
                    process.kill()
                    raise
            code = process.wait()
        if code == 0:
            return json.loads(target.read_text())
        if code == 1 and target.exists():
            told = json.loads(target.read_text())
            raise AttnoptError(told["error"], told["hint"])
        raise RuntimeError(f"the measuring process ended with code {code}:\n{errors.read_text()[-4000:]}")
