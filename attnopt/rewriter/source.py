"""Opening a model: a Hugging Face directory, a GGUF file or a hub id, checked before any work is done on it."""

from __future__ import annotations

import difflib
import hashlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from attnopt.errors import SourceError, UnsupportedError
from attnopt.progress import Reporter
from attnopt.rewriter.checkpoint import (
    PICKLE_SUFFIXES,
    contained,
    pickle_refusal,
    read_json,
    state_dict_values,
    stored_values,
)
from attnopt.rewriter.skeleton import build_skeleton, model_class
from attnopt.rewriter.weights import Value, WeightStore, meta_of

#: Files of which a tokenizer needs one.
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)

#: Files that belong to a model besides config and weights, and are carried over to what is made of it.
SIDE_FILES = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)

#: Names under which configs give the number of attention heads.
_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads", "attention_heads")


@dataclass(frozen=True)
class ModelSource:
    """A model that can be read: its config, code, tokenizer and lazy weights.

    Attributes:
        path: its directory (for a GGUF file, that of its import).
        name: what to call it in messages and model cards.
        format: "safetensors" or "gguf".
        config: its config.
        model_class: the class that implements it.
        weights: values under state-dict names; tied names share one value.
        identity: what the model is, as plain data for a manifest: name, format and hashes.
        warnings: what is odd about it, one line each.
        trust_remote_code: whether code in the directory may be run.
    """

    path: Path
    name: str
    format: str
    config: PretrainedConfig
    model_class: type[PreTrainedModel]
    weights: WeightStore
    identity: dict[str, str]
    warnings: tuple[str, ...] = ()
    trust_remote_code: bool = False
    _side_files: tuple[str, ...] = field(default=(), repr=False)

    def skeleton(
        self, *, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None
    ) -> PreTrainedModel:
        """A new module of the model with meta parameters of type `dtype` and real buffers, in eval mode."""
        model = build_skeleton(self.model_class, self.config, dtype=dtype, attn_implementation=attn_implementation)
        for name, buffer in list(model.named_buffers()):
            if buffer.is_meta:
                owner = model.get_submodule(name.rpartition(".")[0])
                setattr(owner, name.rpartition(".")[2], self.weights.get(name, buffer.dtype))
        return model

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer's files are there."""
        return not set(TOKENIZER_FILES).isdisjoint(self._side_files)

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            SourceError: if it has none or it cannot be read.
        """
        try:
            return AutoTokenizer.from_pretrained(
                str(self.path), local_files_only=True, trust_remote_code=self.trust_remote_code
            )
        except Exception as error:  # tokenizer files are read by several libraries, each with its own errors
            raise SourceError(
                f"{self.name} has no readable tokenizer: {error}", "put the model's tokenizer files into its directory"
            ) from error

    def copy_side_files(self, destination: Path) -> tuple[str, ...]:
        """Copy tokenizer, chat template, generation and preprocessor configs; returns the names copied."""
        for name in self._side_files:
            shutil.copyfile(contained(self.path, name), destination / name)
        return self._side_files


def open_source(model: str | Path, *, trust_remote_code: bool = False, reporter: Reporter | None = None) -> ModelSource:
    """Open a model and check, without reading weights, that it is whole and safe to read.

    Args:
        model: a Hugging Face model directory, a `.gguf` file, or a hub id.
        trust_remote_code: allow Python code in the model's directory to run.
        reporter: takes progress of a GGUF import.

    Raises:
        SourceError: if it is missing, damaged, unsafe, incomplete or of an unknown kind.
        UnsupportedError: if it is readable in principle but not by attnopt (quantised, exotic layout).
    """
    path = Path(model)
    try:
        if path.is_dir():
            return open_directory(path, name=path.resolve().name, trust_remote_code=trust_remote_code)
        if path.is_file():
            return _open_file(path, trust_remote_code, reporter)
    except PermissionError as error:
        raise SourceError(f"cannot read {error.filename or path}: permission denied", "allow it") from error
    if not _looks_like_hub_id(str(model)):
        raise SourceError(
            f"{model} does not exist", "give a Hugging Face model directory, a .gguf file or a hub id like org/name"
        )
    from attnopt.rewriter.hub import fetch_snapshot

    return open_directory(fetch_snapshot(str(model)), name=str(model), trust_remote_code=trust_remote_code)


def _open_file(path: Path, trust_remote_code: bool, reporter: Reporter | None) -> ModelSource:
    if path.suffix in PICKLE_SUFFIXES:
        raise pickle_refusal(path)
    if path.suffix != ".gguf":
        raise SourceError(
            f"{path} is neither a model directory nor a .gguf file", f"did you mean its directory, {path.parent}?"
        )
    from attnopt.rewriter.gguf import import_gguf

    imported = import_gguf(path, reporter)
    return open_directory(
        imported.directory,
        name=path.name,
        format="gguf",
        identity={"file_sha256": imported.sha256},
        trust_remote_code=trust_remote_code,
    )


def _looks_like_hub_id(text: str) -> bool:
    return not text.startswith((".", "/", "~")) and text.count("/") <= 1 and "\\" not in text and not text.endswith("/")


def open_directory(
    path: Path,
    *,
    name: str,
    format: str = "safetensors",
    identity: dict[str, str] | None = None,
    trust_remote_code: bool = False,
) -> ModelSource:
    """Open a Hugging Face model directory; see `open_source`."""
    config = read_config(path, trust_remote_code=trust_remote_code)
    stored = stored_values(path)
    cls = model_class(config, path, trust_remote_code)
    state = state_dict_values(build_skeleton(cls, config), stored)
    untied = state.untied
    if untied:
        # The config promises shared weights, the file disagrees: the file is what the model was trained with.
        config.tie_word_embeddings = False
        state = state_dict_values(build_skeleton(cls, config), stored)
    _check_complete(path, state.missing)
    _check_shapes(path, build_skeleton(cls, config), state.values)
    warnings = []
    if untied:
        pairs = ", ".join(f"{a} and {b}" for a, b in untied)
        warnings.append(f"config.json ties {pairs}, but they are stored with different contents: taken as they are")
    if state.unexpected:
        shown = ", ".join(state.unexpected[:3]) + (", ..." if len(state.unexpected) > 3 else "")
        warnings.append(f"{len(state.unexpected)} stored tensors are not used by {cls.__name__}: {shown}")
    weights = WeightStore(state.values)
    return ModelSource(
        path=path,
        name=name,
        format=format,
        config=config,
        model_class=cls,
        weights=weights,
        identity={
            "name": name,
            "format": format,
            **(identity or {}),
            "config_sha256": hashlib.sha256((path / "config.json").read_bytes()).hexdigest(),
            "weights_digest": weights.digest(),
        },
        warnings=tuple(warnings),
        trust_remote_code=trust_remote_code,
        _side_files=tuple(name for name in SIDE_FILES if (path / name).is_file()),
    )


def read_config(path: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a model directory, checked for what attnopt relies on.

    Raises:
        SourceError: if it is missing, damaged, of an unknown model type, or says nothing of attention heads.
        UnsupportedError: if the weights are stored quantised.
    """
    if not any(path.iterdir()):
        raise SourceError(f"{path} is empty", "give a directory that holds config.json and safetensors files")
    if not (path / "config.json").exists():
        raise SourceError(f"{path} holds no config.json", "give a Hugging Face model directory")
    raw = read_json(contained(path, "config.json"))
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise SourceError(f"{path / 'config.json'} has no model_type", "give a directory written by save_pretrained")
    if kind not in CONFIG_MAPPING:
        _refuse_unknown(path, kind, raw, trust_remote_code)
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UnsupportedError(
            f"the weights of {path} are quantised ({method})", "dequantise them first, or take the original checkpoint"
        )
    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # each config class validates in its own way
        raise SourceError(f"{path / 'config.json'} is not a legal {kind} config: {error}", "correct it") from error
    _check_heads(path, raw, config)
    return config


