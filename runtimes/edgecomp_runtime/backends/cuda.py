"""Memory of an NVIDIA GPU, by NVIDIA's own cuda-python: buffers allocated once, page-locked twins of what the host reads and writes, one stream."""
from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from cuda.bindings import runtime as cudart

from edgecomp_runtime.buffers import Region
from edgecomp_runtime.errors import EdgecompError

KINDS = 16  # of work that are remembered: what differs from token to token is not worth a graph, which takes memory


def checked(result: tuple[Any, ...]) -> Any:
    """What a CUDA call gave. Raises EdgecompError where it failed."""
    status, *values = result
    if status != cudart.cudaError_t.cudaSuccess:
        _, text = cudart.cudaGetErrorString(status)
        raise EdgecompError(f"CUDA: {text.decode() if text else status.name}; `edgecomp doctor` shows what is installed")
    return values[0] if len(values) == 1 else tuple(values)


def capability() -> str:
    """Compute capability of the GPU at hand, as '8.7'. Raises EdgecompError where there is none."""
    found = checked(cudart.cudaGetDeviceProperties(0))
    return f"{found.major}.{found.minor}"


class CudaGraphs:
    """Work that a library gives to a stream, run again as a CUDA graph where it is the same as before: one launch for hundreds.

    The first two times it runs as it is, so that the library has what it allocates once. Work that the host has a part in (copies from or
    to its memory, calls of its functions) is never run from a graph, since that part would be repeated with what it saw the first time.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self._runs: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, Any] = {}  # None: not to be had

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Does the work. Equal keys say that all that the host decides about it is equal: shapes, addresses, numbers that it reads."""
        if graph := self._graphs.get(key):
            checked(cudart.cudaGraphLaunch(graph, self._stream))
            return
        work()
        if key not in self._runs and len(self._runs) >= KINDS:
            return
        self._runs[key] = self._runs.get(key, 0) + 1
        if self._runs[key] >= 2 and key not in self._graphs:
            self._graphs[key] = self._captured(work)

    def _captured(self, work: Callable[[], None]) -> Any:
        """An executable graph of the work, which does not run meanwhile; None where it cannot be one."""
        checked(cudart.cudaStreamBeginCapture(self._stream, cudart.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed))
        try:
            work()
        except Exception:  # of the library, whatever it throws where it meets a stream that records
            cudart.cudaStreamEndCapture(self._stream)
            cudart.cudaGetLastError()
            return None
        status, graph = cudart.cudaStreamEndCapture(self._stream)
        if status != cudart.cudaError_t.cudaSuccess:
            cudart.cudaGetLastError()
            return None
        found = checked(cudart.cudaGraphInstantiate(graph, 0)) if all(map(_on_device, _nodes(graph))) else None
        checked(cudart.cudaGraphDestroy(graph))
        return found


def _nodes(graph: Any) -> list[Any]:
    _, count = checked(cudart.cudaGraphGetNodes(graph, 0))
    nodes, _ = checked(cudart.cudaGraphGetNodes(graph, count))
    return list(nodes)


def _on_device(node: Any) -> bool:
    """Whether the host has no part in a graph's node."""
    kind, kinds = checked(cudart.cudaGraphNodeGetType(node)), cudart.cudaGraphNodeType
    if kind == kinds.cudaGraphNodeTypeMemcpy:
        copied = checked(cudart.cudaGraphMemcpyNodeGetParams(node)).kind
        return bool(copied == cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice)
    return bool(kind != kinds.cudaGraphNodeTypeHost)


class CudaMemory:
    """A GPU's memory. Copies go through one stream, in which a backend's graphs run too, so that all happens in order.

    What the host writes or reads (everything but the cache) has a page-locked twin, from which the GPU copies by itself.
    """

    def __init__(self) -> None:
        self.stream = checked(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        self._blocks: list[int] = []
        self._twins: list[tuple[int, int, int]] = []  # address, size, page-locked address

    def allocate(self, size: int, staged: bool) -> int:
        address = int(checked(cudart.cudaMalloc(max(size, 1))))
        self._blocks.append(address)
        checked(cudart.cudaMemsetAsync(address, 0, max(size, 1), self.stream))
        if staged:
            self._twins.append((address, size, int(checked(cudart.cudaHostAlloc(max(size, 1), cudart.cudaHostAllocDefault)))))
        return address

    def send(self, region: Region) -> None:
        self._copy(region.address, self.on_host(region), region, cudart.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def fetch(self, region: Region) -> None:
        self._copy(self.on_host(region), region.address, region, cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        checked(cudart.cudaStreamSynchronize(self.stream))

    def _copy(self, goal: int, source: int, region: Region, kind: Any) -> None:
        checked(cudart.cudaMemcpyAsync(goal, source, region.nbytes, kind, self.stream))

    def store(self, rows: Region, cache: Region, at: int) -> None:
        row = rows.nbytes // (rows.shape[0] * rows.shape[1] * rows.shape[2])
        checked(cudart.cudaMemcpy2DAsync(cache.address + at * row, cache.shape[2] * row, rows.address, rows.shape[2] * row, rows.shape[2] * row,
                                         rows.shape[0] * rows.shape[1], cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice, self.stream))

    def close(self) -> None:
        """Gives everything back; nothing may use it any more."""
        checked(cudart.cudaStreamSynchronize(self.stream))
        for _, _, twin in self._twins:
            checked(cudart.cudaFreeHost(twin))
        for address in self._blocks:
            checked(cudart.cudaFree(address))
        self._twins, self._blocks = [], []

    def __del__(self) -> None:
        if getattr(self, "_blocks", None):
            self.close()

    def on_host(self, region: Region) -> int:
        """Where a region's page-locked twin lies."""
        for address, size, twin in self._twins:
            if address <= region.address < address + max(size, 1):
                return twin + region.address - address
        raise AssertionError("only what was allocated to be staged is read and written by the host")
