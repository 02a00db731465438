"""Small products of one input as one product, for onnxruntime on a CPU, where each takes some microseconds to be started and waited for.

A row is decoded as fast as weights are read, if they are read in long stretches. With the decoder of SmolVLM-256M on two threads, queries,
keys and values by one product, and gate and up by another, save 5 % of a token in fp32, 4 % in int8 and 10 % in int4. Larger weights take so
long to read that nothing is gained, hence the limit. The weights are laid side by side when onnxruntime loads the graph: a bundle's file keeps
each by itself.
"""
from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir

from edgecomp.dialects.segments import MICROSOFT
from edgecomp.ir.rewrite import constant, dims, inputs, insert, made_by, nodes, replace

SMALL = 4 * 2**20  # bytes of a weight
BY_NAME = {"FusedMatMul": {"transB"}, "MatMulNBits": {"K", "N", "bits", "block_size", "accuracy_level"}}  # the attributes that are understood


def join_small_products(model: ir.Model) -> None:
    """Joins FusedMatMul and MatMulNBits nodes of small constant weights [out, in] that read the same input, in place."""
    groups: dict[object, list[ir.Node]] = defaultdict(list)
    for kind in BY_NAME:
        for product in nodes(model, kind, MICROSOFT):
            if _small(product):
                alike = [(name, a.value) for name, a in sorted(product.attributes.items()) if name != "N"]
                groups[kind, product.inputs[0], len(product.inputs), tuple(alike)].append(product)
    for products in groups.values():
        if len(products) > 1:
            _join(model, products)


def _small(product: ir.Node) -> bool:
    """Whether a product is of the forms that the dialect writes, with a small weight; of fp16, which is for GPUs, packed.py sees to some."""
    weight = _stored(product).const_value
    understood = set(product.attributes) <= BY_NAME[product.op_type] and not product.outputs[0].is_graph_output()
    return understood and weight is not None and weight.nbytes <= SMALL and weight.dtype != ir.DataType.FLOAT16


def _stored(product: ir.Node) -> ir.Value:
    """The value that a product's weight is stored as: behind the flip of quantized.py, where there is one."""
    weight = inputs(product)[1]
    flip = made_by(weight, "BitwiseXor")
    return inputs(flip)[0] if flip else weight


def _join(model: ir.Model, products: list[ir.Node]) -> None:
    first = products[0]
    rows, attributes = [_rows(product) for product in products], {name: a.value for name, a in first.attributes.items()}
    given = [first.inputs[0], *(_side_by_side(model, first, [inputs(product)[at] for product in products]) for at in range(1, len(inputs(first))))]
    if first.op_type == "MatMulNBits":
        attributes["N"] = sum(rows)
    together, = insert(model, first, first.op_type, given, attributes, MICROSOFT)
    sizes, ends = constant(model, "rows_" + "_".join(map(str, rows)), np.array(rows, np.int64)), products
    biased = [found for found in map(bias_of, products) if found]
    if len(biased) == len(products):
        together, ends = with_biases(model, first, together, [bias for _, bias in biased]), [add for add, _ in biased]
    for end, part in zip(ends, insert(model, first, "Split", [together, sizes], {"axis": -1}, outputs=len(products))):
        replace(model, end, part)
    if ends is not products:
        model.graph.remove(products, safe=True)


def bias_of(product: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """What alone reads a product, if that adds a constant of its width to each row; and the constant."""
    readers, weight = [node for node, _ in product.outputs[0].uses()], _stored(product)
    if [node.op_type for node in readers] != ["Add"] or not weight.is_initializer():
        return None
    add, = readers
    bias = next((value for value in inputs(add) if value is not product.outputs[0]), None)
    return (add, bias) if bias is not None and bias.is_initializer() and dims(bias) == dims(weight)[:1] else None


def with_biases(model: ir.Model, before: ir.Node, together: ir.Value, biases: list[ir.Value]) -> ir.Value:
    """The biases of several products side by side, added to what these are together."""
    return insert(model, before, "Add", [together, *insert(model, before, "Concat", biases, {"axis": 0})])[0]


def _side_by_side(model: ir.Model, before: ir.Node, tensors: list[ir.Value]) -> ir.Value:
    """Constants one below the other, flipped together where each is."""
    flips = [made_by(tensor, "BitwiseXor") for tensor in tensors]
    stored = [inputs(flip)[0] if flip else tensor for flip, tensor in zip(flips, tensors)]
    together, = insert(model, before, "Concat", stored, {"axis": 0})
    return insert(model, before, "BitwiseXor", [together, flips[0].inputs[1]])[0] if flips[0] else together


def _rows(product: ir.Node) -> int:
    """The outputs of a product."""
    tensor = _stored(product).const_value
    assert tensor is not None
    return int(tensor.shape.numpy()[0])
