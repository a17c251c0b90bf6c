"""What was written in our own class is read back: the same facts, the same numbers, ready for the next conversion."""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, PreTrainedModel

from attnopt.codegen.hf.configuration_attnopt import AttnoptConfig
from attnopt.codegen.hf.emission import Emission
from attnopt.codegen.hf.emit import choose
from attnopt.codegen.hf.heads_attnopt import HeadRouter
from attnopt.codegen.onnx.emit import emit_onnx
from attnopt.codegen.target import find_target
from attnopt.errors import UnsupportedError
from attnopt.profiles.build import Options, profile_program
from attnopt.profiles.calibration import Calibration
from attnopt.profiles.prompts import Prompts
from attnopt.profiles.settings import Settings
from attnopt.progress import Silent
from attnopt.rewriter.absorb import to_latent_form
from attnopt.rewriter.capture import capture, capture_module
from attnopt.rewriter.interpret import run
from attnopt.rewriter.passes import PassContext
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite, RouteSpec
from attnopt.rewriter.source import open_source
from attnopt.rewriter.verify import verify
from tests import models
from tests.codegen.loading import module_of
from tests.passes.helpers import apply, program_of

#: Three of everything a layer can be: uneven groups that read a map and are routed with weights; even groups that read
#: keys and values, with groups routed by the size of queries; latent attention with fewer heads, routed.
UNEVEN = (
    "share{layers=1:0 fill=none},prune{keep-heads=0.75 unit=head groups=free fill=none},"
    "moh{active=0.7 gate=weighted shared-heads=3 fill=mean behind=false}"
)
EVEN = (
    "share{layers=1:0 edge=kv fill=none},prune{keep-heads=0.75 fill=none},"
    "moh{active=0.5 router=qnorm unit=kv-group fill=none}"
)
LATENT = "to-mla{kv-keep=0.75},prune{keep-heads=0.5 fill=none},moh{active=0.5 fill=mean}"
#: Layers of different sizes.
SIZES = "to-mla{kv-keep=0.5 sizes=measured}"


@functools.cache
def source(family: str = "llama") -> Program:
    if family in ("bert", "roberta"):
        program = models.captured(family)[1]
        architecture = type(models.build(family)).__name__
        return program.replace(config={**program.config, "architectures": [architecture]})
    return program_of(family, 3, 8, 4) if family == "llama" else program_of(family)


def module(emission: Emission) -> PreTrainedModel:
    """The class an emission names, decoder or encoder, filled with its tensors."""
    if emission.architecture == "AttnoptForCausalLM":
        return module_of(emission)
    fields = {key: value for key, value in emission.config.items() if key not in ("model_type", "auto_map")}
    model = AutoModel.from_config(AttnoptConfig(**fields)).eval()
    model.load_state_dict({name: emission.store.get(name) for name in emission.store.names()})
    return model


@functools.cache
def read_back(family: str, pipeline: str) -> tuple[Program, PreTrainedModel, Program, Path]:
    """(the program that was written, the loaded model, the program that was read, its directory)."""
    directory = Path(tempfile.mkdtemp(dir=os.environ["XDG_CACHE_HOME"]))
    written = apply(source(family), pipeline).program
    module(choose(written, "attnopt")[0]).save_pretrained(directory)
    found = capture(open_source(directory))
    verify(found)
    return written, class_of(written).from_pretrained(directory).eval(), found, directory


def class_of(program: Program) -> Any:
    from attnopt.codegen.hf import modeling_attnopt

    return getattr(modeling_attnopt, choose(program, "attnopt")[0].architecture)


def facts(site: AttentionSite) -> dict[str, Any]:
    """What must survive: everything but the names of weights and nodes."""
    names = ("layer", "kind", "heads", "kv_heads", "d_qk", "d_v", "cache", "scale", "kv_of", "original_heads")
    found = {name: getattr(site, name) for name in names}
    found["window"], found["causal"] = site.mask.window, site.mask.causal
    found["share"] = site.share and (site.share.edge, site.share.source.removeprefix("model."))
    found["route"] = site.route and nameless(site.route)
    # Latent queries hold the rotary dims last, and `to-mla` counts from the head's start.
    found["rope"] = site.rope and replace(site.rope, offset=0 if site.latent else site.rope.offset)
    found["norms"] = [norm and (norm.kind, norm.eps, norm.scope) for norm in (site.q_norm, site.k_norm)]
    found["projections"] = [p and p.out_features for p in (site.q, site.k, site.v, site.o)] if not site.latent else []
    found["rank"] = site.latent and (site.latent.kv_lora_rank, site.latent.d_rope, site.latent.encoder)
    return found


