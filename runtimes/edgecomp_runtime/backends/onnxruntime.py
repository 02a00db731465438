"""ONNX Runtime on the CPU or on an NVIDIA GPU. The cache is bound as input and output of one buffer, so that nothing is copied a token."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

from edgecomp_runtime.backends import variant
from edgecomp_runtime.buffers import Bound, HostMemory, Memory, Region, is_state
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import BundleError, EdgecompError
from edgecomp_runtime.limits import PREFILL_ROWS
from edgecomp_runtime.manifest import GraphInfo

CUDA = "CUDAExecutionProvider"


class OnnxRuntimeEngine:
    """One InferenceSession and its bindings, on the CPU."""

    device = "cpu"

    def __init__(self, session: ort.InferenceSession, graph: GraphInfo, memory: Memory):
        self._session, self._binding, self._memory = session, session.io_binding(), memory
        # what it reads on the host, as lengths that shapes are made of: bound to the GPU, it would be copied back without being waited for
        self._hosted = {value.name for value, info in zip(session.get_inputs(), session.get_input_memory_infos()) if info.name == "Cpu"}
        self._ends = [(self._binding.bind_input, {value.name for value in session.get_inputs()}),
                      (self._binding.bind_output, {value.name for value in session.get_outputs()})]
        self._options = ort.RunOptions()
        # onnxruntime's Python looks this up at every run and, where it is not set, catches an exception: 0.06 ms a token
        self._options.add_run_config_entry("gpu_graph_id", "-1")
        if not any(is_state(tensor.role) for tensor in graph.inputs):
            # a vision tower works once a picture: what it worked in goes back, and is not held while text is decoded
            self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0" if self.device == "cpu" else "gpu:0")

    def bind(self, name: str, region: Region) -> None:
        on_host = self.device == "cpu" or name in self._hosted
        for bind, names in self._ends:
            if name in names:
                address = self._memory.on_host(region) if on_host else region.address
                bind(name, "cpu" if on_host else self.device, 0, region.dtype, region.shape, address)

    def execute(self) -> None:
        self._session.run_with_iobinding(self._binding, self._options)


def sums_exactly() -> bool:
    """Whether this CPU says that it has VNNI. x86 without it adds products of uint8 and int8 in 16 bits, and cuts off what is larger.

    onnxruntime then makes weights unsigned where it is asked to (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html):
    exact, and half as fast with VNNI as what it has for signed ones. On an Arm CPU it does not look at that.
    """
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


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
            self.prefill_rows = 4096  # a GPU is not filled by few
        self.options = ort.SessionOptions()
        self.options.log_severity_level = 3
        self.options.intra_op_num_threads = threads or 0
        if not sums_exactly():
            self.options.add_session_config_entry("session.x64quantprecision", "1")
        if device == "cuda":  # weights exactly, beside the pool that grows by doubling
            self.options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")

    def files(self, bundle: Bundle, plan: str) -> dict[str, tuple[Path, GraphInfo]]:
        return variant(bundle, plan, self.dialect, self.name)

    def memory(self) -> Memory:
        if self._device == "cpu":
            return HostMemory()
        from edgecomp_runtime.backends.cuda import CudaMemory
        return CudaMemory()

    def load(self, path: Path, graph: GraphInfo, most: Mapping[str, int], state: Mapping[str, Region], memory: Memory) -> Bound:
        engine = OnnxRuntimeEngine
        if self._device == "cuda":
            from edgecomp_runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaEngine as engine  # needs cuda-python
        return Bound(engine(self.open(path, memory), graph, memory), graph, most, state, memory)

    def open(self, path: Path, memory: Memory) -> ort.InferenceSession:
        """A session of a graph file. Raises BundleError; EdgecompError where the GPU is not to be had."""
        providers: list[Any] = ["CPUExecutionProvider"]
        if self._device == "cuda":
            from edgecomp_runtime.backends.onnxruntime_cuda import provider_options
            providers.insert(0, (CUDA, provider_options(memory)))
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
