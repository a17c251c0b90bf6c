"""Runs the kernels in Triton's interpreter and prints, as JSON, how far each case is from the float64 reference.

A program of its own: the interpreter has to be chosen before triton is imported, and compiling needs the other choice.
Cases are named on the command line as in `CASES`; every one is a few hundred milliseconds.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from attnopt.codegen.triton.runtime import launch, ops, reference
from attnopt.codegen.triton.runtime.select import PAGE, Config

FP32, FP16 = torch.float32, torch.float16


class Batch:
    """A paged cache whose unused slots and pages hold NaN, in random page order."""

    def __init__(self, lengths: list[int], seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.per_request = max(1, max(-(-n // PAGE) for n in lengths))
        total = self.per_request * len(lengths) + 2
        order = torch.randperm(total, generator=self.generator)[: self.per_request * len(lengths)]
        self.table = order.view(len(lengths), -1).to(torch.int32)
        self.pages = total

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype)

    def cache(self, heads: int, width: int, dtype: torch.dtype) -> Tensor:
        """[pages, PAGE, width], or [pages, heads, PAGE, width] if heads > 0."""
        shape = (self.pages, heads, PAGE, width) if heads else (self.pages, PAGE, width)
        cache = torch.full(shape, float("nan"), dtype=dtype)
        for row, length in enumerate(self.lengths.tolist()):
            for slot in range(length):
                at = (int(self.table[row, slot // PAGE]), slice(None), slot % PAGE)
                cache[at if heads else (at[0], at[2])] = self.normal(*((heads,) if heads else ()), width, dtype=dtype)
        return cache


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference as a share of the largest value; NaN and wrong infinities give NaN."""
    found = found.double()
    if not torch.equal(found.isinf(), wanted.isinf()):
        return float("nan")
    found, wanted = (torch.where(wanted.isinf(), 0.0, x) for x in (found, wanted))
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))


def known(cache: Tensor) -> Tensor:
    """The cache as the reference reads it: in float64, unused slots as they are."""
    return cache.double()


def latent(
    design: str, heads: int, tokens: int, rank: int, rope: int, lengths: list[int], dtype: torch.dtype, parts: int = 3
) -> float:
    batch = Batch(lengths)
    cache = batch.cache(0, rank + rope, dtype)
    q = batch.normal(len(lengths), tokens, heads, rank + rope, dtype=dtype)
    scale = (rank / 2) ** -0.5
    tiles = {"mla_decode_d1": (16, 32), "mla_decode_d2": (32, 64), "mla_decode_d3": (64, 32)}
    config = Config(design, *tiles[design], 4, 2, narrow=design != "mla_decode_d2")
    out, lse = launch.latent_decode(q, cache, batch.table, batch.lengths, rank, scale, config, parts)
    want, want_lse = reference.latent_decode(q.double(), known(cache), batch.table, batch.lengths, rank, scale)
    return max(error(out, want), error(lse, want_lse))


def grouped(
    heads: int,
    groups: int,
    tokens: int,
    width: int,
    value_width: int,
    lengths: list[int],
    dtype: torch.dtype,
    softcap: float = 0.0,
    streaming: bool = False,
    active: int = 0,
    parts: int = 3,
) -> float:
    batch = Batch(lengths)
    k, v = batch.cache(groups, width, dtype), batch.cache(groups, value_width, dtype)
    q = batch.normal(len(lengths), tokens, heads, width, dtype=dtype)
    sinks = torch.tensor([(3 * g) % 7 for g in range(groups)], dtype=torch.int32) if streaming else None
    windows = torch.tensor([(0, 5, 70, 17)[g % 4] for g in range(groups)], dtype=torch.int32) if streaming else None
    chosen = None
    if active:
        rows = [torch.randperm(groups, generator=batch.generator)[:active].sort().values for _ in lengths]
        chosen = torch.stack(rows).to(torch.int32)
    scale = width**-0.5
    args = (batch.table, batch.lengths, scale, softcap, sinks, windows, chosen)
    out, lse = launch.grouped_decode(q, k, v, *args, parts=parts)
    want, want_lse = reference.grouped_decode(q.double(), known(k), known(v), *args)
    return max(error(out, want), error(lse, want_lse))


