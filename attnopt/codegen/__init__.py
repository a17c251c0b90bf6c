"""Targets: what a Program is written as. Each target claims a site or refuses it with a reason."""
