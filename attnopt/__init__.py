"""attnopt: a compiler for attention. Importing this imports nothing heavy; the functions below load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import attnopt.codegen.hf  # noqa: F401 - makes transformers know our model class once it is imported; imports nothing

if TYPE_CHECKING:
    from attnopt.api import bench, convert, export, inspect, list_passes, profile, run_pipeline, verify
    from attnopt.conversion import CalibrationOptions, RunOptions
    from attnopt.exporting import ExportOptions
    from attnopt.profiling import ProfileOptions

__version__ = "0.1.0"

_PUBLIC = {
    "CalibrationOptions": "attnopt.conversion",
    "ExportOptions": "attnopt.exporting",
    "ProfileOptions": "attnopt.profiling",
    "RunOptions": "attnopt.conversion",
    "bench": "attnopt.api",
    "convert": "attnopt.api",
    "export": "attnopt.api",
    "inspect": "attnopt.api",
    "list_passes": "attnopt.api",
    "profile": "attnopt.api",
    "run_pipeline": "attnopt.api",
    "verify": "attnopt.api",
}

__all__ = [
    "CalibrationOptions",
    "ExportOptions",
    "ProfileOptions",
    "RunOptions",
    "__version__",
    "bench",
    "convert",
    "export",
    "inspect",
    "list_passes",
    "profile",
    "run_pipeline",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'attnopt' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
