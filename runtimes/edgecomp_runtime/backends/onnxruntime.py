"""ONNX Runtime on the CPU. The cache is bound as input and output of one buffer, so that nothing is copied a token."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgecomp_runtime.backends import is_state
from edgecomp_runtime.errors import BundleError
from edgecomp_runtime.manifest import GraphInfo


class OnnxRuntimeGraph:
    """One InferenceSession and its bindings."""

    def __init__(self, session: ort.InferenceSession, graph: GraphInfo, state: Mapping[str, NDArray[Any]]):
        self._session, self._graph = session, graph
        self._binding = session.io_binding()
        self._state = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in state.items()}
        for tensor in graph.inputs:
            if is_state(tensor.role):
                self._binding.bind_ortvalue_input(tensor.name, self._state[tensor.name])
        self._options = ort.RunOptions()
        if not state:  # a vision tower works once a picture: what it worked in goes back, and is not held while text is decoded
            self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._results = [tensor for tensor in graph.outputs if not is_state(tensor.role)]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        binding = self._binding
        held = [np.ascontiguousarray(feeds[t.key]) for t in self._graph.inputs if not is_state(t.role)]
        for tensor, array in zip((t for t in self._graph.inputs if not is_state(t.role)), held):
            binding.bind_cpu_input(tensor.name, array)
        binding.clear_binding_outputs()
        for tensor in self._graph.outputs:
            if is_state(tensor.role):
                binding.bind_ortvalue_output(tensor.name, self._state[tensor.key])
            else:
                binding.bind_output(tensor.name, "cpu")
        self._session.run_with_iobinding(binding, self._options)
        outputs = dict(zip((t.name for t in self._graph.outputs), binding.get_outputs()))
        return {t.key: outputs[t.name].numpy() for t in self._results}


class OnnxRuntimeBackend:
    """Sessions on the CPU provider."""

    name = "onnxruntime"
    dialect = "onnxruntime"

    def __init__(self, threads: int | None):
        self._options = ort.SessionOptions()
        self._options.log_severity_level = 3
        self._options.intra_op_num_threads = threads or 0

    def load(self, path: Path, graph: GraphInfo, state: Mapping[str, NDArray[Any]]) -> OnnxRuntimeGraph:
        try:
            session = ort.InferenceSession(path, self._options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise BundleError(f"onnxruntime {ort.__version__} cannot load {path.name}: {str(error).splitlines()[0][:300]}") from None
        return OnnxRuntimeGraph(session, graph, state)


def make(threads: int | None) -> OnnxRuntimeBackend:
    """The backend with its threads an operator; None is one a core."""
    return OnnxRuntimeBackend(threads)
