"""Options of the torch.compile backend, checked by name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnopt.codegen.target import Target, find_target
from attnopt.errors import OptionError

KERNELS = ("auto", "triton", "reference")
OPTIONS = ("target", "plan", "kernels", "report")


@dataclass(frozen=True)
class PlanSpec:
    """Rewrites that need no new weights; layers are counted in the order attention runs.

    Attributes:
        dead_heads: heads per layer whose output is to be zero; they are not computed.
        shared_maps: consumer layer -> owner layer whose attention map it uses, if both see the same keys.
    """

    dead_heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    shared_maps: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Any) -> PlanSpec:
        """From a dictionary, JSON text or a file: {"dead_heads": {"3": [0, 5]}, "shared_maps": {"4": 3}}.

        Raises:
            OptionError: it says something else.
        """
        if value is None:
            return cls()
        if isinstance(value, (str, Path)):
            try:
                text = str(value) if str(value).lstrip().startswith("{") else Path(value).read_text(encoding="utf-8")
                value = json.loads(text)
            except (OSError, ValueError) as error:
                raise OptionError(f"the plan cannot be read: {error}", "give a JSON file or a dictionary") from error
        if not isinstance(value, Mapping) or set(value) - {"dead_heads", "shared_maps"}:
            raise OptionError("a plan has the keys dead_heads and shared_maps, and no others", "correct the plan")
        try:
            dead = {int(k): tuple(sorted({int(h) for h in v})) for k, v in (value.get("dead_heads") or {}).items()}
            shared = {int(k): int(v) for k, v in (value.get("shared_maps") or {}).items()}
        except (TypeError, ValueError) as error:
            raise OptionError(f"a plan holds numbers of layers and heads: {error}", "correct the plan") from error
        for consumer, owner in shared.items():
            if not 0 <= owner < consumer or owner in shared:
                raise OptionError(
                    f"layer {consumer} cannot take its map from layer {owner}",
                    "the owner comes before the consumer and computes its own map",
                )
        return cls(dead, shared)


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., options=...)` takes.

    Attributes:
        target: for which machine; None for the device the inputs are on.
        plan: rewrites to apply.
        kernels: "auto" (Triton on GPUs), "triton" or "reference" (no kernels, only graph rewrites).
        report: called once per graph with a list of dictionaries, one per attention call.
        mode: torch.compile's mode, handed to inductor.
    """

    target: Target | None = None
    plan: PlanSpec = field(default_factory=PlanSpec)
    kernels: str = "auto"
    report: Callable[[list[dict[str, Any]]], None] | None = None
    mode: str | None = None

    @classmethod
    def parse(cls, keywords: Mapping[str, Any]) -> Options:
        """From the keywords that Dynamo hands to a backend.

        Raises:
            OptionError: an unknown name or a wrong value.
        """
        unknown = sorted(set(keywords) - {"options", "mode"})
        if unknown:
            raise OptionError(f"the attnopt backend does not take {unknown[0]!r}", "it takes options and mode")
        given = dict(keywords.get("options") or {})
        for name in given:
            if name not in OPTIONS:
                near = difflib.get_close_matches(name, OPTIONS, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise OptionError(
                    f"the attnopt backend has no option {name!r}", f"{hint}there are {', '.join(OPTIONS)}"
                )
        kernels = given.get("kernels", "auto")
        if kernels not in KERNELS:
            raise OptionError(f"kernels {kernels!r} is unknown", f"give one of {', '.join(KERNELS)}")
        report = given.get("report")
        if report is not None and not callable(report):
            raise OptionError("report is not callable", "give a function of a list of dictionaries")
        target = given.get("target")
        return cls(
            target=find_target(target) if target is not None else None,
            plan=PlanSpec.parse(given.get("plan")),
            kernels=kernels,
            report=report,
            mode=keywords.get("mode"),
        )
