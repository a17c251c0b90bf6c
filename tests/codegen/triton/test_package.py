"""The standalone package: it needs nothing of attnopt, runs here in plain torch, and holds what it says."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from attnopt.codegen.triton import emit as emit_module
from attnopt.codegen.triton.emit import PACKAGE
from attnopt.errors import OptionError, UnsupportedError
from attnopt.exporting import ExportOptions, export_model
from attnopt.progress import Silent
from tests.models import build, eager_output, save


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packages of families, made when first asked for, and without compiling: that has tests of its own."""

    class Lazy(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            root = tmp_path_factory.mktemp(name)
            save(name, root / "model")
            export_model(root / "model", root / "out", ExportOptions("triton", dtype="float32"), Silent())
            self[name] = root / "out"
            return self[name]

    return Lazy()


def run(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a module of the package, away from attnopt and its tests."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        env={**kept, **environment},
    )


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_it_generates_what_torch_does(family: str, packages: dict[str, Path]) -> None:
    done = run(packages[family], PACKAGE, "--ids", "5,9,11,40", "--tokens", "5", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    model, ids = build(family), torch.tensor([[5, 9, 11, 40]])
    for _ in range(5):
        ids = torch.cat([ids, eager_output(model, {"input_ids": ids})[:, -1:].argmax(-1)], 1)
    assert done.stdout.strip() == ",".join(map(str, ids[0, 4:].tolist()))


def test_its_kernels_run_in_the_interpreter(packages: dict[str, Path]) -> None:
    for family in ("llama", "deepseek_v3"):
        arguments = (PACKAGE, "--ids", "5,9,11,40,3", "--tokens", "3", "--device", "cpu")
        plain = run(packages[family], *arguments, "--kernels", "reference")
        triton = run(packages[family], *arguments, "--kernels", "triton", TRITON_INTERPRET="1")
        assert triton.returncode == 0, triton.stderr[-2000:]
        assert triton.stdout == plain.stdout


def test_it_imports_only_torch_and_triton(packages: dict[str, Path]) -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in (packages["llama"] / PACKAGE).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for name in names:
                late = path.name == "__main__.py" and name == "tokenizers"  # only for prompts in text
                assert late or name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_selftest_says_what_it_could_not_test(packages: dict[str, Path]) -> None:
    done = run(packages["llama"], f"{PACKAGE}.selftest")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    if not torch.cuda.is_available():
        assert "no GPU here" in report["note"]


def test_it_holds_binaries_metadata_and_picks(packages: dict[str, Path]) -> None:
    package = packages["deepseek_v3"] / PACKAGE
    binaries = sorted(p.name for p in (package / "binaries").iterdir())
    assert [b for b in binaries if b.endswith(".cubin")] == [
        f"latent_h4_r16_p4_{kernel}.cubin" for kernel in ("combine", "decode", "prefill")
    ]
    for path in (package / "binaries").glob("*.cubin"):
        assert path.read_bytes()[:4] == b"\x7fELF"
        facts = json.loads(path.with_suffix(".json").read_text())
        assert facts["target"] == "sm_90"
        assert facts["arguments"]
    picks = json.loads((package / "configs" / "sm90.json").read_text())
    assert picks["schema"] == 1
    assert picks["kernels"]["mla_decode"]["H4 R16 P4 page64 4 sq1"]["kernel"] == "mla_decode_d1"
    assert "binaries" in {p.name for p in package.iterdir()}
    assert not list(packages["deepseek_v3"].rglob("__pycache__"))


def test_the_model_is_readable(packages: dict[str, Path]) -> None:
    source = (packages["deepseek_v3"] / PACKAGE / "model.py").read_text()
    assert "# model.layers.0.self_attn" in source
    assert source.count("ops.attend_latent(") == 2
    assert source.count("ops.cache_write(") == 2
    assert "kv_b_proj.weight__w_uk" in source


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights(dtype: str, tmp_path: Path) -> None:
    save("llama", tmp_path / "model")
    done = export_model(tmp_path / "model", tmp_path / "out", ExportOptions("triton", dtype=dtype), Silent())
    assert done.checks["logits in plain torch"] < 1e-5
    run_done = run(tmp_path / "out", PACKAGE, "--ids", "5,9", "--tokens", "2", "--device", "cpu")
    assert run_done.returncode == 0, run_done.stderr


def test_what_cannot_be_lowered_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnopt.codegen.target import Claim, Refusal

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


def test_a_package_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama", tmp_path / "model")
    real = emit_module.model_source
    monkeypatch.setattr(
        emit_module, "model_source", lambda *a: real(*a).replace("0.35355339059327", "0.36355339059327")
    )
    with pytest.raises(UnsupportedError, match="differs from the model"):
        export_model(tmp_path / "model", tmp_path / "out", ExportOptions("triton"), Silent())
