"""Makes a transformers model express each attention layer as one dialect op while it is being traced.

transformers dispatches attention and mask building through registries of functions. Under `anchored` our functions
are in them: the mask function builds no mask but notes what was asked for, and the attention function emits one
`attnopt::attention` with un-repeated heads. Every argument of the call is either represented on the op or refused by
name: dropping Gemma 3's window silently changed its logits by 0.3.

All use of transformers' registries and of torch's mode stack is in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from attnopt.errors import UnsupportedError
from attnopt.rewriter.ops import attention, expert_linear
from attnopt.rewriter.ops.attention import visible_keys

NAME = "attnopt"

# Arguments that reach the attention function but do not change its result when no cache is used.
_INERT = frozenset(
    {
        "position_ids",
        "use_cache",
        "cache_position",
        "return_dict",
        "num_items_in_batch",
        "output_hidden_states",
        "attnopt_shared",  # where layers of our own class leave what others read
    }
)


@torch.library.custom_op("attnopt::requested_mask", mutates_args=())
def requested_mask(batch: int, queries: int, keys: int, window: int) -> Tensor:
    """A causal mask, bool [B, 1, S, T], of a model that calls SDPA itself. It marks what was asked for while tracing.

    If the model passes it on untouched, `normalize` turns it into arguments of the attention op; if the model changes
    it (Falcon adds ALiBi), attention is not represented and capture refuses. No Program contains it.
    """
    seen = visible_keys(queries, keys, None, True, window, torch.device("cpu"))
    assert seen is not None
    return seen.expand(batch, -1, -1, -1).clone()


@requested_mask.register_fake
def _(batch: int, queries: int, keys: int, window: int) -> Tensor:
    return torch.empty(batch, 1, queries, keys, dtype=torch.bool)


@dataclass
class MaskRequest:
    """What a model asked of its mask function; travels through the layers in the mask's place.

    Attributes:
        causal, window: which keys are visible (window 0: all).
        bias: additive padding mask [B, 1, 1, T], or None.
    """

    causal: bool
    window: int
    bias: Tensor | None


@dataclass
class AnchorLog:
    """What was seen while tracing.

    Attributes:
        requests: every mask that was built.
        calls: module path is unknown to the attention function, so the modules themselves, in call order.
    """

    requests: list[MaskRequest] = field(default_factory=list)
    calls: list[nn.Module] = field(default_factory=list)


def _probe_mask(mask_function: Callable[..., Any], local_size: int | None) -> tuple[bool, int]:
    """Find (causal, window) by asking the mask function about single pairs of positions.

    Raises:
        UnsupportedError: if it hides anything a causal mask or a causal window does not.
    """
    window = int(local_size) if local_size is not None else 0
    far = 3 * max(window, 16) + 5
    queries = [0, 1, 7, far]
    keys = sorted({0, 1, 2, 6, 7, 8, far - 1, far, far + 1, *(far - window + d for d in (-1, 0, 1))})
    with _disable_current_modes():
        zero = torch.tensor(0)
        try:
            seen = {
                (i, j): bool(mask_function(zero, zero, torch.tensor(i), torch.tensor(j))) for i in queries for j in keys
            }
        except Exception as problem:
            raise _odd_mask(mask_function) from problem
    causal = not seen[0, 1]
    for (i, j), visible in seen.items():
        expected = (j <= i or not causal) and (j > i - window or not window)
        if visible != expected or (window and not causal):
            raise _odd_mask(mask_function)
    return causal, window


def _odd_mask(mask_function: Callable[..., Any]) -> UnsupportedError:
    name = getattr(mask_function, "__qualname__", repr(mask_function)).split(".")[0]
    return UnsupportedError(
        f"the model builds an attention mask that is neither full, causal nor a causal window (mask function {name})",
        "attnopt represents full, causal and sliding-window masks, and padding masks of encoders",
    )


class _Anchor:
    """The functions put into the registries, sharing one log."""

    def __init__(self, log: AnchorLog) -> None:
        self.log = log

    def mask(
        self,
        *args: Any,
        mask_function: Callable[..., Any],
        attention_mask: Tensor | None = None,
        local_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        **_: Any,
    ) -> MaskRequest:
        causal, window = _probe_mask(mask_function, local_size)
        bias = None
        # A decoder is captured without padding: slot index is absolute position.
        if attention_mask is not None and not causal:
            if attention_mask.ndim != 2:
                raise UnsupportedError("the model passes an attention mask that is not [batch, length]")
            hidden = ~attention_mask.to(torch.bool)[:, None, None, :]
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            bias = bias.masked_fill(hidden, torch.finfo(dtype).min)
        request = MaskRequest(causal, window, bias)
        self.log.requests.append(request)
        return request

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: MaskRequest | Tensor | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        owner = type(module).__name__
        unknown = sorted(k for k, v in others.items() if k not in _INERT and v is not None and v is not False)
        if unknown:
            raise UnsupportedError(
                f"{owner} passes arguments to its attention that attnopt cannot represent: {', '.join(unknown)}",
                "open an issue naming the model and the argument",
            )
        if isinstance(attention_mask, MaskRequest):
            causal, window, bias = attention_mask.causal, attention_mask.window, attention_mask.bias
        elif attention_mask is None:
            causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
            window, bias = 0, None
            if causal and is_causal is None:
                raise UnsupportedError(
                    f"{owner} is causal but built no mask through transformers' mask functions",
                    "attnopt takes causality from the mask the model asks for and will not guess it",
                )
        else:
            causal, window, bias = False, 0, attention_mask
        if sliding_window is not None and int(sliding_window) != window:
            raise UnsupportedError(
                f"{owner} names a sliding window of {sliding_window}, but its mask has {window or 'none'}"
            )
        if dropout:
            raise UnsupportedError(f"{owner} applies attention dropout {dropout}: the model is in training mode")
        if query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1]:
            raise UnsupportedError(
                f"{owner} has {query.shape[1]} query, {key.shape[1]} key and {value.shape[1]} value heads"
            )
        scale = float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5
        layer = len(self.log.calls)
        self.log.calls.append(module)
        cap = float(softcap) if softcap is not None else 0.0
        out = attention(query, key, value, bias, None, scale, causal, window, cap, s_aux, layer)
        return out, None


def _experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Mixture-of-experts forward of transformers' experts classes, with `expert_linear` as the one opaque step.

    Args:
        module: an experts module: [E, ...] parameters gate_up_proj (or up_proj) and down_proj, and the flags that
            `use_experts_implementation` sets.
        hidden_states: [N, D].
        top_k_index, top_k_weights: [N, k].
    """
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedError(
            f"{type(module).__name__} normalises each expert's output, which attnopt cannot represent"
        )
    tokens, k = top_k_index.shape
    expert = top_k_index.reshape(-1)
    x = hidden_states[:, None, :].expand(-1, k, -1).reshape(tokens * k, hidden_states.shape[-1])

    def linear(x: Tensor, name: str) -> Tensor:
        weight = getattr(module, name)
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        return expert_linear(x, expert, weight.transpose(1, 2) if module.is_transposed else weight, bias)

    if module.has_gate:
        x = module._apply_gate(linear(x, "gate_up_proj"))
    else:
        x = module.act_fn(linear(x, "up_proj"))
    x = linear(x, "down_proj") * top_k_weights.reshape(-1, 1)
    return x.reshape(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


@contextmanager
def _registered(registry: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Put a function into one of transformers' class-wide registries, and what was there back afterwards."""
    mapping = registry._global_mapping
    missing = object()
    before = mapping.get(name, missing)
    mapping[name] = function
    try:
        yield
    finally:
        if before is missing:
            mapping.pop(name, None)
        else:
            mapping[name] = before


@contextmanager
def anchored(model: PreTrainedModel) -> Iterator[AnchorLog]:
    """Within the block, tracing `model` yields one attention op per layer. The model's settings stay changed.

    Models that do not use transformers' attention interface (Falcon) keep calling `scaled_dot_product_attention`; the
    mask functions give them a marker in place of a causal mask, which `normalize` reads.

    Args:
        model: a throw-away skeleton.
    """
    log = AnchorLog()
    anchor = _Anchor(log)

    def tensor_mask(*args: Any, batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
        request = anchor.mask(*args, **kwargs)
        if not request.causal:
            return request.bias
        return requested_mask(batch_size, q_length, kv_length, request.window)

    with (
        _registered(AttentionInterface, NAME, anchor.attention),
        _registered(AttentionMaskInterface, NAME, anchor.mask),
        _registered(AttentionMaskInterface, "sdpa", tensor_mask),
        _experts_registered(),
    ):
        if _uses_interface(model):
            model.set_attn_implementation(NAME)
        if hasattr(model, "set_experts_implementation") and _has_experts(model):
            model.set_experts_implementation(NAME)
        yield log


def _uses_interface(model: PreTrainedModel) -> bool:
    # transformers' own test (it looks for the interface in the model's source file).
    test = getattr(type(model), "_can_set_attn_implementation", None)
    return bool(test()) if test is not None else True


def _has_experts(model: PreTrainedModel) -> bool:
    return any(hasattr(module, "_apply_gate") or hasattr(module, "has_gate") for module in model.modules())


@contextmanager
def _experts_registered() -> Iterator[None]:
    from transformers.integrations import moe

    with _registered(moe.ExpertsInterface, NAME, _experts):
        yield
