"""The measuring process: loads models through transformers and runs them. Imported by `python -m attnopt.evaluate`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnopt.errors import AttnoptError, SourceError
from attnopt.evaluate.job import Job, ModelSpec
from attnopt.evaluate.memory import peak_rss_bytes
from attnopt.evaluate.report import WindowScores, compare
from attnopt.evaluate.serve import Progress
from attnopt.evaluate.text import windows_of

_BATCH_TOKENS = 1024  # a forward pass this long fills two to sixteen cores; more only costs memory
_SLICE = 256  # positions whose distributions over the vocabulary are in memory in full at a time
_PROBE = 12  # prompt tokens of the cache measurement
_STEPS = 5  # tokens generated in it


@dataclass
class Loaded:
    """A model in memory.

    Attributes:
        spec: where it came from.
        directory: the Hugging Face directory it was loaded from.
        model: the module, in eval mode.
        load_seconds: time that took.
        run_seconds, run_tokens: spent on windows so far.
    """

    spec: ModelSpec
    directory: Path
    model: Any
    load_seconds: float
    run_seconds: float = 0.0
    run_tokens: int = 0


def directory_of(path: str) -> Path:
    """The Hugging Face directory behind a path (a GGUF file is imported first)."""
    if Path(path).is_dir():
        return Path(path)
    from attnopt.rewriter.source import open_source

    return open_source(path).path


def load(spec: ModelSpec, dtype: torch.dtype, device: str) -> Loaded:
    """Load a model as any user of transformers would, and refuse one whose tensors are not exactly those it declares.

    Raises:
        SourceError: tensors are missing, left over, or of a wrong shape.
    """
    began = time.perf_counter()
    directory = directory_of(spec.path)
    if _model_type(directory) == "attnopt" and not spec.trust_remote_code:
        import attnopt.codegen.hf  # noqa: F401 (registers the class)
    options = {"trust_remote_code": spec.trust_remote_code, "local_files_only": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True, **options)
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            names = ", ".join(sorted(map(str, info[kind]))[:5])
            what = f"{directory}: {kind.replace('_', ' ')}: {names}"
            raise SourceError(what, "the directory is damaged; write it again")
    return Loaded(spec, directory, model.eval().to(device), time.perf_counter() - began)


def _model_type(directory: Path) -> str:
    try:
        return str(json.loads((directory / "config.json").read_text())["model_type"])
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{directory} has no readable config.json", "give a model directory") from error


@torch.inference_mode()
def run(job: Job, progress: Progress) -> dict[str, Any]:
    """Carry out a job. `progress(what, amount)` is called with the tokens done."""
    began = time.perf_counter()
    models = [load(spec, getattr(torch, job.dtype), job.device) for spec in job.models]
    tokenizers = _tokenizers(job, models)
    texts = [_measure_text(job, index, models, tokenizers, progress) for index in range(len(job.texts))]
    report = {
        "schema": "attnopt.evaluate/1",
        "models": [_describe(job, loaded, tokenizers) for loaded in models],
        "texts": texts,
        "dtype": job.dtype,
        "device": job.device,
        "threads": torch.get_num_threads(),
    }
    if job.logits_file is not None:
        _write_logits(job, models)
    return {**report, "seconds": time.perf_counter() - began, "peak_rss_bytes": peak_rss_bytes()}


def _tokenizers(job: Job, models: list[Loaded]) -> list[Any]:
    """The models' tokenizers if the job needs text; they must agree, or the comparison would mean nothing."""
    if not job.texts and job.prompt is None:
        return []
    try:
        tokenizers = [
            AutoTokenizer.from_pretrained(m.directory, trust_remote_code=m.spec.trust_remote_code) for m in models
        ]
    except Exception as error:  # tokenizers raise whatever their backend raises
        raise SourceError(f"a tokenizer cannot be loaded: {error}", "copy the model's tokenizer files") from error
    probe = "It costs 3.50, or 1,200 for 7 days.\n\tÄrger — naïve 漢字 🙂"
    first = tokenizers[0](probe, add_special_tokens=False)["input_ids"]
    for loaded, tokenizer in zip(models, tokenizers, strict=True):
        if tokenizer(probe, add_special_tokens=False)["input_ids"] != first:
            raise AttnoptError(
                f"{loaded.spec.name} has another tokenizer than {models[0].spec.name}", "compare with its own original"
            )
    return tokenizers


def _measure_text(
    job: Job, index: int, models: list[Loaded], tokenizers: list[Any], progress: Progress
) -> dict[str, Any]:
    spec = job.texts[index]
    windows = windows_of(spec, tokenizers[0], job.window, job.windows)
    scores = [WindowScores() for _ in models]
    for batch in _batches(windows, job):
        reference = None
        for loaded, score in zip(models, scores, strict=True):
            started = time.perf_counter()
            logits = loaded.model(input_ids=batch, use_cache=False).logits
            loaded.run_seconds += time.perf_counter() - started
            loaded.run_tokens += batch.numel()
            reference = logits if reference is None else reference
            score_windows(batch, reference, logits, score)
            del logits
            progress(spec.file, batch.numel())
    names = [loaded.spec.name for loaded in models]
    return {
        "file": spec.file,
        "windows": len(windows),
        "window": job.window,
        "tokens": len(windows) * (job.window - 1),
        "original": {"perplexity": math.exp(sum(scores[0].nll) / len(windows)), "nll": scores[0].nll},
        "converted": {n: compare(scores[0], s) for n, s in zip(names[1:], scores[1:], strict=True)},
    }


