"""What an output directory holds: weights in shards, a manifest that reproduces the run, a model card."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import attnopt
from attnopt.files import write_text, writing
from attnopt.rewriter.safe_tensors import Outgoing, write_tensors
from attnopt.rewriter.weights import WeightStore
from attnopt.staging import MANIFEST_NAME, Staging, resume_key

__all__ = [
    "MANIFEST_NAME",
    "MAX_SHARD_BYTES",
    "Manifest",
    "Staging",
    "outgoing",
    "resume_key",
    "write_checkpoint",
    "write_json",
    "writing",
]

#: Size at which a checkpoint is split, as transformers does it.
MAX_SHARD_BYTES = 5_000_000_000


def outgoing(
    weights: WeightStore, names: Iterable[str] | None = None, dtype: torch.dtype | None = None
) -> list[Outgoing]:
    """The tensors of a store as they are to be written, optionally cast (only floating-point ones are)."""
    result = []
    for name in weights.names() if names is None else names:
        meta = weights.meta(name)
        target = dtype if dtype is not None and meta.dtype.is_floating_point else meta.dtype
        result.append(Outgoing(name, meta.shape, target, _loader(weights, name, target)))
    return result


def _loader(weights: WeightStore, name: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: weights.get(name, dtype)


def write_checkpoint(
    directory: Path, tensors: Sequence[Outgoing], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> tuple[str, ...]:
    """Write `model.safetensors`, or shards and their index, holding one tensor in memory at a time.

    Returns:
        The names of the weight files.

    Raises:
        AttnoptError: if they cannot be written.
    """
    shards: list[list[Outgoing]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    with writing(directory):
        if len(shards) == 1:
            write_tensors(directory / "model.safetensors", shards[0])
            return ("model.safetensors",)
        names = tuple(f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards)))
        for name, shard in zip(names, shards, strict=True):
            write_tensors(directory / name, shard)
        weight_map = {t.key: name for name, shard in zip(names, shards, strict=True) for t in shard}
        total = sum(t.nbytes for t in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return names


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON document with sorted keys.

    Raises:
        AttnoptError: if it cannot be written.
    """
    with writing(path):
        write_text(path, json.dumps(dict(value), indent=2, sort_keys=True, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Manifest:
    """What an output directory says about itself in `attnopt.json`.

    Everything but `run` is a function of the inputs, so that two runs of one command agree.

    Attributes:
        source: `ModelSource.identity`.
        pipeline: the exact pipeline text.
        options: everything else that determined the result (calibration, seed, dtype, ...), as plain data.
        emitted_as: what was written, e.g. "deepseek_v3".
        sites_changed: number of attention layers rewritten.
        cached_numbers_per_token, parameters: (before, after).
        layers: per-layer results.
        plan: what the passes did to each layer, as a plan file has it.
        metrics: quality figures.
        recovery: the course of a distillation, as plain data.
        run: what varies from run to run (seconds, memory, machine).
    """

    source: Mapping[str, str]
    pipeline: str
    options: Mapping[str, Any]
    emitted_as: str
    sites_changed: int
    cached_numbers_per_token: tuple[int, int]
    parameters: tuple[int, int]
    layers: Sequence[Mapping[str, Any]] = ()
    plan: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] | None = None
    recovery: Mapping[str, Any] | None = None
    run: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The document."""
        return {
            "schema": "attnopt.manifest/1",
            "attnopt_version": attnopt.__version__,
            "source": dict(self.source),
            "pipeline": self.pipeline,
            "options": dict(self.options),
            "emitted_as": self.emitted_as,
            "sites_changed": self.sites_changed,
            "cached_numbers_per_token": _before_after(self.cached_numbers_per_token),
            "parameters": _before_after(self.parameters),
            "layers": [dict(layer) for layer in self.layers],
            **({"plan": dict(self.plan)} if self.plan is not None else {}),
            "metrics": dict(self.metrics or {}),
            **({"recovery": dict(self.recovery)} if self.recovery is not None else {}),
            "run": dict(self.run or {}),
        }

    def write(self, directory: Path) -> None:
        """Write `attnopt.json` and the model card `README.md`.

        Raises:
            AttnoptError: if they cannot be written.
        """
        write_json(directory / MANIFEST_NAME, self.to_json())
        with writing(directory):
            write_text(directory / "README.md", self.card())

    def card(self) -> str:
        """The model card, in Markdown with the hub's front matter."""
        before, after = self.cached_numbers_per_token
        lines = [
            "---",
            "library_name: transformers",
            f"base_model: {json.dumps(self.source.get('name', ''))}",
            f"tags: [{', '.join(dict.fromkeys(('attnopt', self.emitted_as)))}]",
            "---",
            "",
            f"# {self.source.get('name', 'model')}, rewritten by attnopt",
            "",
            f"{self.sites_changed} attention layers were rewritten and the model was written as `{self.emitted_as}`.",
            "",
            "| | original | this model |",
            "|---|---|---|",
            f"| cached numbers per token | {before:,} | {after:,} ({after / before:.1%}) |"
            if before
            else f"| cached numbers per token | {before:,} | {after:,} |",
            f"| parameters | {self.parameters[0]:,} | {self.parameters[1]:,} |",
        ]
        lines += [f"| {name} | | {_number(value)} |" for name, value in sorted((self.metrics or {}).items())]
        lines += ["", "## How it was made", "", "```", f"attnopt run MODEL -p '{self.pipeline}' -o OUT", "```", ""]
        lines += [f"- {name}: `{value}`" for name, value in sorted(self.options.items())]
        lines += ["", "Source:", ""]
        lines += [f"- {name}: `{value}`" for name, value in self.source.items()]
        lines += ["", f"Made with attnopt {attnopt.__version__}; `{MANIFEST_NAME}` holds all details.", ""]
        return "\n".join(lines)


def _before_after(pair: tuple[int, int]) -> dict[str, int]:
    return {"before": pair[0], "after": pair[1]}


def _number(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
