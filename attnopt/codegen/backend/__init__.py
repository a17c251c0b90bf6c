"""`torch.compile(model, backend="attnopt")`.

`attnopt` is published under the entry-point group `torch_dynamo_backends`, so the name works after an installation
without importing attnopt. It is a plain function on purpose: decorating it as well would register the name twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import fx

__all__ = ["attnopt"]


def attnopt(gm: fx.GraphModule, example_inputs: Sequence[torch.Tensor], **keywords: Any) -> Callable[..., Any]:
    """Compile one graph that Dynamo captured.

    Args:
        gm: the graph; parameters are inputs.
        example_inputs: values it was captured with.
        keywords: `options` and `mode` of torch.compile, see `options.Options`.

    Raises:
        OptionError: an unknown option or a wrong value.
    """
    from attnopt.codegen.backend.compiler import compile_graph
    from attnopt.codegen.backend.options import Options

    return compile_graph(gm, example_inputs, Options.parse(keywords))
