"""Adding nodes to a graph. They are appended; whoever puts some before others sorts the graph at the end."""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgecomp.ir.rewrite import constant


class Tape:
    """Writes nodes and constants into a model."""

    def __init__(self, model: ir.Model):
        self.model = model

    def add(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """One node with one result."""
        return self.add_many(op_type, 1, *inputs, **attributes)[0]

    def add_many(self, op_type: str, outputs: int, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> Sequence[ir.Value]:
        """One node with several results."""
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs)
        self.model.graph.append(node)
        return node.outputs

    def ints(self, values: Sequence[object] | NDArray[np.int64] | int) -> ir.Value:
        """A constant of whole numbers; equal ones are one."""
        array = np.array(values, np.int64)
        shape = "x".join(map(str, array.shape))
        return constant(self.model, f"edgecomp.ints.{shape}.{'_'.join(map(str, array.reshape(-1)))}" if array.size < 9 else
                        f"edgecomp.ints.{shape}.{hashlib.sha256(array.tobytes()).hexdigest()[:16]}", array)

    def number(self, value: float) -> ir.Value:
        """A constant fp32 number."""
        return constant(self.model, f"edgecomp.number.{value!r}", np.float32(value))

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """An input of the graph."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.model.graph.inputs.append(value)
        return value


def typed(value: ir.Value, name: str, dtype: ir.DataType | None, shape: object) -> ir.Value:
    """The value, named and with type and shape, as a result of the graph has to be."""
    assert dtype is not None
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)  # type: ignore[arg-type]
    return value