def contiguous(heads: int, groups: int, lengths: list[int], dtype: torch.dtype) -> float:
    batch = Batch(lengths)
    k, v = (batch.normal(len(lengths), groups, 150, 16, dtype=dtype) for _ in range(2))
    for row, length in enumerate(lengths):
        k[row, :, length:] = float("nan")
        v[row, :, length:] = float("nan")
    q = batch.normal(len(lengths), 1, heads, 16, dtype=dtype)
    out, lse = launch.grouped_decode(q, k, v, None, batch.lengths, 0.25, parts=3)
    table = torch.arange(len(lengths))[:, None]
    want, want_lse = reference.grouped_decode(q.double(), k.double(), v.double(), table, batch.lengths, 0.25)
    return max(error(out, want), error(lse, want_lse))


def shared(heads: int, groups: int, lengths: list[int], dtype: torch.dtype) -> float:
    batch = Batch(lengths)
    k, v, other = (batch.cache(groups, 16, dtype) for _ in range(3))
    q = batch.normal(len(lengths), 1, heads, 16, dtype=dtype)
    scores = torch.full((len(lengths), groups, heads // groups, batch.per_request * PAGE), float("nan"))
    _, lse = launch.grouped_decode(q, k, v, batch.table, batch.lengths, 0.25, scores=scores, parts=4)
    lse = lse.view(len(lengths), groups, -1)
    out = launch.map_decode(scores, lse, other, batch.table, batch.lengths, parts=3)
    want, _ = reference.grouped_decode(q.double(), known(k), known(other), batch.table, batch.lengths, 0.25)
    kept = reference.map_decode(scores, lse, known(other), batch.table, batch.lengths)
    return max(error(out.flatten(1, 2), want[:, 0]), error(kept.flatten(1, 2), want[:, 0]))


def owner_and_consumer(heads: int, groups: int, tokens: int, dtype: torch.dtype) -> float:
    """The two layers as a package runs them: contiguous caches, rows that see different slots."""
    past = torch.tensor([61, 0, 130])
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, heads, tokens, 16, generator=generator).to(dtype)
    k, v, other = (torch.randn(3, groups, 192, 16, generator=generator).to(dtype) for _ in range(3))
    results = []
    for kernels in ("triton", "reference"):
        ops.force(kernels)
        out, kept = ops.attend_owner(q, k, v, past, 0.25)
        assert (kept is None) == (kernels == "reference")
        results.append([out, ops.attend_map(kept, q, k, other, past, 0.25)])
    return max(error(*pair) for pair in zip(*results, strict=True))


def prompt(
    heads: int,
    groups: int,
    queries: int,
    keys: int,
    nope: int,
    rope: int,
    value: int,
    dtype: torch.dtype,
    **options: object,
) -> float:
    batch = Batch([keys, max(queries, keys - 3)])
    q = batch.normal(2, heads, queries, nope + rope, dtype=dtype)
    k, v = batch.normal(2, groups, keys, nope, dtype=dtype), batch.normal(2, groups, keys, value, dtype=dtype)
    kr = batch.normal(2, 1, keys, rope, dtype=dtype) if rope else None
    lengths = batch.lengths
    for row, length in enumerate(lengths.tolist()):
        k[row, :, length:] = float("nan")
        v[row, :, length:] = float("nan")
    causal, window = bool(options.get("causal", True)), int(str(options.get("window", 0)))
    scale, softcap = (nope + rope) ** -0.5, float(str(options.get("softcap", 0.0)))
    out, lse = launch.prefill(q, k, kr, v, lengths, scale, causal, window, softcap, Config("prefill", 32, 32, 4, 1))
    doubles = [x.double() if x is not None else None for x in (q, k, kr, v)]
    want, want_lse = reference.prefill(*doubles, lengths, scale, causal, window, softcap)  # type: ignore[arg-type]
    return max(error(out, want), error(lse, want_lse))


MIXED = [131, 0, 1, 64, 65]

CASES: dict[str, Callable[[], float]] = {}
for _design in ("mla_decode_d1", "mla_decode_d2", "mla_decode_d3"):
    for _heads, _tokens, _rank, _rope in (
        (9, 1, 144, 48),
        (1, 1, 16, 4),
        (32, 2, 64, 32),
        (63, 1, 32, 16),
        (7, 4, 128, 64),
    ):
        _name = f"{_design} H{_heads} sq{_tokens} R{_rank} P{_rope}"
        CASES[_name + " float32"] = lambda d=_design, h=_heads, t=_tokens, r=_rank, p=_rope: latent(
            d, h, t, r, p, [131, 4, 70], FP32
        )
        CASES[_name + " float16"] = lambda d=_design, h=_heads, t=_tokens, r=_rank, p=_rope: latent(
            d, h, t, r, p, [131, 4, 70], FP16
        )
    CASES[f"{_design} empty and single"] = lambda d=_design: latent(d, 9, 1, 32, 16, MIXED, FP32)
    CASES[f"{_design} one part"] = lambda d=_design: latent(d, 9, 1, 32, 16, MIXED, FP32, parts=1)
    CASES[f"{_design} more parts than blocks"] = lambda d=_design: latent(d, 9, 1, 32, 16, [5, 140], FP32, parts=40)
for _h, _g, _t, _d, _v in (
    (9, 3, 1, 64, 64),
    (4, 4, 1, 16, 24),
    (28, 4, 1, 32, 32),
    (3, 1, 2, 16, 16),
    (6, 2, 4, 48, 16),
):
    for _dtype in (FP32, FP16):
        CASES[f"gqa H{_h} G{_g} sq{_t} D{_d} DV{_v} {str(_dtype)[6:]}"] = (
            lambda h=_h, g=_g, t=_t, d=_d, v=_v, dt=_dtype: grouped(h, g, t, d, v, [131, 4, 70], dt)
        )
CASES |= {
    "gqa empty and single": lambda: grouped(6, 2, 1, 16, 16, MIXED, FP32),
    "gqa contiguous": lambda: contiguous(6, 2, [131, 64, 1, 0, 150], FP32),
    "gqa softcap": lambda: grouped(6, 2, 1, 16, 16, [131, 65], FP32, softcap=2.0),
    "streaming": lambda: grouped(12, 4, 1, 16, 16, [131, 64, 65, 1, 20, 0], FP32, streaming=True),
    "streaming two tokens": lambda: grouped(8, 4, 2, 16, 16, [131, 64, 65, 2, 20], FP32, streaming=True),
    "streaming odd groups float16": lambda: grouped(9, 3, 1, 16, 16, [140, 63], FP16, streaming=True),
    "routed": lambda: grouped(12, 4, 1, 16, 16, [131, 64, 1, 0], FP32, active=3),
    "routed heads": lambda: grouped(7, 7, 1, 16, 16, [131, 64], FP32, active=2),
    "routed streaming": lambda: grouped(8, 4, 1, 16, 16, [131, 70], FP32, active=2, streaming=True),
    "shared map": lambda: shared(6, 2, [131, 64, 1], FP32),
    "shared owner and consumer": lambda: owner_and_consumer(6, 2, 3, FP32),
    "shared map float16": lambda: shared(9, 3, [131, 20], FP16),
    "prefill mla": lambda: prompt(2, 2, 40, 40, 64, 32, 64, FP32),
    "prefill mla float16": lambda: prompt(3, 3, 33, 65, 48, 16, 32, FP16),
    "prefill gqa chunk": lambda: prompt(4, 2, 20, 70, 16, 0, 16, FP32),
    "prefill window": lambda: prompt(2, 1, 50, 50, 16, 0, 16, FP32, window=9),
    "prefill full": lambda: prompt(2, 2, 20, 45, 16, 0, 16, FP32, causal=False),
    "prefill softcap": lambda: prompt(2, 2, 20, 45, 16, 0, 16, FP32, softcap=1.5),
    "prefill one token": lambda: prompt(2, 2, 1, 5, 16, 16, 16, FP32),
}


if __name__ == "__main__":
    print(json.dumps({name: CASES[name]() for name in sys.argv[1:] or CASES}))
