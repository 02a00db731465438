"""Memory of a graph's intermediate values, planned as onnxruntime's CPU provider plans it.

onnxruntime decides before the first run which values share a buffer: one takes over that of another with the same shape and type that is
read no more, so that a buffer which is taken over lives on.
"""
from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgecomp.ir.rewrite import inputs
from edgecomp.predict.graph import ATTENTION, VIEWS
from edgecomp.predict.resolve import constants, nbytes, sizes

# operators that may write their result over their input
IN_PLACE = {"Add", "Sub", "Mul", "Div", "Cast", "Neg", "Sqrt", "Tanh", "Cos", "Sin", "Softmax"}


@dataclass
class _Buffer:
    """Bytes that are taken from step `start` to step `end`, and by how many values now."""
    size: float
    start: int
    end: int
    readers: int = 0


def planned_bytes(model: ir.Model) -> float:
    """The most bytes that the intermediate values of a resolved graph take at a time; inputs and outputs of the graph have buffers of their own.

    Attention's kernels copy query, key and value head by head; the largest such copy counts, too.
    """
    buffers = _planned(model)
    peak = max((sum(b.size for b in buffers if b.start <= step <= b.end) for step in range(len(model.graph))), default=0.0)
    copies = max((sum(map(nbytes, inputs(n)[:3])) for n in model.graph if (n.domain, n.op_type) in ATTENTION), default=0.0)
    return peak + copies


def _planned(model: ir.Model) -> list[_Buffer]:
    outside = constants(model) | {*model.graph.inputs, *model.graph.outputs}
    order = list(model.graph)
    last = {value: step for step, node in enumerate(order) for value in inputs(node)}
    found: list[_Buffer] = []
    holding: dict[ir.Value, _Buffer] = {}
    free: dict[tuple[tuple[int, ...], ir.DataType | None], list[_Buffer]] = {}
    for step, node in enumerate(order):
        for value in node.outputs:
            if value in outside or value not in last:
                continue
            if node.op_type in VIEWS and inputs(node)[0] in outside and node.op_type not in ("Shape", "Size"):
                continue  # a look at a buffer of the graph's own
            kind = sizes(value), value.dtype
            buffer = _taken_over(node, value, step, last, holding) or (free[kind].pop() if free.get(kind) else None)
            if buffer is None:
                buffer = _Buffer(nbytes(value), step, step)
                found.append(buffer)
            holding[value] = buffer
            buffer.readers += 1
            buffer.end = max(buffer.end, last[value])
        for value in dict.fromkeys(inputs(node)):
            if value in holding and last[value] == step:
                holding[value].readers -= 1
                if not holding[value].readers:
                    free.setdefault((sizes(value), value.dtype), []).append(holding[value])
    return found


def _taken_over(node: ir.Node, value: ir.Value, step: int, last: dict[ir.Value, int], holding: dict[ir.Value, _Buffer]) -> _Buffer | None:
    """The buffer of an input that the result lies in."""
    if node.domain:
        return None
    if node.op_type in VIEWS - {"Shape", "Size"}:
        return holding.get(inputs(node)[0])
    for given in inputs(node) if node.op_type in IN_PLACE else ():
        buffer = holding.get(given)
        if buffer and last[given] == step and buffer.readers == 1 and nbytes(given) == nbytes(value):
            return buffer
    return None
