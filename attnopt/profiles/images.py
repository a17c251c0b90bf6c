"""Prompts for image models: pictures from files, prepared as the model's preprocessor says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy
import torch
from torch import Tensor

from attnopt.errors import OptionError, SourceError
from attnopt.profiles.prompts import Prompts
from attnopt.rewriter.checkpoint import read_json

if TYPE_CHECKING:
    from attnopt.rewriter.program import Program
    from attnopt.rewriter.source import ModelSource

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def image_prompts(source: ModelSource, program: Program, files: Sequence[Path], count: int, seed: int = 0) -> Prompts:
    """Prompts from pictures: spread evenly over what the files hold.

    Args:
        source, program: the model.
        files: directories of pictures, or `.npz` files whose array "images" (or only one) is uint8 or float in 0 ... 1,
            [n, height, width], [n, height, width, channels] or [n, channels, height, width].
        count: at most this many.
        seed: recorded only.

    Raises:
        OptionError: if no file is given or one is of an unknown kind.
        SourceError: if one cannot be read or holds no picture.
    """
    if not files:
        raise OptionError(
            "an image model cannot write its own calibration pictures", "give a directory or .npz with --calib"
        )
    share = max(1, count // len(files))
    pictures = [picture for file in files for picture in _pictures(Path(file), share)][:count]
    size, channels = _input_size(program.config)
    mean, std = _normalisation(source, channels)
    batches = [{"pixel_values": (_fitted(picture, size, channels) - mean) / std} for picture in pictures]
    return Prompts.of(batches, ", ".join(Path(file).name for file in files), seed)


def _pictures(path: Path, count: int) -> list[Tensor]:
    """Pictures as float [C, h, w] in 0 ... 1."""
    if path.is_dir():
        return _from_directory(path, count)
    if path.suffix != ".npz":
        raise OptionError(f"{path} holds no pictures", "give a directory of pictures or an .npz file with --calib")
    try:
        with numpy.load(path, allow_pickle=False) as archive:
            name = "images" if "images" in archive.files else archive.files[0]
            stored = archive[name]
    except (OSError, EOFError, BadZipFile, ValueError, IndexError, KeyError) as error:
        raise SourceError(f"cannot read pictures from {path}: {error}", "check the file") from error
    if stored.ndim not in (3, 4) or len(stored) == 0:
        raise SourceError(
            f"{path}: {name} has shape {list(stored.shape)}, which is no list of pictures", "store [n, height, width]"
        )
    found = torch.from_numpy(stored[_spread(len(stored), count)])
    found = found.float() / 255 if found.dtype == torch.uint8 else found.float()
    if found.ndim == 3:
        found = found[:, None]
    elif found.shape[-1] in (1, 3) and found.shape[1] not in (1, 3):
        found = found.permute(0, 3, 1, 2)
    return list(found)


def _from_directory(path: Path, count: int) -> list[Tensor]:
    from PIL import Image, UnidentifiedImageError

    names = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if not names:
        raise SourceError(f"{path} holds no pictures", f"put {', '.join(SUFFIXES)} files there")
    found = []
    for index in _spread(len(names), count):
        try:
            with Image.open(names[index]) as picture:
                pixels = numpy.asarray(picture.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise SourceError(f"cannot read the picture {names[index]}: {error}", "remove or replace it") from error
        found.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255)
    return found


def _spread(total: int, count: int) -> list[int]:
    count = min(total, count)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def _input_size(config: Mapping[str, Any]) -> tuple[tuple[int, int], int]:
    size = config.get("image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return (int(height), int(width)), int(config.get("num_channels", 3))


def _normalisation(source: ModelSource, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, from preprocessor_config.json; one half without it."""
    file = source.path / "preprocessor_config.json"
    found = read_json(file) if file.is_file() else {}
    mean, std = found.get("image_mean") or [0.5], found.get("image_std") or [0.5]
    parts = [torch.tensor((list(v) * channels)[:channels], dtype=torch.float32).view(1, -1, 1, 1) for v in (mean, std)]
    return parts[0], parts[1]


def _fitted(picture: Tensor, size: tuple[int, int], channels: int) -> Tensor:
    """[1, channels, height, width] of the model's size."""
    if picture.shape[0] != channels:
        picture = picture.mean(0, keepdim=True).expand(channels, -1, -1)
    batch = picture[None]
    if picture.shape[1:] != torch.Size(size):
        batch = torch.nn.functional.interpolate(batch, size, mode="bilinear", antialias=True, align_corners=False)
    return batch.clamp(0, 1)
