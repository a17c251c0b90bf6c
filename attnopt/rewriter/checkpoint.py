"""From the files of a Hugging Face model directory to one lazy value per entry of the module's state dict.

What a checkpoint calls its tensors, and how it splits them, differs from the module: experts are stored one by one and
held fused, old names live on. transformers knows these rules as tables (`transformers.conversion_mapping`); they are
read here and turned into `Derived` values instead of being carried out, so nothing is loaded.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import core_model_loading as hf_loading
from transformers.conversion_mapping import get_model_conversion_mapping

from attnopt.errors import SourceError, UnsupportedError
from attnopt.rewriter.safe_tensors import TensorFile, read_header
from attnopt.rewriter.weights import Derived, Stored, Value, evaluate, meta_of

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def contained(directory: Path, name: str) -> Path:
    """The file `name` of a model directory, made sure to lie in it.

    Links are followed. A snapshot folder of the hub's cache may link to its own `blobs` folder, as all of them do.

    Raises:
        SourceError: if the name is absolute, climbs out with "..", leads out through a link, or is not a file.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise SourceError(
            f"{directory}: the file name {name!r} leaves the model directory",
            "do not trust this checkpoint; get it from its original source",
        )
    path = directory / name
    root, real = directory.resolve(), path.resolve()
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise SourceError(
            f"{path} is a link that leaves the model directory", "copy the file it points to into the directory"
        )
    if not real.is_file():
        raise SourceError(f"{path} does not exist", "the checkpoint is incomplete; copy or download it again")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        SourceError: if it cannot be read or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}", "check that the file may be read") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON: {error}", "restore the file from the model's source") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} is not a JSON object", "restore the file from the model's source")
    return value


def stored_values(directory: Path) -> dict[str, Stored]:
    """Every tensor of a model directory under the name its file gives it. Headers are checked, no tensor is read.

    Raises:
        SourceError: if there are no safetensors files, or the index or a file is damaged, incomplete or unsafe.
    """
    if (directory / SINGLE_NAME).exists() or (directory / SINGLE_NAME).is_symlink():
        return _values_of(read_header(contained(directory, SINGLE_NAME)))
    if (directory / INDEX_NAME).exists():
        return _sharded_values(directory)
    raise _no_weights(directory)


def _values_of(file: TensorFile) -> dict[str, Stored]:
    return {key: Stored.of(file, entry) for key, entry in file.entries.items()}


def _sharded_values(directory: Path) -> dict[str, Stored]:
    index = contained(directory, INDEX_NAME)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SourceError(f"{index} has no weight_map from tensor to file names", "restore the file")
    if not weight_map:
        raise SourceError(f"{index} lists no tensors", "the checkpoint is incomplete; copy or download it again")
    values: dict[str, Stored] = {}
    # All names are checked before the first file is opened.
    paths = {name: contained(directory, name) for name in sorted(set(weight_map.values()))}
    for name, path in paths.items():
        if path.suffix in PICKLE_SUFFIXES:
            raise _pickled(directory, name)
        for key, value in _values_of(read_header(path)).items():
            if key in values:
                raise SourceError(f"{path}: tensor {key!r} is in {values[key].path.name} too", "restore the checkpoint")
            values[key] = value
    for key, name in weight_map.items():
        if key not in values or values[key].path != paths[name]:
            raise SourceError(
                f"{index} says that tensor {key!r} is in {name}, but it is not there",
                "the checkpoint is incomplete; copy or download it again",
            )
    return values


def _no_weights(directory: Path) -> SourceError:
    names = sorted(path.name for path in directory.iterdir())
    for name in names:
        if name.endswith(PICKLE_SUFFIXES):
            return _pickled(directory, name)
    for name in names:
        if name.endswith(".gguf"):
            return SourceError(f"{directory} holds no safetensors file", f"give the GGUF file: {directory / name}")
    others = [name for name in names if name.endswith(".safetensors")]
    found = f"only {', '.join(others[:3])}" if others else "none"
    return SourceError(
        f"{directory} holds no {SINGLE_NAME} and no {INDEX_NAME} ({found})",
        "give a directory written by save_pretrained",
    )


def pickle_refusal(path: Path) -> SourceError:
    """The error for a pickled weight file given as the model."""
    return _pickled(path.parent, path.name)


def _pickled(directory: Path, name: str) -> SourceError:
    return SourceError(
        f"{directory / name} is pickled: reading it runs whatever code it holds",
        'if you trust it, convert it once with: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{directory}').save_pretrained('{directory.resolve().name}-safetensors')\"",
    )


@dataclass(frozen=True)
class StateDict:
    """What a checkpoint has to say about a module.

    Attributes:
        values: state-dict name to value; tied names share one value.
        missing: names the module has and the checkpoint has not.
        unexpected: stored tensors the module has no use for.
        untied: (name, name) pairs the module ties but the checkpoint stores with different contents.
    """

    values: dict[str, Value]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    untied: tuple[tuple[str, str], ...]


