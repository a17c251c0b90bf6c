"""Comparing layers: sampled rows of every map are kept, and each layer is compared with all before it."""
