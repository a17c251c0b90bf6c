"""How long an update of a refit's optimiser takes, beside torch's own Muon, which always multiplies bfloat16.

    OMP_NUM_THREADS=1 python benchmarks/refit_speed.py

For matrices of SmolLM2-135M at a quarter of its cache; both in turn in the same run. Prints JSON: medians in seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

#: Query map, output projection, encoder, and the decoders of all heads.
SHAPES = ((864, 576), (576, 576), (56, 576), (1152, 56))


def seconds(optimizer: Any, matrix: Any) -> float:
    """One step on a random gradient."""
    import torch

    matrix.grad = torch.randn_like(matrix)
    began = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - began


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=5)
    arguments = options.parse_args()

    import torch

    from attnopt.passes.common.muon import Muon
    from attnopt.rewriter.precision import multiplies_bfloat16

    rows = []
    for shape in SHAPES:
        matrix = torch.randn(*shape, requires_grad=True)
        ways = {"ours": Muon([matrix], lr=1e-3), "torch": torch.optim.Muon([matrix], lr=1e-3)}
        for optimizer in ways.values():
            seconds(optimizer, matrix)
        times = [{way: seconds(one, matrix) for way, one in ways.items()} for _ in range(arguments.repeats)]
        found = {way: statistics.median(row[way] for row in times) for way in ways}
        rows.append({"shape": shape, **found, "times_as_fast": found["torch"] / found["ours"]})
    native = multiplies_bfloat16("cpu")
    head = {"schema": "attnopt.refit_speed/1", "multiplies_bfloat16": native, "threads": torch.get_num_threads()}
    print(json.dumps({**head, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
