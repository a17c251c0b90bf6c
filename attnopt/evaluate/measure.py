"""The measuring process: loads models through transformers and runs them. Imported by `python -m attnopt.evaluate`.

One model is in memory at a time: first the original, then each converted model. See `recording` for how divergences are
exact all the same.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from attnopt.errors import AttnoptError
from attnopt.evaluate.job import Job
from attnopt.evaluate.loading import Loaded, check_context, device_of, load, load_tokenizers, opened
from attnopt.evaluate.memory import peak_rss_bytes
from attnopt.evaluate.passkey import Prompt, prompts_of
from attnopt.evaluate.recording import Original
from attnopt.evaluate.report import WindowScores, by_position, compare, position_buckets, retrieval, task_scores
from attnopt.evaluate.scores import PIECE, PositionScores, forward_pieces, score_answer, score_windows
from attnopt.evaluate.serve import Progress
from attnopt.evaluate.text import windows_of

_BATCH_TOKENS = 1024  # a forward pass this long fills two to sixteen cores; more only costs memory
_PROBE = 12  # prompt tokens of the cache measurement
_STEPS = 5  # tokens generated in it


@dataclass(frozen=True)
class Passage:
    """A text as it goes through the models.

    Attributes:
        key: a name of its own.
        file: where it came from.
        windows: its tokens, all windows of one length.
        spans: the parts of a window that are told apart, (first token, token after the last).
        piece: tokens that go through at a time; None for whole windows.
    """

    key: str
    file: str
    windows: list[list[int]]
    spans: tuple[tuple[int, int], ...]
    piece: int | None

    @property
    def window(self) -> int:
        """Tokens of a window."""
        return len(self.windows[0])

    def batches(self, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        """(a key, [B, W] tokens) of windows that go through together."""
        size = max(1, _BATCH_TOKENS // self.window)
        for start in range(0, len(self.windows), size):
            yield f"{self.key}-{start}", torch.tensor(self.windows[start : start + size], device=device)


@dataclass
class Outcome:
    """What was measured on one model.

    Attributes:
        about: the model itself, as `_describe` says it.
        scores: per passage, one entry per span.
        cache_bytes: size of one sequence's cache after a long window, by passage.
        answers: of every passkey prompt, (right, negative log-likelihood).
        tasks: rows of the lm-eval harness.
        logits: of the job's sequences, if it asks for them.
    """

    about: dict[str, Any]
    scores: dict[str, list[WindowScores]] = field(default_factory=dict)
    cache_bytes: dict[str, int] = field(default_factory=dict)
    answers: list[tuple[bool, float]] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    logits: torch.Tensor | None = None


@torch.inference_mode()
def run(job: Job, progress: Progress) -> dict[str, Any]:
    """Carry out a job. `progress(what, amount)` is called with the tokens done."""
    began = time.perf_counter()
    device = device_of(job.device)
    # Everything that can be wrong is found before anything is measured.
    sources = [opened(spec) for spec in job.models]
    check_context(job, sources)
    tokenizers = load_tokenizers(job, sources)
    passages = list(_passages(job, tokenizers))
    prompts = prompts_of(job.passkey, tokenizers[0]) if job.passkey is not None else []
    harness = None
    if job.harness is not None:
        from attnopt.evaluate.harness import Harness

        harness = Harness(job.harness)
    for spec in job.models[1:]:
        load(spec, getattr(torch, job.dtype), "cpu")  # a damaged directory
    gc.collect()

    outcomes: dict[str, Outcome] = {}
    original: Original | None = None
    with tempfile.TemporaryDirectory(prefix="attnopt-states-") as folder:
        for index, spec in enumerate(job.models):
            loaded = load(spec, getattr(torch, job.dtype), device)
            first = None
            if original is None:
                needed = passages and len(job.models) > 1
                probe = torch.tensor([passages[0].windows[0][:16]], device=device) if needed else None
                first = original = Original(loaded.model, Path(folder), probe)
            scores, cache_bytes = _measure_passages(passages, loaded, original, first, progress)
            outcome = Outcome(_describe(job, loaded, tokenizers), scores, cache_bytes)
            outcome.answers = [_ask(loaded, prompt, progress) for prompt in prompts]
            if harness is not None:
                outcome.tasks = harness.run(loaded.model, tokenizers[index])
            if job.logits_file is not None:
                ids = torch.tensor(job.logits_ids, device=device)
                outcome.logits = loaded.model(input_ids=ids, use_cache=False).logits.float().cpu().contiguous()
            outcomes[spec.name] = outcome
            if first is not None:
                first.let_go()
            del loaded, first
            gc.collect()
    report = _report(job, passages, prompts, outcomes)
    if harness is not None:
        report["lm_eval_version"] = harness.version
    if job.logits_file is not None:
        from safetensors.torch import save_file

        save_file({name: o.logits for name, o in outcomes.items() if o.logits is not None}, job.logits_file)
    return {
        **report,
        "dtype": job.dtype,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - began,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _passages(job: Job, tokenizers: list[Any]) -> Iterator[Passage]:
    for index, spec in enumerate(job.texts):
        windows = windows_of(spec, tokenizers[0], job.window, job.windows)
        yield Passage(f"text-{index}", spec.file, windows, ((0, job.window),), None)
    for index, spec in enumerate(job.texts if job.long_context is not None else ()):
        assert job.long_context is not None
        windows = windows_of(spec, tokenizers[0], job.long_context, job.long_windows, "--long-context")
        yield Passage(f"long-{index}", spec.file, windows, position_buckets(job.long_context), PIECE)


def _measure_passages(
    passages: list[Passage], loaded: Loaded, original: Original, first: Original | None, progress: Progress
) -> tuple[dict[str, list[WindowScores]], dict[str, int]]:
    """Scores and cache sizes by passage; `first` is the original while it is the model that is measured."""
    scores: dict[str, list[WindowScores]] = {}
    cache_bytes: dict[str, int] = {}
    for passage in passages:
        measured = []
        for key, ids in passage.batches(loaded.model.device):
            outputs = (
                (first.run(key, ids, passage.piece)) if first else forward_pieces(loaded.model, ids, passage.piece)
            )
            reference = None if first else original.logits(key, ids, passage.piece)
            measured.append(score_windows(ids, _watch(outputs, passage, loaded, cache_bytes, progress), reference))
        joined = PositionScores.join(measured)
        scores[passage.key] = [joined.windows(start, stop) for start, stop in passage.spans]
    return scores, cache_bytes


def _watch(
    outputs: Iterator[Any], passage: Passage, loaded: Loaded, cache_bytes: dict[str, int], progress: Progress
) -> Iterator[torch.Tensor]:
    """The logits of what a model returns; on the way, time, progress and the size of the cache."""
    while True:
        started = time.perf_counter()
        out = next(outputs, None)
        loaded.run_seconds += time.perf_counter() - started
        if out is None:
            return
        tokens = out.logits.shape[0] * out.logits.shape[1]
        loaded.run_tokens += tokens
        if passage.piece is not None:
            cache_bytes[passage.key] = count_cache_bytes(out.past_key_values) // out.logits.shape[0]
        progress(passage.file, tokens)
        yield out.logits


def _ask(loaded: Loaded, prompt: Prompt, progress: Progress) -> tuple[bool, float]:
    device = loaded.model.device
    ids, answer = torch.tensor(prompt.ids, device=device), torch.tensor(prompt.answer, device=device)
    found = score_answer(loaded.model, ids, answer)
    progress("passkey", prompt.length)
    return found


def _report(job: Job, passages: list[Passage], prompts: list[Prompt], outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """The numbers of all models put together, the first one beside each of the others."""
    names = [model.name for model in job.models]
    first, others = outcomes[names[0]], names[1:]
    texts, long = [], []
    for passage in passages:
        common = {"file": passage.file, "windows": len(passage.windows), "window": passage.window}
        before = first.scores[passage.key]
        if passage.piece is None:
            (whole,) = before
            texts.append(
                {
                    **common,
                    "tokens": len(passage.windows) * (passage.window - 1),
                    "original": {"perplexity": math.exp(sum(whole.nll) / len(whole.nll)), "nll": whole.nll},
                    "converted": {n: compare(whole, outcomes[n].scores[passage.key][0]) for n in others},
                }
            )
            continue
        compared = {
            n: {
                "buckets": by_position(passage.spans, before, outcomes[n].scores[passage.key]),
                "cache_bytes": {
                    "original": first.cache_bytes[passage.key],
                    "converted": outcomes[n].cache_bytes[passage.key],
                },
            }
            for n in others
        }
        long.append({**common, "converted": compared})
    report: dict[str, Any] = {
        "schema": "attnopt.evaluate/1",
        "models": [outcomes[name].about for name in names],
        "texts": texts,
    }
    if long:
        report["long_context"] = long
    if job.passkey is not None:
        cells = [(prompt.length, prompt.depth) for prompt in prompts]
        report["passkey"] = {n: retrieval(job.passkey, cells, first.answers, outcomes[n].answers) for n in others}
    if job.harness is not None:
        report["tasks"] = {n: task_scores(first.tasks, outcomes[n].tasks) for n in others}
    return report


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
        "cache_bytes_per_token": cached * getattr(torch, job.dtype).itemsize,
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


def count_cache_bytes(cache: Any) -> int:
    """Bytes of keys and values that a transformers cache holds, all layers and sequences together."""
    found = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    kept = [tensor for tensor in found if tensor is not None]  # a layer that reads another's has none
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


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
