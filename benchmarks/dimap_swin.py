"""DIMAP on a small Swin trained here: accuracy lost at a sparsity without fine-tuning, beside magnitude pruning.

    python benchmarks/dimap_swin.py --data mnist10k.npz > dimap.json
    python benchmarks/dimap_swin.py                        # scikit-learn's digits

Four fifths of the digits train, one fifth judges. Arms per seed and sparsity: the dense model, DIMAP (zeros), DIMAP as
in the paper (modules lose the same share, queries, keys and values rank as one matrix), global magnitude (one ranking
of all prunable weights), uniform magnitude (as many of each matrix), DIMAP with heads and channels removed for good,
and, to see what is missing for want of data, DIMAP on weights times the size of their inputs on training images
(Wanda's score, arXiv 2306.11695). Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers import SwinConfig, SwinForImageClassification

SIZE = 32
#: Swin's decay.
RATE, DECAY = 3e-3, 0.05


def digits(data: Path | None) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 32, 32] in [-1, 1] and labels [n]."""
    if data is not None:
        stored = np.load(data)
        images, labels = torch.tensor(stored["images"]).float() / 255, torch.tensor(stored["labels"]).long()
    else:
        from sklearn.datasets import load_digits

        found = load_digits()
        images, labels = torch.tensor(found.images).float() / 16, torch.tensor(found.target).long()
    images = torch.nn.functional.interpolate(images[:, None], size=(SIZE, SIZE), mode="bilinear")
    return images * 2 - 1, labels


def named(data: Path | None) -> str:
    """What the digits are called."""
    return data.stem if data else "scikit-learn digits"


