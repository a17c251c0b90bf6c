"""Which design and tile a shape gets: a table of measured picks, and a deterministic default for what is not in it.

A miss never times anything: timed picks vary from run to run and change the numbers. Imports only the standard library;
copied into packages.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: Slots in a page; every BN divides it.
PAGE = 64


@dataclass(frozen=True)
class Config:
    """A kernel and its tile.

    Attributes:
        kernel: name of the kernel function.
        BH, BN: rows (query heads) and cache slots in a tile.
        num_warps, num_stages: as Triton takes them.
        narrow: 32-bit offsets within a block (MLA).
    """

    kernel: str
    BH: int
    BN: int
    num_warps: int
    num_stages: int
    narrow: bool = True


def pow2(n: int) -> int:
    """The smallest power of two that is at least n, and at least 16 (the least a tensor-core product takes)."""
    return max(16, 1 << (n - 1).bit_length())


def shared_bytes(rows: int, slots: int, width: int, buffers: int, itemsize: int) -> int:
    """Shared memory of an MLA tile: queries, cache blocks, and the weights on their way to the second product."""
    return itemsize * (rows + buffers * slots) * width + itemsize * rows * slots


def mla_decode_config(rows: int, rank: int, rope: int, itemsize: int, arch: str, shared_memory: int) -> Config:
    """The default for absorbed decoding.

    Args:
        rows: query tokens times heads.
        rank, rope: R and P.
        itemsize: bytes of a cached number.
        arch: "sm80", "sm89", "sm90", "sm100" or "gfx942".
        shared_memory: bytes a thread block can have.
    """
    width = pow2(rank) + pow2(rope)
    candidates = []
    if arch in ("sm90", "sm100") and itemsize == 2:
        if 16 < rows <= 32:
            candidates.append(Config("mla_decode_d2", 32, 64, 4, 2, narrow=False))
        elif rows > 32:
            candidates.append(Config("mla_decode_d3", 64, 32, 8, 2))
    tall = 32 if rows > 16 and itemsize == 2 else 16
    candidates.append(Config("mla_decode_d1", tall, 32, 8 if tall == 32 else 4, 3))
    candidates.append(Config("mla_decode_d1", 16, 32, 4, 2))
    candidates.append(Config("mla_decode_d1", 16, 16, 4, 2))
    if arch.startswith("gfx"):
        candidates = [Config("mla_decode_d1", 16, 32, 4, 1), Config("mla_decode_d1", 16, 16, 4, 1)]
    for config in candidates:
        buffers = 2 * config.num_stages if config.kernel == "mla_decode_d3" else config.num_stages
        if shared_bytes(config.BH, config.BN, width, buffers, itemsize) <= shared_memory:
            return config
    return candidates[-1]


def gqa_decode_config(rows: int, width: int, value_width: int, itemsize: int, arch: str, shared_memory: int) -> Config:
    """The default for decoding with keys and values; `rows` is query tokens times heads of a group."""
    tile = pow2(rows)
    stages = 1 if arch.startswith("gfx") else 3
    for slots in (64, 32, 16):
        needed = itemsize * (tile * pow2(width) + stages * slots * (pow2(width) + pow2(value_width)) + tile * slots)
        if needed <= shared_memory:
            return Config("gqa_decode", tile, slots, 4, stages)
    return Config("gqa_decode", tile, 16, 4, 1)


def prefill_config(nope: int, rope: int, value_width: int, itemsize: int, arch: str, shared_memory: int) -> Config:
    """The default for prompts: BH is the tile of queries, BN of keys."""
    width = pow2(nope) + (pow2(rope) if rope else 0)
    wide = arch in ("sm90", "sm100") and itemsize == 2
    for tile, slots, warps, stages in ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1)):
        needed = itemsize * (tile * width + stages * slots * (width + pow2(value_width)) + tile * slots)
        if needed <= shared_memory and (wide or tile < 128):
            return Config("prefill", tile, slots, warps, 1 if arch.startswith("gfx") else stages)
    return Config("prefill", 16, 16, 4, 1)


class Tuned:
    """Measured picks of one device and Triton version, from a JSON file.

    The file holds {"schema": 1, "arch": ..., "sms": ..., "triton": ..., "kernels": {kernel: {shape: config}}}. Picks of
    another architecture or Triton version are not used.
    """

    def __init__(self, path: Path | None, arch: str, triton: str) -> None:
        self._kernels: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            document = json.loads(path.read_text(encoding="utf-8"))
            if (document.get("schema"), document.get("arch"), document.get("triton")) == (1, arch, triton):
                self._kernels = document["kernels"]

    def get(self, kernel: str, shape: str, default: Config) -> Config:
        """The pick for a shape, or the default."""
        found = self._kernels.get(kernel, {}).get(shape)
        return Config(**found) if found is not None else default


def tuned_document(arch: str, sms: int, triton: str, picks: dict[str, dict[str, Config]]) -> dict[str, Any]:
    """The content of a file for `Tuned`."""
    kernels = {kernel: {shape: asdict(c) for shape, c in shapes.items()} for kernel, shapes in picks.items()}
    return {"schema": 1, "arch": arch, "sms": sms, "triton": triton, "kernels": kernels}
