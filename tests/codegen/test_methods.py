"""What share, prune, moh and dimap make, written: the written model computes what the Program computes, cached too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from attnopt.artifact import Staging
from attnopt.codegen.hf import source_class
from attnopt.codegen.hf.configuration_attnopt import AttnoptConfig
from attnopt.codegen.hf.emit import choose, emit
from attnopt.codegen.hf.heads_attnopt import SHARED, GroupedAttention
from attnopt.errors import UnsupportedError
from attnopt.evaluate.measure import measure_cache
from attnopt.rewriter.interpret import run
from tests import models
from tests.codegen.loading import module_of, tokens
from tests.passes.helpers import apply, program_of

CASES = [
    ("llama", "prune{keep-heads=0.5}", "llama"),
    pytest.param("llama", "prune{keep-heads=0.5 unit=head}", "llama", marks=pytest.mark.slow),
    pytest.param("llama", "prune{keep-heads=0.75 unit=head groups=free}", "attnopt", marks=pytest.mark.slow),
    ("llama", "prune{keep-heads=0.5 unit=head groups=free layers=free}", "attnopt"),
    pytest.param("qwen3", "prune{keep-heads=0.5}", "qwen3", marks=pytest.mark.slow),
    pytest.param("mistral-full", "prune{keep-heads=0.5 fill=lsq-nobias}", "mistral", marks=pytest.mark.slow),
    pytest.param("mistral-full", "prune{keep-heads=0.5}", "attnopt", marks=pytest.mark.slow),
    pytest.param("phi3", "prune{keep-heads=0.5 fill=lsq-nobias}", "phi3", marks=pytest.mark.slow),
    ("llama", "share{fraction=0.5}", "attnopt"),
    ("llama", "share{fraction=0.5 edge=kv}", "attnopt"),
    ("qwen3", "share{layers=1}", "attnopt"),
    pytest.param("phi3", "share{layers=1 edge=kv}", "attnopt", marks=pytest.mark.slow),
    ("llama", "moh{active=0.75}", "attnopt"),
    ("llama", "moh{active=0.5 router=qnorm unit=kv-group}", "attnopt"),
    pytest.param("mixtral", "moh{active=0.5}", "attnopt", marks=pytest.mark.slow),
    ("llama", "moh{active=0.75 gate=weighted shared-heads=2}", "attnopt"),
    ("llama", "dimap", "llama"),
    ("llama", "dimap{structured=true sparsity=0.3}", "attnopt"),
    ("llama", "share{fraction=0.5},prune{keep-heads=0.5},moh{active=0.5},dimap", "attnopt"),
    ("llama", "share{fraction=0.25},to-mla{kv-keep=0.75}", "attnopt"),
    ("llama", "to-mla{kv-keep=0.75},prune{keep-heads=0.5},moh{active=0.5}", "attnopt"),
    pytest.param(
        "qwen3",
        "to-mla{kv-keep=0.75},prune{keep-heads=0.5},moh{active=0.5 router=qnorm}",
        "attnopt",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("family", "pipeline", "target"), CASES)
def test_the_written_model_is_the_program(family: str, pipeline: str, target: str) -> None:
    source = program_of(family) if family == "llama" else models.captured(family)[1]
    program = apply(source, pipeline).program
    emission, refused = choose(program)
    assert emission.target == target
    assert (refused is None) == (target != "attnopt")
    model = module_of(emission)
    ids = tokens(2, 12)
    with torch.no_grad():
        got = model(ids % models.VOCAB).logits
    expected = run(program, input_ids=ids % models.VOCAB)["logits"]
    assert float((got - expected).norm() / expected.norm()) < 1e-5
    cached, decode_error = measure_cache(model)
    assert cached == emission.cached_numbers_per_token == program.cached_numbers_per_token
    assert decode_error < 1e-5


@pytest.mark.parametrize("pipeline", ["share{fraction=0.5}", "share{fraction=0.5 edge=kv}", "moh{active=0.5}"])
@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_generation_with_a_cache_equals_generation_without(pipeline: str, how: str) -> None:
    model = module_of(choose(apply(program_of("llama"), pipeline).program)[0])
    model.set_attn_implementation(how)
    ids = tokens(2, 7) % models.VOCAB
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    beams = model.generate(ids, num_beams=3, **options)
    assert beams.shape == cached.shape


@pytest.mark.parametrize("pipeline", ["share{fraction=0.5}", "share{fraction=0.5 edge=kv}", "moh{active=0.5}"])
def test_left_padding_changes_nothing(pipeline: str) -> None:
    model = module_of(choose(apply(program_of("llama"), pipeline).program)[0])
    ids = tokens(1, 6) % models.VOCAB
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    with torch.no_grad():
        plain = model(ids).logits
        moved = model(padded, attention_mask=mask).logits[:, 3:]
    assert models.relative_error(moved, plain) < 1e-5


def test_reusing_the_map_equals_reusing_queries_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    model = module_of(choose(apply(program_of("llama"), "share{fraction=0.5}").program)[0], torch.float64)
    ids = tokens(2, 15) % models.VOCAB
    outputs = []
    for cost in (0, 10**9):
        monkeypatch.setattr(GroupedAttention, "cost", lambda self, q, k, cost=cost: cost)
        with torch.no_grad():
            outputs.append(model(ids).logits)
    assert models.relative_error(outputs[0], outputs[1]) < 1e-12


def test_the_load_balance_is_part_of_the_loss_and_trains_the_router() -> None:
    """M9: tokens spread evenly give a load of k; the loss has it, and its gradient reaches every part of the gates."""
    program = apply(program_of("llama"), "moh{active=0.75 gate=weighted shared-heads=2 fill=none behind=false}").program
    model = module_of(choose(program)[0])
    ids = tokens(2, 12) % models.VOCAB
    losses = []
    for weight in (0.0, 1.0):
        model.config.load_balance = weight
        losses.append(model(ids, labels=ids).loss)
    loads = torch.stack([router.load for router in model.routers])
    assert float((losses[1] - losses[0]).detach()) == pytest.approx(float(loads.mean().detach()), rel=1e-5)
    losses[1].backward()
    for router in model.routers:
        for linear in (router.score, router.share, router.balance):
            assert float(linear.weight.grad.abs().max()) > 0
    router = model.routers[0]
    scores = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    works = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    router.weigh(torch.zeros(2, 32), scores, works)
    assert float(router.load.detach()) == pytest.approx(router.active, abs=1e-6)
    router.weigh(torch.zeros(2, 32), scores[:1], works[:1])
    assert float(router.load.detach()) > router.active + 0.5


def test_a_layer_that_shares_is_not_run_alone() -> None:
    model = module_of(choose(apply(program_of("llama"), "share{fraction=0.25}").program)[0])
    attention = next(m for m in model.modules() if isinstance(m, GroupedAttention) and m.edge)
    with pytest.raises(RuntimeError, match="run by their model"):
        attention(torch.zeros(1, 2, 32))
    assert SHARED not in dict(model.named_buffers())


RELOAD = """
import json, sys, torch, transformers
import attnopt
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    logits = model(ids).logits
text = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
print(json.dumps([type(model).__name__, logits.flatten().tolist(), text.tolist()]))
"""


@pytest.mark.parametrize(("pipeline", "name"), [
    ("share{fraction=0.5},prune{keep-heads=0.5},moh{active=0.5}", "AttnoptForCausalLM"),
    pytest.param("prune{keep-heads=0.5}", "LlamaForCausalLM", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_fresh_process_computes_the_same(pipeline: str, name: str, tmp_path: Path) -> None:
    program = apply(program_of("llama"), pipeline).program

    class Nothing:
        def copy_side_files(self, destination: Path) -> tuple[str, ...]:
            return ()

    with Staging(tmp_path / "out", key="test") as staging:
        emit(program, Nothing(), staging)
        staging.finish()
    ids = (tokens(2, 9) % models.VOCAB).tolist()
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "out"), json.dumps(ids)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    architecture, logits, text = json.loads(done.stdout.splitlines()[-1])
    assert architecture == name
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        own = here(torch.tensor(ids)).logits
    assert torch.equal(torch.tensor(logits), own.flatten())
    assert text == here.generate(torch.tensor(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False).tolist()


@pytest.mark.parametrize(
    ("family", "pipeline"),
    [("bert", "share{layers=1}"), ("bert", "prune{keep-heads=0.5}"), ("vit", "prune{fill=none}"),
     ("swin", "dimap{structured=true}"), ("swin", "dimap"), ("bert", "dimap{structured=true}"), ("bert", "moh")],
)  # fmt: skip
def test_encoders_are_written(family: str, pipeline: str) -> None:
    _, program = models.captured(family)
    given = None
    if family == "vit":  # images cannot be calibrated on, but a plan needs no text
        given = {"heads": {fqn: {"keep": [0, 3]} for fqn in program.sites}}
    program = program.replace(config={**program.config, "architectures": [type(models.build(family)).__name__]})
    after = apply(program, pipeline, given=given).program
    emission, _ = choose(after, "attnopt" if pipeline != "dimap" else "auto")
    fields = {key: value for key, value in emission.config.items() if key not in ("model_type", "auto_map")}
    if emission.target == "attnopt":
        model = AutoModel.from_config(AttnoptConfig(**fields)).eval()
    else:
        model = models.build(family)
    store = emission.store
    model.load_state_dict({name: store.get(name) for name in store.names()}, strict=emission.target == "attnopt")
    batch = models.inputs(family)
    with torch.no_grad():
        got = model(**batch)[0]
    assert models.relative_error(got, run(after, **batch)[program.outputs[0]]) < 1e-5


def test_what_the_source_class_cannot_hold_is_said() -> None:
    program = apply(program_of("llama", 2, 8, 4), "prune{keep-heads=0.75}").program
    refused = source_class.can_emit(program)
    assert refused is not None
    assert "refuses the number of heads" in str(refused)  # 6 heads do not divide a width of 32
    with pytest.raises(UnsupportedError, match="refuses the number"):
        choose(program, "source")
    emission, why = choose(program)
    assert emission.target == "attnopt"
    assert why is not None
    shared = apply(program_of("llama"), "share{fraction=0.25}").program
    assert "another layer" in str(source_class.can_emit(shared))
