"""Mixture of heads: each token chooses the heads that work on it."""
