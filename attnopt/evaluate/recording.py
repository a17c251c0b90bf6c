"""The original's logits, wanted again when the original has left the memory.

A divergence needs both models' distributions over the vocabulary. Two models in memory may be too many, and the
distributions would fill a disk; but the states before the head are small, and the head makes the same logits of them
again, bit for bit. Whether it does is tried on every model; where it does not, the original stays in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from attnopt.evaluate.scores import forward_pieces


class _Body(nn.Module):
    """Stands where a model's body was and returns the states it was given."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self.states: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """An output like the body's, with nothing but the last states."""
        return self.kind(last_hidden_state=self.states)


class Original:
    """The model that others are compared with: run it, let it go, ask for its logits again.

    Args:
        model: a causal language model of transformers.
        folder: for the states, [tokens, hidden width] in the model's type.
        probe: [B, T] tokens to try the model's head on; None if its logits will not be asked for again.
    """

    def __init__(self, model: Any, folder: Path, probe: torch.Tensor | None) -> None:
        self.model = model
        self.folder = folder
        self._name: str = model.base_model_prefix
        self._seen: Any = None
        self.recordable = probe is not None and self._try(probe)

    def _try(self, probe: torch.Tensor) -> bool:
        body = getattr(self.model, self._name, None)
        if not isinstance(body, nn.Module) or body is self.model:
            return False
        self._hook = body.register_forward_hook(self._keep)
        logits = self.model(input_ids=probe, use_cache=False).logits
        if isinstance(getattr(self._seen, "last_hidden_state", None), torch.Tensor):
            stand_in = _Body(type(self._seen))
            stand_in.states = self._seen.last_hidden_state
            setattr(self.model, self._name, stand_in)
            try:
                again = self.model(input_ids=probe, use_cache=False).logits
            except Exception:  # a head that wants more of the body than its states; any error says so
                again = None
            setattr(self.model, self._name, body)
            if again is not None and torch.equal(again, logits):
                self._stand_in = stand_in
                return True
        self._hook.remove()
        return False

    def _keep(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._seen = output

    def run(self, key: str, ids: torch.Tensor, piece: int | None) -> Iterator[Any]:
        """`forward_pieces`, remembered under a key."""
        for index, out in enumerate(forward_pieces(self.model, ids, piece)):
            if self.recordable:
                states = self._seen.last_hidden_state.contiguous().cpu()
                save_file({"states": states}, self.folder / f"{key}-{index}.safetensors")
            yield out

    def let_go(self) -> None:
        """Free the model's body, if its logits can be made without."""
        if self.recordable:
            self._hook.remove()
            self._seen = None
            setattr(self.model, self._name, self._stand_in)
            # Weights are views of mapped files; the head's alone would keep all of them mapped.
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                tensor.data = tensor.data.clone()

    def logits(self, key: str, ids: torch.Tensor, piece: int | None) -> Iterator[torch.Tensor]:
        """The logits that `run` gave for the same arguments, in the same pieces."""
        if not self.recordable:
            yield from (out.logits for out in forward_pieces(self.model, ids, piece))
            return
        for index, start in enumerate(range(0, ids.shape[1], piece or ids.shape[1])):
            states = load_file(self.folder / f"{key}-{index}.safetensors")["states"]
            self._stand_in.states = states.to(ids.device)
            part = ids[:, start : start + states.shape[1]]
            yield self.model(input_ids=part, use_cache=False).logits
