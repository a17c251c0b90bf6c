"""Compiles kernels ahead of time, without a GPU, and reads from the result what makes them fast or slow.

`Figures` are what the project's tests hold on to: shared memory, registers, spills, tensor-core instructions and how
many blocks of the cache are in flight. A cosmetic edit can double the work of a kernel; here that is a failing test.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnopt.codegen.target import Target
from attnopt.codegen.triton.runtime import gqa_decode
from attnopt.codegen.triton.runtime import prefill as prompt
from attnopt.codegen.triton.runtime.combine import combine
from attnopt.codegen.triton.runtime.designs import gluon_obstacle, latent_constants, latent_kernel
from attnopt.codegen.triton.runtime.select import D4, PAGE, Config, d4_refusal, pow2
from attnopt.errors import UnsupportedError

_TYPES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


@dataclass(frozen=True)
class Figures:
    """What the compiler made of a kernel.

    Attributes:
        shared: bytes of shared memory.
        registers, stack: registers per thread, and bytes of stack (spills); 0 where the vendor's tools do not tell.
        instructions: tensor-core instructions by shape, e.g. {"mma.m16n8k16": 96}.
        multiply_adds: what these instructions compute in one pass over the code, all warps together.
        buffers: blocks of the cache that are in flight.
        serialised: the assembler let no wgmma overlap with anything, because it could not follow its registers.
    """

    shared: int
    registers: int
    stack: int
    instructions: Mapping[str, int]
    multiply_adds: int
    buffers: int
    serialised: bool


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for a target.

    Attributes:
        name: of the kernel.
        binary: what the driver loads (cubin or hsaco).
        metadata: what a launcher must know, plain data.
        figures: see `Figures`.
    """

    name: str
    binary: bytes
    metadata: dict[str, Any]
    figures: Figures