def _refuse_unknown(path: Path, kind: str, raw: dict[str, Any], trust_remote_code: bool) -> None:
    if raw.get("auto_map"):
        if trust_remote_code:
            return
        raise SourceError(
            f"{path} is of type {kind!r}, which transformers does not know; the directory brings its own code",
            "read that code, and if you trust it, give --trust-remote-code",
        )
    near = difflib.get_close_matches(kind, list(CONFIG_MAPPING), n=4, cutoff=0.5)
    raise SourceError(
        f"{path / 'config.json'} has the unknown model_type {kind!r}",
        f"did you mean {' or '.join(near)}?" if near else "update transformers, or check config.json",
    )


def _check_heads(path: Path, raw: dict[str, Any], config: PretrainedConfig) -> None:
    """Config classes fill in a default number of heads, and no weight's shape contradicts a wrong one: insist on it."""
    alias = config.attribute_map.get("num_attention_heads")
    names = (*_HEADS, alias) if alias else _HEADS
    for scope in (raw, *(v for k, v in raw.items() if k.endswith("config") and isinstance(v, dict))):
        for name in names:
            if name in scope and _is_head_count(scope[name]):
                return
    raise SourceError(
        f"{path / 'config.json'} does not say how many attention heads the model has",
        f'add "{alias or "num_attention_heads"}", a positive number, as the model was trained with it',
    )


def _is_head_count(value: object) -> bool:
    counts = value if isinstance(value, list) and value else [value]
    return all(type(count) is int and count > 0 for count in counts)


def _check_complete(path: Path, missing: tuple[str, ...]) -> None:
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise SourceError(
            f"{path} lacks the weights {shown}", "the checkpoint is incomplete or config.json belongs to another model"
        )


def _check_shapes(path: Path, model: PreTrainedModel, values: dict[str, Value]) -> None:
    for name, parameter in model.state_dict().items():
        try:
            shape = meta_of(values[name]).shape
        except RuntimeError as error:
            raise SourceError(f"{path}: the parts of {name} do not fit together: {error}", "get it again") from error
        if shape != tuple(parameter.shape):
            raise SourceError(
                f"{path}: {name} has shape {list(shape)}, but config.json calls for {list(parameter.shape)}",
                "config.json and the weights do not belong together; restore both from the model's source",
            )
