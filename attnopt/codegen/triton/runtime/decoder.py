"""Runs a package's model: buffers for its cache, ragged batches, greedy generation. Imports only torch and triton."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .loader import read_json, read_weights
from .select import PAGE


class Decoder:
    """A package's model and one batch of sequences.

    Args:
        model: the generated module, with `forward` and `CACHE`.
        directory: the package.
        device: where to run; None for the first GPU, or the CPU (plain torch) without one.
        dtype: of weights and cache; None for the manifest's.
    """

    def __init__(
        self, model: Any, directory: Path, device: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.model = model
        self.directory = directory
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        stored = read_json(directory / "attnopt.json").get("dtype", "float32")
        self.dtype = dtype or getattr(torch, stored)
        weights = read_weights(directory, self.device)
        self.weights = {
            name: w.to(self.dtype) if w.is_floating_point() and w.ndim > 1 else w for name, w in weights.items()
        }
        self.reset(1, PAGE)

    def reset(self, batch: int, capacity: int) -> None:
        """Make room for `batch` sequences of up to `capacity` tokens, and forget what was cached."""
        room = 4 * PAGE
        while room < capacity:
            room *= 2  # few sizes, so that kernels are compiled for few
        self.capacity = room
        self.past_length = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.cache = {
            name: torch.zeros(
                (batch, heads, room, width) if heads else (batch, room, width), dtype=self.dtype, device=self.device
            )
            for name, (heads, width) in self.model.CACHE.items()
        }

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Tensor:
        """Read tokens [B, S] and append them to the cache; logits [B, S, vocabulary].

        Raises:
            ValueError: the cache has no room for them.
        """
        if int(self.past_length.max()) + input_ids.shape[1] > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens; call reset with more")
        logits = self.model.forward(self.weights, self.cache, input_ids.to(self.device), self.past_length)
        self.past_length = self.past_length + input_ids.shape[1]
        return logits

    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos: Sequence[int] = ()) -> list[list[int]]:
        """Continue prompts of any lengths with the most likely token; the new tokens of each."""
        lengths = torch.tensor([len(p) for p in prompts])
        longest = int(lengths.max())
        self.reset(len(prompts), longest + max_new_tokens)
        padded = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = torch.tensor(prompt)
        # A row's padding is cached behind its end, where nothing sees it, and overwritten by the next tokens.
        logits = self.forward(padded)
        last = logits[torch.arange(len(prompts)), lengths.to(logits.device) - 1]
        self.past_length = lengths.to(self.device)
        produced: list[list[int]] = [[] for _ in prompts]
        running = [True] * len(prompts)
        for step in range(max_new_tokens):
            token = last.argmax(-1)
            for row, value in enumerate(token.tolist()):
                if running[row]:
                    produced[row].append(value)
                    running[row] = value not in eos
            if not any(running) or step + 1 == max_new_tokens:
                break
            last = self.forward(token[:, None])[:, -1]
        return produced


def end_tokens(directory: Path) -> tuple[int, ...]:
    """Ids that end a text, from generation_config.json or config.json."""
    for name in ("generation_config.json", "config.json"):
        found = read_json(directory / name).get("eos_token_id")
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return ()
