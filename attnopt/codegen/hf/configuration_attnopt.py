"""Configuration of the `attnopt` model class: a source architecture whose attention layers were rewritten.

Self-contained on purpose: this file is copied into every emitted directory, for users of `trust_remote_code`, and
therefore imports nothing of attnopt and no torch.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

# What the tensors of a layer mean. Written into every config and compared at load: a runtime that knows another
# convention must refuse, never guess.
SEMANTICS: dict[str, Any] = {
    "version": 1,
    "latent_norm": "none",
    "rope_layout": "interleaved",
    "kv_a_rows": ["latent", "rotary_key"],
    "kv_b_rows": "per head: nope, value",
    "q_rows": "per head: nope, rope",
    "cache": ["latent", "rotary_key"],
}

# Architectures whose decoder layer hands `position_ids` to `self_attn` and whose head is a plain linear map: what the
# class relies on. Each one has a test.
BACKBONES = ("llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe")

# Encoders whose attention can be replaced: where in a layer it stands, and what it makes superfluous (its output
# projection, where the source keeps that elsewhere). Each one has a test.
ENCODERS: dict[str, str | None] = {"bert": "output.dense", "roberta": "output.dense", "vit": None, "swin": None}

_LAYER_FIELDS = {
    "kind": str,
    "heads": int,
    "d_nope": int,
    "d_rope": int,
    "d_v": int,
    "kv_lora_rank": int,
    "rope_table": int,
    "scale": float,
    "encoder": str,
    "q_bias": bool,
    "kv_a_bias": bool,
    "o_bias": bool,
}
_GROUPED_FIELDS: dict[str, Any] = {
    "kind": str,
    "heads": int,
    "kv_heads": int,
    "d_qk": int,
    "d_v": int,
    "width": int,
    "kv_of": list,
    "scale": float,
    "causal": bool,
    "window": (int, type(None)),
    "norm_eps": (float, type(None)),
    "bias_window": (int, type(None)),
    "q_bias": bool,
    "k_bias": bool,
    "v_bias": bool,
    "o_bias": bool,
    "instead_of": (str, type(None)),
    "share": (dict, type(None)),
    "route": (dict, type(None)),
}
_ROUTE_FIELDS = {"router": str, "units": list, "active": int, "gate": str, "bias": bool, "fill": bool}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
# Keys that transformers itself puts into a config or passes to its constructor, besides its own fields.
_ACCEPTED = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "torch_dtype",
    "use_cache",
}
_NORMED_FIELDS = {"kv_heads": int, "d_qk": int, "d_kv_value": int, "norm_eps": float, "kv_bias": bool}


class AttnoptConfig(PretrainedConfig):
    """Source configuration plus one record per layer.

    Args:
        text_config: configuration of the source architecture (a dict with `model_type`, or a config object).
        layers: per attention layer None (the source's own) or a record with a `kind`.
            "latent": heads, d_nope, d_rope, d_v, kv_lora_rank: sizes; kv_lora_rank counts the constant lane if there is
            one; rope_table: index into `rope_tables`; scale: factor on q.k before the softmax;
            encoder: "hidden" (kv_a reads the attention input) or "normed_kv" (kv_a reads cat(k_norm(k), v), and the
            query is q_map applied per head to q_norm(q)); q_bias, kv_a_bias, o_bias: which projections have a bias;
            for "normed_kv" also kv_heads, d_qk, d_kv_value (widths of a source key and value head), norm_eps, kv_bias.
            "grouped": heads, kv_heads, d_qk, d_v and width (hidden size): sizes; kv_of: key/value head of each query
            head, empty if evenly divided; causal, window, scale; norm_eps of q/k norms or None; bias_window: side of
            the window of a relative position bias, or None; q_bias, ..., o_bias; instead_of: module that its output
            projection replaces, or None; share: None or {edge: "map" | "kv", source: index of the layer that is read};
            route: None or a router.
            A router (also in latent records, optional): router "linear" | "qnorm", units: heads of each routed unit,
            active: units that work on a token, gate: "binary" | "weighted" (needs training, and a linear router), bias,
            fill: whether the router has a bias and idle units add a constant.
        rope_tables: inverse frequencies in radians per position, one list per distinct table, one entry per pair.
        paths: module of each attention layer below the backbone; by default those of a decoder.
        head_ids: number that each query head has in the original model, by the path of its layer, where heads were
            removed or moved. Nothing is computed from it.
        load_balance: weight of the load-balance loss in the loss of a model with weighted gates.
        resized: linear maps of other sizes than the source's, by their path below the backbone: [out, in].
        semantics: must equal SEMANTICS.

    Raises:
        ValueError: an unknown or missing field, an unknown architecture, or sizes that do not fit together.
    """

    model_type = "attnopt"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        layers: list[dict[str, Any] | None] | None = None,
        rope_tables: list[list[float]] | None = None,
        paths: list[str] | None = None,
        resized: dict[str, list[int]] | None = None,
        semantics: dict[str, Any] | None = None,
        load_balance: float = 0.01,
        head_ids: dict[str, list[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        unknown = [
            key
            for key in kwargs
            if not (key.startswith("_") or key in _ACCEPTED or key in _TOKENS or hasattr(PretrainedConfig, key))
        ]
        if unknown:
            raise ValueError(f"attnopt config: unknown fields {sorted(unknown)}")
        if text_config is None:
            # transformers builds a default config to find what differs from it when saving; a one-layer Llama will do.
            text_config = {"model_type": "llama", "num_hidden_layers": 1}
        if isinstance(text_config, dict):
            options = {key: value for key, value in text_config.items() if key != "model_type"}
            text_config = AutoConfig.for_model(text_config["model_type"], **options)
        self.text_config = text_config
        if paths is None:
            paths = [f"layers.{index}.self_attn" for index in range(text_config.num_hidden_layers)]
        self.paths = paths
        self.layers = layers if layers is not None else [None] * len(paths)
        self.rope_tables = rope_tables or []
        self.resized = resized or {}
        self.load_balance = load_balance
        self.head_ids = head_ids or {}
        self.semantics = dict(SEMANTICS) if semantics is None else semantics
        for name in _TOKENS:
            kwargs.setdefault(name, getattr(text_config, name, None))
        super().__init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Compare every record with what the class can compute. Raises ValueError naming the layer and field."""
        if self.semantics != SEMANTICS:
            odd = [key for key in {*self.semantics, *SEMANTICS} if self.semantics.get(key) != SEMANTICS.get(key)]
            raise ValueError(f"attnopt config: semantics {sorted(odd)} are not those of this class (version 1)")
        if self.text_config.model_type not in (*BACKBONES, *ENCODERS):
            known = ", ".join((*BACKBONES, *ENCODERS))
            raise ValueError(f"attnopt config: architecture {self.text_config.model_type!r} is not one of {known}")
        if len(self.layers) != len(self.paths):
            raise ValueError(f"attnopt config: {len(self.layers)} layer records for {len(self.paths)} layers")
        for index, layer in enumerate(self.layers):
            where = f"attnopt config: layer {index}"
            if layer is None:
                continue
            if layer.get("kind", "latent") == "latent":
                self._check_layer(where, layer)
            else:
                self._check_grouped(where, index, layer)
            if layer.get("route") is not None:
                _check_route(where, layer["heads"], layer["route"])
        self._check_head_ids()

    def provenance(self) -> dict[str, Any]:
        """What reading such a model back needs and its graph does not tell, for attnopt.

        Returns:
            config: of the source architecture, as plain data, with the type of the tensors; rewritten: module paths of
            rewritten layers; head_ids: by module path; resized: names of weights of other sizes than the source's.
        """
        source = self.text_config.to_dict() | {"dtype": self.to_dict().get("dtype")}
        source["tie_word_embeddings"] = self.tie_word_embeddings
        return {
            "config": source,
            "rewritten": [f"model.{path}" for path, layer in zip(self.paths, self.layers, strict=True) if layer],
            "head_ids": {f"model.{path}": list(ids) for path, ids in self.head_ids.items()},
            "resized": [f"model.{path}.weight" for path in self.resized],
        }

    def _check_head_ids(self) -> None:
        for path, ids in self.head_ids.items():
            layer = self.layers[self.paths.index(path)] if path in self.paths else None
            if layer is None:
                raise ValueError(f"attnopt config: head_ids of {path!r}, which is no rewritten layer")
            if len(set(ids)) != layer["heads"] or len(ids) != layer["heads"] or any(type(i) is not int for i in ids):
                raise ValueError(f"attnopt config: head_ids of {path}: {ids} do not number its {layer['heads']} heads")

    def _check_grouped(self, where: str, index: int, layer: dict[str, Any]) -> None:
        if layer["kind"] != "grouped":
            raise ValueError(f"{where}: kind {layer['kind']!r} is neither 'latent' nor 'grouped'")
        _check_fields(where, layer, _GROUPED_FIELDS)
        for name in ("heads", "kv_heads", "d_qk", "d_v", "width", "scale"):
            if not layer[name] > 0 or not math.isfinite(layer[name]):
                raise ValueError(f"{where}: {name} = {layer[name]} is not positive")
        kv_of = layer["kv_of"]
        if kv_of and (len(kv_of) != layer["heads"] or sorted(set(kv_of)) != list(range(layer["kv_heads"]))):
            raise ValueError(f"{where}: kv_of = {kv_of} does not name a key/value head for each head")
        if not kv_of and layer["heads"] % layer["kv_heads"]:
            raise ValueError(f"{where}: {layer['heads']} heads are not a multiple of {layer['kv_heads']}")
        if layer["share"] is not None:
            self._check_share(where, index, layer)

    def _check_share(self, where: str, index: int, layer: dict[str, Any]) -> None:
        share = layer["share"]
        source = share.get("source")
        if set(share) != {"edge", "source"} or share["edge"] not in ("map", "kv"):
            raise ValueError(f"{where}: share = {share}")
        known = type(source) is int and 0 <= source < index and (self.layers[source] or {}).get("kind") == "grouped"
        other = self.layers[source] if known else None
        if other is None or other["share"] is not None:
            raise ValueError(f"{where}: it reads layer {source}, which is no earlier layer that computes its own")
        same = ("heads", "kv_heads", "d_qk", "kv_of", *(("d_v",) if share["edge"] == "kv" else ()))
        if any(layer[name] != other[name] for name in same):
            raise ValueError(f"{where}: its heads are not those of layer {source}, which it reads")

    def _check_layer(self, where: str, layer: dict[str, Any]) -> None:
        if layer.get("encoder") not in ("hidden", "normed_kv"):
            raise ValueError(f"{where}: encoder {layer.get('encoder')!r} is neither 'hidden' nor 'normed_kv'")
        fields = _LAYER_FIELDS | (_NORMED_FIELDS if layer["encoder"] == "normed_kv" else {})
        layer.setdefault("kind", "latent")
        _check_fields(where, {name: value for name, value in layer.items() if name != "route"}, fields)
        for name in ("heads", "d_v", "kv_lora_rank", *(_NORMED_FIELDS.keys() & {"kv_heads", "d_qk"} & layer.keys())):
            if layer[name] <= 0:
                raise ValueError(f"{where}: {name} = {layer[name]} is not positive")
        if layer["d_nope"] < 0 or layer["d_rope"] < 0 or layer["d_nope"] + layer["d_rope"] == 0:
            raise ValueError(f"{where}: query width {layer['d_nope']} + {layer['d_rope']} is not positive")
        if not 0 <= layer["rope_table"] < len(self.rope_tables):
            raise ValueError(f"{where}: rope_table {layer['rope_table']} of {len(self.rope_tables)} tables")
        pairs = len(self.rope_tables[layer["rope_table"]])
        if 2 * pairs != layer["d_rope"]:
            raise ValueError(f"{where}: d_rope = {layer['d_rope']} but its table has {pairs} pairs")
        if not (math.isfinite(layer["scale"]) and layer["scale"] > 0):
            raise ValueError(f"{where}: scale = {layer['scale']}")


def _check_fields(where: str, layer: dict[str, Any], fields: dict[str, Any]) -> None:
    """Compare a record with the fields it must have and their types."""
    unknown, missing = sorted(set(layer) - set(fields)), sorted(set(fields) - set(layer))
    if unknown or missing:
        raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}")
    for name, kind in fields.items():
        value = layer[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            named = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
            raise ValueError(f"{where}: {name} = {value!r} is not of type {named}")


def _check_route(where: str, heads: int, route: dict[str, Any]) -> None:
    _check_fields(f"{where}: route", route, _ROUTE_FIELDS)
    named = [head for unit in route["units"] for head in unit]
    if len(set(named)) != len(named) or any(type(h) is not int or not 0 <= h < heads for h in named):
        raise ValueError(f"{where}: the routed units {route['units']} are not made of its {heads} heads")
    if route["router"] not in ("linear", "qnorm") or not 0 <= route["active"] <= len(route["units"]):
        raise ValueError(f"{where}: router {route['router']!r} with {route['active']} of {len(route['units'])} units")
    if route["gate"] not in ("binary", "weighted"):
        raise ValueError(f"{where}: gate {route['gate']!r} is neither 'binary' nor 'weighted'")
    if route["gate"] == "weighted" and (route["router"] != "linear" or route["active"] == 0):
        raise ValueError(f"{where}: weighted gates need a linear router and at least one active unit")


__all__ = ["AttnoptConfig"]
