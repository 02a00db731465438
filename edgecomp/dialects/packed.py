"""Queries, keys and values of a layer by one product, for onnxruntime on a GPU: one row is decoded as fast as weights are read, and three
small products read them slower than one large one. GroupQueryAttention takes the three side by side and rotates them itself.
"""
from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx_ir as ir

from edgecomp.dialects.segments import MICROSOFT
from edgecomp.ir.rewrite import constant, dims, inputs, insert, made_by, nodes

Tables = tuple[ir.Value, ir.Value, ir.Value]  # cosines, sines, each row's place in them


def pack_projections(model: ir.Model) -> None:
    """Joins the three products in front of each GroupQueryAttention whose weights are fp16 and follow each other in their file.

    fp16 is what GPUs compute in; a CPU's weights onnxruntime packs anew, in fp32. The new weight is the same bytes of the file. Where a
    bias, a norm or another reader stands between product and attention, all stays as it is.
    """
    tables: dict[tuple[ir.Value | None, ...], Tables] = {}
    for attention in nodes(model, "GroupQueryAttention", MICROSOFT):
        found = _projections(attention)
        weight = _side_by_side(model, [inputs(product)[1] for product in found[1]]) if found else None
        if not found or weight is None:
            continue
        rotary, (product, *_) = found
        shared = (*rotary.inputs[1:3], attention.inputs[6])
        if shared not in tables:
            tables[shared] = _tables(model, attention, rotary)
        joined, = insert(model, attention, "FusedMatMul", [product.inputs[0], weight], {"transB": 1}, MICROSOFT)
        given = [joined, None, None, *attention.inputs[3:7], *tables[shared]]
        attention.resize_inputs(len(given))
        for place, value in enumerate(given):
            attention.replace_input_with(place, value)
        attention.attributes.add(ir.AttrInt64("do_rotary", 1))


def _projections(attention: ir.Node) -> tuple[ir.Node, list[ir.Node]] | None:
    """How queries and keys in front of an attention node are turned, both alike, and the products that make queries, keys and values of
    one input; None where it is otherwise."""
    query, key, value = attention.inputs[:3]
    turned = [rotary for rotary in (made_by(query, "RotaryEmbedding"), made_by(key, "RotaryEmbedding")) if rotary and _whole(rotary)]
    if len(turned) < 2 or inputs(turned[0])[1:] != inputs(turned[1])[1:]:
        return None
    sources = [turned[0].inputs[0], turned[1].inputs[0], value]
    products = [product for product in (made_by(source, "FusedMatMul", MICROSOFT) for source in sources) if product]
    if len(products) < 3 or len({product.inputs[0] for product in products}) > 1:
        return None
    return turned[0], products


def _whole(rotary: ir.Node) -> bool:
    """Whether a node turns whole heads, halves against halves, for one reader."""
    return (len(rotary.outputs[0].uses()) == 1 and len(rotary.inputs) == 3
            and not rotary.attributes.get_int("interleaved", 0) and not rotary.attributes.get_int("rotary_embedding_dim", 0))


def _side_by_side(model: ir.Model, weights: list[ir.Value]) -> ir.Value | None:
    """Weights [out, in] as one, where that is what the file has."""
    tensors = [t for t in (w.const_value for w in weights) if isinstance(t, ir.ExternalTensor) and t.dtype == ir.DataType.FLOAT16]
    if len(tensors) < len(weights) or any((a.location, (a.offset or 0) + a.nbytes) != (b.location, b.offset) for a, b in pairwise(tensors)):
        return None
    first, shapes = tensors[0], [tensor.shape.numpy() for tensor in tensors]
    shape, name = ir.Shape([sum(rows for rows, _ in shapes), shapes[0][1]]), f"{weights[0].name}.with_key_and_value"
    joined = ir.ExternalTensor(first.location, first.offset, sum(tensor.nbytes for tensor in tensors), first.dtype, name=name, shape=shape,
                               base_dir=first.base_dir)
    value = ir.Value(name=name, type=ir.TensorType(first.dtype), shape=shape, const_value=joined)
    model.graph.register_initializer(value)
    return value


def _tables(model: ir.Model, attention: ir.Node, rotary: ir.Node) -> Tables:
    """What GroupQueryAttention turns rows by: of the new rows only, which an input numbers, then zeros: it wants as many as the cache has rows.

    Of one sequence: its CPU kernel takes the first one's numbers for all of a batch (onnxruntime 1.31.1).
    """
    _, cos, sin = inputs(rotary)
    past, total = attention.inputs[3], attention.inputs[6]
    assert past is not None and total is not None and cos.dtype is not None
    half = dims(cos)[-1]
    assert isinstance(half, int)
    capacity, = insert(model, attention, "Shape", [past], {"start": 2, "end": 3})
    size, = insert(model, attention, "Concat", [capacity, constant(model, f"table_width_{half}", np.array([half], np.int64))], {"axis": 0})
    zero = constant(model, f"table_zero_{cos.dtype.name}", np.zeros((1, 1), cos.dtype.numpy()))
    unused, = insert(model, attention, "Expand", [zero, size])
    flat = constant(model, f"table_rows_{half}", np.array([-1, half], np.int64))
    cosines, sines = (insert(model, attention, "Concat", [insert(model, attention, "Reshape", [table, flat])[0], unused], {"axis": 0})[0]
                      for table in (cos, sin))
    layer = (total.name or "").removeprefix("total_rows")
    number = ir.Value(name=f"row_numbers{layer}", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1, f"rows{layer}"]))
    model.graph.inputs.append(number)
    return cosines, sines, number
