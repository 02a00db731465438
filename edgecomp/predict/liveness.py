"""Memory of a graph's intermediate values: its nodes as the steps that are planned."""
from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from edgecomp.ir.rewrite import inputs
from edgecomp.predict.graph import ATTENTION, VIEWS
from edgecomp.predict.planner import Made, Step, most_bytes
from edgecomp.predict.resolve import constants, nbytes, sizes

# operators that may write their result over their input
IN_PLACE = {"Add", "Sub", "Mul", "Div", "Cast", "Neg", "Sqrt", "Tanh", "Cos", "Sin", "Softmax"}
COUNTS = {"Shape", "Size"}  # of views, those that are not of the same bytes


def planned_bytes(model: ir.Model) -> float:
    """The most bytes that the intermediate values of a resolved graph take at a time; inputs and outputs of the graph have buffers of their own.

    Attention's kernels copy query, key and value head by head; the largest such copy counts, too.
    """
    return most_bytes(list(_steps(model)))


def _steps(model: ir.Model) -> Iterator[Step]:
    outside = constants(model) | {*model.graph.inputs, *model.graph.outputs}
    read = {value for node in model.graph for value in inputs(node)}
    for node in model.graph:
        made = tuple(Made(value, (sizes(value), value.dtype), nbytes(value)) for value in node.outputs if value in read and value not in outside)
        over = tuple(inputs(node)) if node.op_type in IN_PLACE and not node.domain else ()
        copied = sum(nbytes(value) for value in node.inputs[:3] if value is not None) if (node.domain, node.op_type) in ATTENTION else 0.0
        yield Step(made, tuple(inputs(node)), over, node.op_type in VIEWS - COUNTS and not node.domain, copied)
