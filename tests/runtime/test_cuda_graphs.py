"""The CUDA engine's own logic, without a GPU: a stand-in for the CUDA runtime whose memory is the machine's and whose streams run at once.

While it records, what a library launches goes into the graph and is not run, as on a GPU.
"""
from __future__ import annotations

import ctypes
import gc
import mmap
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from edgecomp_runtime import Bundle, Session
from edgecomp_runtime.backends import cuda, onnxruntime, onnxruntime_cuda
from edgecomp_runtime.backends.cuda import KINDS, CudaGraphs

Node = Enum("Node", "cudaGraphNodeTypeKernel cudaGraphNodeTypeMemcpy cudaGraphNodeTypeHost")
Copy = Enum("Copy", "cudaMemcpyHostToDevice cudaMemcpyDeviceToHost cudaMemcpyDeviceToDevice")
Status = Enum("Status", "cudaSuccess cudaErrorStreamCaptureInvalidated")
Launch = tuple[Any, Any, Callable[[], None]]  # kind of node, kind of copy, work


class Cuda:
    """The functions of cuda.bindings.runtime that are called."""

    cudaError_t, cudaGraphNodeType, cudaMemcpyKind = Status, Node, Copy
    cudaStreamCaptureMode = Enum("cudaStreamCaptureMode", "cudaStreamCaptureModeRelaxed")
    cudaStreamNonBlocking = cudaHostAllocDefault = 0

    def __init__(self) -> None:
        self.recording: list[Launch] | None = None
        self.launched, self.held, self.broken = 0, list[mmap.mmap](), False

    def launch(self, work: Callable[[], None], kind: Any = Node.cudaGraphNodeTypeKernel, copy: Any = None) -> None:
        """What a library does in its stream."""
        if self.recording is None:
            work()
        else:
            self.recording.append((kind, copy, work))

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any]:
        self.recording = []
        return Status.cudaSuccess,

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, Any]:
        graph, self.recording = self.recording, None
        return (Status.cudaErrorStreamCaptureInvalidated, None) if self.broken else (Status.cudaSuccess, graph)

    def cudaGraphGetNodes(self, graph: list[Launch], count: int) -> tuple[Any, Any, int]:
        return Status.cudaSuccess, graph[:count], len(graph)

    def cudaGraphNodeGetType(self, node: Launch) -> tuple[Any, Any]:
        return Status.cudaSuccess, node[0]

    def cudaGraphMemcpyNodeGetParams(self, node: Launch) -> tuple[Any, Any]:
        return Status.cudaSuccess, type("Params", (), {"kind": node[1]})

    def cudaGraphInstantiate(self, graph: list[Launch], flags: int) -> tuple[Any, Any]:
        return Status.cudaSuccess, list(graph)

    def cudaGraphLaunch(self, graph: list[Launch], stream: Any) -> tuple[Any]:
        self.launched += 1
        for _, _, work in graph:
            work()
        return Status.cudaSuccess,

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any]:
        return Status.cudaSuccess,

    cudaGetLastError = cudaFree = cudaFreeHost = cudaMemsetAsync = cudaStreamSynchronize = lambda self, *given: (Status.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, int]:
        return Status.cudaSuccess, 7

    def cudaMalloc(self, size: int, flags: int = 0) -> tuple[Any, int]:
        self.held.append(mmap.mmap(-1, size))
        return Status.cudaSuccess, ctypes.addressof(ctypes.c_char.from_buffer(self.held[-1]))

    cudaHostAlloc = cudaMalloc

    def cudaMemcpyAsync(self, goal: int, source: int, size: int, kind: Any, stream: Any) -> tuple[Any]:
        ctypes.memmove(goal, source, size)
        return Status.cudaSuccess,


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    found = Cuda()
    with monkeypatch.context() as patched:
        patched.setattr(cuda, "cudart", found)
        yield found
        gc.collect()  # memory that gives itself back while its runtime is still this one


def test_work_runs_from_a_graph_the_third_time(runtime: Cuda) -> None:
    graphs, done, given = CudaGraphs(7), [], 0

    def library() -> None:
        nonlocal given
        given += 1
        runtime.launch(lambda: done.append("kernel"))
        runtime.launch(lambda: done.append("copy"), Node.cudaGraphNodeTypeMemcpy, Copy.cudaMemcpyDeviceToDevice)

    for times in range(1, 6):
        graphs.run("row", library)
        assert done == ["kernel", "copy"] * times  # recording it runs nothing
    assert given == 3 and runtime.launched == 3
    graphs.run("another row", library)
    assert given == 4 and runtime.launched == 3


