"""Operators that a backend does not know, written in those that all know, and a graph written in an older opset."""
from __future__ import annotations

from collections.abc import Callable, Collection
from math import pi, sqrt

import numpy as np
import onnx_ir as ir

from edgecomp.ir.rewrite import constant, dims, inputs, nodes, replace
from edgecomp.passes.tape import Tape
from edgecomp_runtime.errors import EdgecompError

FLOAT = ir.DataType.FLOAT
END = 2**31 - 1  # of a Slice that takes all the rest


def write_plainly(model: ir.Model, operators: Collection[str]) -> None:
    """Replaces the operators that are not among `operators` and for which there is a way, in place."""
    for op_type, plain in PLAIN.items():
        for node in nodes(model, op_type) if op_type not in operators else ():
            replace(model, node, plain(Tape(model), node))


def write_in_opset(model: ir.Model, opset: int) -> None:
    """Makes a graph of opset 23 or 24 one of an older opset (17 at least), in place, as far as our graphs use what has changed since.

    Until 18 reductions have their axes as an attribute, and Split does not count its results.
    """
    if opset < 18:
        for node in list(model.graph):
            if node.domain == "" and node.op_type in REDUCTIONS and len(inputs(node)) > 1:
                axes = ir.convenience.get_const_tensor(inputs(node)[1])
                if axes is None:
                    raise EdgecompError(f"{node.op_type} over computed axes cannot be written in opset {opset}")
                node.attributes.add(ir.AttrInt64s("axes", axes.numpy().reshape(-1).tolist()))
                node.resize_inputs(1)
            elif node.op_type == "Split":
                node.attributes.pop("num_outputs", None)
    model.graph.opset_imports[""] = opset


def scalar(tape: Tape, value: float, dtype: ir.DataType) -> ir.Value:
    """A constant number of a type."""
    return constant(tape.model, f"edgecomp.{dtype.name.lower()}.{value!r}", np.array(value, dtype.numpy()))


def _cast(tape: Tape, value: ir.Value, to: ir.DataType | None) -> ir.Value:
    """The value in a type; None is as it is."""
    return value if to is None or value.dtype == to else tape.add("Cast", value, to=to)


def _last_axes(tape: Tape, node: ir.Node) -> ir.Value:
    """What a norm works over: from its axis on."""
    axis = node.attributes.get_int("axis", -1)
    return tape.ints(list(range(axis - len(dims(inputs(node)[0])) if axis >= 0 else axis, 0)))


def _rms_normalization(tape: Tape, node: ir.Node) -> ir.Value:
    """x / sqrt(mean(x^2) + eps) * scale, all but the product in fp32 (arXiv 1910.07467)."""
    x, scale = inputs(node)
    wide = _cast(tape, x, FLOAT if node.attributes.get_int("stash_type", 1) else None)
    mean = tape.add("ReduceMean", tape.add("Mul", wide, wide), _last_axes(tape, node), keepdims=1)
    root = tape.add("Sqrt", tape.add("Add", mean, tape.number(node.attributes.get_float("epsilon", 1e-5))))
    normed = tape.add("Div", wide, root)
    return tape.add("Mul", normed if scale.dtype == FLOAT else tape.add("Cast", normed, to=scale.dtype), scale)


def _layer_normalization(tape: Tape, node: ir.Node) -> ir.Value:
    """(x - mean(x)) / sqrt(variance(x) + eps) * scale + bias, all but the last two in fp32 (arXiv 1607.06450)."""
    x, scale, *bias = inputs(node)
    axes = _last_axes(tape, node)
    wide = _cast(tape, x, FLOAT)
    centred = tape.add("Sub", wide, tape.add("ReduceMean", wide, axes, keepdims=1))
    variance = tape.add("ReduceMean", tape.add("Mul", centred, centred), axes, keepdims=1)
    root = tape.add("Sqrt", tape.add("Add", variance, tape.number(node.attributes.get_float("epsilon", 1e-5))))
    normed = tape.add("Div", centred, root)
    normed = tape.add("Mul", normed if scale.dtype == FLOAT else tape.add("Cast", normed, to=scale.dtype), scale)
    return tape.add("Add", normed, bias[0]) if bias else normed