def state_dict_values(model: Any, stored: Mapping[str, Stored]) -> StateDict:
    """Match stored tensors to the state dict of a transformers model (on the meta device).

    Follows `transformers.core_model_loading.convert_and_load_state_dict_in_model` step by step, without loading.

    Raises:
        UnsupportedError: if the checkpoint needs a conversion that has no lazy form.
    """
    expected = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, hf_loading.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, hf_loading.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    values: dict[str, Value] = {}
    collected: dict[str, tuple[hf_loading.WeightConverter, dict[str, list[Value]]]] = {}
    unexpected: list[str] = []
    for key in sorted(stored, key=hf_loading.dot_natural_key):
        name, pattern = hf_loading.rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = hf_loading.rename_source_key(key, [], [], prefix, expected)
        if name not in expected:
            unexpected.append(key)
        elif pattern is None:
            values.setdefault(name, stored[key])
        else:
            group = collected.setdefault(name, (copy.copy(by_pattern[pattern]), {}))
            group[1].setdefault(pattern, []).append(stored[key])
    for name, (converter, inputs) in collected.items():
        values.update(_convert(converter, name, inputs, model))
    untied = _tie(model, values)
    missing = tuple(name for name in expected if name not in values)
    return StateDict(values, missing, tuple(_worth_a_warning(model, unexpected)), untied)


def _tie(model: Any, values: dict[str, Value]) -> tuple[tuple[str, str], ...]:
    untied = []
    for target, source in dict(model.all_tied_weights_keys).items():
        if target in values and source in values:
            if _same(values[target], values[source]):
                values[target] = values[source]
            else:
                untied.append((target, source))
        elif source in values:
            values[target] = values[source]
        elif target in values:  # the checkpoint kept the other one of the two names
            values[source] = values[target]
    return tuple(untied)


def _same(a: Value, b: Value) -> bool:
    return a == b or (meta_of(a) == meta_of(b) and bool((evaluate(a) == evaluate(b)).all()))


def _worth_a_warning(model: nn.Module, names: list[str]) -> list[str]:
    ignored = [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
    ignored += list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    return [name for name in names if not any(re.search(pattern, name) for pattern in ignored)]


# A pattern's tensors: a list as long as nothing has merged them.
_Group = Value | list[Value]


def _convert(
    converter: hf_loading.WeightConverter, name: str, inputs: Mapping[str, list[Value]], model: Any
) -> dict[str, Value]:
    groups: dict[str, _Group] = dict(inputs)
    for operation in converter.operations:
        rule = _RULES.get(type(operation).__name__)
        if rule is None:
            raise UnsupportedError(
                f"{name} is stored in a layout that needs the conversion {type(operation).__name__}",
                "load the model with transformers and save_pretrained it in a newer layout, or report this model",
            )
        try:
            groups = rule(operation, groups, converter, name, model)
        except (RuntimeError, ValueError, IndexError) as error:
            raise SourceError(
                f"the stored parts of {name} do not fit together: {error}", "the checkpoint is damaged; get it again"
            ) from error
    # The groups are called by target patterns; the full names put the rest of the name around them.
    whole = name.replace("*.", "0.")
    around = next((whole.partition(pattern) for pattern in groups if pattern in whole), None)
    result = {}
    for pattern, group in groups.items():
        value = _one(group)
        result[around[0] + pattern + around[2] if around else pattern] = value
    return result


def _one(group: _Group) -> Value:
    if not isinstance(group, list):
        return group
    if len(group) != 1:
        raise ValueError(f"{len(group)} tensors where one is expected")
    return group[0]


_Rule = Callable[[Any, dict[str, _Group], Any, str, Any], dict[str, _Group]]


def _merge(op: Any, groups: dict[str, _Group], converter: Any, name: str, model: Any) -> dict[str, _Group]:
    result: dict[str, _Group] = {}
    for pattern, group in groups.items():
        target = op.get_target_pattern(len(groups), pattern, converter.target_patterns)
        result[target] = _checked(Derived.of("stack", *group, dim=op.dim)) if isinstance(group, list) else group
    return result


def _concatenate(op: Any, groups: dict[str, _Group], converter: Any, name: str, model: Any) -> dict[str, _Group]:
    parts: list[Value] = []
    for pattern in converter.source_patterns:
        group = groups.get(pattern, [])
        parts += group if isinstance(group, list) else [group]
    return {op.get_target_pattern(converter.target_patterns): _checked(Derived.of("cat", *parts, dim=op.dim))}


def _chunk(op: Any, groups: dict[str, _Group], converter: Any, name: str, model: Any) -> dict[str, _Group]:
    value = _one(next(iter(groups.values())))
    targets = op.get_target_patterns(converter.target_patterns, config=model.config)
    width = meta_of(value).shape[op.dim]
    size = -(-width // len(targets))
    return {
        target: _checked(Derived.of("narrow", value, dim=op.dim, start=i * size, length=min(size, width - i * size)))
        for i, target in enumerate(targets)
    }


def _split(op: Any, groups: dict[str, _Group], converter: Any, name: str, model: Any) -> dict[str, _Group]:
    value = _one(next(iter(groups.values())))
    start = 0
    result: dict[str, _Group] = {}
    for target in converter.target_patterns:
        width = model.get_parameter(name.replace(converter.target_patterns[0], target)).shape[op.dim]
        result[target] = _checked(Derived.of("narrow", value, dim=op.dim, start=start, length=width))
        start += width
    return result


def _transpose(op: Any, groups: dict[str, _Group], converter: Any, name: str, model: Any) -> dict[str, _Group]:
    value = _one(next(iter(groups.values())))
    target = op.get_target_pattern(groups, converter.source_patterns, converter.target_patterns)
    if op.check_dims and meta_of(value).shape == tuple(model.get_parameter(name).shape):
        return {target: value}
    return {target: Derived.of("transpose", value, dim0=op.dim0, dim1=op.dim1)}


def _checked(value: Derived) -> Derived:
    meta_of(value)  # raises if the parts' shapes disagree
    return value


_RULES: dict[str, _Rule] = {
    "MergeModulelist": _merge,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Split": _split,
    "Transpose": _transpose,
}
