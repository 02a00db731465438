"""Rotary embeddings as one operator each, where the exporter leaves them in pieces: in fp16, whose tables are cast on their way."""
from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgecomp.ir.rewrite import dims, inputs, insert, made_by, nodes, replace


def whole_rotary(model: ir.Model) -> None:
    """Turns x * cos + rotate_half(x) * sin, as Hugging Face's decoders have it, into RotaryEmbedding.

    x: [batch, heads, rows, width]; cos and sin [batch, rows, width] are of angles put twice side by side, of which the operator takes
    one half. What the operator does is the same arithmetic; seven kernels a table become one.
    """
    made: dict[tuple[ir.Value, ir.DataType | None], list[ir.Value]] = {}
    for add in nodes(model, "Add"):
        for straight, crossed in (add.inputs, reversed(add.inputs)):
            if found := _parts(straight, crossed):
                x, angles = found
                if (angles, x.dtype) not in made:
                    made[angles, x.dtype] = [_table(model, add, kind, angles, x.dtype) for kind in ("Cos", "Sin")]
                tables = made[angles, x.dtype]
                replace(model, add, insert(model, add, "RotaryEmbedding", [x, *tables], {"num_heads": dims(x)[1]})[0])
                break


def _table(model: ir.Model, before: ir.Node, kind: str, angles: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """Cosines or sines of angles, in a type."""
    table, = insert(model, before, kind, [angles])
    if angles.dtype != dtype:
        table, = insert(model, before, "Cast", [table], {"to": dtype})
    table.type, table.shape = ir.TensorType(dtype or ir.DataType.FLOAT), angles.shape
    return table


def _parts(straight: ir.Value | None, crossed: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """x and its angles [batch, rows, width / 2], where one product is x * cos and the other is rotate_half(x) * sin."""
    for x, cos in _factors(straight):
        angles = _angles(cos, "Cos")
        if angles is None or x.shape is None or len(x.shape) != 4:
            continue
        heads, width = dims(x)[1], dims(x)[3]
        if not isinstance(heads, int) or not isinstance(width, int):
            continue
        if any(_rotated_half(half, x, width) and _angles(sin, "Sin") is angles for half, sin in _factors(crossed)):
            return x, angles
    return None


def _factors(value: ir.Value | None) -> list[tuple[ir.Value, ir.Value]]:
    product = made_by(value, "Mul")
    if not product:
        return []
    a, b = inputs(product)
    return [(a, b), (b, a)]


def _angles(table: ir.Value, kind: str) -> ir.Value | None:
    """The angles whose cosine or sine a table [batch, 1, rows, width] is, given that they are there twice."""
    spread = made_by(table, "Unsqueeze")
    if not spread or _numbers(inputs(spread)[1]) != [1]:
        return None
    of = inputs(spread)[0]
    cast = made_by(of, "Cast")
    wave = made_by(inputs(cast)[0] if cast else of, kind)
    twice = made_by(inputs(wave)[0], "Concat") if wave else None
    if not twice or len(twice.inputs) != 2 or twice.inputs[0] is not twice.inputs[1] or twice.attributes["axis"].as_int() not in (-1, 2):
        return None
    return twice.inputs[0]


def _rotated_half(value: ir.Value, x: ir.Value, width: int) -> bool:
    """Whether a value is the negated second half of x's last axis, which is so wide, and then the first."""
    both = made_by(value, "Concat")
    negated = made_by(both.inputs[0], "Neg") if both and len(both.inputs) == 2 and both.attributes["axis"].as_int() in (-1, 3) else None
    if not both or not negated:
        return False
    return _slice(both.inputs[1], x, width, 0, width // 2) and _slice(negated.inputs[0], x, width, width // 2, width)


def _slice(value: ir.Value | None, x: ir.Value, width: int, start: int, end: int) -> bool:
    cut = made_by(value, "Slice")
    if not cut or cut.inputs[0] is not x:
        return False
    first, last, axis, step = ([*map(_numbers, cut.inputs[1:]), [1]])[:4]
    return first == [start] and last is not None and min(last[0], width) == end and axis in ([3], [-1]) and step == [1]


def _numbers(value: ir.Value | None) -> list[int] | None:
    """A small constant's numbers."""
    tensor = value.const_value if value is not None else None
    if tensor is None or tensor.size > 8:
        return None
    return [int(n) for n in np.asarray(tensor.numpy()).reshape(-1)]
