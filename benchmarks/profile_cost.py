"""What a profile costs in time and memory: seconds over those of a plain forward pass on the same tokens.

    python benchmarks/profile_cost.py MODEL --text words.txt
    python benchmarks/profile_cost.py MODEL --text words.txt --prompts 1 --context 8192 --memory

All in this process: the forward pass through transformers (logits included), then all metrics that need no gradient,
then those that do, on the very same prompts; `--repeats` times in turn, medians. Prints JSON: times, ratios, limits,
and the peak resident set. Beside the seconds on the clock there are those of the processor, which are to be trusted
where other programs compete for the cores (run with one thread then: idle threads spin).

`--memory` measures no time: it profiles prompts of the given length and of half of it, each in a fresh process, and
prints their peaks above that of the opened model. Memory that grows with the square of the length would quadruple.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

#: The metrics without gradients, and those with, may take this many forward passes each.
LIMIT = 6.0

#: Peak resident set allowed, in bytes.
RSS_LIMIT = 2_500_000_000


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Seconds that some work takes, on the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}


def forward(network: Any, ids: Any) -> None:
    """A plain forward pass over prompts, one at a time, logits included."""
    import torch

    with torch.inference_mode():
        for prompt in ids:
            network(input_ids=prompt[None], use_cache=False)


def load(model: str) -> Any:
    """The model through transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    where = Path(model)
    options = {"gguf_file": where.name} if where.suffix == ".gguf" else {}
    path = where.parent if options else where
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times of the forward pass and of both parts of the profile."""
    import torch

    from attnopt.evaluate import peak_rss_bytes
    from attnopt.passes.mla.spectra import Spectra
    from attnopt.profiles.build import make_passes
    from attnopt.profiles.calibration import from_files
    from attnopt.profiles.prompts import Prompts
    from attnopt.profiles.settings import Settings
    from attnopt.progress import Silent
    from attnopt.rewriter.capture import capture
    from attnopt.rewriter.source import open_source

    source = open_source(arguments.model)
    program = capture(source)
    tokens = arguments.prompts * arguments.context
    text = from_files(source.tokenizer(), [arguments.text], max(tokens, 2 * arguments.context), arguments.context)
    prompts = Prompts.of_calibration(text)
    prompts = Prompts(prompts.inputs[: arguments.prompts], prompts.source, prompts.seed)
    seconds: dict[str, list[dict[str, float]]] = {"forward": [], "forward_metrics": [], "gradient_metrics": []}
    peaks = {"capture": peak_rss_bytes()}
    for _ in range(1 if arguments.only_profile else arguments.repeats):
        heads, gradients = make_passes(program, prompts, Settings(), site_metrics=(Spectra,), reporter=Silent())
        seconds["forward_metrics"].append(timed(heads.run))
        peaks["forward_metrics"] = peak_rss_bytes()
        seconds["gradient_metrics"].append(timed(gradients.run))
        peaks["gradient_metrics"] = peak_rss_bytes()
        del heads, gradients
        if arguments.only_profile:
            break
        # Last, and dropped again: a profile need not hold the whole model, and its memory should not be counted.
        network = load(arguments.model)
        ids = torch.cat([p["input_ids"] for p in prompts.inputs])
        forward(network, ids[:1])
        seconds["forward"].append(timed(partial(forward, network, ids)))
        del network
    medians = {
        kind: {name: statistics.median(one[kind] for one in runs) for name, runs in seconds.items() if runs}
        for kind in ("clock", "processor")
    }
    document: dict[str, Any] = {
        "model": source.name,
        "prompts": len(prompts),
        "context": arguments.context,
        "threads": torch.get_num_threads(),
        "seconds": medians,
        "peak_rss_bytes": peaks,
        "rss_limit": RSS_LIMIT,
    }
    if seconds["forward"]:
        document["forward_passes"] = {
            kind: {name: took[name] / took["forward"] for name in ("forward_metrics", "gradient_metrics")}
            for kind, took in medians.items()
        }
        document["limit"] = LIMIT
    return document


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peaks of two lengths, each in a fresh process."""
    found = {}
    for context in (arguments.context // 2, arguments.context):
        command = [sys.executable, __file__, arguments.model, "--text", str(arguments.text), "--only-profile"]
        command += ["--prompts", str(arguments.prompts), "--context", str(context)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[str(context)] = json.loads(done.stdout)["peak_rss_bytes"]
    return {"model": arguments.model, "prompts": arguments.prompts, "peak_rss_bytes": found, "rss_limit": RSS_LIMIT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model directory or .gguf file")
    parser.add_argument("--text", type=Path, required=True, help="plain text to profile on")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="measure memory by length instead of time")
    parser.add_argument("--only-profile", action="store_true", help="no forward pass through transformers")
    arguments = parser.parse_args()
    document = memory(arguments) if arguments.memory else measure(arguments)
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
