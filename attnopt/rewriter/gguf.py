"""Importing a GGUF file: dequantised once into a cached model directory, which is then opened like any other.

transformers loads GGUF files too, but parses the file's metadata, hundreds of thousands of small Python objects, again
for config, tokenizer and weights, and holds all weights in memory at once. Here the file is parsed once and written
tensor by tensor. Names, permutations, config and tokenizer are transformers' own rules, so the tensors are equal to
those of `from_pretrained(..., gguf_file=...)` bit for bit.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers import modeling_gguf_pytorch_utils as hf_gguf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from attnopt.errors import SourceError, UnsupportedError
from attnopt.files import sync_tree, writing
from attnopt.progress import Reporter, Silent, bar
from attnopt.rewriter.safe_tensors import Outgoing, read_bytes, write_tensors
from attnopt.rewriter.skeleton import build_skeleton, model_class
from attnopt.rewriter.weights import file_digest

try:
    from transformers.integrations.gguf import is_gguf_arch_supported as _has_rules_of_its_own
except ImportError:  # transformers 5.15: the older rules, which are those used here, serve all it knows

    def _has_rules_of_its_own(gguf_arch: str) -> bool:
        return False


#: Changes when the imported form changes, so that old imports are not mistaken for new ones.
_VERSION = 2
_MARKER = "gguf-import.json"
_DAMAGED = "the file is damaged or incomplete; copy or download it again"


@dataclass(frozen=True)
class Imported:
    """A GGUF file as a model directory.

    Attributes:
        directory: where it is; belongs to the cache, must not be changed.
        sha256: of the GGUF file.
    """

    directory: Path
    sha256: str


def cache_directory() -> Path:
    """Where imports are kept: `$ATTNOPT_CACHE`, else `$XDG_CACHE_HOME/attnopt`, else `~/.cache/attnopt`."""
    if own := os.environ.get("ATTNOPT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnopt"


def import_gguf(path: Path, reporter: Reporter | None = None) -> Imported:
    """The model directory of a GGUF file, from the cache if it was imported before.

    Args:
        path: the file.
        reporter: takes progress.

    Raises:
        SourceError: if the file is no GGUF, damaged or incomplete.
        UnsupportedError: if its architecture is not known, or it is one part of several.
        AttnoptError: if the cache cannot be written.
    """
    reporter = reporter or Silent()
    sha256 = _sha256(path)
    key = f"{sha256[:32]}-v{_VERSION}"
    root = cache_directory() / "gguf"
    target = root / key
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        with open(root / f"{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be importing the same file
            if not _is_whole(target):
                for leftover in root.glob(f"{key}*.part"):
                    shutil.rmtree(leftover, ignore_errors=True)
                part = root / f"{key}.{os.getpid()}.part"
                try:
                    part.mkdir()
                    _write_import(path, sha256, part, reporter)
                    sync_tree(part)
                    shutil.rmtree(target, ignore_errors=True)
                    part.rename(target)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
    return Imported(target, sha256)


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise SourceError(f"{path} is no GGUF file", _DAMAGED)
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}", "check that it exists and may be read") from error


def _is_whole(directory: Path) -> bool:
    """True if every file of an import is as it was written (see `weights.file_digest` for the weights)."""
    try:
        marker = json.loads((directory / _MARKER).read_text())
        return all(_digest(directory / name) == digest for name, digest in marker["files"].items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _digest(path: Path) -> str:
    if path.suffix == ".safetensors":
        stat = path.stat()
        return file_digest(path, stat.st_size, stat.st_mtime_ns)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_import(path: Path, sha256: str, directory: Path, reporter: Reporter) -> None:
    reporter.say(f"importing {path.name} (kept in {directory.parent} for the next time)")
    try:
        reader = _Reader(path)
    except Exception as error:  # the reader takes the file at its word and fails in many ways
        raise SourceError(f"{path} is no readable GGUF file: {error}", _DAMAGED) from error
    size = path.stat().st_size
    for tensor in reader.tensors:
        if tensor.data_offset + tensor.n_bytes > size:
            raise SourceError(f"{path} is truncated: tensor {tensor.name!r} ends beyond the file", _DAMAGED)
    parts = reader.fields.get("split.count")
    if parts is not None and int(parts.parts[parts.data[0]][0]) > 1:
        raise UnsupportedError(
            f"{path} is one of several parts", "join them first with: llama-gguf-split --merge FIRST-PART OUT.gguf"
        )
    with _parsed_once(reader):
        config, facts = _config(path, reader)
        tokenizer = _tokenizer(path, reader, reporter)
        cls = model_class(config, directory)
        outgoing = _tensors(path, reader, build_skeleton(cls, config), facts)
    config.architectures = [cls.__name__]
    config.dtype = torch.float32
    config.save_pretrained(directory)
    GenerationConfig.from_model_config(config).save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    with bar(reporter, "dequantising", len(outgoing), "tensors") as handle:
        write_tensors(directory / "model.safetensors", [_reported(t, reporter, handle) for t in outgoing])
    files = {file.name: _digest(file) for file in sorted(directory.iterdir())}
    marker = {"source": path.name, "sha256": sha256, "files": files}
    (directory / _MARKER).write_text(json.dumps(marker, indent=2))


class _Reader(gguf.GGUFReader):
    """The library's reader on plain arrays: slicing a memmap once per token of the vocabulary is five times slower."""

    @property
    def data(self) -> Any:
        """The file's bytes; pages are read when touched."""
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = mapped.view(np.ndarray)