def nameless(route: RouteSpec) -> RouteSpec:
    names = {name: getattr(route, name) for name in ("weight", "bias", "fill", "shared_weight", "balance")}
    return replace(route, **{name: value and "there" for name, value in names.items()})


CASES = [
    ("llama", UNEVEN),
    ("llama", EVEN),
    ("llama", LATENT),
    ("llama", SIZES),
    ("bert", "share{layers=1 fill=none},prune{keep-heads=0.5 fill=none},moh{active=0.5 fill=mean}"),
    *(
        pytest.param(family, pipeline, marks=pytest.mark.slow)
        for family, pipeline in [
            ("llama", "share{layers=1 fill=none}"),
            ("llama", "share{layers=1 edge=kv fill=none}"),
            ("llama", "moh{active=0.5}"),
            ("llama", "moh{active=0.5 router=qnorm fill=none}"),
            ("llama", "moh{active=0.75 gate=weighted shared-heads=1}"),
            ("llama", "moh{active=0.75 gate=weighted shared-heads=2}"),
            ("llama", "prune{keep-heads=0.5}"),
            ("llama", "prune{keep-heads=0.5 unit=head groups=free layers=free}"),
            ("llama", "share{layers=1 fill=none},to-mla{kv-keep=0.75},moh{active=0.5}"),
            ("llama", "dimap{structured=true sparsity=0.3}"),
            ("qwen3", "share{layers=1},prune{keep-heads=0.5},moh{active=0.5 router=qnorm}"),
            ("qwen3", "to-mla{kv-keep=0.75},prune{keep-heads=0.5},moh{active=0.5 router=qnorm}"),
            ("phi3", "share{layers=1 edge=kv}"),
            ("mistral", "prune{keep-heads=0.75 unit=head groups=free},moh{active=0.5}"),
            ("roberta", "share{layers=1},moh"),
            ("bert", "share{layers=1 edge=kv},prune"),
        ]
    ),
]


@pytest.mark.parametrize(("family", "pipeline"), CASES)
def test_facts_and_numbers_are_those_written(family: str, pipeline: str) -> None:
    written, model, found, _ = read_back(family, pipeline)
    assert [facts(site) for site in found.site_list] == [facts(site) for site in written.site_list]
    assert found.cached_numbers_per_token == written.cached_numbers_per_token
    assert found.model_type == family
    assert pipeline != SIZES or len({site.cached_numbers_per_token for site in found.site_list}) > 1
    batch = models.inputs(family, 2, 11, seed=5)
    with torch.no_grad():
        expected = model(**batch)[0]
    assert models.relative_error(run(found, **batch)[found.outputs[0]], expected) < 2e-6
    if all(site.latent is None for site in found.site_list):
        ops = [[p.node(site.nodes.attention).target for site in p.site_list] for p in (found, written)]
        assert ops[0] == ops[1]


@pytest.mark.parametrize(("family", "pipeline"), CASES)
def test_written_again_it_is_the_same_directory(family: str, pipeline: str) -> None:
    written, _, found, _ = read_back(family, pipeline)
    once, twice = choose(written, "attnopt")[0], choose(found, "attnopt")[0]
    assert once.config == twice.config
    assert set(once.values) == set(twice.values)
    assert all(torch.equal(once.store.get(name), twice.store.get(name)) for name in once.values)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("share{layers=1:0 fill=none}", "prune{keep-heads=0.75 unit=head groups=free fill=none}"),
        pytest.param("share{layers=1:0 fill=none}", "to-mla{kv-keep=0.75}", marks=pytest.mark.slow),
        pytest.param(
            "prune{keep-heads=0.75 unit=head groups=free fill=none}",
            "prune{keep-heads=0.75 unit=head groups=free fill=none}",
            marks=pytest.mark.slow,
        ),
        pytest.param("to-mla{kv-keep=0.75}", "prune{keep-heads=0.5 fill=none}", marks=pytest.mark.slow),
        pytest.param("prune{keep-heads=0.75 fill=none}", "moh{active=0.5 fill=none}", marks=pytest.mark.slow),
        pytest.param("moh{active=0.5 fill=none}", "dimap", marks=pytest.mark.slow),
    ],
)
def test_a_second_conversion_gives_what_one_pipeline_gives(first: str, then: str) -> None:
    """Heads keep their numbers, too: they are in the config."""
    _, _, found, _ = read_back("llama", first)
    second = choose(apply(found, then).program, "attnopt")[0]
    at_once = choose(apply(source(), f"{first},{then}").program, "attnopt")[0]
    assert second.config == at_once.config
    assert set(second.values) == set(at_once.values)
    for name in second.values:
        torch.testing.assert_close(second.store.get(name), at_once.store.get(name), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "then", "rule"),
    [
        (UNEVEN, "prune", "routers are made for the heads there are"),
        pytest.param(UNEVEN, "share", "its heads are routed", marks=pytest.mark.slow),
        pytest.param(UNEVEN, "moh", "routed already", marks=pytest.mark.slow),
        pytest.param(UNEVEN, "to-mla", "its heads are routed", marks=pytest.mark.slow),
        pytest.param(LATENT, "share", "latent attention", marks=pytest.mark.slow),
        (LATENT, "to-mla", "multi-head latent attention already"),
    ],
)
def test_what_may_not_follow_is_refused_by_the_same_rule(first: str, then: str, rule: str) -> None:
    with pytest.raises(UnsupportedError, match=rule):
        apply(read_back("llama", first)[2], then)


