"""Products of rounded values with rounded weights, as onnxruntime's kernels take them on a CPU: MatMulIntegerToFloat.

Its kernels for x86 take what enters as numbers from zero up, so they are larger by 128 than the neutral graph's, which changes nothing else.
Weights stay signed, and are transposed when onnxruntime loads the graph, before it packs them. (onnxruntime itself would not find
the pairs: the transposition stands between a weight and its product.)
"""
from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgecomp.dialects.segments import MICROSOFT
from edgecomp.ir.rewrite import constant, dims, inputs, insert, made_by, nodes, replace


def integer_products(model: ir.Model) -> None:
    """Turns `DequantizeLinear(QuantizeLinear(x)) @ Transpose(DequantizeLinear(W))`, W with a scale a row, and a bias behind it, into one node."""
    for product in nodes(model, "MatMul"):
        again, transpose = made_by(product.inputs[0], "DequantizeLinear"), made_by(product.inputs[1], "Transpose")
        weight = made_by(inputs(transpose)[0], "DequantizeLinear") if transpose else None
        rounded = made_by(inputs(again)[0], "QuantizeLinear") if again else None
        if weight is None or rounded is None or "block_size" in weight.attributes:
            continue
        (value, scale, _), (numbers, scales) = inputs(rounded), inputs(weight)
        middle = constant(model, "uint8_middle", np.array(128, np.uint8))
        raised, = insert(model, product, "QuantizeLinear", [value, scale, middle])  # one for all products of a value, once equal nodes are one
        raised.type, raised.shape = ir.TensorType(ir.DataType.UINT8), value.shape
        columns, = insert(model, product, "Transpose", [numbers], {"perm": [1, 0]})
        # where onnxruntime must make weights unsigned, it makes each one's zero so, and takes one that others have for a mistake
        given = [raised, columns, scale, scales, middle, constant(model, f"{numbers.name}.zero", np.array(0, np.int8))]
        last, bias = _bias(product)
        out, = insert(model, last, "MatMulIntegerToFloat", [*given, bias] if bias else given, domain=MICROSOFT)
        replace(model, last, out)
        if last is not product:
            model.graph.remove(product, safe=True)


def _bias(product: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """The addition of a bias that is all that reads a product, and the bias; or the product itself."""
    out, readers = product.outputs[0], [node for node, _ in product.outputs[0].uses()]
    if len(readers) == 1 and readers[0].op_type == "Add" and not out.is_graph_output():
        for value in inputs(readers[0]):
            if value is not out and value.is_initializer() and dims(value) == dims(out)[-1:]:
                return readers[0], value
    return product, None
