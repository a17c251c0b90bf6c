"""The attention dialect: torch.library ops with fake, reference and autograd implementations.

Importing this package registers every op in the namespace `attnopt`:

- `attention`          softmax attention, heads un-repeated (see `ops.attention`)
- `shared_attention`   the same, with queries and keys taken from another site
- `routed_attention`   the same, times per-token per-head gates
- `latent_attention`   Multi-head Latent Attention on the latent itself (see `ops.latent`)
- `rope`               rotary position embedding (see `ops.rope`)
- `expert_linear`      one matrix per row, for mixture-of-experts blocks (see `ops.experts`)

The implementations are references: plain torch on any device. Codegen lowers the ops to something faster.
"""

from attnopt.rewriter.ops.attention import attention, routed_attention, shared_attention
from attnopt.rewriter.ops.experts import expert_linear
from attnopt.rewriter.ops.latent import latent_attention
from attnopt.rewriter.ops.rope import rope

__all__ = ["attention", "expert_linear", "latent_attention", "rope", "routed_attention", "shared_attention"]
