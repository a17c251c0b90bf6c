"""What a conversion to MLA costs in time: seconds of `--recover none` over those of a plain forward pass, same tokens.

    python benchmarks/convert_cost.py MODEL --text words.txt

Both run in this process, the forward pass through transformers (logits included) on the very windows that calibrate.
Prints JSON: both times, their ratio, the limit, and the peak resident set.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

#: The conversion may take this many forward passes.
LIMIT = 3.0


def forward_seconds(model: str, ids: object) -> float:
    """Seconds of a plain forward pass over windows of token ids, one at a time, logits included."""
    import torch
    from transformers import AutoModelForCausalLM

    where = Path(model)
    options = {"gguf_file": where.name} if where.suffix == ".gguf" else {}
    network = AutoModelForCausalLM.from_pretrained(
        where.parent if options else where, dtype=torch.float32, **options
    ).eval()
    assert isinstance(ids, torch.Tensor)
    with torch.inference_mode():
        network(input_ids=ids[:1], use_cache=False)
        began = time.perf_counter()
        for window in ids:
            network(input_ids=window[None], use_cache=False)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model directory or .gguf file")
    parser.add_argument("--text", type=Path, required=True, help="plain text to calibrate on")
    parser.add_argument("--calib-tokens", type=int, default=32768)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--kv-keep", type=float, default=0.5)
    arguments = parser.parse_args()

    import torch

    from attnopt.evaluate import peak_rss_bytes
    from attnopt.passes.registry import REGISTRY
    from attnopt.profiles.calibration import from_files
    from attnopt.rewriter.capture import capture
    from attnopt.rewriter.passes import PassContext
    from attnopt.rewriter.pipeline import Pipeline
    from attnopt.rewriter.source import open_source
    from attnopt.staging import Staging

    source = open_source(arguments.model)
    text = from_files(source.tokenizer(), [arguments.text], arguments.calib_tokens, arguments.context)
    with tempfile.TemporaryDirectory(prefix="attnopt-cost-") as folder:
        began = time.perf_counter()
        program = capture(source)
        captured = time.perf_counter() - began
        with Staging(Path(folder) / "out", key="cost") as staging:
            pipeline = Pipeline.parse(f"to-mla{{kv-keep={arguments.kv_keep}}}", REGISTRY)
            began = time.perf_counter()
            pipeline.run(program, PassContext(calibration=text, workdir=staging))
            converting = time.perf_counter() - began
    peak = peak_rss_bytes()
    forward = forward_seconds(arguments.model, torch.cat([text.windows, text.selection]))
    report = {
        "schema": "attnopt.convert_cost/1",
        "model": arguments.model,
        "tokens": text.tokens,
        "context": text.context,
        "threads": torch.get_num_threads(),
        "forward_seconds": round(forward, 2),
        "capture_seconds": round(captured, 2),
        "convert_seconds": round(converting, 2),
        "ratio": round(converting / forward, 3),
        "limit": LIMIT,
        "peak_rss_bytes": peak,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
