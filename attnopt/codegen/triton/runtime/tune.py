"""Checks and times the designs that a shape of absorbed decoding can have, and keeps the fastest that is right.

`python -m attention_model.selftest --tune` does it for the shapes of a package and writes `configs/`. A design that is
no default may never have run on this kind of device: it first runs in a process of its own, where a fault or a hang
costs nothing else. Imports only torch and triton; copied into packages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

from . import launch
from .designs import gluon_obstacle
from .select import PAGE, Config, d4_refusal, latent_key, mla_decode_candidates, tuned_document
from .trial import BOUNDS, Requests, latent_error

#: Seconds a design has for its check, compilation included.
PATIENCE = 300


@dataclass(frozen=True)
class Latent:
    """A shape of absorbed decoding: heads, ranks, query tokens, scale of the scores, and the type of the cache."""

    heads: int
    rank: int
    rope: int
    dtype: str
    scale: float
    tokens: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes of a cached number."""
        return getattr(torch, self.dtype).itemsize

    @property
    def key(self) -> str:
        """Its name in a table of picks."""
        return latent_key(self.heads, self.rank, self.rope, PAGE, self.itemsize, self.tokens)


@dataclass(frozen=True)
class Finding:
    """What came of a design.

    Attributes:
        config: design and tile.
        error: relative, against float64; None if it did not run.
        microseconds: median, combine included, cold L2; None if it is wrong or was not timed.
        reason: why it did not run.
    """

    config: Config
    error: float | None = None
    microseconds: float | None = None
    reason: str = ""

    @property
    def right(self) -> bool:
        """Whether it ran and the error is within the bound of 16-bit numbers; NaN is not."""
        return self.error is not None and self.error <= BOUNDS[2]


@dataclass(frozen=True)
class Trial:
    """What came of a shape.

    Attributes:
        findings: the default first.
        refused: why D4 is not among them, or "".
    """

    findings: tuple[Finding, ...]
    refused: str = ""


def check(shape: Latent, device: torch.device) -> Trial:
    """Errors of the default and of every candidate; a candidate's in a process of its own."""
    arch, shared, _ = launch.device_facts(device.index or 0)
    sizes = (shape.heads * shape.tokens, shape.rank, shape.rope, shape.itemsize, arch, shared)
    default, *others = mla_decode_candidates(*sizes)
    first = Finding(default, _error(shape, default, device))
    refused = d4_refusal(*sizes) or gluon_obstacle()
    if refused is not None:
        return Trial((first,), refused)
    return Trial((first, *(_isolated(shape, config, device) for config in others)))


def timed(shape: Latent, trial: Trial, device: torch.device, batch: int, context: int) -> Trial:
    """The trial with the times of what is right, for `batch` requests of `context` tokens."""
    requests = Requests(getattr(torch, shape.dtype), device, [context] * batch)
    cache = requests.cache(PAGE, shape.rank + shape.rope)
    q = requests.normal(batch, shape.tokens, shape.heads, shape.rank + shape.rope)
    rest = (requests.table, requests.lengths, shape.rank, shape.scale)
    findings = []
    for one in trial.findings:
        if one.right:
            took = do_bench(lambda c=one.config: launch.latent_decode(q, cache, *rest, c), return_mode="median")
            one = replace(one, microseconds=1e3 * took)
        findings.append(one)
    return replace(trial, findings=tuple(findings))


def tune(shapes: Sequence[Latent], device: torch.device, batch: int = 8, context: int = 8192) -> dict[str, Trial]:
    """Check and time shapes, and write the fastest designs that are right into `launch.CONFIGS`."""
    trials = {s.key: timed(s, check(s, device), device, batch, context) for s in shapes}
    write(trials, device)
    return trials


def write(trials: dict[str, Trial], device: torch.device) -> None:
    """Write picks, beside those that the file has for the same architecture, Triton and device."""
    arch, _, sms = launch.device_facts(device.index or 0)
    picks, passed = {}, {}
    for key, trial in trials.items():
        times = [(f.microseconds, f.config) for f in trial.findings if f.right and f.microseconds is not None]
        if times:
            picks[key] = min(times, key=lambda pair: pair[0])[1]
            passed[key] = [config for _, config in times]
    name = torch.cuda.get_device_name(device)
    document = tuned_document(arch, sms, triton.__version__, {"mla_decode": picks}, name, {"mla_decode": passed})
    path = launch.CONFIGS / f"{arch}.json"
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        if all(old.get(k) == document[k] for k in ("schema", "arch", "triton")):
            before = old["kernels"].get("mla_decode", {})
            document["kernels"] = {**old["kernels"], "mla_decode": before | document["kernels"]["mla_decode"]}
            if old.get("device") == name:
                document["passed"]["mla_decode"] = old["passed"]["mla_decode"] | document["passed"]["mla_decode"]
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)
    launch.tuned.cache_clear()


def _error(shape: Latent, config: Config, device: torch.device) -> float:
    """The larger error of two divisions: short parts, and parts long enough for every buffer to be filled again."""
    sizes = (shape.heads, shape.rank, shape.rope, shape.tokens, shape.scale, getattr(torch, shape.dtype), device)
    errors = [latent_error(*sizes, config, parts) for parts in (None, 2)]
    return max(errors) if all(e == e for e in errors) else float("nan")


def _isolated(shape: Latent, config: Config, device: torch.device) -> Finding:
    """`_error` in another process."""
    module = f"{__package__}.tune"
    root = Path(__file__).resolve().parents[module.count(".")]
    work = json.dumps({"shape": asdict(shape), "config": asdict(config), "device": str(device)})
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, work],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(config, reason=f"no answer within {PATIENCE} seconds")
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return Finding(config, reason=said[-1] if said else f"exit code {done.returncode}")
    return Finding(config, float(done.stdout))


def main() -> None:
    """Run one check and print its error: `_isolated` calls this."""
    work = json.loads(sys.argv[1])
    print(_error(Latent(**work["shape"]), Config(**work["config"]), torch.device(work["device"])))


if __name__ == "__main__":
    main()
