"""Weights in whole numbers as the neutral graph says them: read through DequantizeLinear, their columns perhaps in another order."""
from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgecomp.ir import int4
from edgecomp.ir.graphs import WeightFile, read
from edgecomp.ir.rewrite import inputs, made_by

TYPES = {8: ir.DataType.INT8, 4: ir.DataType.INT4}


def add_numbers(file: WeightFile, name: str, numbers: NDArray[np.int8], bits: int) -> ir.ExternalTensor:
    """Puts whole numbers into a file, two a byte where they have four bits."""
    data = np.ascontiguousarray(numbers)
    return file.add_bytes(name, (int4.packed(data) if bits == 4 else data).reshape(-1).view(np.uint8), TYPES[bits], numbers.shape)


def read_dequantized(model: ir.Model, weight: ir.Value, numbers: ir.TensorProtocol, scales: ir.TensorProtocol, block: int | None = None,
                     zeros: ir.TensorProtocol | None = None) -> ir.Node:
    """Makes a weight [out, in] whole numbers, and lets everything that reads it read what they stand for, (number - zero) * scale.

    Args:
        model: the graph.
        weight: keeps its name.
        numbers: of the weight's shape; scales: [out, in / block], or [out] where a row has one.
        block: numbers of a row that share a scale.
        zeros: of the scales' shape and the numbers' type; none where all are 0.

    Returns:
        The DequantizeLinear node.
    """
    assert weight.dtype is not None
    type_, scale = weight.type, _initializer(model, scales)
    cast = [] if weight.dtype == scale.dtype else [ir.node("Cast", [scale], {"to": weight.dtype})]  # a weight is of its scales' type
    given = [weight, cast[0].outputs[0] if cast else scale, *([] if zeros is None else [_initializer(model, zeros)])]
    node = ir.node("DequantizeLinear", given, {"axis": 1, "block_size": block} if block else {"axis": 0})
    node.outputs[0].type, node.outputs[0].shape = type_, weight.shape
    ir.convenience.replace_all_uses_with(weight, node.outputs[0])
    node.replace_input_with(0, weight)
    model.graph.insert_before(model.graph[0], [*cast, node])
    weight.const_value, weight.type = numbers, ir.TensorType(numbers.dtype)
    return node


def reorder_inputs(model: ir.Model, weight: ir.Node, order: ir.ExternalTensor) -> None:
    """Lets the products with a weight that a DequantizeLinear node makes take `order[i]` of what comes in for the weight's column i."""
    for product in products_with(weight.outputs[0]):
        x = inputs(product)[0]
        done = [node for node, _ in x.uses() if (known := _order(node)) is not None and known.offset == order.offset]
        if not done:  # once for queries, keys and values, which are in one order
            gather = ir.node("Gather", [x, _initializer(model, order)], {"axis": -1})
            gather.outputs[0].type, gather.outputs[0].shape = x.type, x.shape
            producer = x.producer()
            if producer is None:
                model.graph.insert_before(model.graph[0], gather)
            else:
                model.graph.insert_after(producer, gather)
            done.append(gather)
        product.replace_input_with(0, done[0].outputs[0])


def order_of(weight: ir.Node) -> NDArray[np.int32] | None:
    """The order that `reorder_inputs` gave what enters the products with the weight that a DequantizeLinear node makes; None where it gave none."""
    for product in products_with(weight.outputs[0]):
        if (gather := made_by(product.inputs[0], "Gather")) and (order := _order(gather)) is not None:
            return np.asarray(read(order))
    return None


def products_with(weight: ir.Value) -> list[ir.Node]:
    """The products that a weight [out, in] is the transposed right side of."""
    turned = [node for node, _ in weight.uses() if node.op_type == "Transpose"]
    return [node for transpose in turned for node, at in transpose.outputs[0].uses() if node.op_type == "MatMul" and at == 1]


def _order(node: ir.Node) -> ir.ExternalTensor | None:
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != -1:
        return None
    found = inputs(node)[1].const_value
    return found if isinstance(found, ir.ExternalTensor) else None


def _initializer(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    """A tensor as a value of the graph, by its name."""
    assert tensor.name is not None
    if tensor.name not in model.graph.initializers:
        model.graph.register_initializer(ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()),
                                                  const_value=tensor))
    return model.graph.initializers[tensor.name]
