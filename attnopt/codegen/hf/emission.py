"""What is written: a configuration and named tensor expressions; and the pieces both classes share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnopt.errors import VerificationError
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite, Projection
from attnopt.rewriter.weights import Derived, Value, WeightStore, meta_of


@dataclass(frozen=True)
class Refusal:
    """Why a target cannot hold a Program. Each reason names the layer or setting to blame."""

    target: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.target} cannot hold this model: " + "; ".join(self.reasons)


@dataclass(frozen=True)
class Emission:
    """A model ready to be written.

    Attributes:
        target: "deepseek_v3", "attnopt", or the source's model type.
        architecture: class that loads it.
        config: contents of config.json.
        values: tensors of the checkpoint, computed one at a time when written.
        cached_numbers_per_token: what the class will keep per token, all layers.
        notes: facts for the model card and the manifest.
    """

    target: str
    architecture: str
    config: dict[str, Any]
    values: dict[str, Value]
    cached_numbers_per_token: int
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Numbers in the checkpoint; tied weights are stored once."""
        return sum(meta_of(value).numel for value in self.values.values())

    @property
    def store(self) -> WeightStore:
        """The tensors as a WeightStore."""
        return WeightStore(self.values)


def weight_of(store: WeightStore, projection: Projection) -> Value:
    """The [out, in] matrix of a projection, whatever larger matrix it is stored in."""
    whole = store[projection.weight]
    if projection.layout == "conv1d":
        whole = Derived.of("transpose", whole, dim0=0, dim1=1)
    return _pick(whole, projection, store.meta(projection.weight).shape[1 if projection.layout == "conv1d" else 0])


def bias_of(store: WeightStore, projection: Projection) -> Value | None:
    """The [out] bias of a projection, or None if it has none."""
    if projection.bias is None:
        return None
    return _pick(store[projection.bias], projection, store.meta(projection.bias).shape[0])


def _pick(whole: Value, projection: Projection, stored: int) -> Value:
    if projection.rows == ((0, stored),):
        return whole
    parts = [Derived.of("rows", whole, start=start, stop=stop) for start, stop in projection.rows]
    return parts[0] if len(parts) == 1 else Derived.of("cat", *parts, dim=0)


def typed(values: Mapping[str, Value], dtype: torch.dtype) -> dict[str, Value]:
    """The values cast to `dtype` where they are not of it already; integers stay as they are."""
    result: dict[str, Value] = {}
    for name, value in values.items():
        meta = meta_of(value)
        keep = meta.dtype == dtype or not meta.dtype.is_floating_point
        result[name] = value if keep else Derived.of("cast", value, dtype=dtype)
    return result


_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def is_tied(program: Program) -> bool:
    """True if embedding and head are one matrix: the source ties them, and no pass has changed only one of them."""
    if not program.config.get("tie_word_embeddings"):
        return False
    values = {program.weights[name] for name in (_EMBEDDING, _HEAD) if name in program.weight_names}
    return len(values) == 1


def canonical(name: str) -> str:
    """The name that a rewritten weight has in the source: passes put "attnopt." before it where that is taken."""
    while name.startswith("attnopt."):
        name = name.removeprefix("attnopt.")
    return name


def is_rewritten(program: Program, site: AttentionSite) -> bool:
    """Whether a pass has made this layer's attention anew."""
    return "attnopt" in program.node(site.nodes.attention).meta


def outside_attention(program: Program) -> dict[str, Value]:
    """Weights outside the attention layers, under their source names, without rotary tables and other constants.

    A tied matrix appears once, as the embedding, whichever of its names the graph reads it by; in architectures that
    name the embedding otherwise (GPT-2), by the name the graph reads.
    """
    inside = tuple(f"{fqn}." for fqn in program.sites)
    found = {}
    for name in program.weight_names:
        bare = name.removeprefix("attnopt.")
        constant = bare.endswith("inv_freq") or not program.weights.meta(name).dtype.is_floating_point
        if not constant and not bare.startswith(inside):
            found[canonical(name)] = program.weights[name]
    if is_tied(program) and _HEAD in found and _EMBEDDING in program.weights:
        found[_EMBEDDING] = found.pop(_HEAD)
    return found


def check_complete(emission: Emission, expected: Mapping[str, torch.Tensor], tied: set[str]) -> None:
    """Compare the tensors to be written with those the class declares.

    Args:
        emission: what will be written.
        expected: the class's state dict (meta tensors).
        tied: names the class fills in by itself.

    Raises:
        VerificationError: a tensor is missing, left over or of another shape.
    """
    problems = [f"no tensor {name}" for name in expected if name not in emission.values and name not in tied]
    for name, value in emission.values.items():
        if name not in expected:
            problems.append(f"tensor {name} has no place in {emission.architecture}")
            continue
        shape, wanted = meta_of(value).shape, tuple(expected[name].shape)
        if shape != wanted:
            problems.append(f"tensor {name} is {shape} but {emission.architecture} wants {wanted}")
    if problems:
        raise VerificationError(problems[:10])
