"""How quickly a model writes text: seconds of a step of decoding, as transformers makes it and as attnopt does.

    OMP_NUM_THREADS=1 python benchmarks/writing_speed.py MODEL --window 512 --window 2048

As many sequences side by side as `attnopt convert` writes without calibration files, in windows of such lengths. Steps
are timed where a quarter, a half and three quarters of the window have been written, both kinds in turn: transformers'
cache and attention, and attnopt's (`attnopt/profiles/writing.py`). Prints JSON: medians of the processor's milliseconds
a step, tokens per second of a window, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from typing import Any

KINDS = ("transformers", "attnopt")


def filled(model: Any, kind: str, batch: int, length: int, window: int) -> Any:
    """A cache that holds `length` tokens of each sequence."""
    import torch
    from transformers import DynamicCache

    from attnopt.profiles.writing import roomy_cache

    cache = DynamicCache(config=model.config) if kind == "transformers" else roomy_cache(model.config, window)
    # What the numbers are does not matter for the time.
    ids = torch.zeros(1, length, dtype=torch.long)
    with torch.inference_mode():
        small = model(input_ids=ids, use_cache=True).past_key_values
        for index, (layer, given) in enumerate(zip(cache.layers, small.layers, strict=True)):
            layer.update(*(x.expand(batch, *x.shape[1:]).contiguous() for x in (given.keys, given.values)), index)
    return cache


def step(model: Any, kind: str, cache: Any, batch: int, position: int) -> float:
    """Milliseconds of the processor for one token of each sequence."""
    import torch

    from attnopt.profiles.writing import SingleQueries

    ids = torch.zeros(batch, 1, dtype=torch.long)
    with torch.inference_mode(), nullcontext() if kind == "transformers" else SingleQueries():
        began = time.process_time()
        model(input_ids=ids, position_ids=ids + position, past_key_values=cache, use_cache=True)
        return 1000 * (time.process_time() - began)


def measured(model: Any, window: int, repeats: int) -> dict[str, Any]:
    """Both kinds at three places of a window."""
    from attnopt.profiles.writing import sampling_batch

    batch = sampling_batch(model.config, window, model.dtype.itemsize)
    found: dict[str, Any] = {"window": window, "sequences": batch, "milliseconds": {}}
    for place in (window // 4, window // 2, 3 * window // 4):
        caches = {kind: filled(model, kind, batch, place, window) for kind in KINDS}
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for turn in range(repeats + 1):
            for kind in KINDS:
                took = step(model, kind, caches[kind], batch, place + turn)
                times[kind] += [took] if turn else []  # the first step warms up
        found["milliseconds"][place] = {kind: round(statistics.median(values), 1) for kind, values in times.items()}
    means = {kind: statistics.mean(row[kind] for row in found["milliseconds"].values()) for kind in KINDS}
    found["tokens_per_processor_second"] = {kind: round(1000 * batch / mean, 1) for kind, mean in means.items()}
    found["times_as_fast"] = round(means["transformers"] / means["attnopt"], 2)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model directory or .gguf file")
    parser.add_argument("--window", type=int, action="append", help="tokens in a window; repeatable")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    import torch

    from attnopt.profiles.writing import sampler
    from attnopt.rewriter.source import open_source

    model = sampler(open_source(arguments.model))
    rows = [measured(model, window, arguments.repeats) for window in arguments.window or [512, 2048]]
    print(
        json.dumps(
            {"model": arguments.model, "threads": torch.get_num_threads(), "dtype": str(model.dtype), "rows": rows}
        )
    )


if __name__ == "__main__":
    main()
