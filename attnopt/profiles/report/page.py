"""Writing the report: one HTML file with plotly, data, script and style in it. It asks the network for nothing."""

from __future__ import annotations

import html
import json
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path

from attnopt.files import write_text, writing
from attnopt.profiles.profile import Profile
from attnopt.profiles.report.data import report_data
from attnopt.profiles.report.summary import findings

REPORT_NAME = "report.html"


def write_report(profile: Profile, path: Path, *, model: str, methods: Collection[str] | None = None) -> None:
    """Write a profile's report.

    Args:
        profile: the measurements.
        path: the file.
        model: the model's path, for commands.
        methods: methods whose commands may be shown; None for all.

    Raises:
        AttnoptError: if it cannot be written.
    """
    with writing(path):
        write_text(path, render(profile, model=model, methods=methods))


def render(profile: Profile, *, model: str, methods: Collection[str] | None = None) -> str:
    """The page as text. Equal profiles give equal text."""
    from plotly.offline import get_plotlyjs

    parts = {
        "TITLE": html.escape(f"{profile.model.get('name', 'model')}: attention profile"),
        "SUBTITLE": html.escape(_subtitle(profile)),
        "SUMMARY": _summary(profile, model, methods),
        "STYLE": _asset("report.css"),
        "PLOTLY": get_plotlyjs(),
        # A "</script>" inside data would end the script.
        "DATA": json.dumps(report_data(profile), sort_keys=True, separators=(",", ":")).replace("</", "<\\/"),
        "SCRIPT": _asset("report.js"),
    }
    page = _asset("report.html")
    pieces = []
    while "{{" in page:
        before, _, rest = page.partition("{{")
        name, _, page = rest.partition("}}")
        pieces += [before, parts[name]]
    return "".join([*pieces, page])


def _asset(name: str) -> str:
    return (files("attnopt.profiles.report") / "assets" / name).read_text(encoding="utf-8")


def _subtitle(profile: Profile) -> str:
    heads = sum(int(site["heads"]) for site in profile.sites)
    calibration = profile.calibration
    what = f"{calibration['n_prompts']} prompts"
    if calibration.get("tokens"):
        what += f" of {calibration['tokens']:,} tokens in all"
    return f"{len(profile.sites)} attention layers, {heads} heads, measured on {what} ({calibration['source']})"


def _summary(profile: Profile, model: str, methods: Collection[str] | None) -> str:
    items = []
    for finding in findings(profile, model, methods):
        command = f"<pre><code>{html.escape(finding.command)}</code></pre>" if finding.command else ""
        items.append(f"<li>{html.escape(finding.text)}{command}</li>")
    return "\n".join(items)
