"""`python -m attention_model.selftest`: compare the kernels of this package with their references on this machine.

On a GPU every shape the model uses is run by Triton in the package's type against float64; then the model's own logits
are compared, kernels against plain torch. Without a GPU only the model in plain torch runs. Prints JSON; exit code 1 if
a difference is above its bound.

With --tune the designs that latent attention can have are also checked and timed, and the fastest that is right is
written to `configs/`, where this package finds it on this device with this Triton.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from . import launch, model, ops, reference, tune  # type: ignore[attr-defined]  # model is generated
from .decoder import Decoder
from .loader import read_json
from .select import PAGE
from .trial import BOUNDS, LENGTHS, Requests, difference, latent_error


def kernels(shapes: list[dict[str, Any]], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Relative error of every distinct shape, with unused slots poisoned."""
    found = {}
    for shape in shapes:
        if shape["kind"] == "latent":
            sizes = (shape["heads"], shape["rank"], shape["rope"], 1, shape["scale"])
            found[shape["name"]] = latent_error(*sizes, dtype, device)
            continue
        requests = Requests(dtype, device)
        k, v = (requests.cache(shape["groups"], PAGE, shape[width]) for width in ("width", "value_width"))
        q = requests.normal(len(LENGTHS), 1, shape["heads"], shape["width"])
        shared = shape["kind"] in ("owner", "map")
        rows, slots = shape["heads"] // shape["groups"], requests.pages * PAGE
        kept = torch.empty(len(LENGTHS), shape["groups"], rows, slots, device=device) if shared else None
        table, lengths = requests.table, requests.lengths
        args = (table, lengths, shape["scale"], shape["softcap"])
        out, lse2 = launch.grouped_decode(q, k, v, *args, scores=kept)
        if kept is not None and shape["kind"] == "map":
            out = launch.map_decode(kept, lse2.view(len(LENGTHS), shape["groups"], rows), v, table, lengths)
            out = out.view(len(LENGTHS), 1, shape["heads"], shape["value_width"])
        want, _ = reference.grouped_decode(q.double(), k.double(), v.double(), *args)
        found[shape["name"]] = difference(out, want)
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
    parser = argparse.ArgumentParser(prog="python -m attention_model.selftest", description=__doc__)
    parser.add_argument("--tune", action="store_true", help="time the designs of latent attention; writes configs/")
    given = parser.parse_args()
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
        if given.tune:
            dtype, fields = str(decoder.dtype).removeprefix("torch."), ("heads", "rank", "rope", "scale")
            latents = [s for s in manifest["shapes"] if s["kind"] == "latent"]
            tuned = tune.tune([tune.Latent(**{k: s[k] for k in fields}, dtype=dtype) for s in latents], decoder.device)
            report["designs"] = {shape: asdict(trial) for shape, trial in tuned.items()}
    else:
        decoder.forward(torch.zeros(1, 3, dtype=torch.int64))
        report["passed"] = True
        report["note"] = "no GPU here: the kernels were not run, only the model in plain torch"
    print(json.dumps(report, indent=2))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
