"""Which design and tile a shape gets: a table of measured picks, and a deterministic default for what is not in it.

A miss never times anything: timed picks vary from run to run and change the numbers. D4 is never a default: it is a
candidate (`mla_decode_candidates`) that `tune.py` checks and times, and a table's pick only where it passed. Imports
only the standard library; copied into packages.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: Slots in a page; every BN divides it.
PAGE = 64
#: The design that is written in Gluon.
D4 = "mla_decode_d4"


@dataclass(frozen=True)
class Config:
    """A kernel and its tile.

    Attributes:
        kernel: name of the kernel function.
        BH, BN: rows (query heads) and cache slots in a tile.
        num_warps, num_stages: as Triton takes them; D4 has num_stages blocks of the cache in shared memory.
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


def _buffers(config: Config, arch: str) -> int:
    """Blocks of the cache in shared memory: loops of mma.sync copy one ahead of the loads, loops of wgmma do not."""
    if arch.startswith("gfx"):
        return 0
    asynchronous = config.kernel in ("mla_decode_d2", "mla_decode_d3", D4) or (
        config.kernel == "prefill" and hopper(arch)
    )
    return config.num_stages if asynchronous else max(config.num_stages - 1, 1)


def hopper(arch: str) -> bool:
    """Whether products of whole warp groups (wgmma and its successor) exist."""
    return arch in ("sm90", "sm100")


def mla_shared_bytes(config: Config, rank: int, rope: int, itemsize: int, arch: str) -> int:
    """Shared memory of an MLA tile: queries, blocks of the cache, weights on their way to the second product."""
    width, buffers = pow2(rank) + pow2(rope), _buffers(config, arch)
    needed = (config.BH + buffers * config.BN) * width + config.BH * config.BN
    if config.kernel == "mla_decode_d3":
        needed += buffers * config.BN * pow2(rank)  # the values are read again
    exchanged = config.BH * 2 * 4 if config.kernel == D4 else 0  # maxima of rows, between two warp groups
    return itemsize * needed + exchanged


def mla_decode_config(rows: int, rank: int, rope: int, itemsize: int, arch: str, shared_memory: int) -> Config:
    """The default for absorbed decoding.

    Tiles of 32 rows have 64 slots: with 32 the eight warps would compute the scores twice.

    Args:
        rows: query tokens times heads.
        rank, rope: R and P.
        itemsize: bytes of a cached number.
        arch: "sm80", "sm89", "sm90", "sm100" or "gfx942".
        shared_memory: bytes a thread block can have.
    """
    if arch.startswith("gfx"):
        candidates = [Config("mla_decode_d1", 16, 32, 4, 1), Config("mla_decode_d1", 16, 16, 4, 1)]
    else:
        candidates = []
        if hopper(arch) and itemsize == 2 and rows > 32:
            candidates.append(Config("mla_decode_d3", 64, 32, 8, 2))
        if hopper(arch) and itemsize == 2 and rows > 16:
            candidates.append(Config("mla_decode_d2", 32, 64, 4, 2, narrow=False))
        if itemsize == 2 and rows > 16:
            candidates.append(Config("mla_decode_d1", 32, 64, 8, 3))
        candidates += [Config("mla_decode_d1", 16, slots, 4, stages) for slots, stages in ((32, 3), (32, 2), (16, 2))]
    fitting = (c for c in candidates if mla_shared_bytes(c, rank, rope, itemsize, arch) <= shared_memory)
    return next(fitting, candidates[-1])


def d4_refusal(rows: int, rank: int, rope: int, itemsize: int, arch: str, shared_memory: int) -> str | None:
    """Why D4 is not offered for a shape on a machine, or None; arguments as for `mla_decode_config`."""
    if arch != "sm90":
        return f"D4 multiplies with wgmma, which {arch} does not have; it is for sm90"
    if itemsize != 2:
        return f"D4 takes 16-bit numbers, not {8 * itemsize}-bit ones"
    if rows <= 32:
        return f"D4 has tiles of 64 rows; {rows} would leave half of one empty"
    if rank % 8 or rope % 8:
        return f"D4 copies 16 bytes at a time; 8 does not divide R = {rank} and P = {rope}"
    if not _d4_configs(rank, rope, shared_memory):
        return f"no tile of D4 with R = {rank} and P = {rope} fits {shared_memory} bytes"
    return None


def _d4_configs(rank: int, rope: int, shared_memory: int) -> list[Config]:
    """Tiles of D4 that fit: a ring of four blocks, long ones if possible, and two long blocks without look-ahead."""
    ring = [Config(D4, 64, slots, 8, 4) for slots in (64, 32)]
    pair = [Config(D4, 64, 64, 8, 2)]
    fitting = [[c for c in f if mla_shared_bytes(c, rank, rope, 2, "sm90") <= shared_memory] for f in (ring, pair)]
    return [c for found in fitting for c in found[:1]]


