"""Memory that follows from the manifest alone: weights and cache. Computed, never measured; reports say which is which."""
from __future__ import annotations

from math import prod

import numpy as np

from edgecomp_runtime.manifest import Manifest, PlanInfo


def weight_bytes(manifest: Manifest) -> int:
    """Bytes of the weight files."""
    return sum(info.bytes for name, info in manifest.files.items() if name.endswith(".bin"))


def cache_bytes(manifest: Manifest, plan: PlanInfo, rows: int | None = None) -> int:
    """Bytes of the keys and values of `rows` rows in every layer, or of the whole window."""
    tensors = [t for t in manifest.graphs[plan.variants["neutral"]["prefill"]].inputs if t.role.startswith("cache_")]
    total = 0
    for tensor in tensors:
        held = plan.cache_rows[tensor.layer or 0] if rows is None else rows
        total += held * prod(s for s in tensor.shape[1:] if isinstance(s, int)) * np.dtype(tensor.dtype).itemsize
    return total
