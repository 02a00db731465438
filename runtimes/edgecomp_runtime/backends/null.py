"""The null backend: right shapes, made-up numbers. Runs the session's own logic where nothing can execute a graph."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgecomp_runtime.backends import variant
from edgecomp_runtime.buffers import Bound, HostMemory, Memory, Region, view
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import InputError
from edgecomp_runtime.limits import PREFILL_ROWS
from edgecomp_runtime.manifest import GraphInfo


class NullEngine:
    """Gives zeros of each output's shape; logits point at the number of rows that the cache would hold."""

    def __init__(self, graph: GraphInfo):
        self._results = [t for t in graph.outputs if not t.role.startswith("new_")]
        self._regions: dict[str, Region] = {}

    def bind(self, name: str, region: Region) -> None:
        self._regions[name] = region

    def execute(self) -> None:
        regions = self._regions
        for tensor in self._results:
            out = view(regions[tensor.name])
            out[...] = np.arange(out.shape[1]) if tensor.role == "kept" else 0
            if tensor.role == "logits":
                rows = int(view(regions["length"])[0]) + regions["embeddings"].shape[1]
                out[..., rows % out.shape[-1]] = 1


class NullBackend:
    """Reads the neutral graphs' manifest entries, never the files."""

    name = "null"
    prefill_rows = PREFILL_ROWS
    logit_rows = 16

    def files(self, bundle: Bundle, plan: str) -> dict[str, tuple[Path, GraphInfo]]:
        return variant(bundle, plan, "neutral", self.name)

    def memory(self) -> HostMemory:
        return HostMemory()

    def load(self, path: Path, graph: GraphInfo, most: Mapping[str, int], state: Mapping[str, Region], memory: Memory) -> Bound:
        return Bound(NullEngine(graph), graph, most, state, memory)


def make(threads: int | None, name: str = "null") -> NullBackend:
    """The backend. Raises InputError where threads are asked for, which it has no use for."""
    if threads is not None:
        raise InputError(f"--threads {threads} has no effect on the null backend, which computes nothing: leave it out")
    return NullBackend()
