"""Sharing of attention maps, or of keys and values, between layers."""
