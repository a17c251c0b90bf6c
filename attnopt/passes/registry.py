"""Every pass, analysis and method by name. Adding one is a line here."""

from __future__ import annotations

from attnopt.rewriter.registry import Entry, Registry

REGISTRY = Registry(
    items={
        "to-mla": Entry("attnopt.passes.mla.to_mla:ToMla", "turn attention into Multi-head Latent Attention"),
    },
    methods={
        "mla": ("to-mla", "keep a fraction of the cache: one latent and one rotary key per token and layer"),
    },
)
