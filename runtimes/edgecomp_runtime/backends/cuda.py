"""Memory of an NVIDIA GPU, by NVIDIA's own cuda-python: buffers allocated once, page-locked twins of what the host reads and writes, one stream."""
from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart
from numpy.typing import NDArray

from edgecomp_runtime.buffers import Region
from edgecomp_runtime.errors import EdgecompError


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

    def write(self, region: Region, array: NDArray[Any]) -> None:
        twin = self.on_host(region)
        _view(twin, region)[...] = array
        checked(cudart.cudaMemcpyAsync(region.address, twin, region.nbytes, cudart.cudaMemcpyKind.cudaMemcpyHostToDevice, self.stream))

    def read(self, region: Region) -> NDArray[Any]:
        twin = self.on_host(region)
        checked(cudart.cudaMemcpyAsync(twin, region.address, region.nbytes, cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost, self.stream))
        checked(cudart.cudaStreamSynchronize(self.stream))
        found: NDArray[Any] = _view(twin, region).copy()
        return found

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
        """Where what was written to a region, or read from it, lies on the host."""
        for address, size, twin in self._twins:
            if address <= region.address < address + max(size, 1):
                return twin + region.address - address
        raise AssertionError("only what was allocated to be staged is read and written by the host")


def _view(address: int, region: Region) -> NDArray[Any]:
    found: NDArray[Any] = np.frombuffer(memoryview((ctypes.c_char * region.nbytes).from_address(address)), region.dtype).reshape(region.shape)
    return found
