"""The standalone package: it needs nothing of attnopt, runs here in plain torch, and holds what it says."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="the kernels need Triton 3.6 or newer")

from attnopt.codegen.target import Claim, Refusal, find_target
from attnopt.codegen.triton import emit as emit_module
from attnopt.codegen.triton.emit import PACKAGE
from attnopt.errors import OptionError, UnsupportedError
from attnopt.exporting import ExportOptions, export_model
from attnopt.progress import Silent
from tests.codegen.exports import exported_once
from tests.codegen.variants import VARIANTS, variant
from tests.models import build, eager_output, save


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Packages of families."""
    return lambda family: exported_once(tmp_path_factory, family, ExportOptions("triton", dtype="float32"))


def run(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a module of the package, away from attnopt and its tests."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        env={**kept, "PYTHONDONTWRITEBYTECODE": "1", **environment},  # the package stays as it was written
    )


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "deepseek_v3"])
def test_it_generates_what_torch_does(family: str, package: Callable[[str], Path]) -> None:
    done = run(package(family), PACKAGE, "--ids", "5,9,11,40", "--tokens", "5", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    model, ids = build(family), torch.tensor([[5, 9, 11, 40]])
    for _ in range(5):
        ids = torch.cat([ids, eager_output(model, {"input_ids": ids})[:, -1:].argmax(-1)], 1)
    assert done.stdout.strip() == ",".join(map(str, ids[0, 4:].tolist()))


@pytest.mark.slow
def test_its_kernels_run_in_the_interpreter(package: Callable[[str], Path]) -> None:
    for family in ("llama", "deepseek_v3"):
        arguments = (PACKAGE, "--ids", "5,9,11,40,3", "--tokens", "3", "--device", "cpu")
        plain = run(package(family), *arguments, "--kernels", "reference")
        triton = run(package(family), *arguments, "--kernels", "triton", TRITON_INTERPRET="1")
        assert triton.returncode == 0, triton.stderr[-2000:]
        assert triton.stdout == plain.stdout


def test_it_imports_only_torch_and_triton(package: Callable[[str], Path]) -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in (package("deepseek_v3") / PACKAGE).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for name in names:
                late = path.name == "__main__.py" and name == "tokenizers"  # only for prompts in text
                assert late or name.split(".")[0] in allowed, f"{path.name} imports {name}"


@pytest.mark.slow
def test_selftest_says_what_it_could_not_test(package: Callable[[str], Path]) -> None:
    done = run(package("llama"), f"{PACKAGE}.selftest")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    if not torch.cuda.is_available():
        assert "no GPU here" in report["note"]


def test_it_holds_binaries_metadata_and_picks(package: Callable[[str], Path]) -> None:
    directory = package("deepseek_v3") / PACKAGE
    binaries = sorted(p.name for p in (directory / "binaries").iterdir())
    assert [b for b in binaries if b.endswith(".cubin")] == [
        f"latent_h4_r16_p4_{kernel}.cubin" for kernel in ("combine", "decode", "prefill")
    ]
    for path in (directory / "binaries").glob("*.cubin"):
        assert path.read_bytes()[:4] == b"\x7fELF"
        facts = json.loads(path.with_suffix(".json").read_text())
        assert facts["target"] == "sm_90"
        assert facts["arguments"]
    picks = json.loads((directory / "configs" / "sm90.json").read_text())
    assert picks["schema"] == 1
    assert picks["kernels"]["mla_decode"]["H4 R16 P4 page64 4 sq1"]["kernel"] == "mla_decode_d1"
    assert "binaries" in {p.name for p in directory.iterdir()}
    assert not list(package("deepseek_v3").rglob("__pycache__"))


def test_the_model_is_readable(package: Callable[[str], Path]) -> None:
    source = (package("deepseek_v3") / PACKAGE / "model.py").read_text()
    assert "# model.layers.0.self_attn" in source
    assert source.count("ops.attend_latent(") == 2
    assert source.count("ops.cache_write(") == 2
    assert "kv_b_proj.weight__w_uk" in source


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights(dtype: str, tmp_path: Path) -> None:
    save("llama", tmp_path / "model")
    done = export_model(tmp_path / "model", tmp_path / "out", ExportOptions("triton", dtype=dtype), Silent())
    assert done.checks["logits in plain torch"] < 1e-5
    run_done = run(tmp_path / "out", PACKAGE, "--ids", "5,9", "--tokens", "2", "--device", "cpu")
    assert run_done.returncode == 0, run_done.stderr


@pytest.mark.slow
def test_what_cannot_be_lowered_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama", tmp_path / "model")
    real = emit_module.claim

    def first_only(program: object, site: object, *rest: object) -> Claim | Refusal:
        return real(program, site, *rest) if site.layer == 0 else Refusal(site.fqn, "made up")

    monkeypatch.setattr(emit_module, "claim", first_only)
    done = export_model(tmp_path / "model", tmp_path / "out", ExportOptions("triton"), Silent())
    assert done.to_json()["refused"][0]["refused"] == "made up"
    assert any("plain torch: made up" in note for note in done.notes)
    assert "ops.attend_reference(" in (tmp_path / "out" / PACKAGE / "model.py").read_text()
    monkeypatch.setattr(emit_module, "claim", lambda program, site, *rest: Refusal(site.fqn, "made up"))
    with pytest.raises(UnsupportedError, match="made up"):
        export_model(tmp_path / "model", tmp_path / "none", ExportOptions("triton"), Silent())
    assert not (tmp_path / "none").exists()


def test_mistakes_are_named(tmp_path: Path) -> None:
    save("llama", tmp_path / "model")
    for options, message in (
        (ExportOptions("triton", target="cpu"), "does not compile for cpu"),
        (ExportOptions("triton", dtype="int8"), "cannot hold 'int8'"),
        (ExportOptions("triton", target="sm_70"), "no target 'sm_70'"),
    ):
        with pytest.raises(OptionError, match=message):
            export_model(tmp_path / "model", tmp_path / "out", options, Silent())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.slow
def test_a_package_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama", tmp_path / "model")
    real = emit_module.model_source
    monkeypatch.setattr(
        emit_module, "model_source", lambda *a: real(*a).replace("0.35355339059327", "0.36355339059327")
    )
    with pytest.raises(UnsupportedError, match="differs from the model"):
        export_model(tmp_path / "model", tmp_path / "out", ExportOptions("triton"), Silent())


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_layers_that_share_or_route(name: str, tmp_path: Path) -> None:
    """emit compares with the program in plain torch; here the kernels are compared with that, in the interpreter."""
    program = variant(name)
    done = emit_module.emit_triton(program, tmp_path, find_target("sm_90"), "float32", Silent())
    assert done.checks["logits in plain torch"] < 1e-5
    assert done.cached_numbers_per_token == program.cached_numbers_per_token
    forms = [v.form for v in done.verdicts if isinstance(v, Claim)]
    assert forms == ["gqa_decode", {"shared-map": "map_decode", "routed": "gqa_decode routed"}.get(name, "gqa_decode")]
    if name == "shared-map":
        kernels = {path.stem.rsplit("_", 1)[0] for path in (tmp_path / PACKAGE / "binaries").glob("*_decode.cubin")}
        assert kernels == {"owner_h4_g2_d8_v8", "map_h4_g2_d8_v8"}
    arguments = (PACKAGE, "--ids", "5,9,11,40,3", "--tokens", "3", "--device", "cpu")
    plain = run(tmp_path, *arguments, "--kernels", "reference")
    kernels_run = run(tmp_path, *arguments, "--kernels", "triton", TRITON_INTERPRET="1")
    assert plain.returncode == kernels_run.returncode == 0, plain.stderr[-1000:] + kernels_run.stderr[-2000:]
    assert kernels_run.stdout == plain.stdout
