"""The `attnopt` model class: a source architecture whose attention was rewritten in some or all layers.

Self-contained on purpose: this file is copied into every emitted directory, for users of `trust_remote_code`, and
therefore imports nothing of attnopt. Multi-head Latent Attention (MLA) is DeepSeek-V2's (arXiv 2405.04434, section
2.1), without the norm on the latent and with one rotary table per layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_attnopt import AttnoptConfig
from .heads_attnopt import (
    SHARED,
    GroupedAttention,
    HeadNorm,
    HeadRouter,
    RelativeBias,
    eager_attention,
    relative_index,
    resize,
)


class HeadMap(nn.Module):
    """One matrix per head: [..., heads, n] to [..., heads, m] with a weight of shape [heads, m, n]."""

    def __init__(self, heads: int, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, rows, columns))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.transpose(1, 2) @ self.weight.transpose(1, 2)).transpose(1, 2)


class Angles(nn.Module):
    """cos and sin [B, S, pairs] of a table of inverse frequencies at position_ids [B, S], computed in float32."""

    inv_freq: torch.Tensor

    def __init__(self, table: list[float]) -> None:
        super().__init__()
        self.table = tuple(table)
        self.register_buffer("inv_freq", torch.tensor(table, dtype=torch.float32), persistent=False)

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        phase = position_ids[..., None].float() * self.inv_freq
        return phase.cos().to(dtype), phase.sin().to(dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Angles:
        """As nn.Module's, but a cast of the model must not round the angles."""
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:
            self.inv_freq = torch.tensor(self.table, dtype=torch.float32, device=self.inv_freq.device)
        return self


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the interleaved pairs (0, 1), (2, 3), ... of x [..., d] by the angles of cos and sin [..., d/2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


class LatentAttention(nn.Module):
    """Multi-head Latent Attention: per token one latent [r] and one rotary key [d_rope] are cached, nothing else.

    While a prompt is read for the first time, keys and values of that prompt are expanded (less arithmetic). As soon as
    there is a past, the query is taken into the latent space instead ("absorbed"): scores are
    (W_uk^T q_nope) . latent + q_rope . key, and the value map is applied to the attended latent. So the cache is never
    expanded, and no tensor of size cached tokens x heads x head width exists.

    Args:
        config: configuration of the source architecture (its hidden size and attention implementation).
        layer_idx: index of the layer in the cache.
        spec: the layer's record, see AttnoptConfig.
        table: inverse frequencies of the layer's rotary pairs.
    """

    is_causal = True
    num_key_value_groups = 1  # expanded keys have as many heads as queries

    def __init__(self, config: PretrainedConfig, layer_idx: int, spec: dict[str, Any], table: list[float]) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        width = config.hidden_size
        self.heads, self.rank = spec["heads"], spec["kv_lora_rank"]
        self.d_nope, self.d_rope, self.d_v = spec["d_nope"], spec["d_rope"], spec["d_v"]
        self.scale = spec["scale"]
        self.angles = Angles(table)
        self.normed = spec["encoder"] == "normed_kv"
        d_q = self.d_nope + self.d_rope
        if self.normed:
            groups, d_qk, d_kv_value = spec["kv_heads"], spec["d_qk"], spec["d_kv_value"]
            self.groups, self.d_qk = groups, d_qk
            self.q_proj = nn.Linear(width, self.heads * d_qk, bias=spec["q_bias"])
            self.k_proj = nn.Linear(width, groups * d_qk, bias=spec["kv_bias"])
            self.v_proj = nn.Linear(width, groups * d_kv_value, bias=spec["kv_bias"])
            self.q_norm, self.k_norm = HeadNorm(d_qk, spec["norm_eps"]), HeadNorm(d_qk, spec["norm_eps"])
            self.q_map = HeadMap(self.heads, d_q, d_qk)
            encoded = groups * (d_qk + d_kv_value)
        else:
            self.q_proj = nn.Linear(width, self.heads * d_q, bias=spec["q_bias"])
            encoded = width
        self.kv_a_proj = nn.Linear(encoded, self.rank + self.d_rope, bias=spec["kv_a_bias"])
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.d_nope + self.d_v), bias=False)
        self.o_proj = nn.Linear(self.heads * self.d_v, width, bias=spec["o_bias"])
        self.router = HeadRouter(width, self.heads, spec["route"]) if spec.get("route") else None

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [B, S, heads, d_nope + d_rope] and [latent | unrotated key] [B, S, rank + d_rope] of x [B, S, D]."""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))
        if not self.normed:
            return q, self.kv_a_proj(x)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.groups, self.d_qk))).flatten(-2)
        return self.q_map(self.q_norm(q)), self.kv_a_proj(torch.cat((k, self.v_proj(x)), dim=-1))

    def expanded(
        self, q: torch.Tensor, latent: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention of a prompt over itself, [B, S, H, d_v]: S == T, and no mask means causal; else as `absorbed`."""
        rows = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        nope, value = rows.split((self.d_nope, self.d_v), dim=-1)
        keys = torch.cat((nope, key.unsqueeze(1).expand(-1, self.heads, -1, -1)), dim=-1)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        return attend(self, q, keys, value, mask, dropout=0.0, scaling=self.scale)[0]

    def absorbed(
        self, q: torch.Tensor, latent: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention over the cache as it is stored.

        Args:
            q: [B, H, S, d_nope + d_rope], rotated.
            latent, key: [B, T, rank] and [B, T, d_rope], rotated; the last S of the T tokens are the queries' own.
            mask: additive, broadcastable to [B, 1, S, T]; None if every query sees every token.

        Returns:
            [B, S, H, d_v].
        """
        heads, steps = q.shape[1:3]
        w_uk, w_uv = self.kv_b_proj.weight.view(heads, -1, self.rank).split((self.d_nope, self.d_v), dim=1)
        # Heads and steps become rows of one matrix per sequence: a broadcast matmul would copy the cache once a head.
        q_latent = torch.einsum("bhsn,hnr->bhsr", q[..., : self.d_nope], w_uk).flatten(1, 2)
        q_rope = q[..., self.d_nope :].flatten(1, 2)
        scores = (q_latent @ latent.mT + q_rope @ key.mT).unflatten(1, (heads, steps)) * self.scale
        if mask is not None:
            scores = scores + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        attended = (weights.flatten(1, 2) @ latent).unflatten(1, (heads, steps))
        return torch.einsum("bhsr,hvr->bshv", attended, w_uv)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """The interface of a transformers decoder layer's `self_attn`; attention maps are never returned."""
        q, compressed = self.project(hidden_states)
        gates, idle = self.router(hidden_states, q.transpose(1, 2)) if self.router is not None else (None, None)
        cos, sin = self.angles(position_ids, q.dtype)
        q_nope, q_rope = q.split((self.d_nope, self.d_rope), dim=-1)
        q = torch.cat((q_nope, rotate(q_rope, cos.unsqueeze(2), sin.unsqueeze(2))), dim=-1).transpose(1, 2)
        latent, key = compressed.split((self.rank, self.d_rope), dim=-1)
        key = rotate(key, cos, sin)
        steps = latent.shape[1]
        past: int | torch.Tensor = 0
        if past_key_values is not None:
            # A cache of fixed size counts in a tensor that `update` writes into, hence the copy.
            past = past_key_values.get_seq_length(self.layer_idx) + 0
            # Both are stored as one head, which is what every transformers cache layer expects.
            stored = past_key_values.update(latent.unsqueeze(1), key.unsqueeze(1), self.layer_idx)
            latent, key = stored[0].squeeze(1), stored[1].squeeze(1)
        total = latent.shape[1]
        if total == steps and steps > 1:  # all there is comes from this call
            out = self.expanded(q, latent, key, attention_mask)
        else:
            if attention_mask is not None:
                attention_mask = attention_mask[..., :total]
                if attention_mask.dtype == torch.bool:
                    attention_mask = additive(attention_mask, q.dtype)
            elif total > 1:
                # No mask means causal. Slots after the last token are empty (a cache of fixed size); a window has
                # dropped the oldest.
                slots = torch.arange(total, device=q.device)
                first = past if isinstance(past, torch.Tensor) else min(past, total - steps)
                attention_mask = additive(slots <= slots[:steps, None] + first, q.dtype)
            out = self.absorbed(q, latent, key, attention_mask)
        result = self.o_proj((out if gates is None else out * gates.unsqueeze(-1)).flatten(-2))
        return result if idle is None else result + idle, None


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a key is seen, the lowest finite number elsewhere (a row that sees nothing stays finite)."""
    lowest = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, lowest)


class AttnoptPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = AttnoptConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 (transformers' own spelling)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HeadNorm):
            init.ones_(module.weight)
        elif isinstance(module, Angles):
            # Loading builds modules without values; what no checkpoint stores is restored here.
            init.copy_(module.inv_freq, torch.tensor(module.table, dtype=torch.float32))
        elif isinstance(module, RelativeBias):
            init.zeros_(module.table)
            init.copy_(module.index, relative_index(module.window))
        elif isinstance(module, HeadRouter):
            if module.fill is not None:
                init.zeros_(module.fill)
            for linear in (module.share, module.balance):
                if linear is not None:
                    init.zeros_(linear.weight)
        elif isinstance(module, HeadMap):
            init.normal_(module.weight, mean=0.0, std=1.0 / math.sqrt(module.weight.shape[-1]))
        else:
            type(self.model)._init_weights(self.model, module)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers', but a tensor that is missing, left over or of a wrong shape is an error, not a warning."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(problem):
                raise ValueError(f"attnopt model: {problem.replace('_', ' ')}: {sorted(map(str, info[problem]))[:5]}")
        return (model, info) if output_loading_info else model

    def rewrite(self) -> None:
        """Put the rewritten layers into the source architecture's backbone, `self.model`."""
        config = self.config
        lenders = {record["share"]["source"] for record in config.layers if record and record.get("share")}
        self.shares = bool(lenders)
        for index, record in enumerate(config.layers):
            if record is None:
                continue
            owner = self.model.get_submodule(config.paths[index].rpartition(".")[0])
            name = config.paths[index].rpartition(".")[2]
            if record["kind"] == "latent":
                new: nn.Module = LatentAttention(
                    config.text_config, index, record, config.rope_tables[record["rope_table"]]
                )
            else:
                new = GroupedAttention(config.text_config, index, record, index in lenders)
            setattr(owner, name, new)
            if record["kind"] == "grouped" and record["instead_of"]:
                self.model.set_submodule(record["instead_of"], nn.Identity())
        resize(self.model, config.resized)
        self.routers = tuple(module for module in self.model.modules() if isinstance(module, HeadRouter))
        # transformers asks the models inside to initialise what lies in them, and these do not know our modules.
        models: list[Any] = [module for module in self.model.modules() if isinstance(module, PreTrainedModel)]
        for model in models:
            model._init_weights = self._init_weights


class AttnoptForCausalLM(AttnoptPreTrainedModel, GenerationMixin):
    """Causal language model; tensor names are the source architecture's, except inside rewritten layers."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' own spelling)

    def __init__(self, config: AttnoptConfig) -> None:
        super().__init__(config)
        text = config.text_config
        self.model = AutoModel.from_config(text)
        self.rewrite()
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=getattr(text, "lm_head_bias", False))
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, vocab] (or of the last `logits_to_keep` positions), the cache, and the loss for `labels`."""
        if self.shares:
            kwargs[SHARED] = {}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size)
            loads = [module.load for module in self.routers if module.load is not None]
            if loads:
                loss = loss + self.config.load_balance * torch.stack([load.to(loss.device) for load in loads]).mean()
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


class AttnoptModel(AttnoptPreTrainedModel):
    """An encoder; called as the source's own class."""

    def __init__(self, config: AttnoptConfig) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(config.text_config)
        self.main_input_name = self.model.main_input_name
        self.rewrite()
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The source class's outputs. The first argument is what it reads: token ids, or pixels."""
        named = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        kwargs |= {name: value for name, value in named.items() if value is not None}
        if self.shares:
            kwargs[SHARED] = {}
        return self.model(input_ids if pixel_values is None else pixel_values, **kwargs)


class AttnoptForImageClassification(AttnoptModel):
    """An image classifier; called as the source's own class."""

    main_input_name = "pixel_values"

    def __init__(self, config: AttnoptConfig) -> None:
        AttnoptPreTrainedModel.__init__(self, config)
        self.model = AutoModelForImageClassification.from_config(config.text_config)
        self.rewrite()
        self.post_init()


__all__ = ["AttnoptConfig", "AttnoptForCausalLM", "AttnoptForImageClassification", "AttnoptModel"]
