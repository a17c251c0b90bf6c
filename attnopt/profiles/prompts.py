"""Prompts to profile on: each a batch of one, cut to what is real, so that padding can never count."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import OptionError
from attnopt.profiles.calibration import Calibration


@dataclass(frozen=True)
class Prompts:
    """What a profile is measured on.

    Attributes:
        inputs: the program's inputs by name for each prompt, batch 1, without padding.
        source: "self", file names, or what else they come from.
        seed: of their sampling.
    """

    inputs: tuple[Mapping[str, Tensor], ...]
    source: str
    seed: int = 0

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def images(self) -> bool:
        """Whether they are images."""
        return "pixel_values" in self.inputs[0]

    @property
    def hashes(self) -> tuple[str, ...]:
        """SHA-256 of each prompt's inputs."""
        return tuple(_hash(inputs) for inputs in self.inputs)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt; 0 for images."""
        return tuple(inputs["input_ids"].shape[1] if "input_ids" in inputs else 0 for inputs in self.inputs)

    def to_json(self) -> dict[str, Any]:
        """What a profile says of them."""
        hashes = self.hashes
        return {
            "source": self.source,
            "seed": self.seed,
            "n_prompts": len(self),
            "lengths": sorted(set(self.lengths)),
            "tokens": sum(self.lengths),
            "prompt_sha256": list(hashes),
            "sha256": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        }

    @classmethod
    def of(cls, batches: Sequence[Mapping[str, Tensor]], source: str, seed: int = 0) -> Prompts:
        """Prompts from batches of inputs; padding that an `attention_mask` marks is cut off.

        Args:
            batches: inputs by name, any batch size.
            source, seed: see the attributes.

        Raises:
            OptionError: if there is none, one is empty, or padding lies inside a prompt.
        """
        inputs = []
        for batch in batches:
            for row in range(next(iter(batch.values())).shape[0]):
                inputs.append(_unpadded({name: value[row : row + 1] for name, value in batch.items()}))
        if not inputs:
            raise OptionError("there is no prompt to profile on", "give at least one")
        return cls(tuple(inputs), source, seed)

    @classmethod
    def of_calibration(cls, text: Calibration) -> Prompts:
        """All windows of a calibration text: a profile chooses nothing, so both pools serve."""
        windows = torch.cat([text.windows, text.selection])
        return cls.of([{"input_ids": windows}], text.source, text.seed)


def _unpadded(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = dict(inputs)
    mask = result.pop("attention_mask", None)
    if mask is None:
        return result
    (real,) = mask[0].nonzero(as_tuple=True)
    if len(real) == 0:
        raise OptionError("a prompt is all padding", "leave it out")
    first, last = int(real[0]), int(real[-1]) + 1
    if last - first != len(real):
        raise OptionError("a prompt has padding between its tokens", "pad at its end or not at all")
    length = mask.shape[1]
    return {n: v[:, first:last] if v.ndim == 2 and v.shape[1] == length else v for n, v in result.items()}


def _hash(inputs: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256()
    for name in sorted(inputs):
        value = inputs[name]
        state.update(f"{name} {tuple(value.shape)} {value.dtype}\0".encode())
        state.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