def _rotary_embedding(tape: Tape, node: ir.Node) -> ir.Value:
    """Pairs of numbers turned by angles whose cosines and sines are [B, S, D / 2] (arXiv 2104.09864): a number and the one half the width
    further, or neighbours (`interleaved`). x: [B, H, S, D], or [B, S, H * D] with `num_heads`. Behind `rotary_embedding_dim` nothing turns."""
    x, cos, sin, *numbers = inputs(node)
    if numbers:
        raise EdgecompError("RotaryEmbedding with a table and numbers of its rows has no plain form here: gather the rows before it")
    flat, heads = len(dims(x)) == 3, node.attributes.get_int("num_heads", 0)
    last = tape.ints([-1])
    if flat:
        x = tape.add("Reshape", x, tape.ints([0, 0, heads, -1]))
    cos, sin = (tape.add("Unsqueeze", table, tape.ints([2 if flat else 1])) for table in (cos, sin))
    of_heads = dims(inputs(node)[0])[-1]
    assert isinstance(of_heads, int)
    width = of_heads // heads if flat else of_heads
    turned, interleaved = node.attributes.get_int("rotary_embedding_dim", 0) or width, node.attributes.get_int("interleaved", 0)
    spans = [(0, turned, 2), (1, turned, 2)] if interleaved else [(0, turned // 2, 1), (turned // 2, turned, 1)]
    one, other = (tape.add("Slice", x, tape.ints([first]), tape.ints([end]), last, tape.ints([step])) for first, end, step in spans)
    pairs = [tape.add("Sub", tape.add("Mul", one, cos), tape.add("Mul", other, sin)),
             tape.add("Add", tape.add("Mul", other, cos), tape.add("Mul", one, sin))]
    if interleaved:
        both = tape.add("Concat", *(tape.add("Unsqueeze", pair, last) for pair in pairs), axis=-1)
        pairs = [tape.add("Reshape", both, tape.ints([0, 0, 0, -1]))]
    rest = [tape.add("Slice", x, tape.ints([turned]), tape.ints([END]), last)] if turned < width else []
    found = pairs[0] if len(pairs + rest) == 1 else tape.add("Concat", *pairs, *rest, axis=-1)
    return tape.add("Reshape", found, tape.ints([0, 0, -1])) if flat else found


def _gelu(tape: Tape, node: ir.Node) -> ir.Value:
    """x / 2 * (1 + erf(x / sqrt 2)), or with tanh for it (arXiv 1606.08415)."""
    x, = inputs(node)
    assert x.dtype is not None
    half, one = scalar(tape, 0.5, x.dtype), scalar(tape, 1.0, x.dtype)
    if node.attributes.get_string("approximate", "none") == "tanh":
        cube = tape.add("Mul", tape.add("Mul", x, x), tape.add("Mul", x, scalar(tape, 0.044715, x.dtype)))
        inner = tape.add("Tanh", tape.add("Mul", tape.add("Add", x, cube), scalar(tape, sqrt(2 / pi), x.dtype)))
    else:
        inner = tape.add("Erf", tape.add("Mul", x, scalar(tape, sqrt(0.5), x.dtype)))
    return tape.add("Mul", tape.add("Mul", x, half), tape.add("Add", inner, one))


def _swish(tape: Tape, node: ir.Node) -> ir.Value:
    """x * sigmoid(alpha x)."""
    x, = inputs(node)
    assert x.dtype is not None
    alpha = node.attributes.get_float("alpha", 1.0)
    return tape.add("Mul", x, tape.add("Sigmoid", x if alpha == 1 else tape.add("Mul", x, scalar(tape, alpha, x.dtype))))


def _cast_like(tape: Tape, node: ir.Node) -> ir.Value:
    x, like = inputs(node)
    return tape.add("Cast", x, to=type_of(like))


def type_of(value: ir.Value) -> ir.DataType:
    """A value's type; where nobody has written it down, what its operator makes of the types of what it reads."""
    while value.dtype is None:
        node = value.producer()
        assert node is not None, f"{value.name} has no type"
        if node.op_type == "Cast":
            return ir.DataType(node.attributes["to"].as_int())
        if node.op_type in RESULTS or (node.op_type == "TopK" and value.index() == 1):
            return RESULTS.get(node.op_type, ir.DataType.INT64)
        value = inputs(node)[{"Where": 1, "OneHot": 2}.get(node.op_type, 0)]
    return value.dtype


PLAIN: dict[str, Callable[[Tape, ir.Node], ir.Value]] = {
    "RMSNormalization": _rms_normalization, "LayerNormalization": _layer_normalization, "RotaryEmbedding": _rotary_embedding,
    "Gelu": _gelu, "Swish": _swish, "CastLike": _cast_like}
REDUCTIONS = ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare")
RESULTS = {**dict.fromkeys(("Shape", "Size", "ArgMax", "ArgMin", "NonZero"), ir.DataType.INT64),
           **dict.fromkeys(("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "And", "Or", "Not", "IsNaN"), ir.DataType.BOOL)}
