"""`attnopt profile`: documents, files, views, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest

from attnopt import demo
from attnopt.profiles.profile import Profile
from tests import models
from tests.cli.helpers import Run, entries, save_byte_tokenizer

TEXT = ("--calib-tokens", "512", "--context", "64")


def test_files_document_and_view(cli: Run, tiny: Path, prose: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile"
    outcome = cli("profile", tiny, "-o", out, "--calib", prose, *TEXT, "--json")
    assert outcome.code == 0, outcome.err
    assert entries(out) == {"attnopt.json", "profile.json", "profile.safetensors", "report.html"}
    assert outcome.document["schema"] == "attnopt.profile/1"
    assert outcome.document["output"] == str(out)
    assert json.loads((out / "attnopt.json").read_text())["pipeline"] == "profile"
    profile = Profile.load(out)
    assert profile.model["name"] == tiny.name
    assert {"michel", "retrieval", "spectrum_joint", "map_reuse_error"} <= set(profile.metrics)
    assert entries(tmp_path) == {"profile", *(f"profile/{name}" for name in entries(out))}

    again = cli("profile", tiny, "-o", out, "--calib", prose, *TEXT)
    assert again.code == 1
    assert "exists" in again.err
    shown = cli("profile", tiny, "-o", out, "--calib", prose, *TEXT, "--overwrite", "--no-gradients")
    assert shown.code == 0
    assert "contribution" in shown.out
    assert "█" in shown.out
    assert "report.html" in shown.out
    assert "michel" in Profile.load(out).absent


def test_text_the_model_writes(cli: Run, tiny: Path, tmp_path: Path) -> None:
    outcome = cli("profile", tiny, "-o", tmp_path / "out", *TEXT, "-q")
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{tmp_path / 'out'}\n"
    assert Profile.load(tmp_path / "out").calibration["source"] == "self"


def test_text_of_a_file_and_of_the_model(cli: Run, tiny: Path, prose: Path, tmp_path: Path) -> None:
    outcome = cli("profile", tiny, "-o", tmp_path / "out", "--calib", prose, "--calib", "self", *TEXT, "-q")
    assert outcome.code == 0, outcome.err
    assert Profile.load(tmp_path / "out").calibration["source"] == f"{prose.name}, self"


def test_encoders_read_what_python_ships(cli: Run, tmp_path: Path) -> None:
    model = models.save("bert", tmp_path / "bert", vocab_size=256)
    save_byte_tokenizer(model)
    outcome = cli("profile", model, "-o", tmp_path / "out", *TEXT, "-q")
    assert outcome.code == 0, outcome.err
    profile = Profile.load(tmp_path / "out")
    assert profile.calibration["source"] == "pydoc_data.topics"
    assert "retrieval" in profile.absent


def test_pictures(cli: Run, tmp_path: Path) -> None:
    model = models.save("vit", tmp_path / "vit")
    missing = cli("profile", model, "-o", tmp_path / "out")
    assert missing.code == 1
    assert "calibration pictures" in missing.err
    assert "hint:" in missing.err
    assert entries(tmp_path) - {"vit"} == {f"vit/{part}" for part in entries(model)}
    pictures = tmp_path / "pictures.npz"
    numpy.savez(pictures, images=numpy.random.default_rng(0).integers(0, 255, (5, 10, 10), dtype=numpy.uint8))
    both = cli("profile", model, "-o", tmp_path / "out", "--calib", pictures, "--calib", "self")
    assert both.code == 1
    assert "writes no text" in both.err
    outcome = cli("profile", model, "-o", tmp_path / "out", "--calib", pictures, "-q")
    assert outcome.code == 0, outcome.err
    assert Profile.load(tmp_path / "out").calibration["n_prompts"] == 5


@pytest.mark.slow
def test_the_real_model(cli: Run, tmp_path: Path) -> None:
    """SmolLM2-135M; fetches 98 MB. Most of its heads look at the first token most of the time, and some copy."""
    arguments = ("profile", demo.fetch_model(), "-o", tmp_path / "out", "--calib-tokens", "2048", "--context", "512")
    outcome = cli(*arguments, "-q")
    assert outcome.code == 0, outcome.err
    profile = Profile.load(tmp_path / "out")
    sink, copies = profile.metric("sink_mass"), profile.metric("retrieval")
    assert sink.shape == copies.shape == (30, 9)
    assert (sink[2:] > 0.5).double().mean() > 0.3
    assert copies.max() > 0.5 > copies.median()
    assert profile.metric("michel").isfinite().all()
