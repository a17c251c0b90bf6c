"""A plan as a file: what every pass of a pipeline does to each layer. Printed, edited, applied and recorded.

    {"schema": "attnopt.plan/1",
     "model": {"name": ..., "config_sha256": ..., "weights_digest": ...},
     "pipeline": "share,prune{keep-heads=0.5}", "seed": 0,
     "sites": {"model.layers.7.self_attn": {"share": {"map_from": ..., "head_map": [...]}, "heads": {"keep": [0, 2]}}}}

A layer that is not named stays as it is. What stands under a name like "heads" is what the pass of that section takes;
heads are named by their numbers in the original model. Other keys that a dry run prints (notes, predictions) are not
read. Anything unknown is refused, and so is the plan of another model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnopt.errors import OptionError
from attnopt.rewriter.passes import Pass, Plan, plain
from attnopt.rewriter.pipeline import Given
from attnopt.rewriter.program import Program

SCHEMA = "attnopt.plan/1"

#: Of a model's identity, what a plan is bound to.
_BOUND = ("config_sha256", "weights_digest")
#: What a dry run adds for people, and a plan file may hold.
_DERIVED = {"notes", "cached_numbers_per_token", "memory_bytes", "complete"}
_KEYS = {"schema", "model", "pipeline", "seed", "sites"}


@dataclass(frozen=True)
class PlanFile:
    """The content of a plan file.

    Attributes:
        model: name and hashes of the model it is for.
        pipeline: text of the passes.
        sites: by fqn, what each section of a pass says.
        seed: of everything random.
    """

    model: Mapping[str, str]
    pipeline: str
    sites: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0

    @classmethod
    def of(cls, identity: Mapping[str, str], pipeline: str, plans: Sequence[tuple[Pass, Plan]], seed: int) -> PlanFile:
        """The plan file of what passes intend or did. If two passes have one section, the later one's stands."""
        sites: dict[str, dict[str, Any]] = {}
        for item, plan in plans:
            for edit in plan.edits:
                sites.setdefault(edit.site, {})[item.section] = plain(edit.edit)
        known = {name: identity[name] for name in ("name", *_BOUND) if name in identity}
        return cls(known, pipeline, sites, seed)

    @classmethod
    def load(cls, path: str | Path) -> PlanFile:
        """Read a plan file.

        Raises:
            OptionError: it cannot be read, is no plan, or says something unknown.
        """
        hint = "attnopt convert ... --dry-run --json prints one"
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OptionError(f"the plan {path} cannot be read: {error}", hint) from error
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise OptionError(f"{path} is no plan of schema {SCHEMA}", hint)
        unknown = sorted(set(content) - _KEYS - _DERIVED)
        missing = sorted({"model", "pipeline", "sites"} - set(content))
        if unknown or missing:
            what = f"has the unknown keys {', '.join(unknown)}" if unknown else f"lacks {', '.join(missing)}"
            raise OptionError(f"the plan {path} {what}", f"its keys are {', '.join(sorted(_KEYS))}")
        shapes = {"model": dict, "pipeline": str, "sites": dict}
        wrong = [name for name, kind in shapes.items() if not isinstance(content[name], kind)]
        wrong += [name for name, site in content["sites"].items() if not isinstance(site, dict)] if not wrong else []
        if wrong or type(content.get("seed", 0)) is not int:
            raise OptionError(f"the plan {path} is malformed at {', '.join(wrong) or 'seed'}", hint)
        return cls(content["model"], content["pipeline"], content["sites"], content.get("seed", 0))

    def to_json(self) -> dict[str, Any]:
        """The document that `load` reads."""
        return {
            "schema": SCHEMA,
            "model": dict(self.model),
            "pipeline": self.pipeline,
            "seed": self.seed,
            "sites": plain(self.sites),
        }

    def given(self, identity: Mapping[str, str], program: Program, passes: Sequence[Pass]) -> Given:
        """What the file says for each pass, checked against the model and the pipeline.

        Args:
            identity: of the model at hand.
            program: captured from it.
            passes: of the pipeline.

        Raises:
            OptionError: another model, an unknown layer or section, or a section that two passes would read.
        """
        other = [name for name in _BOUND if self.model.get(name) != identity.get(name)]
        if other:
            raise OptionError(
                f"the plan was made for another model, {self.model.get('name', 'unknown')}: {', '.join(other)} differ",
                "plan this model with --dry-run",
            )
        sections = [item.section for item in passes]
        twice = sorted({section for section in sections if sections.count(section) > 1})
        if twice:
            raise OptionError(
                f"two passes of the plan's pipeline would read its {twice[0]!r}", "write one of them into the pipeline"
            )
        result: dict[str, dict[str, Any]] = {section: {} for section in sections}
        for fqn, site in self.sites.items():
            if fqn not in program.sites:
                raise OptionError(f"the plan names {fqn!r}, which is no attention layer of this model")
            for section, edit in site.items():
                if section not in result:
                    raise OptionError(
                        f"the plan's {section!r} of {fqn} belongs to no pass of its pipeline",
                        f"the pipeline {self.pipeline} has the sections {', '.join(sections)}",
                    )
                result[section][fqn] = edit
        return result
