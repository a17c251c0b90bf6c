"""Cached decoding with onnxruntime: exports of attnopt beside the plain export of the original, in one run.

    python benchmarks/onnx_decode.py MODEL --export NAME=DIR ... [--contexts 1024 4096 8192 16384] [--steps 16]

MODEL is the original Hugging Face directory; its baseline is `torch.onnx.export` of the transformers model with a
DynamicCache (inputs past_key_values, outputs their concatenation), exported here once. DIRs are what
`attnopt export --format onnx` wrote. For every context the cache is filled with random numbers (what is in it does not
change the time), all models decode `--steps` tokens in turn, a token each, and medians are compared. Peak memory is
that of a process that does nothing but decode that model at that context. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime

CPU = ["CPUExecutionProvider"]


class Runner(Protocol):
    """One model with its cache; `fill` makes room and pretends that tokens were read, `step` decodes one token."""

    def fill(self, context: int) -> int: ...

    def step(self) -> None: ...


class Ours:
    """An export of attnopt."""

    def __init__(self, directory: str, threads: int) -> None:
        from attnopt.codegen.onnx import OnnxDecoder

        self.decoder = OnnxDecoder(directory, providers=CPU, threads=threads)

    def fill(self, context: int) -> int:
        """Bytes of the cache at this context (the buffers are a little larger: they have room to grow)."""
        decoder = self.decoder
        decoder.reset(1, context + 64)
        generator = np.random.default_rng(0)
        for buffer in decoder._buffers:
            buffer.update_inplace(generator.standard_normal(buffer.shape(), dtype=np.float32) * 0.1)
        decoder.past_length[:] = context
        return decoder.cache_bytes * context // decoder.capacity

    def step(self) -> None:
        """Decode one token."""
        self.decoder.forward(np.array([[5]]))


class Plain:
    """The transformers model, exported by torch.onnx with its cache concatenated at every step."""

    def __init__(self, file: str, threads: int) -> None:
        from attnopt.codegen.onnx.decoder import open_session

        self.session = open_session(Path(file), CPU, threads)
        inputs = self.session.get_inputs()
        self.ids, self.mask, self.positions = (i.name for i in inputs[:3])
        self.shapes = {i.name: i.shape for i in inputs[3:]}
        self.outputs = [o.name for o in self.session.get_outputs()][1:]

    def fill(self, context: int) -> int:
        """Bytes of the cache at this context."""
        generator = np.random.default_rng(0)
        self.length = context
        self.cache = [
            onnxruntime.OrtValue.ortvalue_from_numpy(
                generator.standard_normal((1, s[1], context, s[3]), dtype=np.float32) * 0.1
            )
            for s in self.shapes.values()
        ]
        return sum(4 * int(np.prod(c.shape())) for c in self.cache)

    def step(self) -> None:
        """Decode one token."""
        binding = self.session.io_binding()
        binding.bind_cpu_input(self.ids, np.array([[5]]))
        binding.bind_cpu_input(self.mask, np.ones((1, self.length + 1), np.int64))
        binding.bind_cpu_input(self.positions, np.array([[self.length]]))
        for name, value in zip(self.shapes, self.cache, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        self.cache = list(binding.get_outputs())[1:]
        self.length += 1


def export_plain(model: str, file: Path) -> None:
    """`torch.onnx.export` of the transformers model, with dynamic batch and lengths, at the opset ours has."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()
    config = loaded.config
    heads, width = config.num_key_value_heads, getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers

    class Flat(torch.nn.Module):
        """The model with its cache as tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.model = loaded

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: list[Any]
        ) -> tuple[torch.Tensor, ...]:
            cache = DynamicCache(past)
            out = self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
            )
            flat = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
            return (out.logits, *flat)

    past = [(torch.zeros(2, heads, 5, width), torch.zeros(2, heads, 5, width)) for _ in range(layers)]
    dynamic = torch.export.Dim.DYNAMIC
    examples = {
        "input_ids": torch.zeros(2, 3, dtype=torch.long),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
        "position_ids": torch.arange(5, 8).repeat(2, 1),
        "past": past,
    }
    shapes = {name: {0: dynamic, 1: dynamic} for name in ("input_ids", "attention_mask", "position_ids")}
    layer_shape = {0: dynamic, 2: dynamic}
    shapes["past"] = [(layer_shape, layer_shape) for _ in range(layers)]
    with torch.no_grad():
        torch.onnx.export(
            Flat(),
            (),
            str(file),
            kwargs=examples,
            dynamic_shapes=shapes,
            dynamo=True,
            opset_version=24,
            external_data=True,
            verbose=False,
            output_names=["logits"],
        )


def open_runner(kind: str, path: str, threads: int) -> Runner:
    """The model at a path, "plain" or "ours"."""
    return Plain(path, threads) if kind == "plain" else Ours(path, threads)


def peak_bytes(kind: str, path: str, context: int, threads: int) -> int:
    """Largest resident memory of a process that decodes three tokens at this context."""
    command = [sys.executable, __file__, "--child", kind, path, str(context), str(threads)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def child(kind: str, path: str, context: int, threads: int) -> None:
    """The process that `peak_bytes` starts."""
    from attnopt.evaluate.memory import peak_rss_bytes

    runner = open_runner(kind, path, threads)
    runner.fill(context)
    for _ in range(3):
        runner.step()
    print(peak_rss_bytes())


def measure(models: dict[str, tuple[str, str]], contexts: list[int], steps: int, threads: int) -> list[dict[str, Any]]:
    """A row per context: for each model tokens per second, cache bytes, peak memory, ratio to the first."""
    runners = {name: open_runner(kind, path, threads) for name, (kind, path) in models.items()}
    rows = []
    for context in contexts:
        cache = {name: runner.fill(context) for name, runner in runners.items()}
        times: dict[str, list[float]] = {name: [] for name in runners}
        for turn in range(steps + 2):
            for name, runner in runners.items():
                start = time.perf_counter()
                runner.step()
                if turn >= 2:
                    times[name].append(time.perf_counter() - start)
        first = statistics.median(times[next(iter(times))])
        row: dict[str, Any] = {"context": context, "models": {}}
        for name, (kind, path) in models.items():
            middle = statistics.median(times[name])
            row["models"][name] = {
                "tokens_per_second": 1 / middle,
                "fastest_tokens_per_second": 1 / min(times[name]),
                "ratio": first / middle,
                "ratio_of_fastest": min(times[next(iter(times))]) / min(times[name]),
                "cache_bytes": cache[name],
                "peak_bytes": peak_bytes(kind, path, context, threads),
            }
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    return rows


def main() -> None:
    """Parse, measure, print."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--export", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 8192, 16384])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plain", type=Path, help="keep the plain export here, and use it if it is there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plain = given.plain or Path(folder) / "plain.onnx"
        if not plain.exists():
            plain.parent.mkdir(parents=True, exist_ok=True)
            export_plain(given.model, plain)
        models = {"plain": ("plain", str(plain))}
        models |= {name: ("ours", path) for name, path in (item.split("=", 1) for item in given.export)}
        rows = measure(models, given.contexts, given.steps, given.threads)
    versions = {"onnxruntime": onnxruntime.__version__, "python": platform.python_version()}
    facts = {"machine": platform.machine(), "threads": given.threads, "steps": given.steps, "versions": versions}
    print(json.dumps({"benchmark": "onnx_decode", **facts, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
