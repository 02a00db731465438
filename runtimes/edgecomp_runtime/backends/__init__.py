"""The backends: one module each, and the one table of them. A backend binds buffers and executes graphs, nothing else."""
from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from edgecomp_runtime.buffers import Memory, Region
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import EdgecompError, InputError, UnknownNameError
from edgecomp_runtime.manifest import GraphInfo

# name: (its module, the package it needs, the extra that installs that)
BACKENDS = {
    "onnxruntime": ("edgecomp_runtime.backends.onnxruntime", "onnxruntime", "cpu"),
    "onnxruntime-cuda": ("edgecomp_runtime.backends.onnxruntime", "onnxruntime", "gpu"),
    "tensorrt": ("edgecomp_runtime.backends.tensorrt", "tensorrt", "tensorrt"),
    "tensorrt-rtx": ("edgecomp_runtime.backends.tensorrt", "tensorrt_rtx", "tensorrt-rtx"),
    "null": ("edgecomp_runtime.backends.null", "numpy", ""),
}
AUTO = ("onnxruntime", "tensorrt", "tensorrt-rtx")  # 'auto' takes the first that is installed; null must be asked for


class Executable(Protocol):
    """One loaded graph. The KV cache is updated in place."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs the graph on arrays by role; returns the outputs that are not state, by role."""


class Backend(Protocol):
    """A way to execute graphs of one dialect.

    prefill_rows: of a prompt, taken at a time. logit_rows: whose logits one run gives at most.
    """
    name: str
    prefill_rows: int
    logit_rows: int

    def files(self, bundle: Bundle, plan: str) -> dict[str, tuple[Path, GraphInfo]]:
        """What it loads for each part of a plan: vision, prefill, decode. Raises EdgecompError where the bundle has nothing for it."""

    def memory(self) -> Memory:
        """A new place for buffers. They live as long as it does."""

    def load(self, path: Path, graph: GraphInfo, most: Mapping[str, int], state: Mapping[str, Region], memory: Memory) -> Executable:
        """Loads a graph file: a `Bound` of the backend's own engine.

        Args:
            path: the file.
            graph: the manifest's entry.
            most: the largest size of every symbol in the shapes.
            state: a region of the memory for each input of role cache_key or cache_value, by name.
            memory: of this backend.
        """


def backend(name: str, threads: int | None) -> Backend:
    """The named backend, or for 'auto' the first that is installed.

    Args:
        name: 'auto' or a name of the table.
        threads: for one operator; None is the backend's default, one a core.

    Raises:
        UnknownNameError, EdgecompError: unknown, or what it needs is not installed.
    """
    if name == "auto":
        name = next((n for n in AUTO if installed(BACKENDS[n][1])), AUTO[0])
    if name not in BACKENDS:
        raise UnknownNameError("backend", name, ["auto", *BACKENDS])
    module, package, extra = BACKENDS[name]
    if not installed(package):
        raise EdgecompError(f"backend {name!r} needs the package {package}: pip install 'edgecomp[{extra}]'")
    try:
        made: Backend = importlib.import_module(module).make(threads, name)
    except ModuleNotFoundError as error:
        raise EdgecompError(f"backend {name!r} needs the package {error.name} too: pip install 'edgecomp[{extra}]'") from None
    return made


def variant(bundle: Bundle, plan: str, dialect: str, backend: str) -> dict[str, tuple[Path, GraphInfo]]:
    """The graph files of a plan in a dialect. Raises InputError where it was not lowered to it."""
    found = bundle.manifest.plans[plan].variants.get(dialect)
    if found is None:
        raise InputError(f"plan {plan!r} has no graphs for {backend}: lower it with `edgecomp compress BUNDLE -o BUNDLE`")
    return {part: (bundle.file(file), bundle.manifest.graphs[file]) for part, file in found.items()}


def installed(package: str) -> bool:
    """Whether there is a package of that name; a folder without code, as type stubs leave it, is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None
