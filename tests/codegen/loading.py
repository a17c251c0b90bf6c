"""An emission as a loaded module, without a detour over the disk."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import attnopt.codegen.hf  # noqa: F401 (registers our class)
from attnopt.codegen.hf.emission import Emission


def module_of(emission: Emission, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The class an emission names, filled with its tensors."""
    fields = {key: value for key, value in emission.config.items() if key not in ("model_type", "auto_map")}
    config = AutoConfig.for_model(emission.config["model_type"], **fields)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    assert type(model).__name__ == emission.architecture
    store = emission.store
    result = model.load_state_dict({name: store.get(name) for name in store.names()}, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids that are no special tokens."""
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))
