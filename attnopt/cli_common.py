"""Options that several verbs of the command line have: types only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a Hugging Face model directory, a .gguf file or a hub id")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout and nothing else there")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="say nothing but the result, warnings and errors")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="show the libraries' warnings, and tracebacks")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run Python code that the model directory brings")]

Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="OUT", help="directory to write")]
Calib = Annotated[
    list[str] | None,
    typer.Option(
        "--calib",
        metavar="self|FILE",
        help="text to calibrate on (image models: pictures), may be repeated; 'self' lets the model write it, or some",
        show_default="self",
    ),
]
CalibTokens = Annotated[int, typer.Option("--calib-tokens", help="how much calibration text, in tokens")]
Context = Annotated[int, typer.Option("--context", help="length of a calibration window")]
Seed = Annotated[int, typer.Option("--seed", help="of everything random")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda[:N]")]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="type of the written weights: auto (the source's), float32, bfloat16, ..."),
]
Budget = Annotated[
    float | None,
    typer.Option("--memory-budget", metavar="GB", help="refuse what would need more memory"),
]
Resume = Annotated[bool, typer.Option("--resume", help="go on with an unfinished run")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an existing output")]
CheckEach = Annotated[bool, typer.Option("--check-each", help="compare the logits before and after every pass")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print what would be done, without reading weights")]


def example(*lines: str) -> str:
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)
