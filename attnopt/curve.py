"""The curve of a distillation: what a manifest keeps of it, and a page that shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.files import write_text, writing

if TYPE_CHECKING:
    from attnopt.rewriter.program import HistoryEntry

PAGE = "recovery.html"


def curve_of(history: Sequence[HistoryEntry]) -> dict[str, Any] | None:
    """What the last distillation among the passes did, without what varies from run to run; None without one."""
    found = [entry.summary for entry in history if "curve" in entry.summary]
    if not found:
        return None
    summary = dict(found[-1])
    curve = dict(summary["curve"])
    curve["held_out"] = [point[:2] for point in curve["held_out"]]
    return {**summary, "curve": curve}


def write_curve(directory: Path, recovery: Mapping[str, Any] | None) -> None:
    """Write the page, which asks the network for nothing; nothing if there was no distillation.

    Args:
        directory: where.
        recovery: what `curve_of` returned.

    Raises:
        AttnoptError: if it cannot be written.
    """
    if recovery is not None:
        with writing(directory):
            write_text(directory / PAGE, curve_page([("", recovery["curve"])], "loss in nats per token"))


def curve_page(curves: Sequence[tuple[str, Mapping[str, Any]]], unit: str) -> str:
    """A page with curves.

    Args:
        curves: a name each, "loss" (tokens, value per step; may be left out) and "held_out" (tokens, value per check).
        unit: of the values.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, curve in curves:
        before = f"{name} " if name else ""
        if curve.get("loss"):
            tokens, values = zip(*curve["loss"], strict=True)
            figure.add_scatter(x=tokens, y=values, mode="lines", name=f"{before}training text", opacity=0.5)
        tokens, values = zip(*(point[:2] for point in curve["held_out"]), strict=True)
        figure.add_scatter(x=tokens, y=values, mode="lines+markers", name=f"{before}held-out text")
    figure.update_layout(xaxis_title="tokens learned from", yaxis_title=unit, template="plotly_white")
    # The same file in every run: plotly would make up a name for the element.
    page: str = figure.to_html(include_plotlyjs=True, full_html=True, div_id="curve")
    return page
