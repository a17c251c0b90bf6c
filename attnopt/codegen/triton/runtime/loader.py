"""Reads a package: weights from safetensors, facts from its manifest. Imports only torch.

The format is simple enough to read here, so that a package needs nothing but torch and triton: eight bytes, the length
of a JSON header, then the tensors (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_safetensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        ValueError: the file is damaged.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        result = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            file.seek(8 + length + start)
            data = bytearray(file.read(stop - start))
            if len(data) != stop - start:
                raise ValueError(f"{path} ends inside {name}")
            flat = torch.frombuffer(data, dtype=_DTYPES[entry["dtype"]]) if data else torch.empty(0)
            result[name] = flat.reshape(entry["shape"]).to(device)
    return result


def read_weights(directory: Path, device: torch.device) -> dict[str, Tensor]:
    """All weights of a package, from one file or from shards."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return read_safetensors(directory / "model.safetensors", device)
    weights: dict[str, Tensor] = {}
    for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
        weights |= read_safetensors(directory / name, device)
    return weights


def read_json(path: Path) -> dict[str, Any]:
    """A JSON document, or {} if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
