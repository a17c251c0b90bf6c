"""Options of the command line that belong to `verify`: types only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Against = Annotated[str | None, typer.Option(metavar="MODEL", help="the original; by default where OUT was made from")]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="held-out text, may be repeated; by default the English text that Python ships (pydoc_data.topics)",
    ),
]
Window = Annotated[int, typer.Option(help="tokens in a window")]
Windows = Annotated[int, typer.Option(help="windows per text")]
Wikitext = Annotated[bool, typer.Option("--wikitext", help="undo the marks of WikiText in the texts")]
LongContext = Annotated[
    int | None,
    typer.Option(metavar="N", help="also perplexity by position, in windows of N tokens of the same texts"),
]
LongWindows = Annotated[int, typer.Option(help="windows of --long-context per text")]
Passkey = Annotated[
    str | None,
    typer.Option(metavar="N,N,...", help="also retrieval of a number told inside texts of so many tokens"),
]
PasskeyTrials = Annotated[int, typer.Option(help="prompts per length and depth; there are five depths")]
LmEval = Annotated[
    str | None,
    typer.Option(metavar="TASKS", help='also tasks of the lm-eval harness; needs pip install "attnopt[lm-eval]"'),
]
LmEvalLimit = Annotated[int | None, typer.Option(help="at most so many examples of each task")]
LmEvalFolder = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="task definitions (YAML) besides those of the harness"),
]
Gate = Annotated[
    float | None,
    typer.Option(metavar="RATIO", help="exit with 3 if a perplexity ratio (of a text, at a position) is above this"),
]
PasskeyGate = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="exit with 3 if less than this share of the original's passkeys is found at a length; "
        "0.95 if there is a --gate",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="of the passkey prompts")]
Dtype = Annotated[str, typer.Option("--dtype", help="type both models compute in")]