def _batches(windows: list[list[int]], job: Job) -> Iterator[torch.Tensor]:
    size = max(1, _BATCH_TOKENS // job.window)
    for start in range(0, len(windows), size):
        yield torch.tensor(windows[start : start + size], device=job.device)


def score_windows(ids: torch.Tensor, reference: torch.Tensor, logits: torch.Tensor, scores: WindowScores) -> None:
    """Add loss, divergence and agreement of a batch of windows to `scores`.

    Args:
        ids: [B, W] tokens.
        reference, logits: [B, W, vocabulary] of the original and of the model; position t predicts token t + 1.
    """
    batch, predictions = ids.shape[0], ids.shape[1] - 1
    nll = torch.empty(batch, predictions, dtype=torch.float64)
    kl, agree = torch.zeros_like(nll), torch.ones_like(nll)
    for start in range(0, predictions, _SLICE):
        part = slice(start, min(start + _SLICE, predictions))
        target = ids[:, part.start + 1 : part.stop + 1, None]
        log_q = logits[:, part].float().log_softmax(-1)
        nll[:, part] = -log_q.gather(-1, target).squeeze(-1).double().cpu()
        if reference is not logits:
            log_p = reference[:, part].float().log_softmax(-1)
            agree[:, part] = (log_p.argmax(-1) == log_q.argmax(-1)).double().cpu()
            kl[:, part] = (log_p.exp() * (log_p - log_q)).sum(-1).double().cpu()
    scores.nll += nll.mean(1).tolist()
    scores.kl += [[_mean(q) for q in row.tensor_split(4)] for row in kl]
    scores.agree += [[_mean(q) for q in row.tensor_split(4)] for row in agree]


def _mean(values: torch.Tensor) -> float:
    return float(values.mean()) if values.numel() else 0.0


def _describe(job: Job, loaded: Loaded, tokenizers: list[Any]) -> dict[str, Any]:
    model = loaded.model
    cached, error = measure_cache(model)
    stock = type(model).__module__.startswith("transformers.models.")
    return {
        "name": loaded.spec.name,
        "path": loaded.spec.path,
        "reloaded_as": type(model).__name__,
        "runtime": f"transformers {transformers.__version__}" + ("" if stock else ", model code from outside it"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "cached_numbers_per_token": cached,
        "decode_error": error,
        "load_seconds": loaded.load_seconds,
        "tokens_per_second": loaded.run_tokens / loaded.run_seconds if loaded.run_seconds else None,
        "sample": continue_text(job, model, tokenizers[0]) if job.prompt is not None else None,
    }


@torch.inference_mode()
def measure_cache(model: Any, batch: int = 1) -> tuple[int, float]:
    """Count the numbers a model really keeps per token, and compare decoding with the cache to doing without.

    Returns:
        (cached numbers per token, all layers, counted on the cache object after generating;
        largest relative error of a decoded position's logits against one pass over the whole text).

    Raises:
        AttnoptError: the model returns no cache that can be counted.
    """
    text = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, text.vocab_size, (batch, _PROBE), generator=generator).to(model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_STEPS,
        min_new_tokens=_STEPS,
        do_sample=False,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )
    whole = model(input_ids=out.sequences[:, :-1], use_cache=False).logits[:, _PROBE - 1 :].float()
    decoded = torch.stack(out.logits, dim=1).float()
    errors = (decoded - whole).norm(dim=-1) / whole.norm(dim=-1)
    return count_cached_numbers(out.past_key_values, batch), float(errors.max())


def count_cached_numbers(cache: Any, batch: int) -> int:
    """Numbers per token and sequence in a transformers cache, all layers together.

    Raises:
        AttnoptError: it is no cache of keys and values, or a layer does not hold whole tokens.
    """
    # A layer that reads another layer's keys and values keeps none, and never starts to.
    layers = [one for one in getattr(cache, "layers", None) or () if getattr(one, "is_initialized", True)]
    if not layers or not all(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
        raise AttnoptError("the model keeps no cache of keys and values", "only causal language models can be measured")
    total = 0
    for layer in layers:
        numbers, tokens = layer.keys.numel() + layer.values.numel(), batch * layer.keys.shape[-2]
        if tokens == 0 or numbers % tokens:
            raise AttnoptError("a cache layer does not hold whole tokens", "this cache cannot be measured")
        total += numbers // tokens
    return total


def continue_text(job: Job, model: Any, tokenizer: Any) -> str:
    """The greedy continuation of the job's prompt."""
    if job.chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": job.prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(job.prompt, return_tensors="pt")
    ids, mask = encoded["input_ids"].to(model.device), encoded["attention_mask"].to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    out = model.generate(ids, attention_mask=mask, max_new_tokens=job.sample_tokens, do_sample=False, pad_token_id=pad)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def _write_logits(job: Job, models: list[Loaded]) -> None:
    from safetensors.torch import save_file

    ids = torch.tensor(job.logits_ids, device=job.device)
    logits = {m.spec.name: m.model(input_ids=ids, use_cache=False).logits.float().cpu().contiguous() for m in models}
    save_file(logits, str(job.logits_file))
