"""Correctness and speed of the Triton kernels on a GPU, against measured ceilings, in one run. Prints JSON.

    python benchmarks/gpu.py [--quick] [--out benchmarks/results/gpu-NAME.json]

1. Ceilings of this device: copy, a reduction that only reads, an 8192^3 bf16 product of random matrices.
2. Every kernel in bf16 against float64, with NaN in unused slots and zero lengths among the requests. The Gluon design
   of MLA, D4, which is a default nowhere, is checked in processes of its own (`runtime/tune.py`).
3. Decoding and prompts: CUDA graphs, cold L2 (a buffer of twice its size is written between calls), 10 warm-up calls,
   three trials of 50, median. A row has bytes and operations of the formulas, and the share of the ceilings. Every tile
   of D4 that is offered and right stands beside the default.
4. Beside each, alternating with it: torch SDPA on the grouped cache the latent replaces, FlexAttention for prompts,
   FlashInfer and FlashMLA where they are installed. What is not installed is named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from attnopt.codegen.triton.runtime import launch, reference, tune
from attnopt.codegen.triton.runtime.select import PAGE, Config
from attnopt.codegen.triton.runtime.trial import Requests, difference

BF16 = torch.bfloat16
sdpa = torch.nn.functional.scaled_dot_product_attention
DEVICE = torch.device("cuda")


def timed(calls: Sequence[Callable[[], Any]], trials: int, repeats: int) -> list[list[float]]:
    """Microseconds of each call, alternating, graph-replayed, with a cold L2."""
    size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    flush = torch.empty(max(size, 1 << 26), dtype=torch.int8, device=DEVICE)
    replays = [captured(call) for call in calls]
    found: list[list[float]] = [[] for _ in calls]
    for trial in range(trials + 1):
        for _ in range(repeats if trial else 10):
            for place, replay in enumerate(replays):
                flush.zero_()
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                replay()
                stop.record()
                torch.cuda.synchronize()
                if trial:
                    found[place].append(start.elapsed_time(stop) * 1e3)
    return found


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of a call, or the call itself where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return graph.replay


def ceilings() -> dict[str, float]:
    """Bytes per second of a copy (read plus written) and of a reduction; operations per second of a product."""
    x = torch.randn(1 << 29, device=DEVICE, dtype=BF16)
    y = torch.empty_like(x)
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=BF16) for _ in range(2))
    calls = (lambda: y.copy_(x), lambda: x.view(torch.int32).max(), lambda: a @ b)
    copy, read, product = (statistics.median(t) * 1e-6 for t in timed(calls, 1, 10))
    return {"copy": 2 * x.nbytes / copy, "read": x.nbytes / read, "gemm": 2 * 8192**3 / product}


def correctness() -> dict[str, float]:
    """Relative error of every kernel and design in bf16."""
    found = {}
    lengths = [0, 1, 63, 64, 65, 700]
    paged = Requests(BF16, DEVICE, lengths)
    for heads, rank, rope, tokens in (
        *((h, 512, 64, 1) for h in (1, 9, 16, 28, 32, 64, 128)),
        *((9, 144, 48, 1), (32, 256, 64, 1), (32, 128, 64, 1), (16, 512, 64, 2), (9, 144, 48, 4)),
    ):
        cache = paged.cache(PAGE, rank + rope)
        q = torch.randn(len(lengths), tokens, heads, rank + rope, device=DEVICE, dtype=BF16)
        usable = paged.lengths.clamp(min=tokens) * (paged.lengths > 0)
        usable = torch.where(paged.lengths < tokens, 0, usable).to(torch.int32)
        out, _ = launch.latent_decode(q, cache, paged.table, usable, rank, 0.07)
        want, _ = reference.latent_decode(q.double(), cache.double(), paged.table, usable, rank, 0.07)
        found[f"mla H{heads} R{rank} P{rope} sq{tokens}"] = difference(out, want)
    for heads, groups, width in ((32, 8, 128), (28, 4, 128), (9, 3, 64), (32, 32, 128), (32, 1, 128)):
        k, v = (paged.cache(groups, PAGE, width) for _ in range(2))
        q = torch.randn(len(lengths), 1, heads, width, device=DEVICE, dtype=BF16)
        out, _ = launch.grouped_decode(q, k, v, paged.table, paged.lengths, width**-0.5)
        args = (q.double(), k.double(), v.double(), paged.table, paged.lengths, width**-0.5)
        found[f"gqa {heads}/{groups}x{width}"] = difference(out, reference.grouped_decode(*args)[0])
        sinks = torch.arange(groups, dtype=torch.int32, device=DEVICE) % 5
        windows = torch.tensor([(0, 100, 64)[g % 3] for g in range(groups)], dtype=torch.int32, device=DEVICE)
        out, _ = launch.grouped_decode(q, k, v, paged.table, paged.lengths, width**-0.5, 0.0, sinks, windows)
        want, _ = reference.grouped_decode(*args, sinks=sinks, windows=windows)
        found[f"streaming {heads}/{groups}x{width}"] = difference(out, want)
    for nope, rope, value in ((128, 64, 128), (64, 32, 64), (128, 0, 128)):
        q = torch.randn(2, 8, 300, nope + rope, device=DEVICE, dtype=BF16)
        k, v = (torch.randn(2, 8, 300, d, device=DEVICE, dtype=BF16) for d in (nope, value))
        kr = torch.randn(2, 1, 300, rope, device=DEVICE, dtype=BF16) if rope else None
        count = torch.tensor([300, 300], dtype=torch.int32, device=DEVICE)
        out, _ = launch.prefill(q, k, kr, v, count, 0.07)
        doubles = (q.double(), k.double(), None if kr is None else kr.double(), v.double())
        found[f"prefill {nope}+{rope}/{value}"] = difference(out, reference.prefill(*doubles, count, 0.07)[0])
    return found


def experimental() -> tuple[dict[str, float], dict[str, tune.Trial]]:
    """Errors of every tile of D4 that is offered, and what came of each shape, refusals with their reasons."""
    errors, trials = {}, {}
    for heads, rank, rope, tokens, dtype in (
        *((h, 512, 64, 1, "bfloat16") for h in (16, 40, 64, 128)),
        *((64, 256, 64, 1, "bfloat16"), (64, 128, 64, 1, "bfloat16"), (40, 144, 48, 1, "bfloat16")),
        *((32, 512, 64, 2, "bfloat16"), (64, 512, 64, 1, "float16")),
    ):
        shape = tune.Latent(heads, rank, rope, dtype, 0.07, tokens)
        trial = tune.check(shape, DEVICE)
        label = f"{shape.key} {dtype}"
        trials[label] = trial
        for one in trial.findings[1:]:
            # A design that does not run is as wrong as one that computes something else.
            errors[f"{label} {tile(one.config)}"] = float("nan") if one.error is None else one.error
    return errors, trials


def tile(config: Config) -> str:
    """A short name of a design and its tile."""
    return f"{config.kernel} {config.BH}x{config.BN} x{config.num_stages}"


def row(times: list[float], read: float, operations: float, top: dict[str, float]) -> dict[str, float]:
    """Figures of one kernel from its microseconds, bytes and operations."""
    ordered = sorted(times)
    middle = statistics.median(times)
    return {
        "us": middle,
        "us_p20": ordered[len(ordered) // 5],
        "us_p80": ordered[4 * len(ordered) // 5],
        "bytes_per_second": read / middle * 1e6,
        "operations_per_second": operations / middle * 1e6,
        "share_of_copy": read / middle * 1e6 / top["copy"],
        "share_of_read": read / middle * 1e6 / top["read"],
        "share_of_gemm": operations / middle * 1e6 / top["gemm"],
        "share_of_floor": max(read / top["copy"], operations / top["gemm"]) * 1e6 / middle,
    }


def decoding(top: dict[str, float], quick: bool, right: Sequence[Config]) -> list[dict[str, Any]]:
    """MLA against torch SDPA on the 32/8 x 128 cache it replaces, and the grouped kernel on that cache.

    Args:
        right: tiles of D4 for R = 512, P = 64 that were found right.
    """
    rows = []
    shapes = [(16, 32, 8192), (32, 32, 8192), (32, 1, 32768), (64, 32, 8192), (128, 32, 8192), (16, 64, 4096)]
    shapes += [(32, 32, 1024), (64, 1, 32768)]
    for heads, batch, context in shapes[:4] if quick else shapes:
        paged = Requests(BF16, DEVICE, [context] * batch)
        latent = paged.cache(PAGE, 576)
        q = torch.randn(batch, 1, heads, 576, device=DEVICE, dtype=BF16)
        k, v = (torch.randn(batch, 8, context, 128, device=DEVICE, dtype=BF16) for _ in range(2))
        qg = torch.randn(batch, 1, 32, 128, device=DEVICE, dtype=BF16)
        rows_q = qg.transpose(1, 2)
        calls: dict[str, Callable[[], Any]] = {
            "mla": lambda q=q, c=latent, p=paged: launch.latent_decode(q, c, p.table, p.lengths, 512, 0.07),
            "gqa": lambda q=qg, k=k, v=v, p=paged: launch.grouped_decode(q, k, v, None, p.lengths, 0.088),
            "sdpa gqa": lambda q=rows_q, k=k, v=v: sdpa(q, k, v, enable_gqa=True),
        }
        for config in right if heads > 32 else ():
            calls[tile(config)] = lambda q=q, c=latent, p=paged, t=config: launch.latent_decode(
                q, c, p.table, p.lengths, 512, 0.07, t
            )
        times = dict(zip(calls, timed(list(calls.values()), 1 if quick else 3, 20 if quick else 50), strict=True))
        tokens = batch * context
        costs = {"gqa": (4096, 4 * 32 * 128), "sdpa gqa": (4096, 4 * 32 * 128)}
        figures = {}
        for name, took in times.items():
            read, operations = costs.get(name, (1152, 2 * heads * 1088))
            figures[name] = row(took, tokens * read, tokens * operations, top)
        ratio = figures["sdpa gqa"]["us"] / figures["mla"]["us"]
        rows.append({"heads": heads, "batch": batch, "context": context, "kernels": figures, "mla_over_sdpa": ratio})
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def prompts(top: dict[str, float], quick: bool) -> list[dict[str, Any]]:
    """Causal prompts: 192/128 and 128/128, beside SDPA and FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = torch.compile(flex_attention)
    rows = []
    for nope, rope, value, length in ((128, 64, 128, 8192), (128, 0, 128, 8192))[: 1 if quick else 2]:
        q = torch.randn(1, 32, length, nope + rope, device=DEVICE, dtype=BF16)
        k, v = (torch.randn(1, 32, length, d, device=DEVICE, dtype=BF16) for d in (nope, value))
        kr = torch.randn(1, 1, length, rope, device=DEVICE, dtype=BF16) if rope else None
        whole = k if kr is None else torch.cat([k, kr.expand(-1, 32, -1, -1)], -1)
        count = torch.tensor([length], dtype=torch.int32, device=DEVICE)
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cuda")
        calls: dict[str, Callable[[], Any]] = {
            "prefill": lambda q=q, k=k, kr=kr, v=v, c=count: launch.prefill(q, k, kr, v, c, 0.07),
            "sdpa": lambda q=q, k=whole, v=v: sdpa(q, k, v, is_causal=True, scale=0.07),
            "flex": lambda q=q, k=whole, v=v, m=mask: flex(q, k, v, block_mask=m, scale=0.07),
        }
        found: dict[str, Any] = {}
        for name, call in calls.items():
            try:
                call()
                found[name] = call
            except Exception as problem:
                print(f"{name}: {problem}", file=sys.stderr)
        times = dict(zip(found, timed(list(found.values()), 1, 10), strict=True))
        operations = 32 * length**2 * (nope + rope + value)
        figures = {name: row(t, 0.0, operations, top) for name, t in times.items()}
        rows.append({"widths": f"{nope}+{rope}/{value}", "length": length, "kernels": figures})
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def main() -> int:
    """Measure and print; exit code 1 if a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here; nothing was measured", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    top = ceilings()
    errors = correctness()
    found, trials = experimental()
    errors |= found
    shape = tune.Latent(64, 512, 64, "bfloat16", 0.07)
    right = [finding.config for finding in trials[f"{shape.key} bfloat16"].findings[1:] if finding.right]
    report = {
        "benchmark": "gpu",
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "ceilings": top,
        "errors": errors,
        "experimental": {label: asdict(trial) for label, trial in trials.items()},
        "not_installed": [n for n in ("flashinfer", "flash_mla", "flash_attn") if importlib.util.find_spec(n) is None],
        "decoding": decoding(top, given.quick, right),
        "prompts": prompts(top, given.quick),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text + "\n")
    wrong = {name: value for name, value in errors.items() if not value < 2e-2}
    if wrong:
        print(f"wrong: {wrong}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
