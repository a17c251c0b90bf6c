"""Writing files whole or not at all, with errors that say what to do, and JSON that every reader takes."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnopt.errors import AttnoptError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into errors that say what to do.

    Raises:
        AttnoptError: instead of OSError.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise AttnoptError(
                f"no space left to write {where}", "free some space or choose another place, then run again (--resume)"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise AttnoptError(f"{where} may not be written: {error.strerror}", "choose another output path") from error
        raise AttnoptError(f"cannot write {where}: {error.strerror}", "check the output path and its disk") from error


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a crash leaves either the old or the new one; raises OSError."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    sync_directory(path.parent)


def json_safe(value: Any) -> Any:
    """The same lists and objects with null for numbers that JSON cannot say: infinite ones, and what is no number."""
    if isinstance(value, dict):
        return {key: json_safe(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to the disk."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(directory: Path) -> None:
    """Flush every file and directory below to the disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_directory(Path(folder))
