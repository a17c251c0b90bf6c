"""Data-independent module-aware pruning."""
