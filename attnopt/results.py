"""What the verbs return: data for programs (`to_json`) and a view for people (`view`). No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnopt.profiles.profile import Profile
    from attnopt.rewriter.site import AttentionSite, RopeSpec


@dataclass(frozen=True)
class Inspection:
    """The attention layers of a model.

    Attributes:
        model: what was inspected.
        model_type: its architecture's name in transformers.
        parameters: floating-point numbers in its weights, tied ones counted once.
        sites: attention layers in forward order.
        identity: name, format and hashes of the source.
    """

    model: str
    model_type: str
    parameters: int
    sites: tuple[AttentionSite, ...]
    identity: Mapping[str, str]

    exit_code = 0

    @property
    def cached_numbers_per_token(self) -> int:
        """Numbers kept per token while decoding, all layers together."""
        return sum(site.cached_numbers_per_token for site in self.sites)

    def to_json(self) -> dict[str, Any]:
        """The document `attnopt.inspect/1`."""
        return {
            "schema": "attnopt.inspect/1",
            "model_type": self.model_type,
            "layers": len(self.sites),
            "parameters": self.parameters,
            "source": dict(self.identity),
            "sites": [site_json(site) for site in self.sites],
            "cached_numbers_per_token": self.cached_numbers_per_token,
        }

    def view(self, *, quiet: bool) -> RenderableType:
        """A table with a line per run of equal layers; only the cached numbers if quiet."""
        from rich.console import Group

        from attnopt.render import gigabytes, table

        if quiet:
            return str(self.cached_numbers_per_token)
        rows = []
        for first, last in equal_runs([_facts(site) for site in self.sites]):
            layers = str(self.sites[first].layer) if first == last else f"{first}-{last}"
            rows.append([layers, *_facts(self.sites[first])])
        columns = ("layers", "kind", "heads", "key/value heads", "head dim", "rope", "mask", "norms", "cached numbers")
        cached = self.cached_numbers_per_token
        closing = f"{self.parameters:,} parameters; "
        if cached:
            closing += (
                f"{cached:,} cached numbers per token, {gigabytes(cached * 2 * 32768)} for 32,768 tokens at 16 bits"
            )
        else:
            closing += "no cache (not a decoder)"
        title = f"{self.model}: {self.model_type}, {len(self.sites)} attention layers"
        return Group(table(title, columns, rows, numbers=(2, 3, 4, 8)), closing)


def site_json(site: AttentionSite) -> dict[str, Any]:
    """One attention layer as JSON values."""
    found = site.facts() | {
        "scale": site.scale,
        "rope": _rope_json(site.rope),
        "softcap": site.mask.softcap,
        "qk_norm": site.q_norm.scope if site.q_norm else None,
        "cache": [{"name": e.name, "heads": e.heads, "width": e.width} for e in site.cache.entries],
    }
    if site.latent is not None:
        found["kv_lora_rank"] = site.latent.kv_lora_rank
        found["qk_rope_head_dim"] = site.latent.d_rope
        found["qk_nope_head_dim"] = site.latent.d_nope
    if site.kv_of:
        found["kv_of"] = list(site.kv_of)
    if site.head_ids:
        found["original_heads"] = list(site.head_ids)
    if site.share is not None:
        found["share"] = {"edge": site.share.edge, "source": site.share.source}
    if site.route is not None:
        route = site.route
        units = {"unit": route.unit, "units": len(site.routed_units), "active": route.active}
        found["route"] = {"router": route.router, "gate": route.gate, "shared": list(route.shared), **units}
    return found


def _rope_json(rope: RopeSpec | None) -> dict[str, Any] | None:
    if rope is None:
        return None
    return {
        "type": rope.rope_type,
        "dim": rope.dim,
        "style": rope.style,
        "offset": rope.offset,
        "attention_scaling": rope.attention_scaling,
        "inv_freq": [rope.inv_freq[0], rope.inv_freq[-1]] if rope.inv_freq else [],
    }


def _facts(site: AttentionSite) -> list[str]:
    mask = "causal" if site.mask.causal else "full"
    mask += f", window {site.mask.window}" if site.mask.window else ""
    mask += f", softcap {site.mask.softcap:g}" if site.mask.softcap else ""
    mask += ", bias" if site.mask.bias else ""
    mask += ", alibi" if site.mask.alibi else ""
    mask += ", sinks" if site.mask.sinks else ""
    rope = f"{site.rope.dim} {site.rope.style} {site.rope.rope_type}" if site.rope else "-"
    norms = f"q/k per {site.q_norm.scope}" if site.q_norm and site.latent is None else "-"
    width = str(site.d_qk) if site.d_qk == site.d_v else f"{site.d_qk}/{site.d_v}"
    kv = f"latent {site.latent.kv_lora_rank}" if site.latent else str(site.kv_heads)
    kind = f"{site.kind}, shared {site.share.edge}" if site.share else site.kind
    kind += ", routed" if site.route else ""
    return [kind, str(site.heads), kv, width, rope, mask, norms, f"{site.cached_numbers_per_token:,}"]


def equal_runs(values: Sequence[object]) -> list[tuple[int, int]]:
    """(first, last) of every longest run of equal neighbours."""
    runs: list[tuple[int, int]] = []
    for index, value in enumerate(values):
        if runs and values[runs[-1][0]] == value:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs


@dataclass(frozen=True)
class PlanPreview:
    """What a conversion would do (`--dry-run`).

    Attributes:
        model: what would be converted.
        pipeline: the exact pipeline text.
        notes: the plan, a line each.
        layers: per-layer plan as JSON values.
        cached_before, cached_after: cached numbers per token; after is None if only measuring can tell.
        memory_bytes: predicted peak.
        document: the plan as a plan file has it.
    """

    model: str
    pipeline: str
    notes: tuple[str, ...]
    layers: tuple[Mapping[str, Any], ...]
    cached_before: int
    cached_after: int | None
    memory_bytes: int
    document: Mapping[str, Any]

    exit_code = 0

    def to_json(self) -> dict[str, Any]:
        """The document `attnopt.plan/1`, which --plan takes back."""
        return {
            **self.document,
            "notes": list(self.notes),
            "cached_numbers_per_token": {"before": self.cached_before, "after": self.cached_after},
            "memory_bytes": self.memory_bytes,
        }

    def view(self, *, quiet: bool) -> RenderableType:
        """The plan, layers planned alike on one line; only the pipeline if quiet."""
        from rich.console import Group

        from attnopt.render import gigabytes, table

        if quiet:
            return self.pipeline
        lines = [f"pipeline   {self.pipeline}", f"cache      {_change(self.cached_before, self.cached_after)}"]
        lines += [f"memory     about {gigabytes(self.memory_bytes)} at the peak", *self.notes, ""]
        edits = [{key: _plain(value) for key, value in layer.items() if key != "site"} for layer in self.layers]
        columns = list(dict.fromkeys(key for edit in edits for key in edit))
        rows = []
        for first, last in equal_runs(edits):
            name = str(self.layers[first]["site"])
            name += f" ... {self.layers[last]['site']}" if last > first else ""
            rows.append([name, *(edits[first].get(key, "-") for key in columns)])
        return Group("\n".join(lines), table("plan", ("attention layers", *columns), rows))


def _plain(value: object) -> str:
    if isinstance(value, Mapping) and set(value) == {"before", "after"}:
        return f"{value['before']} -> {value['after']}"
    return str(value)


def _change(before: int, after: int | None) -> str:
    from attnopt.render import percent

    if after is None:
        return f"{before:,} cached numbers per token now"
    return f"{before:,} -> {after:,} cached numbers per token ({percent(after, before)})"


@dataclass(frozen=True)
class Conversion:
    """A finished conversion.

    Attributes:
        output: the directory written.
        emitted_as: the class it was written for.
        sites_changed: attention layers rewritten.
        cached_before, cached_after: cached numbers per token, all layers together.
        parameters_before, parameters_after: numbers in the weights.
        pipeline: the exact text that reproduces it.
        seconds: from start to finish.
        peak_rss_bytes: largest resident memory of the process.
        notes: what the passes and the emitter want known.
        details: more for the JSON document.
    """

    output: str
    emitted_as: str
    sites_changed: int
    cached_before: int
    cached_after: int
    parameters_before: int
    parameters_after: int
    pipeline: str
    seconds: float
    peak_rss_bytes: int
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    exit_code = 0

    def to_json(self) -> dict[str, Any]:
        """The document `attnopt.convert/1`."""
        return {
            "schema": "attnopt.convert/1",
            "output": self.output,
            "emitted_as": self.emitted_as,
            "sites_changed": self.sites_changed,
            "cached_numbers_per_token": {"before": self.cached_before, "after": self.cached_after},
            "parameters": {"before": self.parameters_before, "after": self.parameters_after},
            "pipeline": self.pipeline,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "notes": list(self.notes),
            **self.details,
        }

    def view(self, *, quiet: bool) -> RenderableType:
        """The change in cache first; only the output path if quiet."""
        from attnopt.render import gigabytes

        if quiet:
            return self.output
        return "\n".join(
            [
                _change(self.cached_before, self.cached_after),
                f"{self.parameters_before:,} -> {self.parameters_after:,} parameters",
                f"{self.sites_changed} attention layers rewritten in {self.seconds:.0f} s, "
                f"at most {gigabytes(self.peak_rss_bytes)} of memory",
                *self.notes,
                f"written as {self.emitted_as}: {self.output}",
            ]
        )


@dataclass(frozen=True)
class Profiled:
    """A finished profile.

    Attributes:
        output: the directory written.
        model: what was profiled.
        profile: the measurements.
        seconds: from start to finish.
        peak_rss_bytes: largest resident memory of the process.
    """

    output: str
    model: str
    profile: Profile
    seconds: float
    peak_rss_bytes: int

    exit_code = 0

    def to_json(self) -> dict[str, Any]:
        """The document `attnopt.profile/1` without its arrays, and where it was written."""
        return {
            **self.profile.to_json(),
            "output": self.output,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
        }

    def view(self, *, quiet: bool) -> RenderableType:
        """Heat maps of the heads and what the profile suggests; only the output path if quiet."""
        from rich.console import Group

        from attnopt.profiles.report.summary import findings
        from attnopt.render import gigabytes, heat_maps

        if quiet:
            return self.output
        shown = [name for name in ("contribution", "distant_mass", "retrieval") if name in self.profile.metrics]
        maps = {name: self.profile.metric(name).tolist() for name in shown}
        said = [f"{name}: {self.profile.metrics[name].help}" for name in shown]
        said += ["", *(f"- {finding.text}" for finding in findings(self.profile))]
        closing = f"{self.seconds:.0f} s, at most {gigabytes(self.peak_rss_bytes)} of memory: {self.output}/report.html"
        return Group(heat_maps(maps), "\n".join(["", *said, "", closing]))


@dataclass(frozen=True)
class Bench:
    """Speed and memory of a model, and of its original.

    Attributes:
        document: `attnopt.bench/1`, as `bench.bench_report` makes it.
    """

    document: Mapping[str, Any]

    exit_code = 0

    def to_json(self) -> dict[str, Any]:
        """The document `attnopt.bench/1`."""
        return dict(self.document)

    def view(self, *, quiet: bool) -> RenderableType:
        """See `bench.report.bench_view`."""
        from attnopt.timing.report import bench_view

        return bench_view(self.document, quiet=quiet)


@dataclass(frozen=True)
class PassList:
    """Every pass and method.

    Attributes:
        passes: name, summary, fields and needs of each, as JSON values.
        methods: name, pipeline and summary of each, as JSON values.
    """

    passes: tuple[Mapping[str, Any], ...]
    methods: tuple[Mapping[str, Any], ...]

    exit_code = 0

    def to_json(self) -> dict[str, Any]:
        """The document `attnopt.passes/1`."""
        return {
            "schema": "attnopt.passes/1",
            "passes": [dict(entry) for entry in self.passes],
            "methods": [dict(entry) for entry in self.methods],
        }

    def view(self, *, quiet: bool) -> RenderableType:
        """One line each, with options; only the names if quiet."""
        from rich.console import Group

        from attnopt.render import table

        if quiet:
            return "\n".join(str(entry["name"]) for entry in self.passes)
        methods = [[f"--to {m['name']}", str(m["pipeline"])] for m in self.methods]
        passes = [[str(p["name"]), str(p["summary"])] for p in self.passes]
        options = [
            [str(p["name"]), str(o["name"]), str(o["type"]), str(o["default"])]
            for p in self.passes
            for o in p["options"]
        ]
        return Group(
            table("methods", ("method", "pipeline"), methods),
            "",
            table("passes", ("pass", "what it does"), passes),
            "",
            table("options", ("pass", "option", "type", "default"), options),
        )
