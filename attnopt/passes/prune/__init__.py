"""Removal of heads and of key/value groups."""
