"""ONNX: one graph for prompt and decoding, the cache as its inputs and outputs, run by onnxruntime.

`generate` and `OnnxDecoder` run what `attnopt export --format onnx` wrote.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnopt.codegen.onnx.decoder import OnnxDecoder, generate

__all__ = ["OnnxDecoder", "generate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("attnopt.codegen.onnx.decoder"), name)
