"""Products with weights in blocks of whole numbers, as onnxruntime's MatMulNBits takes them: in the layout and bytes that a bundle stores.

MatMulNBits reads a weight [out, in] as [out, blocks, bytes of a block], which are the same bytes, but counts from zero up where DequantizeLinear
counts from the middle: its numbers are larger by 8 or 128, which flips the highest bit of each. One BitwiseXor before it does; onnxruntime
computes it once, when it loads the graph, so that one file of weights serves every backend. Zeros, where a checkpoint has them, go the same way.
"""
from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgecomp.dialects.segments import MICROSOFT
from edgecomp.ir.rewrite import constant, inputs, insert, made_by, nodes, replace

IN_FP32, IN_INT8 = 0, 4  # MatMulNBits' accuracy levels on a CPU; in int8 it rounds what comes in, too
ACCURACY_LEVEL = IN_INT8
HIGHEST = {4: 0x88, 8: 0x80}  # the highest bit of every number in a byte


def quantized_products(model: ir.Model) -> None:
    """Turns `x @ Transpose(DequantizeLinear(W))` in blocks into MatMulNBits, in place."""
    for product in nodes(model, "MatMul"):
        transpose = made_by(product.inputs[1], "Transpose")
        weight = made_by(inputs(transpose)[0], "DequantizeLinear") if transpose else None
        if weight is None:
            continue
        numbers, scale, *zeros = inputs(weight)
        tensor, block = numbers.const_value, weight.attributes["block_size"].as_int()
        assert tensor is not None, "a weight is a constant"
        (rows, width), bits = tensor.shape.numpy(), tensor.dtype.bitwidth
        shapes = [(rows, width // block, block * bits // 8), (rows, width // block * bits // 8)]
        given = [_from_zero_up(model, product, value, shape, bits) for value, shape in zip([numbers, *zeros], shapes)]
        attributes = {"K": width, "N": rows, "bits": bits, "block_size": block, "accuracy_level": ACCURACY_LEVEL}
        out, = insert(model, product, "MatMulNBits", [product.inputs[0], given[0], scale, *given[1:]], attributes, MICROSOFT)
        replace(model, product, out)


def _from_zero_up(model: ir.Model, before: ir.Node, numbers: ir.Value, shape: tuple[int, ...], bits: int) -> ir.Value:
    """Bytes of constant whole numbers, in another shape, as MatMulNBits counts."""
    assert numbers.const_value is not None
    data = _bytes(model, f"{numbers.name}.bytes", numbers.const_value, shape)
    return insert(model, before, "BitwiseXor", [data, constant(model, f"highest_of_{bits}", np.array([HIGHEST[bits]], np.uint8))])[0]


def _bytes(model: ir.Model, name: str, tensor: ir.TensorProtocol, shape: tuple[int, ...]) -> ir.Value:
    """A tensor's own bytes as a tensor of another shape; where it lies in a file, those in the file."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    found: ir.TensorProtocol
    if isinstance(tensor, ir.ExternalTensor):
        found = ir.ExternalTensor(tensor.location, tensor.offset, tensor.length, ir.DataType.UINT8, name=name, shape=ir.Shape(shape),
                                  base_dir=tensor.base_dir)
    else:
        found = ir.tensor(np.frombuffer(tensor.tobytes(), np.uint8).reshape(shape), name=name)
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape(shape), const_value=found)
    model.graph.register_initializer(value)
    return value
