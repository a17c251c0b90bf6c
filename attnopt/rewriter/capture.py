"""Model -> Program. Weights are never loaded: the skeleton that is traced has fake parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from attnopt.errors import UnsupportedError
from attnopt.rewriter.anchor import anchored
from attnopt.rewriter.export import RawGraph, export_graph
from attnopt.rewriter.normalize import normalize, specialize
from attnopt.rewriter.program import Program
from attnopt.rewriter.recognize import Miss, recognize
from attnopt.rewriter.stamp import Cut, cut_layers, stamp
from attnopt.rewriter.weights import Inline, WeightStore
from attnopt.rewriter.written import Provenance

if TYPE_CHECKING:
    from attnopt.rewriter.source import ModelSource


def capture(source: ModelSource) -> Program:
    """Capture an opened model.

    Args:
        source: see `source.open_source`.

    Returns:
        A Program in float32 with dynamic batch and length, whose weights are those of the source.

    Raises:
        UnsupportedError: if the model cannot be traced, or one of its attention layers cannot be represented; the
            message names the obstacle.
    """
    return _capture(source.skeleton(), source.weights)


def capture_module(model: nn.Module) -> Program:
    """Capture a model in memory. The model is not modified; the Program's weights share its storage.

    Args:
        model: a transformers model, in any floating-point type.

    Raises:
        UnsupportedError: as `capture`, or if the model is not a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"{type(model).__name__} is not a transformers model",
            "attnopt finds attention through transformers' attention interface",
        )
    named = dict(model.named_parameters(remove_duplicate=False))
    values = {id(p): Inline(p.detach()) for p in named.values()}
    weights = WeightStore({name: values[id(p)] for name, p in named.items()})
    fakes: dict[int, Any] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for p in named.values():
            fakes[id(p)] = _fake_parameter(p)
    return _capture(copy.deepcopy(model, fakes), weights)


def _fake_parameter(p: torch.Tensor) -> nn.Parameter:
    dtype = torch.float32 if p.is_floating_point() else p.dtype
    return nn.Parameter(torch.empty(p.shape, dtype=dtype, device="cpu"), requires_grad=False)


def _prepare(skeleton: nn.Module) -> None:
    """Make every parameter a fake float32 CPU tensor and every floating buffer float32."""
    replaced: dict[int, nn.Parameter] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in skeleton.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = replaced.setdefault(id(p), _fake_parameter(p))
    for module in skeleton.modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            if buffer.is_meta:
                raise UnsupportedError(f"buffer {name!r} of {type(module).__name__} has no values")
            buffer = buffer.detach().cpu()
            module._buffers[name] = buffer.float() if buffer.is_floating_point() else buffer
    skeleton.eval()


# Rope rules whose frequencies depend on the length of the input, so that no table stands for them.
_LENGTH_DEPENDENT = {"dynamic", "longrope"}


def _refuse_by_config(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    tables = rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]
    for table in tables:
        kind = (table or {}).get("rope_type", "default")
        if kind in _LENGTH_DEPENDENT and not _is_fixed(table):
            raise UnsupportedError(
                f"rope type {kind!r} changes its frequencies with the length of the input",
                "choose a fixed rope type in the model's config.json (default, linear, llama3 or yarn)",
            )


def _is_fixed(table: Mapping[str, Any]) -> bool:
    """True for longrope with one list of factors for short and long inputs: how free tables are written."""
    return table["rope_type"] == "longrope" and table.get("short_factor") == table.get("long_factor")


def _freeze_rope(skeleton: nn.Module) -> None:
    """Take the update that longrope makes in every forward pass out of tables that it would not change."""
    module: Any  # transformers' own attribute, which nn.Module does not know
    for module in skeleton.modules():
        if getattr(module, "rope_type", None) == "longrope":
            module.rope_type = "fixed"


def _capture(skeleton: nn.Module, weights: WeightStore) -> Program:
    if not isinstance(skeleton, PreTrainedModel):
        raise UnsupportedError(f"{type(skeleton).__name__} is not a transformers model")
    config = skeleton.config
    _refuse_by_config(config.get_text_config())
    facts, provenance = config.to_dict(), Provenance.of(config)
    _prepare(skeleton)
    _freeze_rope(skeleton)
    program = _capture_cut(skeleton, cut_layers(skeleton), weights)
    if program is None:
        with anchored(skeleton):
            raw = export_graph(skeleton)
        program = _program(raw, weights, _facts(skeleton), config.model_type)
    program = program.replace(config=facts)
    return program if provenance is None else provenance.applied(program)


def _capture_cut(skeleton: PreTrainedModel, cut: Cut | None, weights: WeightStore) -> Program | None:
    """The program from one traced layer of each kind, or None if that cannot be done."""
    if cut is None:
        return None
    try:
        with anchored(skeleton), cut.applied():
            raw = export_graph(skeleton)
            facts = _facts(skeleton)
    except UnsupportedError:
        return None  # tracing the whole model fails as well, and says why, unless the cut was to blame
    if not cut.proven():
        return None
    return stamp(_program(raw, weights, facts, skeleton.config.model_type), cut)


def _facts(skeleton: PreTrainedModel) -> dict[str, Any]:
    """The config that attention is described by."""
    return skeleton.config.get_text_config().to_dict()


def _program(raw: RawGraph, weights: WeightStore, config: dict[str, Any], model_type: str) -> Program:
    known = weights.with_values({name: Inline(value) for name, value in raw.constants.items()})
    normalize(raw.graph)
    program = Program(raw.graph, known, {}, config, model_type, raw.inputs, raw.outputs)
    sites, misses = recognize(program)
    if misses or not sites:
        raise _refusal(misses)
    return program.replace(sites={site.fqn: site for site in specialize(raw.graph, sites)})


def _refusal(misses: list[Miss]) -> UnsupportedError:
    if not misses:
        return UnsupportedError("no attention was found in the traced model")
    first = misses[0]
    more = f" (and {len(misses) - 1} more)" if len(misses) > 1 else ""
    return UnsupportedError(f"attention not understood: {first.reason}{more}", f"nodes: {', '.join(first.nodes)}")