@pytest.mark.parametrize(("kind", "copy"), [(Node.cudaGraphNodeTypeHost, None), (Node.cudaGraphNodeTypeMemcpy, Copy.cudaMemcpyHostToDevice),
                                            (Node.cudaGraphNodeTypeMemcpy, Copy.cudaMemcpyDeviceToHost)])
def test_work_that_the_host_has_a_part_in_is_not_run_from_a_graph(runtime: Cuda, kind: Any, copy: Any) -> None:
    graphs, done = CudaGraphs(7), []

    def library() -> None:
        runtime.launch(lambda: done.append(1))
        runtime.launch(lambda: done.append(2), kind, copy)

    for _ in range(5):
        graphs.run("row", library)
    assert done == [1, 2] * 5 and runtime.launched == 0


@pytest.mark.parametrize("reason", ["the library does not take it", "the recording broke"])
def test_what_cannot_be_recorded_runs_as_it_is(runtime: Cuda, reason: str) -> None:
    graphs, done = CudaGraphs(7), []
    runtime.broken = "broke" in reason

    def library() -> None:
        if runtime.recording is not None and not runtime.broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        runtime.launch(lambda: done.append(1))

    for times in range(1, 6):
        graphs.run("row", library)
        assert done == [1] * times and runtime.recording is None


def test_work_that_never_comes_again_is_not_remembered_without_end(runtime: Cuda) -> None:
    graphs, done = CudaGraphs(7), []
    for number in (*range(10 * KINDS), *range(10 * KINDS), *range(10 * KINDS)):
        graphs.run(number, lambda: runtime.launch(lambda: done.append(1)))
    assert len(done) == 30 * KINDS and runtime.launched == KINDS


@pytest.fixture
def on_the_cpu(runtime: Cuda, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """The CUDA engine over onnxruntime's CPU provider, which is told of lengths alone to read them on the host."""
    monkeypatch.setattr(onnxruntime_cuda.OnnxRuntimeCudaEngine, "device", "cpu")
    monkeypatch.setattr(cuda.CudaMemory, "on_host", lambda self, region: region.address)
    monkeypatch.setattr(onnxruntime.OnnxRuntimeBackend, "open",
                        lambda self, path, memory: ort.InferenceSession(path, self.options, providers=["CPUExecutionProvider"]))
    plain, build = onnxruntime.OnnxRuntimeEngine.execute, onnxruntime_cuda.OnnxRuntimeCudaEngine.__init__
    monkeypatch.setattr(onnxruntime.OnnxRuntimeEngine, "execute", lambda self: runtime.launch(lambda: plain(self)))

    def init(self: Any, *given: Any) -> None:
        build(self, *given)
        self._hosted = {name for name in self._hosted if name.startswith("total_rows")}
    monkeypatch.setattr(onnxruntime_cuda.OnnxRuntimeCudaEngine, "__init__", init)
    return runtime


@pytest.mark.parametrize("plan", ["full", "cls-64"])
def test_answers_from_graphs_are_those_without(on_the_cpu: Cuda, demo: Path, scenes: Path, plan: str) -> None:
    """Two answers of one session, the second about more rows: one graph serves them, since what differs is on the GPU."""
    picture, found = scenes / "images" / "scene-03.jpg", []
    for device in ("cpu", "cuda"):
        session = Session(Bundle.open(demo), plan=plan, backend=onnxruntime.OnnxRuntimeBackend(1, device=device))
        for question in ("describe the image.", "what is written?"):
            generation = session.generate(question, [picture], max_new_tokens=12)
            generation.finish()
            found.append(generation.token_ids)
    assert found[:2] == found[2:] and len(found[0]) > 4
    assert on_the_cpu.launched >= len(found[0]) + len(found[1]) - 5


def test_another_number_that_the_host_reads_is_other_work(on_the_cpu: Cuda, demo: Path) -> None:
    backend = onnxruntime.OnnxRuntimeBackend(1, device="cuda")
    bundle = Bundle.open(demo)
    session = Session(bundle, plan="full", backend=backend)
    row = {"embeddings": np.zeros((1, 1, bundle.manifest.decoder.hidden), np.float32), "positions": np.zeros((1, 1), np.int64),
           "length": np.zeros(1, np.int64), "logit_rows": np.zeros(1, np.int64), "last_row": np.zeros(1, np.int32),
           "row_numbers": np.zeros((1, 1), np.int64)}
    launched = []
    for total in (40, 40, 40, 41, 41, 41, 40):
        session._decoder.run({**row, "total_rows": np.array(total, np.int32)})
        launched.append(on_the_cpu.launched)
    assert launched == [0, 0, 1, 1, 1, 2, 3]