def mla_decode_candidates(
    rows: int, rank: int, rope: int, itemsize: int, arch: str, shared_memory: int
) -> list[Config]:
    """The default and what may be faster; arguments as for `mla_decode_config`."""
    default = mla_decode_config(rows, rank, rope, itemsize, arch, shared_memory)
    if d4_refusal(rows, rank, rope, itemsize, arch, shared_memory) is not None:
        return [default]
    return [default, *_d4_configs(rank, rope, shared_memory)]


def latent_key(heads: int, rank: int, rope: int, page: int, itemsize: int, tokens: int) -> str:
    """The name of a shape of absorbed decoding in a table of picks."""
    return f"H{heads} R{rank} P{rope} page{page} {itemsize} sq{tokens}"


def gqa_decode_config(rows: int, width: int, value_width: int, itemsize: int, arch: str, shared_memory: int) -> Config:
    """The default for decoding with keys and values; `rows` is query tokens times heads of a group."""
    tile = pow2(rows)
    stages = 1 if arch.startswith("gfx") else 3
    for slots in (64, 32, 16):
        config = Config("gqa_decode", tile, slots, 4, stages)
        blocks = _buffers(config, arch) * slots * (pow2(width) + pow2(value_width))
        if itemsize * (tile * pow2(width) + blocks + tile * slots) <= shared_memory:
            return config
    return Config("gqa_decode", tile, 16, 4, 1)


def map_decode_config(rows: int) -> Config:
    """The tile for values under a kept map; `rows` is query tokens times heads of a group."""
    return Config("map_decode", pow2(rows), 64, 4, 3)


def prefill_config(nope: int, rope: int, value_width: int, itemsize: int, arch: str, shared_memory: int) -> Config:
    """The default for prompts: BH is the tile of queries, BN of keys."""
    width = pow2(nope) + (pow2(rope) if rope else 0)
    if arch.startswith("gfx"):
        tiles = [(64, 32, 4, 1), (32, 32, 4, 1)]
    elif itemsize == 4:
        tiles = [(32, 32, 4, 2)]  # without matrix units a tile lives in registers
    else:
        stages = 2 if hopper(arch) else 3
        tiles = [(128, 64, 8, stages), (64, 32, 4, stages)]
    for tile, slots, warps, stages in (*tiles, (16, 16, 4, 1)):
        config = Config("prefill", tile, slots, warps, stages)
        blocks = _buffers(config, arch) * slots * (width + pow2(value_width))
        if itemsize * (tile * width + blocks + tile * slots) <= shared_memory:
            return config
    return Config("prefill", 16, 16, 4, 1)


class Tuned:
    """Measured picks of one device and Triton version, from a JSON file.

    The file holds {"schema": 1, "arch": ..., "sms": ..., "triton": ..., "kernels": {kernel: {shape: config}}}. Picks of
    another architecture or Triton version are not used. A pick of D4 counts only on the device whose name is under
    "device", and only if "passed", {kernel: {shape: [config, ...]}}, has it.
    """

    def __init__(self, path: Path | None, arch: str, triton: str, device: str | None = None) -> None:
        self._kernels: dict[str, dict[str, Any]] = {}
        self._passed: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            document = json.loads(path.read_text(encoding="utf-8"))
            if (document.get("schema"), document.get("arch"), document.get("triton")) == (1, arch, triton):
                self._kernels = document["kernels"]
                if device is not None and document.get("device") == device:
                    self._passed = document.get("passed", {})

    def get(self, kernel: str, shape: str, default: Config) -> Config:
        """The pick for a shape, or the default."""
        found = self._kernels.get(kernel, {}).get(shape)
        if found is None:
            return default
        if found["kernel"] == D4 and found not in self._passed.get(kernel, {}).get(shape, []):
            return default
        return Config(**found)


def tuned_document(
    arch: str,
    sms: int,
    triton: str,
    picks: dict[str, dict[str, Config]],
    device: str | None = None,
    passed: dict[str, dict[str, list[Config]]] | None = None,
) -> dict[str, Any]:
    """The content of a file for `Tuned`."""
    kernels = {kernel: {shape: asdict(c) for shape, c in shapes.items()} for kernel, shapes in picks.items()}
    document = {"schema": 1, "arch": arch, "sms": sms, "triton": triton, "kernels": kernels}
    if device is not None:
        document["device"] = device
        document["passed"] = {
            kernel: {shape: [asdict(c) for c in configs] for shape, configs in shapes.items()}
            for kernel, shapes in (passed or {}).items()
        }
    return document
