"""Program -> ONNX model in memory, whose weights are still expressions: nothing is read before it is written."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnxscript.values import Opset
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from attnopt.codegen.decoding import CacheTensor, Decoding, decoding_graph
from attnopt.codegen.folding import Folded, as_float32, fold_constants
from attnopt.codegen.onnx.forms import OnnxLane, latent_query, padded_values
from attnopt.codegen.onnx.pairs import complex_to_pairs
from attnopt.errors import UnsupportedError
from attnopt.rewriter.export import BATCH, LENGTH
from attnopt.rewriter.ops.experts import expert_linear_reference  # noqa: F401 - the op must be registered
from attnopt.rewriter.ops.rope import rope_reference
from attnopt.rewriter.program import Program

OPSET = 24
op = Opset("", OPSET)
#: Slots of the cache while tracing; different from every other size.
_CAPACITY = 11
#: Metadata keys of a node: the attention site and the module it was made for.
SITE_KEY, MODULE_KEY = "attnopt.site", "attnopt.module"


@dataclass(frozen=True)
class OnnxModel:
    """A model to be written.

    Attributes:
        model: the graph; initialisers are lazy.
        inputs, outputs: names.
        cache: cached tensors.
        weights: name -> how to compute it.
    """

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cache: tuple[CacheTensor, ...]


def lower(program: Program, forms: Mapping[str, str]) -> OnnxModel:
    """Build the ONNX graph of a program.

    Args:
        program: in latent form.
        forms: form of every site, see `forms.claim`.

    Raises:
        UnsupportedError: torch's ONNX exporter has no translation for something in the graph.
    """
    decoding = decoding_graph(program, OnnxLane(dict(forms)))
    graph = decoding.graph
    _inline(graph)
    complex_to_pairs(graph)
    folded = fold_constants(graph, program, _role)
    weights: dict[str, Callable[[], torch.Tensor]] = {}
    root = _root(graph, program, folded, weights)
    module = fx.GraphModule(root, graph)
    examples, shapes = _examples(graph, decoding)
    try:
        try:
            model = _translate(module, examples, shapes, decompose=False)
        except torch.onnx.OnnxExporterError:  # an operation that has to be decomposed first
            model = _translate(module, examples, shapes, decompose=True)
    except Exception as problem:
        reason = str(problem).strip().splitlines() or [type(problem).__name__]
        raise UnsupportedError(
            f"the graph cannot be written as ONNX: {reason[0]}", "open an issue naming the model"
        ) from problem
    _rename(model, decoding)
    _optimize(model, weights)
    _attach(model, weights)
    _annotate(model, program)
    _name_dimensions(model, decoding)
    return OnnxModel(model, decoding.inputs, decoding.outputs, decoding.cache)


def _translate(module: fx.GraphModule, examples: Mapping[str, Any], shapes: Any, *, decompose: bool) -> ir.Model:
    """Trace with dynamic shapes and translate.

    Args:
        module, examples, shapes: as torch.export takes them.
        decompose: run torch's decompositions, which trace the graph once more; captured graphs hardly ever need them,
            and tracing with symbolic sizes is what an export spends its time on.

    Raises:
        torch.onnx.OnnxExporterError: torch's ONNX exporter has no translation for an operation.
    """
    with torch.no_grad(), _quiet():
        exported = torch.export.export(module, (), dict(examples), dynamic_shapes=shapes, strict=False)
        if not decompose:
            exported.run_decompositions = lambda *_: exported
        program = torch.onnx.export(
            exported,
            (),
            kwargs=dict(examples),
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=_translations(),
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program.model


def _inline(graph: fx.Graph) -> None:
    """Replace ops that ONNX has no counterpart of by functions that compute the same; tracing opens these."""
    for node in graph.nodes:
        if node.target is torch.ops.attnopt.rope.default:
            node.target = rope_reference
        elif node.target is torch.ops.attnopt.expert_linear.default:
            node.target = _gathered_experts
        elif node.target is torch.ops.aten.adaptive_avg_pool1d.default and list(node.args[1]) == [1]:
            node.target, node.args = torch.mean, (node.args[0], -1, True)
        elif node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default  # strides differ from those seen at capture


def _gathered_experts(
    x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`attnopt::expert_linear` by a gather of matrices: reads only experts that are hit, one copy per token."""
    y = torch.matmul(weight[expert], x[:, :, None])[:, :, 0]
    return y if bias is None else y + bias[expert]


def _role(node: fx.Node) -> str:
    """What to call a folded part: the two halves of a latent's decoder have names, others get their node's."""
    if node.target is padded_values:
        return "w_uv"
    if any(user.target is latent_query for user in node.users):
        return "w_uk"
    return node.name


def _root(
    graph: fx.Graph, program: Program, folded: Mapping[str, Folded], weights: dict[str, Callable[[], torch.Tensor]]
) -> nn.Module:
    """A module that holds every weight the graph reads, without values. `weights` is filled with how to get them."""
    root = nn.Module()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for node in graph.nodes:
        if node.op != "get_attr" or str(node.target) in weights:
            continue
        name = str(node.target)
        owner: nn.Module = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        weights[name] = folded[name].compute if name in folded else _reader(program, name)
        if node.meta.get("buffer"):
            owner.register_buffer(last, program.weights.get(name))
            continue
        with mode:
            stored = folded[name].meta() if name in folded else program.weights.meta(name)
            dtype = torch.float32 if stored.dtype.is_floating_point else stored.dtype
            value = torch.empty(stored.shape, dtype=dtype)
            owner.register_parameter(last, nn.Parameter(value, requires_grad=False))
    return root


