"""TensorRT, and TensorRT for RTX: engines that `edgecomp build` made, bound to buffers of the GPU. Nothing is allocated a token.

A row is decoded by one CUDA graph a bucket of the cache: TensorRT's work is captured by us, TensorRT for RTX captures its own.
"""
from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecomp_runtime.backends import BACKENDS
from edgecomp_runtime.backends.cuda import CudaGraphs, CudaMemory, capability
from edgecomp_runtime.buffers import Bound, Memory, Region
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import EdgecompError, InputError
from edgecomp_runtime.limits import ENGINE_LOGIT_ROWS, ENGINE_PREFILL_ROWS
from edgecomp_runtime.manifest import EngineInfo, GraphInfo

if TYPE_CHECKING:
    import tensorrt as trt


class TensorRTEngine:
    """One engine with its execution context.

    Args:
        engine: deserialised.
        rtx: whether it is TensorRT for RTX's.
        graph: the manifest's entry.
        memory: whose stream it runs in.
    """

    def __init__(self, engine: trt.ICudaEngine, rtx: bool, graph: GraphInfo, memory: CudaMemory):
        self._engine, self._stream, self._graphs = engine, int(memory.stream), CudaGraphs(memory.stream)
        self._context = _rtx_context(engine) if rtx else engine.create_execution_context()
        if self._context is None:
            raise EdgecompError("TensorRT could not make an execution context: the GPU's memory does not hold what the engine works in; "
                                "build it with a shorter --context or a smaller budget")
        # a graph of one row is the same work every time but for the buckets
        self._places = [t.name for t in graph.inputs if t.role == "places"]
        self._captures = not rtx and all(isinstance(size, int) for t in graph.inputs if t.role != "places" for size in t.shape)
        self._buckets: dict[str, tuple[int, ...]] = {}

    def bind(self, name: str, region: Region) -> None:
        mode = self._engine.get_tensor_mode(name)
        if mode == type(mode).INPUT and not self._context.set_input_shape(name, region.shape):
            raise EdgecompError(f"{name} of shape {list(region.shape)} is outside of what the engine was built for: build it again")
        self._context.set_tensor_address(name, region.address)
        if name in self._places:
            self._buckets[name] = region.shape

    def execute(self) -> None:
        if self._captures:
            self._graphs.run(tuple(self._buckets.values()), self._enqueue)
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise EdgecompError("TensorRT did not run the engine; its reason is in the lines above")


def _rtx_context(engine: Any) -> Any:
    """TensorRT for RTX compiles its kernels now, and captures CUDA graphs itself."""
    rtx = importlib.import_module("tensorrt_rtx")
    config = engine.create_runtime_config()
    config.cuda_graph_strategy = rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return engine.create_execution_context(config)


class TensorRTBackend:
    """Engines for the GPU at hand, made by the very TensorRT that is installed.

    Args:
        name: 'tensorrt' or 'tensorrt-rtx'.
    """

    prefill_rows = ENGINE_PREFILL_ROWS
    logit_rows = ENGINE_LOGIT_ROWS

    def __init__(self, name: str):
        self.name, self._rtx = name, name == "tensorrt-rtx"
        self._trt: Any = importlib.import_module(BACKENDS[name][1])
        self._logger = self._trt.Logger(self._trt.Logger.WARNING)
        self._runtime = self._trt.Runtime(self._logger)

    def files(self, bundle: Bundle, plan: str) -> dict[str, tuple[Path, GraphInfo]]:
        """The engines of a plan for this GPU and this TensorRT. Raises EdgecompError naming what there is instead."""
        manifest, here, version = bundle.manifest, capability(), self._trt.__version__
        graphs = {engine.graph: engine for engine in manifest.engines if fits(engine, self.name, version, here)}
        for parts in manifest.plans[plan].variants.values():
            if set(parts.values()) <= set(graphs):
                return {part: (bundle.file(graphs[file].file), manifest.graphs[file]) for part, file in parts.items()}
        raise EdgecompError(f"plan {plan!r} has no engines of {self.name} {version} for compute capability {here}; "
                            f"there are {others(manifest.engines)}: run `edgecomp build` for this device")

    def memory(self) -> CudaMemory:
        return CudaMemory()

    def load(self, path: Path, graph: GraphInfo, most: Mapping[str, int], state: Mapping[str, Region], memory: Memory) -> Bound:
        assert isinstance(memory, CudaMemory)
        engine = self._runtime.deserialize_cuda_engine(np.memmap(path, np.uint8, "r"))  # a copy of it would not fit a small board
        if engine is None:
            raise EdgecompError(f"TensorRT {self._trt.__version__} does not take {path.name}; its reason is in the lines above: build it again")
        return Bound(TensorRTEngine(engine, self._rtx, graph, memory), graph, most, state, memory)


def fits(engine: EngineInfo, backend: str, version: str, capability: str) -> bool:
    """Whether an engine may be loaded: TensorRT takes those of its own version, made for the GPU's compute capability."""
    return (engine.backend, engine.version, engine.capability) == (backend, version, capability)


def others(engines: tuple[EngineInfo, ...]) -> str:
    """What engines there are, in words."""
    found = dict.fromkeys(f"{e.backend} {e.version} for {e.capability} ({e.device})" for e in engines)
    return ", ".join(found) or "none"


def make(threads: int | None, name: str = "tensorrt") -> TensorRTBackend:
    """The backend. Raises InputError where threads are asked for, which it has no use for."""
    if threads is not None:
        raise InputError(f"--threads {threads} has no effect on {name}, which works on the GPU: leave it out")
    return TensorRTBackend(name)
