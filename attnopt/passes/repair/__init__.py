"""Passes that bring a rewritten model back to its original: refit (layer by layer) and distill (end to end)."""