def build(seed: int, width: int) -> SwinForImageClassification:
    """A Swin of two stages with shifted windows; linear maps start as PyTorch draws them, the wider the smaller.

    Drawn alike (transformers' own 0.02), the matrices end so alike that nothing tells global magnitude from the rest.
    """
    torch.manual_seed(seed)
    config = SwinConfig(
        image_size=SIZE, patch_size=4, num_channels=1, embed_dim=width, depths=[2, 2],
        num_heads=[width // 8, width // 4], window_size=4, num_labels=10, drop_path_rate=0.0,
    )  # fmt: skip
    model = SwinForImageClassification(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()
    return model


def train(model: SwinForImageClassification, images: Tensor, labels: Tensor, epochs: int, seed: int) -> None:
    """AdamW with a one-cycle rate; images are moved by up to two pixels."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(images) // 100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for part in order.split(100)[: len(images) // 100]:
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            output = model(pixel_values=torch.roll(images[part], shift, (2, 3)), labels=labels[part])
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(outputs: Any, images: Tensor, labels: Tensor) -> float:
    """Share of right answers; `outputs` gives logits of a batch."""
    with torch.no_grad():
        right = [outputs(i).argmax(-1) == t for i, t in zip(images.split(250), labels.split(250), strict=True)]
    return float(torch.cat(right).float().mean())


def prunable(program: Any) -> dict[str, Tensor]:
    """The weights that DIMAP ranks, by name."""
    from attnopt.passes.dimap.modules import ranked_layers

    return {n: program.weights.get(n) for one in ranked_layers(program, "split") for n in one.weights}


def magnitude(program: Any, sparsity: float, uniform: bool) -> Any:
    """The program with its smallest prunable weights zero: of all together, or of each matrix."""
    from attnopt.passes.dimap.lamp import exact_count, keep_largest
    from attnopt.rewriter.weights import Inline

    values = prunable(program)
    if not uniform:
        every = torch.cat([value.abs().flatten() for value in values.values()])
        threshold = every.sort(descending=True).values[exact_count(len(every), sparsity) - 1]
    result = {}
    for name, value in values.items():
        if uniform:
            result[name] = Inline(keep_largest(value, counts=(exact_count(value.numel(), sparsity),)))
        else:
            result[name] = Inline(torch.where(value.abs() >= threshold, value, torch.zeros_like(value)))
    return program.replace(weights=program.weights.with_values(result))


def input_sizes(model: SwinForImageClassification, images: Tensor) -> dict[str, Tensor]:
    """Root mean square of what each column of a linear map multiplies, by the name of the map's weight."""
    sizes: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        sizes[f"{name}.weight"] = x.flatten(0, -2).square().mean(0).sqrt()

    hooks = [
        module.register_forward_hook(lambda _, given, __, name=name: keep(name, given[0]))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(pixel_values=images)
    for hook in hooks:
        hook.remove()
    return sizes


def seeing(program: Any, sizes: dict[str, Tensor], sparsity: float) -> Any:
    """The program with zeros as DIMAP sets them, of weights times the size of what they multiply."""
    from attnopt.passes.dimap.lamp import exact_count, keep_largest, kept_counts
    from attnopt.rewriter.weights import Inline

    values = prunable(program)
    scaled = {name: value * sizes[name] for name, value in values.items()}
    total = sum(value.numel() for value in values.values())
    counts = kept_counts([lambda v=v: v.abs().flatten() for v in scaled.values()], exact_count(total, sparsity))
    result = {}
    for (name, value), count in zip(values.items(), counts, strict=True):
        kept = keep_largest(scaled[name], counts=(count,)) != 0
        result[name] = Inline(torch.where(kept, value, torch.zeros_like(value)))
    return program.replace(weights=program.weights.with_values(result))


def trained(
    arguments: argparse.Namespace, seed: int, images: Tensor, labels: Tensor
) -> tuple[SwinForImageClassification, float | None]:
    """A model and the seconds its training took, or None if an earlier run with the same --keep trained it."""
    model = build(seed, arguments.width)
    name = f"swin-{named(arguments.data).replace(' ', '-')}-{arguments.width}-{arguments.epochs}-{seed}.safetensors"
    path = arguments.keep and arguments.keep / name
    if path and path.exists():
        load_model(model, path)
        return model.eval(), None
    began = time.perf_counter()
    train(model, images, labels, arguments.epochs, seed)
    seconds = round(time.perf_counter() - began, 1)
    if path:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        save_model(model, path)
    return model, seconds


def one_seed(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train one model and prune it in every way."""
    from attnopt.passes.registry import REGISTRY
    from attnopt.rewriter.capture import capture_module
    from attnopt.rewriter.interpret import run
    from attnopt.rewriter.passes import PassContext
    from attnopt.rewriter.pipeline import Pipeline

    images, labels = digits(arguments.data)
    test, rest = slice(0, len(images) // 5), slice(len(images) // 5, None)
    model, seconds = trained(arguments, seed, images[rest], labels[rest])
    sizes = input_sizes(model, images[rest][:500])
    program = capture_module(model)

    def judged(changed: Any) -> float:
        return accuracy(lambda i: run(changed, pixel_values=i)["logits"], images[test], labels[test])

    def pruned(text: str) -> Any:
        return Pipeline.parse(text, REGISTRY).run(program, PassContext()).program

    dense = accuracy(lambda i: model(pixel_values=i).logits, images[test], labels[test])
    rows = []
    for sparsity in arguments.sparsity:
        removed = pruned(f"dimap{{sparsity={sparsity} structured=true}}")
        found = {
            "dimap": judged(pruned(f"dimap{{sparsity={sparsity}}}")),
            "dimap_paper": judged(pruned(f"dimap{{sparsity={sparsity} shares=equal granularity=fused}}")),
            "global_magnitude": judged(magnitude(program, sparsity, uniform=False)),
            "uniform_magnitude": judged(magnitude(program, sparsity, uniform=True)),
            "dimap_structured": judged(removed),
            "dimap_seeing": judged(seeing(program, sizes, sparsity)),
        }
        rows.append(
            {
                "sparsity": sparsity,
                "accuracy": found,
                "drop": {name: dense - value for name, value in found.items()},
                "parameters": {"dense": program.parameters, "dimap_structured": removed.parameters},
            }
        )
    print(json.dumps({"seed": seed, "dense": dense, "rows": rows}), file=sys.stderr, flush=True)
    return {"seed": seed, "dense_accuracy": dense, "training_seconds": seconds, "sparsities": rows}


def mean_drop(seeds: list[dict[str, Any]], place: int) -> dict[str, Any]:
    """Mean drop of every arm at one sparsity, and DIMAP's as a share of global magnitude's."""
    rows = [seed["sparsities"][place] for seed in seeds]
    drop = {name: sum(row["drop"][name] for row in rows) / len(rows) for name in rows[0]["drop"]}
    share = drop["dimap"] / drop["global_magnitude"] if drop["global_magnitude"] > 0 else None
    return {"sparsity": rows[0]["sparsity"], "mean_drop": drop, "share_of_global_magnitude": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="npz of images [n, 28, 28] and labels; scikit-learn's digits if absent"
    )
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    parser.add_argument(
        "--width", type=int, default=16, help="channels of the first stage; the second has twice as many"
    )
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="folder to keep trained models in, and to take them from")
    arguments = parser.parse_args()
    rows = [one_seed(arguments, seed) for seed in range(arguments.seeds)]
    document = {
        "schema": "attnopt.dimap_swin/3",
        "data": named(arguments.data),
        "width": arguments.width,
        "seeds": rows,
        "means": [mean_drop(rows, place) for place in range(len(arguments.sparsity))],
        "to_reach": {"sparsity": 0.5, "share_of_global_magnitude": 1 / 3, "dense_accuracy": 0.97},
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