def profiled(program: Program) -> Any:
    ids = torch.randint(3, models.VOCAB, (1, 40), generator=torch.Generator().manual_seed(2))
    prompts = Prompts.of([{"input_ids": ids}, {"input_ids": ids.flip(1)}], "test")
    return profile_program(program, prompts, Settings(windows=(2, 8), skip=3, recent=8), Options(gradients=True))


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", [UNEVEN, EVEN, LATENT, SIZES])
def test_it_can_be_profiled(pipeline: str) -> None:
    """Values per key/value head are there for uneven groups, and of shared layers what they compute themselves."""
    written, _, found, _ = read_back("llama", pipeline)
    profile, other = profiled(found), profiled(written)
    assert set(profile.metrics) == set(other.metrics)
    for name in ("contribution", "kv_contribution", "streaming_error", "q_norm"):
        torch.testing.assert_close(
            profile.metric(name), other.metric(name), rtol=1e-3, atol=1e-5, equal_nan=True, msg=name
        )
    heads = {site.heads for site in found.site_list}
    assert profile.metric("contribution").shape[-1] == max(heads)
    if pipeline == UNEVEN:
        assert profile.metric("kv_contribution").shape[-1] == max(site.kv_heads for site in found.site_list)
        assert bool(profile.metric("lamp")[1].isnan().all())  # layer 1 has no queries and keys of its own
        assert not bool(profile.metric("lamp")[0].isnan().any())


@pytest.mark.parametrize(
    "pipeline", [SIZES, *(pytest.param(text, marks=pytest.mark.slow) for text in (UNEVEN, EVEN, LATENT))]
)
def test_it_can_be_exported(pipeline: str, tmp_path: Path) -> None:
    found = read_back("llama", pipeline)[2]
    result = emit_onnx(to_latent_form(found), tmp_path, find_target("cpu"), "matmul", Silent())
    assert max(result.checks.values()) < 1e-5
    assert result.cached_numbers_per_token == found.cached_numbers_per_token


