"""Memory that follows from the manifest alone: weights and cache. Computed, never measured; reports say which is which."""
from __future__ import annotations

from math import prod

import numpy as np

from edgecomp_runtime.manifest import Manifest, PlanInfo


def weight_bytes(manifest: Manifest) -> int:
    """Bytes of the weight files."""
    return sum(info.bytes for name, info in manifest.files.items() if name.endswith(".bin"))


def cache_bytes(manifest: Manifest, plan: PlanInfo, rows: int | None = None) -> int:
    """Bytes of the keys and values of a prompt of `rows` rows as it enters, one picture among them, or of the whole window.

    Behind a cut in the decoder layers hold fewer.
    """
    tensors = [t for t in manifest.graphs[plan.variants["neutral"]["prefill"]].inputs if t.role.startswith("cache_")]
    total = 0
    for tensor in tensors:
        layer = tensor.layer or 0
        held = plan.cache_rows[layer] if rows is None else rows - (plan.visual_tokens - plan.tokens_at(layer))
        total += held * prod(s for s in tensor.shape[1:] if isinstance(s, int)) * np.dtype(tensor.dtype).itemsize
    return total
