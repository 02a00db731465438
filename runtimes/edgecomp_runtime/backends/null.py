"""The null backend: right shapes, made-up numbers. Runs the session's own logic where nothing can execute a graph."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecomp_runtime.backends import is_state
from edgecomp_runtime.errors import InputError
from edgecomp_runtime.manifest import GraphInfo


class NullGraph:
    """Gives zeros of each output's shape; logits point at the number of rows that the cache would hold."""

    def __init__(self, graph: GraphInfo):
        self._graph = graph

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        sizes: dict[str, int] = {}
        for tensor in self._graph.inputs:
            if tensor.key in feeds:
                sizes |= {s: n for s, n in zip(tensor.shape, feeds[tensor.key].shape) if isinstance(s, str)}
        outputs = {}
        for tensor in self._graph.outputs:
            if not is_state(tensor.role):
                shape = [sizes[s] if isinstance(s, str) else s for s in tensor.shape]
                outputs[tensor.key] = np.zeros(shape, tensor.dtype)
        for key in outputs:
            if key.startswith("kept"):
                outputs[key] += np.arange(outputs[key].shape[1])
        if "logits" in outputs:
            rows = int(feeds["length"][0]) + feeds["embeddings"].shape[1]
            outputs["logits"][..., rows % outputs["logits"].shape[-1]] = 1
        return outputs


class NullBackend:
    """Reads the neutral graphs' manifest entries, never the files."""

    name = "null"
    dialect = "neutral"

    def load(self, path: Path, graph: GraphInfo, state: Mapping[str, NDArray[Any]]) -> NullGraph:
        return NullGraph(graph)


def make(threads: int | None) -> NullBackend:
    """The backend. Raises InputError where threads are asked for, which it has no use for."""
    if threads is not None:
        raise InputError(f"--threads {threads} has no effect on the null backend, which computes nothing: leave it out")
    return NullBackend()
