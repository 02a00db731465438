"""The phases of an answer: what a result calls them as they were measured and as they are predicted, and people."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """measured: the key in a plan's latency. predicted: in its prediction for a device."""
    measured: str
    predicted: str
    title: str


PHASES = {"vision": Phase("vision_ms", "vision_ms", "vision"), "prefill": Phase("prefill_ms", "prefill_ms", "prefill"),
          "decode": Phase("per_token_ms", "tpot_ms", "each further token")}
PEAK = Phase("peak_bytes", "memory_bytes", "peak memory")  # is predicted and measured as they are