def _reader(program: Program, name: str) -> Callable[[], torch.Tensor]:
    return lambda: as_float32(program.weights.get(name))


def _examples(graph: fx.Graph, decoding: Decoding) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, Any]]]:
    """Inputs to trace with, and which of their dimensions are dynamic."""
    batch = length = capacity = torch.export.Dim.DYNAMIC
    examples: dict[str, torch.Tensor] = {}
    shapes: dict[str, dict[int, Any]] = {}
    pasts = {tensor.past.replace(".", "_"): tensor for tensor in decoding.cache}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        if name in pasts:
            examples[name] = torch.zeros(pasts[name].shape(BATCH, _CAPACITY))
            shapes[name] = {0: batch, examples[name].ndim - 2: capacity}
        elif name == "past_length":
            examples[name], shapes[name] = torch.zeros(BATCH, dtype=torch.long), {0: batch}
        elif name == "pixel_values":
            size = [int(d) for d in node.meta["val"].shape[1:]]
            examples[name], shapes[name] = torch.zeros(BATCH, *size), {0: batch}
        else:
            fill = 1 if name == "attention_mask" else 0
            examples[name] = torch.full((BATCH, LENGTH), fill)
            shapes[name] = {0: batch, 1: length}
    return examples, shapes


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter prints its progress and logs every decomposition it lacks; failures are exceptions anyway."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _translations() -> dict[Any, Callable[..., Any]]:
    """ONNX for our own ops."""

    def cache_write(past: Any, new: Any, past_length: Any) -> Any:
        return op.TensorScatter(past, new, past_length, axis=-2)

    def attention(q: Any, k: Any, v: Any, bias: Any, scale: float, softcap: float) -> Any:
        y, _, _, _ = op.Attention(q, k, v, bias, scale=scale, softcap=softcap)
        return y

    def rotary(x: Any, cos: Any, sin: Any, interleaved: bool) -> Any:
        return op.RotaryEmbedding(x, cos, sin, interleaved=int(interleaved))

    def stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        # All of them, largest first or last; TopK, too, puts the lower index first where numbers are equal.
        count = op.Shape(self, start=dim, end=dim + 1 if dim != -1 else None)
        return op.TopK(self, count, axis=dim, largest=int(descending), sorted=1)

    ops = torch.ops.attnopt
    return {
        torch.ops.aten.sort.stable: stable_sort,
        ops.cache_write.default: cache_write,
        ops.onnx_attention.default: attention,
        ops.onnx_rotary.default: rotary,
    }


def _rename(model: ir.Model, decoding: Decoding) -> None:
    """Give inputs and outputs their names."""
    for value, name in zip(model.graph.inputs, decoding.inputs, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, decoding.outputs, strict=True):
        value.name = name


def _optimize(model: ir.Model, weights: Mapping[str, Any]) -> None:
    """Fold constants and merge equal nodes, without touching the weights: they have no values yet."""
    shapes = {}
    for name, value in model.graph.initializers.items():
        if name in weights:
            shapes[name], value.const_value = value.const_value, None
    with _quiet():
        onnxscript.optimizer.optimize_ir(model, input_size_limit=1024, output_size_limit=65536)
    for name, tensor in shapes.items():
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = tensor


def _attach(model: ir.Model, weights: Mapping[str, Callable[[], torch.Tensor]]) -> None:
    """Let every initialiser that stands for a weight be computed when it is written."""
    for name, value in model.graph.initializers.items():
        if name in weights and isinstance(value.const_value, ir.TensorProtocol):
            like = value.const_value
            value.const_value = ir.LazyTensor(
                _array(weights[name]), dtype=like.dtype, shape=ir.Shape(like.shape.numpy()), name=name, cache=False
            )


def _array(compute: Callable[[], torch.Tensor]) -> Callable[[], ir.TensorProtocol]:
    return lambda: ir.tensor(compute().numpy())


def _annotate(model: ir.Model, program: Program) -> None:
    """Leave on every node the module it came from and its attention site, and no path of this machine."""
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        node.metadata_props.clear()
        if scopes is None:
            continue
        *modules, _ = ast.literal_eval(scopes) or [""]
        if modules and modules[-1]:
            node.metadata_props[MODULE_KEY] = modules[-1]
        site = next((name for name in modules if name in program.sites), None)
        if site is not None:
            node.metadata_props[SITE_KEY] = site


def _name_dimensions(model: ir.Model, decoding: Decoding) -> None:
    """Call the dynamic dimensions batch, sequence and capacity everywhere."""
    names: dict[str, str] = {}
    pasts = {tensor.past for tensor in decoding.cache}
    for value in model.graph.inputs:
        assert value.shape is not None
        last = len(value.shape) - 2 if value.name in pasts else 1
        for place, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                name = "batch" if place == 0 else "capacity" if value.name in pasts else "sequence"
                if place in (0, last):
                    names.setdefault(dim.value, name)
    pattern = re.compile("|".join(rf"\b{re.escape(n)}\b" for n in names)) if names else None
    values = [v for node in model.graph.all_nodes() for v in node.outputs]
    for value in {*values, *model.graph.inputs, *model.graph.outputs}:
        if value.shape is None or pattern is None:
            continue
        value.shape = ir.Shape(
            [
                pattern.sub(lambda m: names[m.group()], d.value) if isinstance(d, ir.SymbolicDim) and d.value else d
                for d in value.shape
            ]
        )
