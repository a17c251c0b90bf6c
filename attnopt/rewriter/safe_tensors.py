"""Reading and writing safetensors files without mapping them into memory.

The `safetensors` library maps a whole file, and mapped pages count in a process's peak memory; it also writes a file
only from tensors that are all in memory at once. A converter that must stay within one layer's memory can afford
neither, so this module reads a tensor's bytes with `pread` at the offset the header gives, and writes tensor by tensor.
The format (https://github.com/huggingface/safetensors#format) is an 8-byte little-endian header length, a JSON header
and the tensors' bytes back to back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeGuard

import torch

from attnopt.errors import SourceError

#: Names of element types in the format and what they are in torch.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

#: The header metadata transformers looks for.
METADATA = {"format": "pt"}

#: The limit the safetensors library puts on a header, in bytes.
MAX_HEADER = 100_000_000

_DAMAGED = "the file is damaged or incomplete; copy or download it again"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a file: `nbytes` bytes from the absolute byte `offset`."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header has been checked.

    Attributes:
        path: the file.
        size: its length in bytes.
        entries: its tensors by key, in file order.
        metadata: the free-form strings of the header.
    """

    path: Path
    size: int
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> TensorFile:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        SourceError: if the file is unreadable, truncated, or its header is not a legal description of its contents.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = _header_bytes(file, path, size)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}", "check that it exists and may be read") from error
    start = 8 + len(raw)
    try:
        header = json.loads(raw, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: the header is not JSON ({error})", _DAMAGED) from error
    if not isinstance(header, dict):
        raise SourceError(f"{path}: the header is not a JSON object", _DAMAGED)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise SourceError(f"{path}: the header's __metadata__ is not an object", _DAMAGED)
    entries = [_entry(path, key, info, start) for key, info in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    end = start
    for entry in entries:
        if entry.offset < end:
            raise SourceError(f"{path}: tensor {entry.key!r} overlaps the one before it", _DAMAGED)
        if entry.offset > end:
            raise SourceError(f"{path}: {entry.offset - end} bytes before {entry.key!r} belong to no tensor", _DAMAGED)
        end = entry.offset + entry.nbytes
        if end > size:
            raise SourceError(
                f"{path} is truncated: tensor {entry.key!r} ends at byte {end:,}, the file at {size:,}", _DAMAGED
            )
    if end != size:
        raise SourceError(f"{path}: {size - end:,} bytes after the last tensor belong to none", _DAMAGED)
    return TensorFile(path, size, {entry.key: entry for entry in entries}, metadata)


def _header_bytes(file: BinaryIO, path: Path, size: int) -> bytes:
    if size < 8:
        raise SourceError(f"{path} is truncated: {size} bytes are no safetensors file", _DAMAGED)
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise SourceError(f"{path} is no safetensors file: it claims a header of {length:,} bytes", _DAMAGED)
    if 8 + length > size:
        raise SourceError(f"{path} is truncated: the header alone has {length:,} bytes, the file {size:,}", _DAMAGED)
    return file.read(length)


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _entry(path: Path, key: str, info: object, start: int) -> TensorEntry:
    where = f"{path}: tensor {key!r}"
    if not isinstance(info, dict):
        raise SourceError(f"{where} is not described by an object", _DAMAGED)
    name, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise SourceError(f"{where} has element type {name!r}", f"store it as one of {', '.join(DTYPES)}")
    if not _is_counts(shape):
        raise SourceError(f"{where} has the impossible shape {shape!r}", _DAMAGED)
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise SourceError(f"{where} has the impossible byte range {offsets!r}", _DAMAGED)
    nbytes = offsets[1] - offsets[0]
    needed = math.prod(shape) * dtype.itemsize
    if nbytes != needed:
        raise SourceError(f"{where}: shape {shape} of {name} needs {needed:,} bytes, {nbytes:,} are given", _DAMAGED)
    return TensorEntry(key, dtype, tuple(shape), start + offsets[0], nbytes)


def _is_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def read_bytes(path: Path, offset: int, nbytes: int, size: int) -> torch.Tensor:
    """Read a byte range into fresh memory.

    Args:
        path: the file.
        offset, nbytes: the range.
        size: length the file had when its header was read; another length means it was replaced meanwhile.

    Returns:
        uint8 tensor [nbytes].

    Raises:
        SourceError: if the file cannot be read, has changed, or ends early.
    """
    data = torch.empty(nbytes, dtype=torch.uint8)
    view = memoryview(data.numpy().data)
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            if os.fstat(fd).st_size != size:
                raise SourceError(f"{path} changed while it was in use", "leave it alone until the work on it ends")
            done = 0
            while done < nbytes:
                count = os.preadv(fd, [view[done : done + (1 << 30)]], offset + done)
                if count == 0:
                    raise SourceError(f"{path} ends before byte {offset + nbytes:,}", _DAMAGED)
                done += count
        finally:
            os.close(fd)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}", "check that it exists and may be read") from error
    return data


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be written: name, shape and type are needed for the header, `load` gives it when its turn comes."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Length of its data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Iterable[Outgoing], metadata: Mapping[str, str] = METADATA) -> None:
    """Write a safetensors file holding one tensor in memory at a time, and flush it to the disk.

    The bytes depend on the arguments only. Widest types come first, then names, as the library itself orders them, so
    that every tensor is aligned to its element size.

    Raises:
        ValueError: if a loaded tensor is not of the announced shape and type.
        OSError: if writing fails.
    """
    ordered = sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.key))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for tensor in ordered:
        header[tensor.key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for tensor in ordered:
            value = tensor.load()
            if tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype:
                raise ValueError(
                    f"{tensor.key}: announced {tensor.shape} {tensor.dtype}, got {tuple(value.shape)} {value.dtype}"
                )
            data = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            file.write(memoryview(data.numpy().data))
            del value, data
        file.flush()
        os.fsync(file.fileno())
