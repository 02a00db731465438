"""Predictions of latency and memory, from a config.json or a bundle, for devices that need not be at hand."""
from __future__ import annotations
