"""Queries, keys and values of a layer side by side, as one product makes them: GroupQueryAttention takes them so, and turns rows itself.

On a GPU one row is decoded as fast as weights are read, and three small products read them slower than one large one. On a CPU each node
takes some microseconds: with the decoder of SmolVLM-256M on two threads, a Split and two rotations a layer are 3 % of a token in int4.
"""
from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx_ir as ir

from edgecomp.dialects.joined import bias_of, with_biases
from edgecomp.dialects.segments import MICROSOFT
from edgecomp.ir.rewrite import constant, dims, inputs, insert, made_by, nodes

Tables = tuple[ir.Value, ir.Value, ir.Value]  # cosines, sines, each row's place in them


def pack_projections(model: ir.Model) -> None:
    """Gives each GroupQueryAttention its queries, keys and values in one, where one product makes them or could.

    One does where joined.py put small products together; and one can in fp16, which is what GPUs compute in, where the three weights follow
    each other in their file: the new weight is the same bytes. Where a norm or another reader stands between, all stays as it is.
    """
    tables: dict[tuple[ir.Value | None, ...], Tables] = {}
    for attention in nodes(model, "GroupQueryAttention", MICROSOFT):
        found = _turned(attention)
        if not found:
            continue
        rotary, sources = found
        joined = _made_together(sources) or _product_of_one_weight(model, attention, sources)
        if joined is None:
            continue
        shared = (*rotary.inputs[1:3], attention.inputs[6])
        if shared not in tables:
            tables[shared] = _tables(model, attention, rotary)
        given = [joined, None, None, *attention.inputs[3:7], *tables[shared]]
        attention.resize_inputs(len(given))
        for place, value in enumerate(given):
            attention.replace_input_with(place, value)
        attention.attributes.add(ir.AttrInt64("do_rotary", 1))


def _turned(attention: ir.Node) -> tuple[ir.Node, list[ir.Value]] | None:
    """How queries and keys in front of an attention node are turned, both alike, and queries, keys and values before that; None where it is
    otherwise."""
    query, key, value = attention.inputs[:3]
    turned = [rotary for rotary in (made_by(query, "RotaryEmbedding"), made_by(key, "RotaryEmbedding")) if rotary and _whole(rotary)]
    if value is None or len(turned) < 2 or inputs(turned[0])[1:] != inputs(turned[1])[1:]:
        return None
    return turned[0], [inputs(turned[0])[0], inputs(turned[1])[0], value]


def _whole(rotary: ir.Node) -> bool:
    """Whether a node turns whole heads, halves against halves, for one reader."""
    return (len(rotary.outputs[0].uses()) == 1 and len(rotary.inputs) == 3
            and not rotary.attributes.get_int("interleaved", 0) and not rotary.attributes.get_int("rotary_embedding_dim", 0))


def _made_together(sources: list[ir.Value]) -> ir.Value | None:
    """What is split into these, in their order and for one reader each."""
    split = made_by(sources[0], "Split")
    if not split or list(split.outputs) != sources or any(len(source.uses()) > 1 for source in sources):
        return None
    return split.inputs[0]


def _product_of_one_weight(model: ir.Model, attention: ir.Node, sources: list[ir.Value]) -> ir.Value | None:
    """Queries, keys and values by one product, where three of one input make them whose weights are one in the file; with their biases."""
    summed = [value for add in (made_by(source, "Add") for source in sources) if add for value in inputs(add)]
    products = [product for product in (made_by(value, "FusedMatMul", MICROSOFT) for value in summed or sources) if product]
    biased = [found for found in map(bias_of, products) if found and found[0].outputs[0] in sources]
    if len(products) != len(sources) or len(biased) != (len(sources) if summed else 0) or len({product.inputs[0] for product in products}) > 1:
        return None
    weight = _side_by_side(model, [inputs(product)[1] for product in products])
    if weight is None:
        return None
    joined, = insert(model, attention, "FusedMatMul", [products[0].inputs[0], weight], {"transB": 1}, MICROSOFT)
    return with_biases(model, attention, joined, [bias for _, bias in biased]) if biased else joined


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
    """What GroupQueryAttention turns rows by: of the new rows only, which an input numbers, then zeros: it wants as many as it is told of.

    Of one sequence: its CPU kernel takes the first one's numbers for all of a batch (onnxruntime 1.31.1).
    """
    _, cos, sin = inputs(rotary)
    past, total = attention.inputs[3], attention.inputs[6]
    assert past is not None and total is not None and past.dtype is not None
    width = dims(past)[-1]
    assert isinstance(width, int)
    half = width // 2
    if past.dtype == ir.DataType.FLOAT16:  # on a GPU the same for every token, and known without reading a number there
        rows, = insert(model, attention, "Shape", [past], {"start": 2, "end": 3})
    else:
        rows, = insert(model, attention, "Cast", insert(model, attention, "Reshape", [total, constant(model, "one_number", np.array([1], np.int64))]),
                       {"to": ir.DataType.INT64})
    before, behind = (constant(model, name, np.zeros(count, np.int64)) for name, count in (("no_rows_before", 2), ("no_columns_behind", 1)))
    added, = insert(model, attention, "Concat", [before, rows, behind], {"axis": 0})
    flat = constant(model, f"table_rows_{half}", np.array([-1, half], np.int64))
    cosines, sines = (insert(model, attention, "Pad", [insert(model, attention, "Reshape", [table, flat])[0], added])[0] for table in (cos, sin))
    layer = (total.name or "").removeprefix("total_rows")
    number = ir.Value(name=f"row_numbers{layer}", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1, f"rows{layer}"]))
    model.graph.inputs.append(number)
    return cosines, sines, number
