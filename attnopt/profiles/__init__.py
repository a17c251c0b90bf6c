"""Calibration text and what is measured on it."""
