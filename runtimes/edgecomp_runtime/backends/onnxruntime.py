"""ONNX Runtime on the CPU. The cache is bound as input and output of one buffer, so that nothing is copied a token."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from edgecomp_runtime.backends import variant
from edgecomp_runtime.buffers import Bound, HostMemory, Memory, Region
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import BundleError
from edgecomp_runtime.manifest import GraphInfo


class OnnxRuntimeEngine:
    """One InferenceSession and its bindings."""

    def __init__(self, session: ort.InferenceSession, once: bool):
        self._session, self._binding = session, session.io_binding()
        self._inputs = {value.name for value in session.get_inputs()}
        self._outputs = {value.name for value in session.get_outputs()}
        self._bound: dict[tuple[str, bool], Region] = {}
        self._options = ort.RunOptions()
        if once:
            self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def execute(self, regions: Mapping[str, Region]) -> None:
        for name, region in regions.items():
            for names, bind in ((self._inputs, self._binding.bind_input), (self._outputs, self._binding.bind_output)):
                key = name, names is self._inputs
                if name in names and self._bound.get(key) != region:
                    bind(name, "cpu", 0, region.dtype, region.shape, region.address)
                    self._bound[key] = region
        self._session.run_with_iobinding(self._binding, self._options)


class OnnxRuntimeBackend:
    """Sessions on the CPU provider.

    Args:
        threads: for one operator; None is one a core.
        dialect: of the graphs; those for other readers that are in ONNX's own operators run here too.
    """

    name = "onnxruntime"
    prefill_rows = 256  # activations grow with it (attention's with the whole window), speed hardly does
    logit_rows = 16

    def __init__(self, threads: int | None, dialect: str = "onnxruntime"):
        self.dialect = dialect
        self.options = ort.SessionOptions()
        self.options.log_severity_level = 3
        self.options.intra_op_num_threads = threads or 0

    def files(self, bundle: Bundle, plan: str) -> dict[str, tuple[Path, GraphInfo]]:
        return variant(bundle, plan, self.dialect, self.name)

    def memory(self) -> Memory:
        return HostMemory()

    def load(self, path: Path, graph: GraphInfo, most: Mapping[str, int], state: Mapping[str, Region], memory: Memory) -> Bound:
        # a vision tower works once a picture: what it worked in goes back, and is not held while text is decoded
        return Bound(OnnxRuntimeEngine(self.open(path), once=not state), graph, most, state, memory)

    def open(self, path: Path) -> ort.InferenceSession:
        """A session of a graph file. Raises BundleError."""
        try:
            return ort.InferenceSession(path, self.options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise BundleError(f"onnxruntime {ort.__version__} cannot load {path.name}: {str(error).splitlines()[0][:300]}") from None


def make(threads: int | None, name: str = "onnxruntime") -> OnnxRuntimeBackend:
    """The backend with its threads an operator; None is one a core."""
    return OnnxRuntimeBackend(threads)
