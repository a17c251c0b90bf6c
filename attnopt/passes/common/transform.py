"""From new facts of some layers to a finished pass: lower them, repair the program, put the weights in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attnopt.passes.common.heads import with_output_bias
from attnopt.passes.common.lower import lower
from attnopt.passes.common.moments import check_text
from attnopt.passes.common.repair import Settings, put, repair
from attnopt.rewriter.edit import Editor
from attnopt.rewriter.passes import PassContext, PassResult
from attnopt.rewriter.program import Program
from attnopt.rewriter.recognize import Miss
from attnopt.rewriter.site import AttentionSite


def transform(
    program: Program,
    editor: Editor,
    facts: Mapping[str, AttentionSite],
    settings: Settings,
    context: PassContext,
    by: str,
    *,
    misses: Sequence[Miss] = (),
    summary: Mapping[str, Any] | None = None,
    records: Mapping[str, Mapping[str, Any]] | None = None,
) -> PassResult:
    """Finish a pass.

    Args:
        program: before the pass.
        editor: of the program; holds the weights that `facts` name.
        facts: new facts of the layers that change, by fqn.
        settings: of the repair.
        context: what the pass runs in.
        by: text of the pass.
        misses, summary: for the result.
        records: facts about each layer, for the result.

    Raises:
        OptionError: a repair was asked for without calibration text.
    """
    if settings.fill in ("lsq", "mean"):
        facts = {fqn: with_output_bias(editor, site) for fqn, site in facts.items()}
    lower(editor, program, facts)
    after = editor.finish()
    changed = set(editor.changed_sites)
    found: dict[str, dict[str, Any]] = {fqn: {"site": fqn, **(records or {}).get(fqn, {})} for fqn in facts}
    if not settings.idle:
        check_text(program, context, f"the repair of {by.split('{')[0]}")
        with torch.no_grad():
            repaired = repair(program, after, set(facts), settings, context)
        second = Editor(after, by)
        for fqn, weights in repaired.weights.items():
            put(second, after.sites[fqn], weights)
        after = second.finish()
        changed |= set(second.changed_sites)
        for fqn, record in repaired.records.items():
            found.setdefault(fqn, {"site": fqn}).update(record)
    layers = tuple({"layer": site.layer, **found[fqn]} for fqn, site in after.sites.items() if fqn in found)
    return PassResult(
        after, tuple(fqn for fqn in after.sites if fqn in changed), tuple(misses), dict(summary or {}), layers
    )