def _reported(tensor: Outgoing, reporter: Reporter, handle: int) -> Outgoing:
    def load() -> torch.Tensor:
        value = tensor.load()
        reporter.advance(handle)
        return value

    return Outgoing(tensor.key, tensor.shape, tensor.dtype, load)


_PARSING = threading.Lock()


@contextlib.contextmanager
def _parsed_once(reader: gguf.GGUFReader) -> Iterator[None]:
    """While open, transformers gets this reader instead of parsing the file again; it takes a path only.

    It also asks for the map of tensor names once per module of the model, and making one costs 60 ms: it is kept.
    """
    module: Any = gguf
    with _PARSING:
        original = module.GGUFReader, module.get_tensor_name_map
        module.GGUFReader = lambda path, *args, **kwargs: reader
        module.get_tensor_name_map = lru_cache(original[1])
        try:
            yield
        finally:
            module.GGUFReader, module.get_tensor_name_map = original


def _config(path: Path, reader: gguf.GGUFReader) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The config object, and the plain facts that tensor conversion needs."""
    field = reader.fields.get("general.architecture")
    if field is None:
        raise SourceError(f"{path} does not say of what architecture it is", _DAMAGED)
    architecture = str(field.contents())
    known = hf_gguf.GGUF_SUPPORTED_ARCHITECTURES
    if _has_rules_of_its_own(architecture):
        raise UnsupportedError(f"GGUF files of architecture {architecture!r} are not supported", _ORIGINAL)
    try:
        facts = hf_gguf.load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    except ValueError as error:
        raise UnsupportedError(
            f"GGUF files of architecture {architecture!r} are not supported", f"{_ORIGINAL}; known: {', '.join(known)}"
        ) from error
    except Exception as error:  # metadata may be of any shape
        raise SourceError(f"the metadata of {path} make no sense: {error}", _DAMAGED) from error
    if not isinstance(facts.get("num_attention_heads", facts.get("n_head")), int):
        raise SourceError(f"{path} does not say how many attention heads the model has", _DAMAGED)
    try:
        return CONFIG_MAPPING[facts["model_type"]].from_dict(dict(facts)), facts
    except Exception as error:  # each config class validates in its own way
        raise SourceError(f"the metadata of {path} make no legal config: {error}", _DAMAGED) from error


_ORIGINAL = "give the model's original Hugging Face directory"


def _tokenizer(path: Path, reader: gguf.GGUFReader, reporter: Reporter) -> Any:
    """The tokenizer in the file, or None if it has none that transformers can build: the weights are usable without."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
        if end := reader.fields.get("tokenizer.ggml.eos_token_id"):  # transformers 5.17 takes the first token for it
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(end.contents()))
        return tokenizer
    except Exception as error:  # the vocabulary may be of any shape, and several libraries read it
        reporter.warn(f"{path.name} has no usable tokenizer ({error}); text cannot be read with this model")
        return None


def _tensors(path: Path, reader: gguf.GGUFReader, model: PreTrainedModel, facts: dict[str, Any]) -> list[Outgoing]:
    """One entry per weight of the model, which reads and dequantises when its turn comes."""
    architecture = str(reader.fields["general.architecture"].contents())
    processor = hf_gguf.TENSOR_PROCESSORS.get(architecture, hf_gguf.TensorProcessor)(config=facts)
    try:
        names = hf_gguf.get_gguf_hf_weights_map(model, processor)
    except NotImplementedError as error:
        raise UnsupportedError(f"{path}: {error}", _ORIGINAL) from error
    sources: dict[str, list[Any]] = {}
    for tensor in reader.tensors:
        # Experts are mapped without their suffix.
        name = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if name is not None:
            sources.setdefault(name, []).append(tensor)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    lacking = [name for name in expected if name not in sources and name not in model.all_tied_weights_keys]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise SourceError(f"{path} lacks the weights {', '.join(lacking[:3])}{more}", _DAMAGED)
    size = path.stat().st_size

    def entry(name: str, parts: list[Any]) -> Outgoing:
        def load() -> torch.Tensor:
            value = _dequantised(path, size, parts, processor, names, name)
            if tuple(value.shape) != expected[name]:
                raise SourceError(
                    f"{path}: {parts[0].name!r} has shape {list(value.shape)}, {name} needs {list(expected[name])}",
                    "the file's metadata and tensors do not belong together",
                )
            return value

        return Outgoing(name, expected[name], torch.float32, load)

    return [entry(name, parts) for name, parts in sources.items() if name in expected]


def _dequantised(
    path: Path, size: int, parts: list[Any], processor: Any, names: dict[str, str], name: str
) -> torch.Tensor:
    """Dequantise the tensors that make up one weight and bring them into transformers' layout."""
    collected: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
    for part in parts:
        raw = read_bytes(path, int(part.data_offset), int(part.n_bytes), size).numpy()
        values = gguf.dequantize(raw.view(part.data.dtype).reshape(part.data.shape), part.tensor_type)
        done = processor.process(weights=values, name=part.name, tensor_key_mapping=names, parsed_parameters=collected)
        # A processor either returns the weight or, where several tensors make one, puts it into the collection.
        if done.name is not None:
            collected["tensors"][name] = torch.from_numpy(np.ascontiguousarray(done.weights))
    return collected["tensors"][name].float()
