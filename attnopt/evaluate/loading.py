"""Models and tokenizers as any user of transformers would load them, and what is refused. In the measuring process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoModelForCausalLM

from attnopt.errors import AttnoptError, OptionError, SourceError, UnsupportedError
from attnopt.evaluate.job import Job, ModelSpec
from attnopt.rewriter.source import ModelSource, open_source


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


def device_of(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, or the processor.

    Raises:
        OptionError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"there is no device {name!r} here", "use auto, cpu, cuda or cuda:N") from error
    return torch.device(name)


def opened(spec: ModelSpec) -> ModelSource:
    """A model whose files have been checked without reading a weight; a GGUF file is imported first.

    Raises:
        SourceError: it is missing, damaged, unsafe or incomplete.
        UnsupportedError: its weights are stored quantised, or it predicts no next words.
    """
    if not spec.trust_remote_code:
        import attnopt.codegen.hf  # noqa: F401 (transformers knows our class then)
    source = open_source(spec.path, trust_remote_code=spec.trust_remote_code)
    known = type(source.config) in MODEL_MAPPING or not spec.trust_remote_code
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(source.config), None)
    if known and causal is not source.model_class:
        raise UnsupportedError(
            f"{spec.path} is a {source.model_class.__name__}, which predicts no next words",
            "verify and bench measure causal language models; inspect, profile and export take other models too",
        )
    return source


def load(spec: ModelSpec, dtype: torch.dtype, device: str | torch.device) -> Loaded:
    """Load a model as any user of transformers would, and refuse one whose tensors are not exactly those it declares.

    Raises:
        SourceError, UnsupportedError: see `opened`; or tensors are missing, left over, of a wrong shape or not finite.
    """
    directory = opened(spec).path
    options = {"trust_remote_code": spec.trust_remote_code, "local_files_only": True}
    began = time.perf_counter()
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True, **options)
    model, info = loaded
    model.eval().to(device)
    seconds = time.perf_counter() - began  # without what is checked around it
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            names = ", ".join(sorted(map(str, info[kind]))[:5])
            what = f"{directory}: {kind.replace('_', ' ')}: {names}"
            raise SourceError(what, "the directory is damaged; write it again")
    for name, weight in model.state_dict().items():
        if not bool(torch.isfinite(weight).all()):
            raise SourceError(f"{directory}: {name} holds NaN or infinite numbers", "write or download it again")
    return Loaded(spec, directory, model, seconds)


def check_context(job: Job, sources: Sequence[ModelSource]) -> None:
    """Refuse sequences longer than a model promises to read."""
    for spec, source in zip(job.models, sources, strict=True):
        promised = getattr(source.config.get_text_config(), "max_position_embeddings", None)
        if promised is not None and job.longest > promised:
            raise OptionError(
                f"{spec.name} promises a context of {promised} tokens, {job.longest} were asked for",
                f"use at most {promised} with --long-context and --passkey",
            )


def load_tokenizers(job: Job, sources: Sequence[ModelSource]) -> list[Any]:
    """The models' tokenizers if the job needs text; they must agree, or the comparison would mean nothing."""
    if not job.texts and job.prompt is None and job.passkey is None and job.harness is None:
        return []
    tokenizers = [source.tokenizer() for source in sources]
    probe = "It costs 3.50, or 1,200 for 7 days.\n\tÄrger — naïve 漢字 🙂"
    first = tokenizers[0](probe, add_special_tokens=False)["input_ids"]
    for spec, tokenizer in zip(job.models, tokenizers, strict=True):
        if tokenizer(probe, add_special_tokens=False)["input_ids"] != first:
            raise AttnoptError(
                f"{spec.name} has another tokenizer than {job.models[0].name}", "compare with its own original"
            )
    return tokenizers