def compile_kernel(
    kernel: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    target: Target,
    num_warps: int,
    num_stages: int,
) -> Compiled:
    """Compile one kernel.

    Args:
        kernel: the jitted function.
        pointers: element type of each pointer argument, as in "float16" or "*i32"; others are sizes or scales.
        constants: values of the constexpr arguments.
        target: a GPU.
    """
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = _TYPES.get(pointers[name], pointers[name])
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name.endswith("log2"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            attributes[(index,)] = [["tt.divisibility", 16]]
    gpu = GPUTarget("cuda" if target.vendor == "nvidia" else "hip", target.arch, target.warp)
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        Source = ASTSource
    source = Source(kernel, signature, dict(constants), attributes)
    compiled = triton.compile(source, target=gpu, options={"num_warps": num_warps, "num_stages": num_stages})
    binary = compiled.asm["cubin" if target.vendor == "nvidia" else "hsaco"]
    registers, stack = _resources(binary, compiled.asm, target)
    instructions = _instructions(compiled.asm, target)
    figures = Figures(
        shared=compiled.metadata.shared,
        registers=registers,
        stack=stack,
        instructions=dict(sorted(instructions.items())),
        multiply_adds=sum(_multiply_adds(shape, num_warps) * count for shape, count in instructions.items()),
        buffers=_buffers(compiled.asm["ttgir"]),
        serialised="wgmma" in "".join(instructions) and _serialised(compiled.asm["ptx"], target),
    )
    metadata = {
        "name": compiled.metadata.name,
        "kernel": kernel.__name__,
        "shared": compiled.metadata.shared,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "arguments": [[name, kind] for name, kind in signature.items() if kind != "constexpr"],
        "constants": dict(constants),
        "triton": triton.__version__,
        "target": target.name,
    }
    return Compiled(kernel.__name__, binary, metadata, figures)


def _resources(binary: bytes, asm: Mapping[str, Any], target: Target) -> tuple[int, int]:
    if target.vendor == "amd":
        text = asm["amdgcn"]
        used = re.search(r"\.vgpr_count:\s*(\d+)", text)
        spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
        return int(used.group(1)) if used else 0, int(spilled.group(1)) if spilled else 0
    said = _said(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump", binary, "-res-usage")
    registers = [int(n) for n in re.findall(r"REG:(\d+)", said)]
    stack = [int(n) for n in re.findall(r"STACK:(\d+)", said)]
    return max(registers, default=0), max(stack, default=0)


def _serialised(ptx: str, target: Target) -> bool:
    from triton.backends.nvidia.compiler import get_ptxas  # Triton has several, and the version decides which it uses

    said = _said(get_ptxas(target.arch).path, ptx.encode(), "-v", f"--gpu-name={target.name}a", "-o", os.devnull)
    return "wgmma.mma_async instructions are serialized" in said


def _said(tool: str | Path, content: bytes, *options: str) -> str:
    """What a tool says about a file."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        done = subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _instructions(asm: Mapping[str, Any], target: Target) -> Counter[str]:
    if target.vendor == "amd":
        return Counter(f"mfma.{shape}" for shape in re.findall(r"v_mfma_\w+?_(\d+x\d+x\d+)", asm["amdgcn"]))
    text = asm["ptx"]
    found = Counter(f"wgmma.{shape}" for shape in re.findall(r"wgmma\.mma_async\S*?\.(m\d+n\d+k\d+)", text))
    found.update(f"mma.{shape}" for shape in re.findall(r"[^.\w]mma\.sync\S*?\.(m\d+n\d+k\d+)", text))
    return found


def _multiply_adds(shape: str, num_warps: int) -> int:
    kind, _, size = shape.partition(".")
    m, n, k = (int(x) for x in re.findall(r"\d+", size))
    # wgmma is issued by a group of four warps, the others by one.
    return m * n * k * (num_warps // 4 if kind == "wgmma" else num_warps)


def _buffers(ttgir: str) -> int:
    """The largest number of blocks that a buffer in shared memory is made of; 1 if loads are not pipelined."""
    depths = [int(n) for n in re.findall(r"ttg\.local_alloc\s*:\s*\(\)\s*->\s*!ttg\.memdesc<(\d+)x\d+x\d+x", ttgir)]
    return max(depths, default=1)


_ITEMS = dict.fromkeys(("table", "lengths", "item_sequence", "item_start", "item_stop"), "*i32")
_PARTS = {"partial": "float32", "partial_lse2": "float32"}


def mla_decode_kernel(heads: int, rank: int, rope: int, dtype: str, config: Config, target: Target) -> Compiled:
    """Absorbed decoding of one token, see `runtime/mla_decode.py`.

    Raises:
        UnsupportedError: the design is D4, which the target, the shape or the installed Triton cannot have.
    """
    if config.kernel == D4:
        arch, size = target.name.replace("_", ""), getattr(torch, dtype).itemsize
        refused = d4_refusal(heads, rank, rope, size, arch, target.shared_memory) or gluon_obstacle()
        if refused is not None:
            raise UnsupportedError(refused, "take another design")
    constants = latent_constants(config, heads, 1, rank, rope, PAGE, _precision(dtype))
    pointers = {"q": dtype, "cache": dtype, **_ITEMS, **_PARTS}
    kernel = latent_kernel(config)
    return compile_kernel(kernel, pointers, constants, target, config.num_warps, config.num_stages)


def gqa_decode_kernel(
    heads: int,
    groups: int,
    width: int,
    value_width: int,
    dtype: str,
    config: Config,
    target: Target,
    *,
    streaming: bool = False,
    routed: int = 0,
    softcap: bool = False,
    store_map: bool = False,
    paged: bool = True,
) -> Compiled:
    """Decoding of one token with keys and values, see `runtime/gqa_decode.py`."""
    constants = {
        "GROUPS": groups,
        "ACTIVE": routed or groups,
        "GROUP": heads // groups,
        "TOKENS": 1,
        "D": width,
        "DV": value_width,
        "PAGE": PAGE if paged else 0,
        "BH": config.BH,
        "BN": config.BN,
        "BD": pow2(width),
        "BV": pow2(value_width),
        "ROUTED": routed > 0,
        "STREAMING": streaming,
        "SOFTCAP": softcap,
        "STORE_MAP": store_map,
        "PRECISION": _precision(dtype),
    }
    pointers = {"q": dtype, "keys": dtype, "values": dtype, **_ITEMS, **_PARTS, "scores": "float32"}
    pointers |= dict.fromkeys(("sinks", "windows", "active"), "*i32")
    return compile_kernel(gqa_decode.gqa_decode, pointers, constants, target, config.num_warps, config.num_stages)


def map_decode_kernel(
    heads: int, groups: int, value_width: int, dtype: str, config: Config, target: Target, *, paged: bool = True
) -> Compiled:
    """Values under another layer's map, see `runtime/gqa_decode.py`."""
    constants = {
        "GROUPS": groups,
        "GROUP": heads // groups,
        "TOKENS": 1,
        "DV": value_width,
        "PAGE": PAGE if paged else 0,
        "BH": config.BH,
        "BN": config.BN,
        "BV": pow2(value_width),
        "PRECISION": _precision(dtype),
    }
    pointers = {"scores": "float32", "lse2": "float32", "values": dtype, **_ITEMS, "partial": "float32"}
    return compile_kernel(gqa_decode.map_decode, pointers, constants, target, config.num_warps, config.num_stages)


def prefill_kernel(
    heads: int, groups: int, nope: int, rope: int, value_width: int, dtype: str, config: Config, target: Target
) -> Compiled:
    """Attention over a prompt, see `runtime/prefill.py`."""
    constants = {
        "HEADS": heads,
        "GROUP": heads // groups,
        "KR_HEADS": 1,
        "DN": nope,
        "DR": rope,
        "DV": value_width,
        "BM": config.BH,
        "BN": config.BN,
        "BD": pow2(nope),
        "BR": pow2(max(rope, 1)),
        "BV": pow2(value_width),
        "CAUSAL": True,
        "WINDOW": 0,
        "SOFTCAP": False,
        "PRECISION": _precision(dtype),
    }
    pointers = dict.fromkeys(("q", "k", "k_rope", "v", "out"), dtype) | {"lse2": "float32", "lengths": "*i32"}
    return compile_kernel(prompt.prefill, pointers, constants, target, config.num_warps, config.num_stages)


def combine_kernel(rows: int, width: int, dtype: str, target: Target, add: bool = False) -> Compiled:
    """Merging of parts, see `runtime/combine.py`."""
    constants = {"ROWS": rows, "WIDTH": width, "BW": min(pow2(width), 128), "SUM": add}
    pointers = {"first_item": "*i32", "out": dtype, "lse2": "float32", **_PARTS}
    return compile_kernel(combine, pointers, constants, target, 4, 3)


def _precision(dtype: str) -> str:
    return "ieee" if dtype == "float32" else "tf32"
