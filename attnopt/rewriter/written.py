"""What a model written in attnopt's own class says of itself, where its graph cannot tell.

Everything that the model computes is measured on its graph, as for any model. Its config adds where it comes from: the
source architecture, which layers were rewritten, and which of the original heads theirs are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from attnopt.rewriter.program import Program

#: What stands for the pass in nodes that an earlier conversion made.
EARLIER = "an earlier conversion"


@dataclass(frozen=True)
class Provenance:
    """See `AttnoptConfig.provenance`, which gives it.

    Attributes:
        config: of the source architecture.
        rewritten: module paths of the rewritten layers.
        head_ids: number of each query head in the original model, by module path.
        resized: names of weights that are of other sizes than the source's.
    """

    config: Mapping[str, Any]
    rewritten: tuple[str, ...]
    head_ids: Mapping[str, tuple[int, ...]]
    resized: frozenset[str]

    @classmethod
    def of(cls, config: Any) -> Provenance | None:
        """What a config says, None if it is that of an ordinary model."""
        told = getattr(config, "provenance", None)
        if not callable(told):
            return None
        said = told()
        ids = {path: tuple(heads) for path, heads in said["head_ids"].items()}
        return cls(said["config"], tuple(said["rewritten"]), ids, frozenset(said["resized"]))

    def applied(self, program: Program) -> Program:
        """The program as one of the source architecture, some layers of which passes have made anew."""
        nodes = {node.name: node for node in program.graph.nodes}
        sites = dict(program.sites)
        for fqn in self.rewritten:
            sites[fqn] = site = replace(sites[fqn], head_ids=self.head_ids.get(fqn, ()))
            nodes[site.nodes.attention].meta["attnopt"] = {"pass": EARLIER, "site": fqn}
        for node in nodes.values():
            if node.op == "get_attr" and node.target in self.resized:
                node.meta["resized"] = True
        return program.replace(sites=sites, config=dict(self.config), model_type=str(self.config["model_type"]))
