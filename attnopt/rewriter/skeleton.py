"""The module a config describes, with its parameters on the meta device: shapes and code, no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import meta_device_safe_creation_ops
from transformers.models.auto import modeling_auto

from attnopt.errors import SourceError

#: Auto classes in the order in which they are tried when a config names no architecture.
_AUTO = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForImageClassification", "AutoModel")


def model_class(config: PretrainedConfig, directory: Path, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The class that implements a config.

    Raises:
        SourceError: if transformers has none.
    """
    names = list(getattr(config, "architectures", None) or ())
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code and auto_map:
        for auto in (*_AUTO, *auto_map):
            if auto in auto_map and auto.startswith("AutoModel"):
                return get_class_from_dynamic_module(auto_map[auto], str(directory))
    registered = [getattr(modeling_auto, auto)._model_mapping.get(type(config), None) or () for auto in _AUTO]
    flat = [c for cls in registered for c in (cls if isinstance(cls, (list, tuple)) else [cls])]
    for name in names:
        found = getattr(transformers, name, None) or next((c for c in flat if c.__name__ == name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    if flat:
        return flat[0]
    raise SourceError(
        f"transformers {transformers.__version__} has no model class for {', '.join(names) or config.model_type}",
        "install the version the model was made with, or give --trust-remote-code if the directory brings its own code",
    )


def build_skeleton(
    cls: type[PreTrainedModel],
    config: PretrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Construct the module with meta parameters and real computed buffers (rotary tables, position indices).

    Buffers that a checkpoint stores stay on the meta device; the caller fills them.

    Args:
        cls, config: what to build; the config is copied.
        dtype: element type of the parameters.
        attn_implementation: name of the attention function, as transformers registers them; the default one if None.

    Raises:
        SourceError: if the class refuses the config.
    """
    import copy

    config = copy.deepcopy(config)
    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        with torch.device("meta"), meta_device_safe_creation_ops():
            model = cls._from_config(config, **options)
    except Exception as error:  # a config's code may raise anything
        raise SourceError(
            f"{cls.__name__} cannot be built from this config: {error}", "correct config.json; its fields contradict"
        ) from error
    _compute_buffers(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _compute_buffers(model: PreTrainedModel) -> None:
    """Recompute the buffers no checkpoint stores, by the module's own initialisation, as from_pretrained does."""
    for parameter in model.state_dict(keep_vars=True).values():
        parameter._is_hf_initialized = True
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner = model.get_submodule(name.rpartition(".")[0])
        owner.register_buffer(name.rpartition(".")[2], torch.empty_like(buffer, device="cpu"), persistent=False)
    module: Any  # the flag is transformers' own and unknown to nn.Module
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
