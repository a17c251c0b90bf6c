"""Options of conversions on the command line: types only."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Recover(StrEnum):
    """What is done after the closed form."""

    none = "none"
    refit = "refit"
    distill = "distill"


class SizesOf(StrEnum):
    """How the layers share what they may cache."""

    equal = "equal"
    measured = "measured"


class Emit(StrEnum):
    """The class the result is written for."""

    auto = "auto"
    deepseek_v3 = "deepseek_v3"
    source = "source"
    attnopt = "attnopt"


class Format(StrEnum):
    """What a model is lowered to."""

    onnx = "onnx"
    triton = "triton"


class Attention(StrEnum):
    """How ONNX computes attention."""

    auto = "auto"
    matmul = "matmul"
    operator = "operator"


class Edge(StrEnum):
    """What a layer reads of an earlier one."""

    map = "map"
    kv = "kv"


class Unit(StrEnum):
    """What is removed or switched as a whole."""

    kv_group = "kv-group"
    head = "head"


class Routing(StrEnum):
    """What scores the heads."""

    linear = "linear"
    qnorm = "qnorm"


class Gating(StrEnum):
    """How much a head that works counts."""

    binary = "binary"
    weighted = "weighted"


class Grouping(StrEnum):
    """How many heads each group keeps."""

    even = "even"
    free = "free"


class Filling(StrEnum):
    """What makes up for what goes."""

    lsq = "lsq"
    lsq_nobias = "lsq-nobias"
    mean = "mean"
    none = "none"


EmitAs = Annotated[
    Emit,
    typer.Option(
        "--emit",
        help="write for stock transformers (deepseek_v3, or the source's class), for attnopt's class, or choose",
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        metavar="auto|SPEC|uniform|free",
        help='share: layers that read another\'s, e.g. "7,8,25-28"; prune: as many units in each layer, or not',
    ),
]
Fraction = Annotated[float | None, typer.Option(help="share: fraction of the layers that read another's")]
EdgeKind = Annotated[Edge | None, typer.Option(help="share: the attention map, or keys and values")]
Active = Annotated[float | None, typer.Option(help="moh: fraction of the heads that work on a token")]
SharedHeads = Annotated[
    str | None, typer.Option("--shared-heads", metavar="auto|N", help="moh: heads that always work")
]
Router = Annotated[Routing | None, typer.Option(help="moh: what scores the heads")]
Gate = Annotated[Gating | None, typer.Option(help="moh: weighted gates are trained by --recover refit")]
KeepHeads = Annotated[float | None, typer.Option("--keep-heads", help="prune: fraction of the heads or groups to keep")]
UnitKind = Annotated[Unit | None, typer.Option(help="prune, moh: key/value groups or query heads")]
Groups = Annotated[Grouping | None, typer.Option(help="prune: as many heads in each group, or any")]
Importance = Annotated[
    str | None, typer.Option(metavar="METRIC", help="prune, moh: measured here, or a metric of the profile")
]
Fill = Annotated[Filling | None, typer.Option(help="share, moh, prune: what makes up for the loss")]
Sparsity = Annotated[float | None, typer.Option(help="dimap: fraction to remove")]
Structured = Annotated[bool, typer.Option("--structured", help="dimap: remove heads and channels, not single weights")]

Measure = Annotated[
    bool, typer.Option("--measure", help="with --dry-run: read weights and text, so that every choice is printed")
]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="do what a plan says; --dry-run --json prints one to edit"),
]
ProfileDir = Annotated[
    Path | None, typer.Option("--profile", metavar="DIR", help="what attnopt profile measured, for passes that read it")
]
