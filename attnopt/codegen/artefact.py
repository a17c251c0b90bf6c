"""What a lane of `attnopt export` returns, and what goes into the manifest of its directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import attnopt
from attnopt.codegen.decoding import CacheTensor
from attnopt.codegen.target import Claim, Target, Verdict
from attnopt.rewriter.program import Program


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        format: "onnx" or "triton".
        target: for which machine.
        verdicts: claim or refusal of every site, in layer order.
        cache: cached tensors.
        files: names of the files written.
        checks: figures of the verification, by name; every one is below its bound.
        details: more for the manifest, plain data.
        notes: what a user should know.
        usage: Markdown that says how to run it.
    """

    format: str
    target: Target
    verdicts: tuple[Verdict, ...]
    cache: tuple[CacheTensor, ...]
    files: tuple[str, ...]
    checks: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    usage: str = ""

    @property
    def cached_numbers_per_token(self) -> int:
        """Numbers kept per token, all layers."""
        return sum(tensor.numbers_per_token for tensor in self.cache)


def site_records(program: Program, verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """A record per site: what it is and what became of it."""
    records = []
    for site, verdict in zip(program.site_list, verdicts, strict=True):
        record: dict[str, Any] = {"fqn": site.fqn, "layer": site.layer, "kind": site.kind}
        if isinstance(verdict, Claim):
            record |= {"form": verdict.form, **({"note": verdict.note} if verdict.note else {})}
        else:
            record["refused"] = verdict.reason
        records.append(record)
    return records


def cache_records(cache: Sequence[CacheTensor], dtype: str) -> list[dict[str, Any]]:
    """A record per cached tensor: names, shape with the dynamic dimensions as words, type."""
    return [
        {
            "site": tensor.site,
            "entry": tensor.entry,
            "past": tensor.past,
            "present": tensor.present,
            "shape": ["batch", tensor.heads, "capacity", tensor.width]
            if tensor.heads
            else ["batch", "capacity", tensor.width],
            "dtype": dtype,
        }
        for tensor in cache
    ]


def manifest(
    program: Program, exported: Exported, source: Mapping[str, str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The document `attnopt.json` of an exported directory. Equal runs give equal documents, but for `checks`."""
    return {
        "schema": "attnopt.artefact/1",
        "attnopt_version": attnopt.__version__,
        "format": exported.format,
        "target": exported.target.name,
        "source": dict(source),
        "model_type": program.model_type,
        "options": dict(options),
        "pipeline": [entry.text for entry in program.history],
        "sites": site_records(program, exported.verdicts),
        "cache": cache_records(exported.cache, exported.details.get("cache_dtype", "float32")),
        "cached_numbers_per_token": exported.cached_numbers_per_token,
        "checks": dict(exported.checks),
        **exported.details,
    }


def card(program: Program, exported: Exported, source: Mapping[str, str]) -> str:
    """The README.md of an exported directory."""
    forms: dict[str, int] = {}
    for verdict in exported.verdicts:
        key = verdict.form if isinstance(verdict, Claim) else f"not lowered: {verdict.reason}"
        forms[key] = forms.get(key, 0) + 1
    lines = [
        f"# {source.get('name', 'model')} as {exported.format} for {exported.target.name}",
        "",
        f"Written by attnopt {attnopt.__version__} from `{source.get('name', '')}` ({program.model_type}).",
        "",
        "| attention layers | form |",
        "|---|---|",
        *(f"| {count} | {form} |" for form, count in forms.items()),
        "",
        f"Cached numbers per token: {exported.cached_numbers_per_token:,}.",
        "",
        exported.usage,
        "",
        *(f"- {note}" for note in exported.notes),
        "",
        "Checked when it was written: " + ", ".join(f"{k} {v:.2g}" for k, v in exported.checks.items()) + ".",
        "",
    ]
    return "\n".join(lines)
