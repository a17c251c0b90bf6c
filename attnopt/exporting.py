"""The work behind `export`: open, capture, lower for a target, check what was written, move it into place."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.conversion import open_and_capture
from attnopt.errors import OptionError
from attnopt.progress import Reporter
from attnopt.results import equal_runs

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnopt.codegen.artefact import Exported
    from attnopt.codegen.target import Target
    from attnopt.rewriter.program import Program

#: What `--format` takes, and the target each is written for by default.
FORMATS = {"onnx": "cpu", "triton": "sm_90"}


@dataclass(frozen=True)
class Export:
    """A model lowered for a target.

    Attributes:
        output: the directory written.
        format, target: what it was lowered to.
        model_type: architecture of the source.
        sites: per attention layer what became of it: "form", or "refused" with the reason; JSON values.
        cached_numbers_per_token: what the exported decoder keeps; 0 for encoders.
        files: names of the files written.
        checks: figures of the check of the saved files.
        bytes: size of the directory.
        notes: what a user should know.
        seconds: from start to finish.
    """

    output: str
    format: str
    target: str
    model_type: str
    sites: tuple[Mapping[str, Any], ...]
    cached_numbers_per_token: int
    files: tuple[str, ...]
    checks: Mapping[str, float]
    bytes: int
    notes: tuple[str, ...]
    seconds: float

    exit_code = 0

    def to_json(self) -> dict[str, Any]:
        """The document `attnopt.export/1`."""
        return {
            "schema": "attnopt.export/1",
            "output": self.output,
            "format": self.format,
            "target": self.target,
            "model_type": self.model_type,
            "sites": [dict(site) for site in self.sites],
            "refused": [dict(site) for site in self.sites if "refused" in site],
            "cached_numbers_per_token": self.cached_numbers_per_token,
            "files": list(self.files),
            "checks": dict(self.checks),
            "bytes": self.bytes,
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def view(self, *, quiet: bool) -> RenderableType:
        """What each layer became, and how far the saved files are from the model; only the output path if quiet."""
        from rich.console import Group

        from attnopt.render import gigabytes, table

        if quiet:
            return self.output
        facts = [[str(s["kind"]), str(s.get("form", "not lowered")), str(s.get("refused", ""))] for s in self.sites]
        rows = []
        for first, last in equal_runs(facts):
            numbers = [str(self.sites[i]["layer"]) for i in (first, last)]
            rows.append([numbers[0] if first == last else "-".join(numbers), *facts[first]])
        checks = ", ".join(f"{name} {value:.1e}" for name, value in self.checks.items())
        lines = [f"checked from the saved files, relative error: {checks}", *self.notes]
        if self.cached_numbers_per_token:
            lines.insert(0, f"{self.cached_numbers_per_token:,} cached numbers per token")
        lines.append(f"written in {self.seconds:.0f} s, {gigabytes(self.bytes)}: {self.output}")
        title = f"{self.model_type} as {self.format} for {self.target}"
        return Group(table(title, ("layers", "kind", "form", "reason"), rows), "\n".join(lines))


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        format: "onnx" or "triton".
        target: name of a target, or None for the format's default.
        attention: form of attention in ONNX: "auto", "matmul" or "operator".
        dtype: element type of a Triton package's weights and cache.
        overwrite: replace an existing output.
        trust_remote_code: run Python code that the model directory brings.
    """

    format: str
    target: str | None = None
    attention: str = "auto"
    dtype: str = "auto"
    overwrite: bool = False
    trust_remote_code: bool = False


def export_model(model: str | Path, output: Path, options: ExportOptions, reporter: Reporter) -> Export:
    """Lower a model for a target and write the result as a directory."""
    if options.format not in FORMATS:
        raise OptionError(f"there is no format {options.format!r}", f"give one of {', '.join(FORMATS)}")
    from attnopt.artifact import write_json, writing
    from attnopt.codegen.artefact import card, manifest, site_records
    from attnopt.codegen.target import find_target
    from attnopt.files import write_text
    from attnopt.staging import MANIFEST_NAME, Staging, resume_key

    started = time.perf_counter()
    target = find_target(options.target or FORMATS[options.format])
    source, program = open_and_capture(model, options.trust_remote_code, reporter)
    settings: dict[str, Any] = {"format": options.format, "target": target.name}
    settings |= {"attention": options.attention} if options.format == "onnx" else {"dtype": options.dtype}
    key = resume_key(source.identity, "export", settings)
    paths = [source.path, *([Path(model)] if Path(model).exists() else [])]
    with Staging(output, key=key, overwrite=options.overwrite, sources=paths) as staging:
        exported = _emit(program, staging.path, target, options, reporter)
        write_json(staging.path / "config.json", program.config)
        with writing(staging.path):
            side = source.copy_side_files(staging.path)
            write_text(staging.path / "README.md", card(program, exported, source.identity))
        write_json(staging.path / MANIFEST_NAME, manifest(program, exported, source.identity, settings))
        staging.finish()
    return Export(
        output=str(output),
        format=options.format,
        target=target.name,
        model_type=program.model_type,
        sites=tuple(site_records(program, exported.verdicts)),
        cached_numbers_per_token=exported.cached_numbers_per_token,
        files=(*exported.files, "config.json", *side),
        checks=dict(exported.checks),
        bytes=sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
        notes=exported.notes,
        seconds=time.perf_counter() - started,
    )


def _emit(program: Program, directory: Path, target: Target, options: ExportOptions, reporter: Reporter) -> Exported:
    if options.format == "triton":
        from attnopt.codegen.triton.emit import emit_triton

        return emit_triton(program, directory, target, options.dtype, reporter)
    from attnopt.codegen.onnx.emit import emit_onnx

    return emit_onnx(program, directory, target, options.attention, reporter)
