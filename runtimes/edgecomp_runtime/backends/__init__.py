"""The backends: one module each, and the one table of them. A backend binds buffers and executes graphs, nothing else."""
from __future__ import annotations

import importlib
import importlib.util
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgecomp_runtime.errors import EdgecompError, UnknownNameError
from edgecomp_runtime.manifest import GraphInfo

# name: (its module, the package it needs, the extra that installs that)
BACKENDS = {
    "onnxruntime": ("edgecomp_runtime.backends.onnxruntime", "onnxruntime", "cpu"),
    "null": ("edgecomp_runtime.backends.null", "numpy", ""),
}
AUTO = ("onnxruntime",)  # 'auto' takes the first that is installed; null must be asked for


class Executable(Protocol):
    """One loaded graph. State (the KV cache) lives in it and is updated in place."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs the graph on arrays by role; returns the outputs that are not state, by role."""


class Backend(Protocol):
    """A way to execute graphs of one dialect."""
    name: str
    dialect: str

    def load(self, path: Path, graph: GraphInfo, state: Mapping[str, NDArray[Any]]) -> Executable:
        """Loads a graph file. `state` has a buffer for each input of role cache_key or cache_value, by input name."""


def backend(name: str, threads: int | None) -> Backend:
    """The named backend, or for 'auto' the first that is installed.

    Args:
        name: 'auto' or a name of the table.
        threads: for one operator; None is the backend's default, one a core.

    Raises:
        UnknownNameError, EdgecompError: unknown, or what it needs is not installed.
    """
    if name == "auto":
        name = next((n for n in AUTO if importlib.util.find_spec(BACKENDS[n][1])), AUTO[0])
    if name not in BACKENDS:
        raise UnknownNameError("backend", name, ["auto", *BACKENDS])
    module, package, extra = BACKENDS[name]
    if not importlib.util.find_spec(package):
        raise EdgecompError(f"backend {name!r} needs the package {package}: pip install 'edgecomp[{extra}]'")
    made: Backend = importlib.import_module(module).make(threads)
    return made


def is_state(role: str) -> bool:
    """Whether a role names a cache buffer, which stays in the executable."""
    return role.startswith("cache_")


def aligned_zeros(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Zeros that begin on a page of their own (accelerators ask for a multiple of 256 bytes). Pages are taken when first written: straight
    from the system, for an allocator hands out again what others have filled."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype, int(np.prod(shape))).reshape(shape)
