"""ONNX Runtime on the CPU or on an NVIDIA GPU. The cache is bound as input and output of one buffer, so that nothing is copied a token."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

from edgecomp_runtime.backends import variant
from edgecomp_runtime.buffers import Bound, HostMemory, Memory, Region
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import BundleError, EdgecompError
from edgecomp_runtime.limits import PREFILL_ROWS
from edgecomp_runtime.manifest import GraphInfo

CUDA = "CUDAExecutionProvider"


class OnnxRuntimeEngine:
    """One InferenceSession and its bindings."""

    def __init__(self, session: ort.InferenceSession, device: str, once: bool, memory: Memory):
        self._session, self._binding, self._device, self._memory = session, session.io_binding(), device, memory
        # what it reads on the host, as lengths that shapes are made of: bound to the GPU, it would be copied back without being waited for
        self._hosted = {value.name for value, info in zip(session.get_inputs(), session.get_input_memory_infos()) if info.name == "Cpu"}
        self._ends = [(self._binding.bind_input, {value.name for value in session.get_inputs()}),
                      (self._binding.bind_output, {value.name for value in session.get_outputs()})]
        self._options = ort.RunOptions()
        if once:
            self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0" if device == "cpu" else "gpu:0")

    def bind(self, name: str, region: Region) -> None:
        on_host = self._device == "cpu" or name in self._hosted
        for bind, names in self._ends:
            if name in names:
                address = self._memory.on_host(region) if on_host else region.address
                bind(name, "cpu" if on_host else self._device, 0, region.dtype, region.shape, address)

    def execute(self) -> None:
        self._session.run_with_iobinding(self._binding, self._options)


class OnnxRuntimeBackend:
    """Sessions on the CPU provider, or on the CUDA provider.

    Args:
        threads: for one operator; None is one a core.
        dialect: of the graphs; those for other readers that are in ONNX's own operators run here too.
        device: 'cpu' or 'cuda'.
    """

    prefill_rows = PREFILL_ROWS
    logit_rows = 16

    def __init__(self, threads: int | None, dialect: str = "onnxruntime", device: str = "cpu"):
        self.name, self.dialect, self._device = "onnxruntime" + f"-{device}" * (device != "cpu"), dialect, device
        if device == "cuda":
            self.prefill_rows = 2048  # a GPU is not filled by fewer
        self.options = ort.SessionOptions()
        self.options.log_severity_level = 3
        self.options.intra_op_num_threads = threads or 0

    def files(self, bundle: Bundle, plan: str) -> dict[str, tuple[Path, GraphInfo]]:
        return variant(bundle, plan, self.dialect, self.name)

    def memory(self) -> Memory:
        if self._device == "cpu":
            return HostMemory()
        from edgecomp_runtime.backends.cuda import CudaMemory
        return CudaMemory()

    def load(self, path: Path, graph: GraphInfo, most: Mapping[str, int], state: Mapping[str, Region], memory: Memory) -> Bound:
        # a vision tower works once a picture: what it worked in goes back, and is not held while text is decoded
        return Bound(OnnxRuntimeEngine(self.open(path, memory), self._device, once=not state, memory=memory), graph, most, state, memory)

    def open(self, path: Path, memory: Memory) -> ort.InferenceSession:
        """A session of a graph file. Raises BundleError; EdgecompError where the GPU is not to be had."""
        providers: list[Any] = ["CPUExecutionProvider"]
        if self._device == "cuda":  # in the stream of the memory, so that copies and graphs follow each other
            stream = int(memory.stream)  # type: ignore[attr-defined]
            providers.insert(0, (CUDA, {"device_id": 0, "user_compute_stream": str(stream)}))
        try:
            session = ort.InferenceSession(path, self.options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise BundleError(f"onnxruntime {ort.__version__} cannot load {path.name}: {str(error).splitlines()[0][:300]}") from None
        if self._device == "cuda" and CUDA not in session.get_providers():  # it goes on without a word
            raise EdgecompError("onnxruntime could not start its CUDA provider; `edgecomp doctor` shows what is installed")
        return session


def make(threads: int | None, name: str = "onnxruntime") -> OnnxRuntimeBackend:
    """The backend with its threads an operator; None is one a core. Raises EdgecompError where it is for a GPU and this onnxruntime is not."""
    if name == "onnxruntime":
        return OnnxRuntimeBackend(threads)
    if CUDA not in ort.get_available_providers():
        raise EdgecompError("the onnxruntime that is installed has no CUDA provider: pip uninstall onnxruntime, then pip install 'edgecomp[gpu]'")
    ort.preload_dlls()  # CUDA and cuDNN from their packages, where the system has none
    return OnnxRuntimeBackend(threads, device="cuda")
