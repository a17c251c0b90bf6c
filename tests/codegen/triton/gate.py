"""The kernels whose compiled code is held to golden figures: names, and how to compile each.

`python -m tests.codegen.triton.gate` prints the figures of the installed Triton as JSON, for `golden/`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict

import triton

from attnopt.codegen.target import find_target
from attnopt.codegen.triton.compile import (
    Compiled,
    combine_kernel,
    gqa_decode_kernel,
    map_decode_kernel,
    mla_decode_kernel,
    prefill_kernel,
)
from attnopt.codegen.triton.runtime.select import (
    D4,
    Config,
    gqa_decode_config,
    map_decode_config,
    mla_decode_candidates,
    mla_decode_config,
    prefill_config,
)

#: (heads, R, P): DeepSeek's at three numbers of heads, small ranks, and what conversion of a small model gives.
LATENTS = ((16, 512, 64), (32, 512, 64), (64, 512, 64), (32, 256, 64), (32, 128, 64), (9, 144, 48))
#: The same for D4, which has tiles of 64 rows and is for sm_90 alone.
D4_LATENTS = ((64, 512, 64), (128, 256, 64), (64, 128, 64), (40, 144, 48))
TARGETS = ("sm_80", "sm_90")


def d4_cases() -> dict[str, tuple[int, int, int, Config]]:
    """Name -> heads, R, P and a tile that is offered, for every target that offers one."""
    found = {}
    for name in TARGETS:
        for sizes in D4_LATENTS:
            arch, limit = name.replace("_", ""), find_target(name).shared_memory
            for config in mla_decode_candidates(*sizes, 2, arch, limit):
                if config.kernel == D4:
                    label = "{} d4 H{} R{} P{}".format(name, *sizes)
                    found[f"{label} BN{config.BN} x{config.num_stages}"] = (*sizes, config)
    return found


def cases() -> dict[str, Callable[[], Compiled]]:
    """Name -> compile."""
    found: dict[str, Callable[[], Compiled]] = {}
    for name in TARGETS:
        target, arch = find_target(name), name.replace("_", "")
        limit = target.shared_memory
        for heads, rank, rope in LATENTS:
            config = mla_decode_config(heads, rank, rope, 2, arch, limit)
            found[f"{name} mla H{heads} R{rank} P{rope}"] = lambda h=heads, r=rank, p=rope, c=config, t=target: (
                mla_decode_kernel(h, r, p, "bfloat16", c, t)
            )
        grouped = gqa_decode_config(4, 128, 128, 2, arch, limit)
        for label, options in (
            ("gqa", {}),
            ("gqa streaming", {"streaming": True}),
            ("gqa routed", {"routed": 6}),
            ("gqa map owner", {"store_map": True}),
            ("gqa softcap contiguous", {"softcap": True, "paged": False}),
        ):
            found[f"{name} {label}"] = lambda o=options, c=grouped, t=target: gqa_decode_kernel(
                32, 8, 128, 128, "bfloat16", c, t, **o
            )
        found[f"{name} map consumer"] = lambda t=target: map_decode_kernel(
            32, 8, 128, "bfloat16", map_decode_config(4), t
        )
        for label, nope, rope, value in (("192/128", 128, 64, 128), ("96/64", 64, 32, 64), ("128", 128, 0, 128)):
            config = prefill_config(nope, rope, value, 2, arch, limit)
            found[f"{name} prefill {label}"] = lambda n=nope, r=rope, v=value, c=config, t=target: prefill_kernel(
                32, 32, n, r, v, "bfloat16", c, t
            )
        found[f"{name} combine"] = lambda t=target: combine_kernel(32, 512, "bfloat16", t)
    for name, (*sizes, config) in d4_cases().items():
        target = find_target(name.split()[0])
        found[name] = lambda s=sizes, c=config, t=target: mla_decode_kernel(*s, "bfloat16", c, t)
    return found


if __name__ == "__main__":
    wanted = sys.argv[1:]
    made = {name: asdict(make().figures) for name, make in cases().items() if not wanted or name in wanted}
    print(json.dumps({"triton": triton.__version__, "kernels": made}, indent=1, sort_keys=True))
