"""Making a Profile: the passes over the layers, and everything derived from what they find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnopt.errors import UnsupportedError
from attnopt.profiles.geometry import power_of_two_below
from attnopt.profiles.gradients import BACKWARD, BackwardPass
from attnopt.profiles.groups import MAX_ERROR, sharing_graph, sharing_groups
from attnopt.profiles.layers import LayerReader
from attnopt.profiles.measure import FIRST_ONLY, FORWARD, ForwardPass, Measured
from attnopt.profiles.metric import Collected, SiteMetric, arrays, describe_all
from attnopt.profiles.metrics import lamp, retrieval
from attnopt.profiles.metrics.retrieval import Needle, make_needles
from attnopt.profiles.pairs import compare
from attnopt.profiles.predict import predictions
from attnopt.profiles.profile import MetricInfo, Profile, SharingGroup, program_digest
from attnopt.profiles.prompts import Prompts
from attnopt.profiles.settings import Settings
from attnopt.profiles.stability import stability
from attnopt.progress import Reporter, Silent
from attnopt.rewriter.interpret import LayerRunner
from attnopt.rewriter.program import Program


@dataclass(frozen=True)
class Options:
    """How to profile.

    Attributes:
        gradients: measure what needs a backward pass.
        device, dtype: where and in what to compute; float32 or float64.
    """

    gradients: bool = True
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32


def profile_program(
    program: Program,
    prompts: Prompts,
    settings: Settings | None = None,
    options: Options | None = None,
    *,
    identity: Mapping[str, str] | None = None,
    site_metrics: Sequence[type[SiteMetric]] = (),
    reporter: Reporter | None = None,
) -> Profile:
    """Measure a program's attention.

    Args:
        program: what to profile.
        prompts: what to profile on.
        settings: sizes and thresholds.
        options: how.
        identity: of the model, for the file.
        site_metrics: further metrics, of passes.
        reporter: told of progress.

    Raises:
        UnsupportedError: if a layer's attention cannot be taken apart.
    """
    settings, options, reporter = settings or Settings(), options or Options(), reporter or Silent()
    forward, backward = make_passes(program, prompts, settings, options, site_metrics=site_metrics, reporter=reporter)
    found = forward.run()
    gradients = backward.run() if options.gradients else None
    bins = forward.reader.bins
    return _assemble(program, prompts, settings, options, identity or {}, found, gradients, bins, site_metrics)


def make_passes(
    program: Program,
    prompts: Prompts,
    settings: Settings,
    options: Options | None = None,
    *,
    site_metrics: Sequence[type[SiteMetric]] = (),
    reporter: Reporter,
) -> tuple[ForwardPass, BackwardPass]:
    """The two passes over the layers, ready to run; arguments as for `profile_program`."""
    options = options or Options()
    runner = LayerRunner(program, options.dtype, options.device)
    reader = LayerReader(program, settings, prompts.images, max(prompts.lengths))
    needles = _needles(program, prompts, settings)
    forward = ForwardPass(runner, reader, prompts, needles, site_metrics, reporter)
    return forward, BackwardPass(runner, reader, prompts, settings.seed, reporter)


def _needles(program: Program, prompts: Prompts, settings: Settings) -> list[Needle]:
    """Synthetic needles; none where the model reads no tokens or not from left to right, or is too small for them."""
    causal = all(site.mask.causal for site in program.site_list)
    vocabulary = int(program.config.get("vocab_size") or 0)
    context = min(settings.needle_context, max(prompts.lengths))
    length = min(settings.needle_length, context // 4, vocabulary // 4)
    if prompts.images or not causal or length < 2:
        return []
    return make_needles(vocabulary, settings.needles, length, context, settings.seed)


def _assemble(
    program: Program,
    prompts: Prompts,
    settings: Settings,
    options: Options,
    identity: Mapping[str, str],
    found: Measured,
    gradients: Collected | None,
    bins: int,
    site_metrics: Sequence[type[SiteMetric]],
) -> Profile:
    described = describe_all((*FORWARD, *FIRST_ONLY, *BACKWARD), settings, bins)
    described |= lamp.DESCRIBED | retrieval.DESCRIBED | compare.DESCRIBED
    for metric in site_metrics:
        described |= metric.describe()
    values: dict[str, Tensor] = {}
    for part in (found.forward, found.needles, found.sites, *([gradients] if gradients else [])):
        values |= {name: part.array(name) for name in part.names()}
    values |= {name: value for name, value in found.pairs.items() if name != "head_alignment"}
    # Not one value per prompt: weights alone, one assignment for all prompts, pictures of the first.
    single = {name: found.weights.array(name)[0] for name in found.weights.names()}
    single |= {name: found.first.array(name)[0].float() for name in found.first.names()}
    if "head_alignment" in found.pairs:
        single["head_alignment"] = found.pairs["head_alignment"]
    infos = {name: replace(described[name], prompts=value.shape[0]) for name, value in values.items()}
    infos = {name: _with_stability(info, values[name], settings.seed) for name, info in infos.items()}
    infos |= {name: described[name] for name in single}
    tensors = arrays(infos, values | single)
    groups: tuple[SharingGroup, ...] = ()
    if "map_reuse_error_aligned" in infos:
        similarity, error = tensors["map_correlation_aligned/mean"], tensors["map_reuse_error_aligned/mean"]
        groups = sharing_groups(sharing_graph(similarity, error))
    causal = all(site.mask.causal for site in program.site_list)
    recent = settings.recent or power_of_two_below(max(prompts.lengths) / (4 if causal else 8))
    return Profile(
        model={"name": "a module in memory", **identity, "program_digest": program_digest(program)},
        calibration=prompts.to_json(),
        numeric={
            "dtype": str(options.dtype).removeprefix("torch."),
            "accum": "float64",
            **settings.to_json(),
            "recent": recent,
            "group_max_error": MAX_ERROR,
        },
        sites=tuple(site.facts() for site in program.site_list),
        metrics=dict(sorted(infos.items())),
        tensors=tensors,
        absent=_absent(described, infos, program, options, site_metrics),
        groups=groups,
        predictions=predictions(
            program.site_list, groups, tensors.get("streaming_error/mean"), recent + settings.sink, found.tokens
        ),
    )


def _with_stability(info: MetricInfo, values: Tensor, seed: int) -> MetricInfo:
    if info.axes not in (("site", "head"), ("site", "kv_head")):
        return info
    return replace(info, stability=stability(values, seed))


def _absent(
    described: Mapping[str, MetricInfo],
    infos: Mapping[str, MetricInfo],
    program: Program,
    options: Options,
    site_metrics: Sequence[type[SiteMetric]],
) -> dict[str, str]:
    """Why each metric that could be there is not."""
    kinds = {name: kind for kind in (*FORWARD, *BACKWARD) for name in kind.describe(Settings(), 1)}
    of_sites = {name: kind for kind in site_metrics for name in kind.describe()}
    result = {}
    for name in sorted(set(described) - set(infos)):
        reasons: list[str | None] = []
        if name in of_sites:
            reasons = [of_sites[name].obstacle(site) for site in program.site_list]
        elif name in kinds and kinds[name].uses_gradient and not options.gradients:
            reasons = ["gradients were not asked for"]
        elif name in kinds:
            reasons = [kinds[name].obstacle(site) for site in program.site_list]
        elif name in retrieval.DESCRIBED:
            reasons = ["needles need a causal model that reads tokens, and prompts of 8 tokens or more"]
        elif name in compare.DESCRIBED:
            reasons = ["no two layers have heads of the same sizes that see the same keys"]
        elif name in lamp.DESCRIBED:
            reasons = ["latent attention shares its keys' weights between heads"]
        result[name] = next((reason for reason in reasons if reason), "it makes no sense for this model's layers")
    return result


def require_finite(profile: Profile) -> None:
    """Refuse a profile that holds infinite values.

    Raises:
        UnsupportedError: naming the metric.
    """
    for name in profile.metrics:
        if bool(profile.metric(name).isinf().any()):
            raise UnsupportedError(f"{name} is not finite on these prompts", "check the model's weights")
