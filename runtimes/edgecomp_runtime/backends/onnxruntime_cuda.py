"""ONNX Runtime's CUDA provider: a session in the stream of the memory, its decoding of one row as a CUDA graph."""
from __future__ import annotations

import ctypes

import onnxruntime as ort

from edgecomp_runtime.backends.cuda import CudaGraphs, CudaMemory
from edgecomp_runtime.backends.onnxruntime import OnnxRuntimeEngine
from edgecomp_runtime.buffers import Memory, Region
from edgecomp_runtime.manifest import GraphInfo


def provider_options(memory: Memory) -> dict[str, str]:
    """Of the CUDA provider: copies and graphs follow each other in one stream; the patch embedding, the one convolution that there is,
    is not worth trying every algorithm, some of which take gigabytes to work in."""
    assert isinstance(memory, CudaMemory)
    return {"device_id": "0", "user_compute_stream": str(int(memory.stream)), "cudnn_conv_algo_search": "HEURISTIC"}


class OnnxRuntimeCudaEngine(OnnxRuntimeEngine):
    """One InferenceSession on a GPU. Decoding one row, which is hundreds of short kernels, is one CUDA graph a bucket of the cache."""

    device = "cuda"

    def __init__(self, session: ort.InferenceSession, graph: GraphInfo, memory: Memory):
        assert isinstance(memory, CudaMemory)
        super().__init__(session, graph, memory)
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # who reads what it made waits for the stream
        self._row = next((tensor.name for tensor in graph.inputs if tensor.role == "embeddings"), None)
        self._graphs, self._regions = CudaGraphs(memory.stream), dict[str, Region]()
        self._bindings: dict[tuple[Region, ...], int] = {}  # all regions as they were: numbered, since to hash them takes 0.1 ms
        self._same: int | None = None  # the number, as long as none changes

    def bind(self, name: str, region: Region) -> None:
        super().bind(name, region)
        self._regions[name], self._same = region, None

    def execute(self) -> None:
        if self._row is None or self._regions[self._row].shape[1] > 1:
            super().execute()
            return
        if self._same is None:
            self._same = self._bindings.setdefault(tuple(self._regions.values()), len(self._bindings))
        read = [self._regions[name] for name in self._hosted if name in self._regions]
        # what the host reads decides what it launches
        seen = tuple(ctypes.string_at(self._memory.on_host(region), region.nbytes) for region in read)
        self._graphs.run((self._same, seen), super().execute)
