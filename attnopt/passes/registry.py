"""Every pass, analysis and method by name. Adding one is a line here."""

from __future__ import annotations

from attnopt.rewriter.registry import Entry, Registry

REGISTRY = Registry(
    items={
        "to-mla": Entry("attnopt.passes.mla.to_mla:ToMla", "turn attention into Multi-head Latent Attention"),
        "share": Entry(
            "attnopt.passes.share.share:Share", "let layers read an earlier layer's map, or keys and values"
        ),
        "prune": Entry("attnopt.passes.prune.prune:Prune", "remove heads or key/value groups"),
        "moh": Entry("attnopt.passes.moh.moh:MixtureOfHeads", "let each token choose its heads"),
        "dimap": Entry("attnopt.passes.dimap.dimap:Dimap", "prune weights, or heads and channels, without any data"),
        "refit": Entry("attnopt.passes.repair.refit:Refit", "fit the attention layer by layer to the original's"),
        "distill": Entry("attnopt.passes.repair.distill:Distill", "train on what the original says, end to end"),
    },
    methods={
        "mla": ("to-mla", "keep a fraction of the cache: one latent and one rotary key per token and layer"),
        "share": ("share", "layers that attend alike read one attention map, or one set of keys and values"),
        "moh": ("moh", "mixture of heads: shared heads always work, each token chooses among the others"),
        "prune": ("prune", "remove the heads or key/value groups that are missed least"),
        "dimap": ("dimap", "prune by weights alone, ranked within the modules of each kind"),
    },
)
