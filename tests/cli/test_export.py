"""`attnopt export` on the command line: documents, refusals, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnopt.codegen.onnx import generate
from tests.cli.helpers import Run, entries


@pytest.mark.slow
def test_onnx_export_of_a_directory(cli: Run, tiny: Path, tmp_path: Path) -> None:
    done = cli("export", tiny, "--format", "onnx", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    document = done.document
    assert document["schema"] == "attnopt.export/1"
    assert [site["form"] for site in document["sites"]] == ["matmul", "matmul"]
    assert document["refused"] == []
    assert max(document["checks"].values()) < 1e-4
    assert {"model.onnx", "config.json", "tokenizer.json"} <= set(document["files"])
    assert {"attnopt.json", "README.md", *document["files"]} == entries(tmp_path / "out")
    text = generate(tmp_path / "out", "The quick", max_new_tokens=4)
    assert isinstance(text, str)
    assert generate(tmp_path / "out", ["The quick", "a"], max_new_tokens=4)[0] == text


@pytest.mark.slow
def test_the_view_for_people_and_the_quiet_one(cli: Run, tiny: Path, tmp_path: Path) -> None:
    done = cli("export", tiny, "--format", "onnx", "-o", tmp_path / "out")
    assert "matmul" in done.out
    assert "relative error" in done.out
    again = cli("export", tiny, "--format", "onnx", "-o", tmp_path / "out", "--overwrite", "-q")
    assert again.out.strip() == str(tmp_path / "out")


def test_an_export_can_be_exported_to_another_path_only(cli: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    done = cli("export", tiny, "--format", "onnx", "-o", tmp_path / "out", "--overwrite")
    assert done.code == 1
    assert entries(tmp_path) == {"out", "out/mine.txt"}


def test_mistakes_exit_with_1_and_leave_nothing(cli: Run, tiny: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("--format", "triton", "--target", "cpu"), "does not compile for cpu"),
        (("--format", "onnx", "--target", "sm_91"), "there is no target 'sm_91'"),
        (("--format", "triton", "--dtype", "int4"), "cannot hold 'int4'"),
    ):
        done = cli("export", tiny, *arguments, "-o", tmp_path / "out", "--json")
        assert done.code == 1
        assert message in done.document["message"]
        assert done.document["hint"]
        assert entries(tmp_path) == set()


@pytest.mark.slow
def test_the_manifest_says_where_it_comes_from(cli: Run, tiny: Path, tmp_path: Path) -> None:
    cli("export", tiny, "--format", "onnx", "--attention", "operator", "-o", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "attnopt.json").read_text())
    assert manifest["schema"] == "attnopt.artefact/1"
    assert manifest["options"] == {"format": "onnx", "target": "cpu", "attention": "operator"}
    assert manifest["source"]["name"] == tiny.name
    assert [site["form"] for site in manifest["sites"]] == ["operator", "operator"]
    assert manifest["cache"][0]["shape"] == ["batch", 2, "capacity", 8]