def test_layers_of_one_kind_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths and numbers of heads differ from layer to layer and make no other kind; names of routers are moved."""
    from attnopt.rewriter import capture as capturing

    given = {"route": {}}
    for site in source().site_list:
        given["route"][site.fqn] = {
            "type": "linear", "unit": "head", "shared": [0, 1], "k": 3, "gate": "binary",
        }  # fmt: skip
    written = apply(source(), "moh{fill=mean behind=false}", given=given).program
    model = module_of(choose(written, "attnopt")[0])
    cuts = []
    stamp = capturing.stamp
    monkeypatch.setattr(capturing, "stamp", lambda partial, cut: cuts.append(cut.chosen) or stamp(partial, cut))
    found = capture_module(model)
    assert cuts == [[0]]
    verify(found)
    assert [site.route.weight for site in found.site_list] == [f"{s.fqn}.router.score.weight" for s in found.site_list]
    batch = models.inputs("llama", 2, 7)
    with torch.no_grad():
        assert models.relative_error(run(found, **batch)["logits"], model(**batch).logits) < 2e-6


def test_gates_that_are_no_mixture_of_heads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    written = apply(program_of("llama", 2, 4, 2), "moh{active=0.5 router=qnorm fill=mean behind=false}").program
    model = module_of(choose(written, "attnopt")[0])
    forward = HeadRouter.forward

    def halved(self: HeadRouter, x: torch.Tensor, q: torch.Tensor) -> Any:
        gates, idle = forward(self, x, q)
        return gates * x[..., :1].sigmoid(), idle

    def doubled(self: HeadRouter, x: torch.Tensor, q: torch.Tensor) -> Any:
        gates, idle = forward(self, x, q)
        return gates, 2 * idle

    def by_size(self: HeadRouter, x: torch.Tensor, q: torch.Tensor) -> Any:
        return q.square().sum(-1).transpose(1, 2), None

    for wrong, reason in ((halved, "known mixture"), (doubled, "no constant"), (by_size, "no choice among them")):
        monkeypatch.setattr(HeadRouter, "forward", wrong)
        with pytest.raises(UnsupportedError, match=reason):
            capture_module(model)


@pytest.mark.parametrize(
    ("ids", "words"),
    [({"layers.0.self_attn": [0]}, "do not number"), ({"layers.7.self_attn": [0]}, "no rewritten layer"),
     ({"layers.0.self_attn": [0, 1, 2, 2, 4, 5]}, "do not number")],
)  # fmt: skip
def test_wrong_numbers_of_heads_are_refused(ids: dict[str, list[int]], words: str) -> None:
    config = choose(read_back("llama", UNEVEN)[0], "attnopt")[0].config
    fields = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    with pytest.raises(ValueError, match=words):
        AttnoptConfig(**{**fields, "head_ids": ids})


@pytest.mark.slow
def test_a_written_swin_has_its_table_when_it_is_loaded(tmp_path: Path) -> None:
    """Its encoder initialises what lies in it by itself; what no file stores must be computed all the same."""
    program = models.captured("swin")[1]
    program = program.replace(config={**program.config, "architectures": ["SwinModel"]})
    written = apply(program, "dimap{structured=true}").program
    module(choose(written, "attnopt")[0]).save_pretrained(tmp_path)
    model, found = class_of(written).from_pretrained(tmp_path).eval(), capture(open_source(tmp_path))
    batch = models.inputs("swin")
    expected = run(written, **batch)[written.outputs[0]]
    with torch.no_grad():
        assert models.relative_error(model(**batch)[0], expected) < 1e-5
    assert models.relative_error(run(found, **batch)[found.outputs[0]], expected) < 1e-5
    assert [site.heads for site in found.site_list] == [site.heads for site in written.site_list]


@pytest.mark.slow
@pytest.mark.skipif("ATTNOPT_TEST_GGUF" not in os.environ, reason="ATTNOPT_TEST_GGUF names a real model")
@pytest.mark.parametrize(
    ("pipeline", "bound"),
    [
        ("share{fraction=0.2333}", 2.0),
        ("moh{active=0.7778}", 2.0),
        ("prune{keep-heads=0.6667 unit=head groups=free}", 3.0),
    ],
)
def test_a_real_model(pipeline: str, bound: float, tmp_path: Path) -> None:
    """Few tokens to calibrate on: the bounds say that the mechanism works, nothing of its quality."""
    original = open_source(os.environ["ATTNOPT_TEST_GGUF"])
    words = Path(__file__).parents[2].joinpath("docs", "methods.md").read_text()
    ids = torch.tensor(original.tokenizer()(words)["input_ids"])
    text, judged = ids[: 12 * 128].view(12, 128), ids[12 * 128 : 16 * 128].view(4, 128)
    before = capture(original)
    context = PassContext(calibration=Calibration(text[:10], text[10:], "test", "", 0))
    written = apply(before, pipeline, context).program
    model = module_of(choose(written, "attnopt")[0])
    model.save_pretrained(tmp_path)
    found = capture(open_source(tmp_path))
    assert [facts(site) for site in found.site_list] == [facts(site) for site in written.site_list]
    with torch.no_grad():
        expected = model(judged[:1]).logits
        assert models.relative_error(run(found, input_ids=judged[:1])["logits"], expected) < 1e-4
        losses = []
        for program in (before, found):
            logits = run(program, input_ids=judged)["logits"][:, :-1].flatten(0, 1)
            losses.append(float(torch.nn.functional.cross_entropy(logits, judged[:, 1:].flatten())))
    assert losses[1] - losses[0] < torch.tensor(bound).log()
