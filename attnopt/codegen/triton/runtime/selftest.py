"""`python -m attention_model.selftest`: compare the kernels of this package with their references on this machine.

On a GPU every shape the model uses is run by Triton in the package's type against float64; then the model's own logits
are compared, kernels against plain torch. Without a GPU only the model in plain torch runs. Prints JSON; exit code 1 if
a difference is above its bound.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton

from . import launch, model, ops, reference  # type: ignore[attr-defined]  # model is generated
from .decoder import Decoder
from .loader import read_json
from .select import PAGE

#: Largest relative difference, by element size: rounding of the inputs of the second product, and of the sum.
BOUNDS = {2: 2e-2, 4: 2e-3}
LENGTHS = (1, 20, 64, 65, 700, 0)


def kernels(shapes: list[dict[str, Any]], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Relative error of every distinct shape, with unused slots poisoned."""
    found = {}
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    pages = -(-max(LENGTHS) // PAGE)
    table = torch.randperm(len(LENGTHS) * pages, generator=torch.Generator().manual_seed(0))
    table = table.view(len(LENGTHS), pages).to(torch.int32).to(device)

    def poison(cache: torch.Tensor) -> torch.Tensor:
        for row, length in enumerate(LENGTHS):
            for slot in range(length, pages * PAGE):
                cache[int(table[row, slot // PAGE]), ..., slot % PAGE, :] = float("nan")
        return cache

    for shape in shapes:
        if shape["kind"] == "latent":
            cache = poison(normal(len(LENGTHS) * pages, PAGE, shape["rank"] + shape["rope"]))
            q = normal(len(LENGTHS), 1, shape["heads"], shape["rank"] + shape["rope"])
            out, _ = launch.latent_decode(q, cache, table, lengths, shape["rank"], shape["scale"])
            want, _ = reference.latent_decode(q.double(), cache.double(), table, lengths, shape["rank"], shape["scale"])
        else:
            sizes = len(LENGTHS) * pages, shape["groups"], PAGE
            k, v = poison(normal(*sizes, shape["width"])), poison(normal(*sizes, shape["value_width"]))
            q = normal(len(LENGTHS), 1, shape["heads"], shape["width"])
            shared = shape["kind"] in ("owner", "map")
            rows = shape["heads"] // shape["groups"]
            kept = torch.empty(len(LENGTHS), shape["groups"], rows, pages * PAGE, device=device) if shared else None
            args = (table, lengths, shape["scale"], shape["softcap"])
            out, lse2 = launch.grouped_decode(q, k, v, *args, scores=kept)
            if kept is not None and shape["kind"] == "map":
                out = launch.map_decode(kept, lse2.view(len(LENGTHS), shape["groups"], rows), v, table, lengths)
                out = out.view(len(LENGTHS), 1, shape["heads"], shape["value_width"])
            want, _ = reference.grouped_decode(q.double(), k.double(), v.double(), *args)
        found[shape["name"]] = float((out.double() - want).abs().max() / want.abs().max())
    return found


def logits(decoder: Decoder) -> float:
    """Relative difference of prompt and cached steps between kernels and plain torch."""
    vocabulary = next(w.shape[0] for name, w in decoder.weights.items() if "embed" in name or "wte" in name)
    ids = torch.randint(0, vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))
    results = []
    for which in ("triton", "reference"):
        ops.force(which)
        decoder.reset(2, 24)
        pieces = [decoder.forward(ids[:, :20])] + [decoder.forward(ids[:, i : i + 1]) for i in range(20, 24)]
        results.append(torch.cat(pieces, 1).double())
    ops.force("auto")
    return float((results[0] - results[1]).abs().max() / results[1].abs().max())


def main() -> int:
    """Run the test and print its figures."""
    directory = Path(__file__).resolve().parent.parent
    manifest = read_json(directory / "attnopt.json")
    decoder = Decoder(model, directory)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if decoder.device.type == "cuda" else "cpu",
        "triton": triton.__version__,
        "torch": torch.__version__,
        "dtype": str(decoder.dtype),
    }
    if decoder.device.type == "cuda":
        report["kernels"] = kernels(manifest["shapes"], decoder.dtype, decoder.device)
        report["logits"] = logits(decoder)
        worst = max([report["logits"], *report["kernels"].values()])
        report["passed"] = worst <= BOUNDS[torch.finfo(decoder.dtype).bits // 8]
    else:
        decoder.forward(torch.zeros(1, 3, dtype=torch.int64))
        report["passed"] = True
        report["note"] = "no GPU here: the kernels were not run, only the model in plain torch"
    print(json.dumps(report, indent=2))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
