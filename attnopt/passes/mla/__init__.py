"""Conversion of attention to Multi-head Latent Attention. See docs/mla.md for the method."""
