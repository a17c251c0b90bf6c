"""The measuring process: times prefill and decoding of several models, one after the other, case by case."""

from __future__ import annotations

import platform
import statistics
import time
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers

from attnopt.errors import AttnoptError
from attnopt.evaluate.loading import Loaded, load
from attnopt.evaluate.measure import count_cached_numbers
from attnopt.evaluate.memory import peak_rss_bytes
from attnopt.evaluate.serve import Progress
from attnopt.timing.job import BenchJob

_WARM_UP = 32  # prompt tokens before anything is timed: libraries choose kernels and claim memory then


@torch.inference_mode()
def run(job: BenchJob, progress: Progress) -> dict[str, Any]:
    """Carry out a job. `progress(what, amount)` is called with the tokens done.

    Raises:
        AttnoptError: a context is longer than a model was made for, a model is no causal language model, or the memory
            does not suffice.
    """
    models = [_load(job, index) for index in range(len(job.models))]
    for loaded in models:
        _check(job, loaded)
        _decode(loaded, _prefill(job, loaded, _tokens(job, 1, min(_WARM_UP, *job.contexts)))[1], job, 1)
    cases = []
    for context in job.contexts:
        for batch in job.batches:
            try:
                cases.append(_case(job, models, context, batch, progress))
            except (MemoryError, RuntimeError) as error:  # torch's own is a RuntimeError
                if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
                    raise
                raise AttnoptError(
                    f"{batch} x {context} tokens do not fit into memory", "measure shorter contexts, or fewer at once"
                ) from error
    return {
        "schema": "attnopt.bench.result/1",
        "models": [_describe(loaded) for loaded in models],
        "cases": cases,
        "machine": _machine(job),
        "peak_bytes": _peak_bytes(job),
    }


def _load(job: BenchJob, index: int) -> Loaded:
    dtype: Any = "auto" if job.dtype == "auto" else getattr(torch, job.dtype)
    return load(job.models[index], dtype, job.device)


def _check(job: BenchJob, loaded: Loaded) -> None:
    text = loaded.model.config.get_text_config()
    longest, needed = getattr(text, "max_position_embeddings", None), max(job.contexts) + job.steps
    if longest is not None and needed > longest:
        raise AttnoptError(
            f"{loaded.spec.name} was made for {longest:,} tokens, and {needed:,} were asked for",
            f"use --context up to {longest - job.steps}",
        )


def _tokens(job: BenchJob, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 256, (batch, length), generator=generator).to(job.device)


def _case(job: BenchJob, models: list[Loaded], context: int, batch: int, progress: Progress) -> dict[str, Any]:
    """One context and batch: every prompt pass and every step of one model is followed by the next model's."""
    ids = _tokens(job, batch, context)
    prefill: list[list[float]] = [[] for _ in models]
    caches: list[Any] = [None for _ in models]
    for _ in range(job.runs):
        for index, loaded in enumerate(models):
            caches[index] = None  # the last run's cache goes first
            seconds, caches[index] = _prefill(job, loaded, ids)
            prefill[index].append(seconds)
            progress(f"prefill {context}", ids.numel())
    bytes_after_prompt = [cache_bytes(cache) for cache in caches]
    cached = [count_cached_numbers(cache, batch) for cache in caches]
    decode: list[list[float]] = [[] for _ in models]
    for step in range(job.steps + 1):
        for index, loaded in enumerate(models):
            seconds = _decode(loaded, caches[index], job, batch)
            if step:  # the first grows buffers
                decode[index].append(seconds)
                progress(f"decode {context}", batch)
    return {
        "context": context,
        "batch": batch,
        "models": [
            {
                "prefill_seconds": prefill[index],
                "decode_seconds": decode[index],
                "prefill_tokens_per_second": batch * context / statistics.median(prefill[index]),
                "decode_tokens_per_second": batch / statistics.median(decode[index]),
                "cache_bytes": bytes_after_prompt[index],
                "cached_numbers_per_token": cached[index],
                "predicted_bytes_per_step": _bytes_per_step(loaded, batch) + bytes_after_prompt[index],
            }
            for index, loaded in enumerate(models)
        ],
    }


def _prefill(job: BenchJob, loaded: Loaded, ids: torch.Tensor) -> tuple[float, Any]:
    """Seconds to read a prompt, as generation does it (logits of the last token only), and the cache."""
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in signature(loaded.model.forward).parameters else {}
    _finish(job.device)
    began = time.perf_counter()
    cache = loaded.model(input_ids=ids, use_cache=True, **only_last).past_key_values
    _finish(job.device)
    return time.perf_counter() - began, cache


def _decode(loaded: Loaded, cache: Any, job: BenchJob, batch: int) -> float:
    """Seconds of one decoding step; the cache grows by a token."""
    token = _tokens(job, batch, 1)
    _finish(job.device)
    began = time.perf_counter()
    loaded.model(input_ids=token, past_key_values=cache, use_cache=True)
    _finish(job.device)
    return time.perf_counter() - began


def _finish(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def cache_bytes(cache: Any) -> int:
    """Bytes of a transformers cache, all layers together."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def _bytes_per_step(loaded: Loaded, batch: int) -> int:
    """Weights that one decoding step reads, in bytes.

    All but the token embedding, of which it reads a row per sequence, unless the output layer is the same tensor. Of
    the experts of a mixture, those that `batch` tokens are expected to be routed to, if every expert is as likely.
    """
    model, config = loaded.model, loaded.model.config.get_text_config()
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output is not None and output.weight is embedding.weight
    experts = next((n for name in _EXPERTS if (n := getattr(config, name, None))), 0)
    chosen = getattr(config, "num_experts_per_tok", None) or experts
    share = 1.0 - (1.0 - chosen / experts) ** batch if experts else 1.0
    total = 0.0
    for name, weight in model.named_parameters():
        size = weight.numel() * weight.element_size()
        if weight is embedding.weight and not tied:
            size = batch * weight.shape[1] * weight.element_size()
        total += size * (share if ".experts." in name else 1.0)
    return round(total)


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _describe(loaded: Loaded) -> dict[str, Any]:
    model = loaded.model
    parameters = list(model.parameters())
    return {
        "name": loaded.spec.name,
        "path": loaded.spec.path,
        "loaded_as": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in parameters),
        "weight_bytes": sum(p.numel() * p.element_size() for p in parameters),
        "load_seconds": loaded.load_seconds,
    }


def _machine(job: BenchJob) -> dict[str, Any]:
    cuda = job.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(job.device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": platform.platform(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _peak_bytes(job: BenchJob) -> int:
    return torch.cuda.max_memory_allocated(job.device) if job.device.startswith("cuda") else peak_rss_bytes()
