"""Pictures from files: any usual layout, prepared as the model says; what is no picture is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from attnopt.errors import AttnoptError
from attnopt.profiles.images import image_prompts
from attnopt.profiles.prompts import Prompts

SIZE = 16


def prompts(folder: Path, *files: Path, count: int = 16) -> Prompts:
    """Prompts for a model in `folder` that takes 16 x 16 pictures of three channels."""
    source: Any = SimpleNamespace(path=folder)
    program: Any = SimpleNamespace(config={"image_size": SIZE, "num_channels": 3})
    return image_prompts(source, program, files, count)


@pytest.mark.parametrize("shape", [(5, 10, 10), (5, 16, 16, 3), (5, 3, 16, 16)])
def test_arrays(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stored = numpy.random.default_rng(0).integers(0, 255, shape, dtype=numpy.uint8)
    numpy.savez(tmp_path / "p.npz", images=stored)
    found = prompts(tmp_path, tmp_path / "p.npz")
    assert len(found) == 5
    pixels = found.inputs[0]["pixel_values"]
    assert pixels.shape == (1, 3, SIZE, SIZE)
    assert -1 <= float(pixels.min()) < float(pixels.max()) <= 1
    if shape[1:] == (16, 16, 3):
        expected = torch.from_numpy(stored[0]).permute(2, 0, 1)[None] / 255
        torch.testing.assert_close(pixels, (expected - 0.5) / 0.5)


def test_fewer_pictures_are_spread_over_all(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "p.npz", images=numpy.arange(9.0)[:, None, None] * numpy.ones((1, 4, 4)) / 10)
    found = prompts(tmp_path, tmp_path / "p.npz", count=3)
    assert [round(10 * (float(p["pixel_values"].mean()) + 1) / 2) for p in found.inputs] == [1, 4, 7]


def test_the_models_own_normalisation(tmp_path: Path) -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 0.125]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    numpy.savez(tmp_path / "p.npz", numpy.full((1, 3, SIZE, SIZE), 0.6, dtype=numpy.float32))
    pixels = prompts(tmp_path, tmp_path / "p.npz").inputs[0]["pixel_values"]
    expected = (0.6 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(pixels[0, :, 3, 5], expected)


def test_a_directory(tmp_path: Path) -> None:
    for index in range(4):
        pixels = numpy.random.default_rng(index).integers(0, 255, (20, 30, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert len(prompts(tmp_path, tmp_path)) == 4
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(AttnoptError, match=r"0\.png"):
        prompts(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, None, "calibration pictures"),
        ("words.txt", b"words", "holds no pictures"),
        ("empty.npz", b"", "cannot read pictures"),
        ("cut.npz", b"PK\x03\x04", "cannot read pictures"),
        ("missing.npz", None, "cannot read pictures"),
        ("folder", None, "holds no pictures"),
    ],
)
def test_no_pictures(tmp_path: Path, name: str | None, content: bytes | None, message: str) -> None:
    if name == "folder":
        (tmp_path / name).mkdir()
    elif name and content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(AttnoptError, match=message) as caught:
        prompts(tmp_path, *([tmp_path / name] if name else []))
    assert caught.value.hint


def test_an_array_that_is_no_list_of_pictures(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "p.npz", images=numpy.zeros(7))
    with pytest.raises(AttnoptError, match=r"shape \[7\]"):
        prompts(tmp_path, tmp_path / "p.npz")
