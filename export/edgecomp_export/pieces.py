"""A piece of a neutral graph, from one mark to the next, as something that onnxruntime runs in fp32."""
from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from edgecomp.dialects import lowering
from edgecomp.dialects.quantized import IN_FP32
from edgecomp.dialects.segments import MICROSOFT
from edgecomp.ir.graphs import describe, read
from edgecomp.ir.rewrite import nodes
from edgecomp_runtime.buffers import is_state

CAST_TO = "to"  # the attribute of Cast that names a type


def cut(model: ir.Model, outputs: Sequence[ir.Value], names: Sequence[str], stops: Mapping[ir.Value, str]) -> ir.Model:
    """What makes `outputs`, up to the graph's inputs and the values `stops`, which become inputs, as a graph of its own.

    Args:
        model: the whole graph, unchanged.
        outputs: values of it; names: what they are called, a role or `role.layer`.
        stops: values where the piece begins, and what those are called.
    """
    given, seen, inputs = {*stops, *model.graph.inputs}, set(), []
    waiting = list(outputs)
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        producer = value.producer()
        if value in given:
            inputs.append(value)
        elif producer is not None:
            waiting += [v for v in producer.inputs if v is not None]
    inputs.sort(key=lambda value: (value in stops, [*model.graph.inputs].index(value) if value not in stops else 0, stops.get(value, "")))
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    named: dict[str | None, ir.Value] = {}
    for value, original in zip(list(graph.inputs), inputs):
        value.name = stops.get(original, value.name)
        if (first := named.setdefault(value.name, value)) is not value:  # a stop takes the place of the input whose name it has been given
            ir.convenience.replace_all_uses_with(value, first)
            graph.inputs.remove(value)
    for value, name in zip(graph.outputs, names):
        value.name = name
    graph.opset_imports.update(model.graph.opset_imports)
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))


def widen(model: ir.Model) -> None:
    """Turns a graph's fp16 weights, constants, casts and values into fp32, in place, and reads all weights into memory."""
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            content = read(value.const_value)
            value.const_value = ir.tensor(content.astype(np.float32) if content.dtype == np.float16 else np.array(content), name=value.name)
    for node in model.graph:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.FLOAT16:
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.as_tensor().numpy().astype(np.float32)))
            elif name == CAST_TO and attribute.type == ir.AttributeType.INT and attribute.as_int() == ir.DataType.FLOAT16:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(v for node in model.graph for v in node.outputs)]
    for value in values:
        if value.dtype == ir.DataType.FLOAT16:
            value.dtype = ir.DataType.FLOAT


class Piece:
    """A lowered piece, loaded. Its cache, where it has one, starts empty."""

    def __init__(self, model: ir.Model, capacity: int = 0):
        widen(model)
        lowering("onnxruntime")(model)
        for product in nodes(model, "MatMulNBits", MICROSOFT):  # in fp32 like the rest, whatever is faster on a CPU
            product.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", IN_FP32)
        graph = describe(model)
        self._state = {t.name: np.zeros((1, *(capacity if isinstance(s, str) else s for s in t.shape[1:])), np.float32)
                       for t in graph.inputs if is_state(t.role)}
        self._inputs, self._outputs = [t for t in graph.inputs if not is_state(t.role)], graph.outputs
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "piece.onnx"
            ir.save(model, path, external_data="piece.bin", size_threshold_bytes=1024)
            options = ort.SessionOptions()
            options.log_severity_level = 3
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by role and layer. `feeds` may hold more than the piece takes."""
        out = self._session.run([t.name for t in self._outputs], {**self._state, **{t.name: feeds[t.key] for t in self._inputs}})
        found = {t.key: array for t, array in zip(self._outputs, out)}
        self._state = {name: found[name] for name in self._state}
        return found
