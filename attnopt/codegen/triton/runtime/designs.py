"""Kernel functions of the designs of absorbed decoding, and what hinders one on this installation.

D4 is written in Gluon, which is an experiment of Triton's: a version may lack it or spell it otherwise. Then the design
is not there, and `gluon_obstacle` says why; nothing else depends on it. Imports only triton; copied into packages.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import triton

from . import mla_decode
from .select import D4, Config, pow2


@lru_cache
def gluon_obstacle() -> str | None:
    """Why the installed Triton cannot have D4, or None."""
    if triton.knobs.runtime.interpret:
        return "Gluon has no interpreter"
    try:
        importlib.import_module(".mla_decode_gluon", __package__)
    except (ImportError, AttributeError) as problem:
        return f"Triton {triton.__version__} lacks the Gluon that D4 is written in: {problem}"
    return None


def latent_kernel(config: Config) -> Any:
    """The function of a design.

    Raises:
        ValueError: it is D4, and the installed Triton cannot have it.
    """
    if config.kernel != D4:
        return getattr(mla_decode, config.kernel)
    reason = gluon_obstacle()
    if reason is not None:
        raise ValueError(reason)
    return importlib.import_module(".mla_decode_gluon", __package__).mla_decode_d4


def latent_constants(
    config: Config, heads: int, tokens: int, rank: int, rope: int, page: int, precision: str
) -> dict[str, Any]:
    """The constexpr arguments of `latent_kernel`; `precision` as Triton's products take it."""
    sizes = {"H": heads, "TOKENS": tokens, "R": rank, "P": rope, "PAGE": page}
    tile = {"BH": config.BH, "BN": config.BN, "BR": pow2(rank), "BP": pow2(rope)}
    if config.kernel == D4:
        return {**sizes, **tile, "STAGES": config.num_stages}
    return {**sizes, **tile, "NARROW": config.narrow, "PRECISION": precision}
