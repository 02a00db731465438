"""Fewer rows: when one value is shortened, every shape behind it follows, in values and in the constants that operators take as shapes.

Rows are followed by axis, from operator to operator. Numbers are never searched for: a width may well equal the row count.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

import numpy as np
import onnx_ir as ir

from edgecomp.ir.rewrite import DOMAIN, constant, dims, insert, made_by
from edgecomp_runtime.errors import EdgecompError

Rows = dict[int, int]  # of one value: axis -> the rows that it has there now
Dims = tuple["int | ir.SymbolicDim", ...]


def shorten(model: ir.Model, value: ir.Value, axis: int, rows: int) -> None:
    """Gives a value `rows` rows at an axis, and what is computed from it the shapes that follow, in place.

    Leading rows keep their meaning (a Slice may drop the first ones), others do not.

    Args:
        model: a neutral graph; its nodes are sorted.
        value: with its old shape or its new one.
        axis: the rows' axis; negative from the end.
        rows: how many it has now.

    Raises:
        EdgecompError: an operator behind it splits, joins or picks rows, mixes in a value that still has the old ones, or is not known.
    """
    old: dict[ir.Value, Dims] = {value: dims(value)}
    known: dict[ir.Value, Rows] = {value: {axis % len(dims(value)): rows}}
    _resize(value, known[value])
    model.graph.sort()
    for node in list(model.graph):
        if any(v in known for v in node.inputs if v is not None):
            found = _Node(model, node, known, old).follow()
            for out in node.outputs if found else ():
                old[out], known[out] = dims(out), found
                _resize(out, found)


def _resize(value: ir.Value, rows: Rows) -> None:
    value.shape = ir.Shape([rows.get(axis, size) for axis, size in enumerate(dims(value))])


class _Node:
    """One operator behind the shortened value: which axes of its results hold rows, and how many."""

    def __init__(self, model: ir.Model, node: ir.Node, known: dict[ir.Value, Rows], old: dict[ir.Value, Dims]):
        self.model, self.node, self.known, self.old = model, node, known, old

    def follow(self) -> Rows:
        for value in (*self.node.inputs, *self.node.outputs):
            if value is not None and value.shape is None:
                raise self.refuse(f"{value.name} has no shape")
        operator = (self.node.domain, self.node.op_type)
        if operator not in OPERATORS:
            raise self.refuse("it is not known what it does to rows")
        return OPERATORS[operator](self)

    def refuse(self, why: str) -> EdgecompError:
        out = self.node.outputs[0].name
        return EdgecompError(f"the tokens cannot be shortened in front of operator {self.node.op_type} (result {out!r}): {why}; cut elsewhere")

    def rows(self, at: int) -> Rows:
        """Of an input; none where it is left out or does not come from the shortened value."""
        value = self.node.inputs[at] if at < len(self.node.inputs) else None
        return self.known.get(value, {}) if value is not None else {}

    def input(self, at: int) -> ir.Value:
        value = self.node.inputs[at]
        assert value is not None
        return value

    def dims(self, at: int) -> Dims:
        return dims(self.input(at))

    def given(self) -> list[int]:
        """The inputs that are not left out."""
        return [at for at, value in enumerate(self.node.inputs) if value is not None]

    def axis(self, default: int) -> int:
        return self.node.attributes.get_int("axis", default) % len(self.dims(0))

    def numbers(self, at: int) -> list[int]:
        """A constant input."""
        value = self.input(at)
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None:
            raise self.refuse(f"its input {value.name!r} is computed")
        return [int(n) for n in tensor.numpy().reshape(-1)]

    def agree(self, at: int, axis: int, count: int, *, broadcast: bool = False) -> None:
        """Raises where an input has another number of rows at an axis."""
        size = self.dims(at)[axis]
        if size != count and not (broadcast and size == 1):
            raise self.refuse(f"its input {self.input(at).name!r} has {size} rows where {count} are left")

    def aligned(self, inputs: Iterable[int], rank: int, ends: int = 0) -> Rows:
        """Rows after broadcasting to a rank, axes aligned at the end; the last `ends` axes are left to the caller."""
        found: Rows = {}
        for at in inputs:
            found |= {axis + rank - len(self.dims(at)): n for axis, n in self.rows(at).items() if axis < len(self.dims(at)) - ends}
        for at in inputs:
            for axis, count in found.items():
                if (own := axis - rank + len(self.dims(at))) >= 0:
                    self.agree(at, own, count, broadcast=True)
        return found

    def retarget(self, at: int, rows: Rows, inferred: tuple[int, ...]) -> None:
        """Writes row counts into a shape that the operator takes as an input, but where it holds a number that follows by itself."""
        target = self.input(at)
        if ir.convenience.get_const_tensor(target) is not None:
            self.node.replace_input_with(at, self.ints([n if n in inferred else rows.get(i, n) for i, n in enumerate(self.numbers(at))]))
            return
        concat = made_by(target, "Concat")
        if concat is None:
            raise self.refuse(f"its shape {target.name!r} is computed")
        pieces, start = list(concat.inputs), 0
        for n, piece in enumerate(pieces):
            assert piece is not None
            if (tensor := ir.convenience.get_const_tensor(piece)) is not None:
                numbers = [int(i) for i in tensor.numpy().reshape(-1)]
                pieces[n] = self.ints([i if i in inferred else rows.get(start + k, i) for k, i in enumerate(numbers)])
                start += len(numbers)
            else:
                length = dims(piece)[0]
                if not isinstance(length, int):
                    raise self.refuse(f"its shape {target.name!r} is computed")
                shape = made_by(piece, "Shape")
                if any(start + k in rows for k in range(length)) and not (shape and shape.inputs[0] in self.known):
                    raise self.refuse(f"its shape {target.name!r} is computed")
                start += length
        made, = insert(self.model, self.node, "Concat", pieces, {"axis": 0})
        made.type, made.shape = target.type, target.shape
        self.node.replace_input_with(at, made)

    def ints(self, numbers: list[int]) -> ir.Value:
        return constant(self.model, "shape_" + "_".join(map(str, numbers)), np.array(numbers, np.int64))


def _same(node: _Node) -> Rows:
    """One input, its rows where they were."""
    return node.rows(0)


def _elementwise(node: _Node) -> Rows:
    return node.aligned(node.given(), max(len(node.dims(at)) for at in node.given()))


def _norm(node: _Node) -> Rows:
    first = node.axis(-1)
    if any(axis >= first for axis in node.rows(0)):
        raise node.refuse("it works across rows")
    return node.rows(0)


def _matmul(node: _Node) -> Rows:
    left, right = (len(node.dims(at)) for at in (0, 1))
    if min(left, right) < 2:
        raise node.refuse("one of its inputs is a vector")
    rank = max(left, right)
    found = node.aligned((0, 1), rank, ends=2)
    if (count := node.rows(0).get(left - 1, node.rows(1).get(right - 2))) is not None:  # rows that the product sums over
        node.agree(0, left - 1, count)
        node.agree(1, right - 2, count)
    if left - 2 in node.rows(0):
        found[rank - 2] = node.rows(0)[left - 2]
    if right - 1 in node.rows(1):
        found[rank - 1] = node.rows(1)[right - 1]
    return found


def _reshape(node: _Node) -> Rows:
    before, after = node.old[node.input(0)], dims(node.node.outputs[0])
    found: Rows = {}
    for axis, count in node.rows(0).items():
        same = [n for n in range(len(after)) if _size(after[:n]) == _size(before[:axis]) and _size(after[n + 1:]) == _size(before[axis + 1:])]
        if not same:
            raise node.refuse(f"it makes {_text(after)} of {_text(before)}, where axis {axis}, the rows, is not left whole")
        found[same[0]] = count
    node.retarget(1, found, inferred=(-1,))
    return found


def _size(sizes: Dims) -> tuple[int, list[str]]:
    """A product of dimensions: of those that are numbers, and the symbols."""
    return prod(d for d in sizes if isinstance(d, int)), sorted(str(d) for d in sizes if not isinstance(d, int))


def _text(sizes: Dims) -> str:
    return f"[{', '.join(str(d) if isinstance(d, int) else str(d.value) for d in sizes)}]"


def _expand(node: _Node) -> Rows:
    rank, length = len(dims(node.node.outputs[0])), node.dims(1)[0]
    found = {axis + rank - len(node.dims(0)): n for axis, n in node.rows(0).items()}
    assert isinstance(length, int)
    node.retarget(1, {axis - rank + length: n for axis, n in found.items()}, inferred=(1,))
    return found


def _transpose(node: _Node) -> Rows:
    rank = len(node.dims(0))
    order = list(node.node.attributes.get_ints("perm", range(rank)[::-1]))
    return {order.index(axis): n for axis, n in node.rows(0).items()}


def _unsqueeze(node: _Node) -> Rows:
    rank = len(dims(node.node.outputs[0]))
    added = {axis % rank for axis in node.numbers(1)}
    kept = [axis for axis in range(rank) if axis not in added]
    return {kept[axis]: n for axis, n in node.rows(0).items()}


def _squeeze(node: _Node) -> Rows:
    return _without(node, {axis % len(node.dims(0)) for axis in node.numbers(1)})


def _reduce(node: _Node) -> Rows:
    if len(node.node.inputs) < 2:
        raise node.refuse("it works across rows")
    gone = {axis % len(node.dims(0)) for axis in node.numbers(1)}
    keepdims = node.node.attributes.get_int("keepdims", 1)
    return {axis: n for axis, n in node.rows(0).items() if axis not in gone} if keepdims and not gone & set(node.rows(0)) else _without(node, gone)


def _without(node: _Node, gone: set[int]) -> Rows:
    if gone & set(node.rows(0)):
        raise node.refuse("it works across rows")
    return {axis - sum(g < axis for g in gone): n for axis, n in node.rows(0).items()}


def _slice(node: _Node) -> Rows:
    starts, ends = node.numbers(1), node.numbers(2)
    axes = [axis % len(node.dims(0)) for axis in (node.numbers(3) if len(node.node.inputs) > 3 else range(len(starts)))]
    steps = node.numbers(4) if len(node.node.inputs) > 4 else [1] * len(starts)
    found = dict(node.rows(0))
    for start, end, axis, step in zip(starts, ends, axes, steps):
        if axis in found:
            size = node.old[node.input(0)][axis]
            if step != 1 or start < 0 or end < (size if isinstance(size, int) else np.iinfo(np.int64).max) or start >= found[axis]:
                raise node.refuse(f"it takes rows {start} to {end} in steps of {step}, and which rows those are has changed")
            found[axis] -= start
    return found


def _gather(node: _Node) -> Rows:
    axis, rank = node.axis(0), len(node.dims(1))
    if node.rows(1) or axis in node.rows(0):
        raise node.refuse("it picks rows")
    return {at if at < axis else at + rank - 1: n for at, n in node.rows(0).items()}


def _concat(node: _Node) -> Rows:
    axis = node.axis(0)
    found: Rows = {}
    for at in node.given():
        found |= node.rows(at)
    if axis in found:
        raise node.refuse("it joins rows")
    for at in node.given():
        for row_axis, count in found.items():
            node.agree(at, row_axis, count)
    return found


def _split(node: _Node) -> Rows:
    if node.axis(0) in node.rows(0):
        raise node.refuse("it splits rows")
    return node.rows(0)


def _rotary(node: _Node) -> Rows:
    rank = len(node.dims(0))
    given = node.given()
    for axis, count in node.rows(0).items():
        if axis != rank - 2 and not (rank == 3 and axis == 1):
            raise node.refuse("its rows are not where its positions are")
        for at in (3,) if 3 in given else (1, 2):  # position ids, or angles a row
            node.agree(at, 1, count)
    return node.rows(0)


def _attention(node: _Node) -> Rows:
    """query, key, value [B, H, S, D]; segments and the keys' bias [B, S] at 6 and 7."""
    for at, axis in ((0, 2), (1, 2), (2, 2)):
        if set(node.rows(at)) - {axis}:
            raise node.refuse("rows are in its batch, heads or width")
    if node.rows(1) or node.rows(2):
        keys = {**node.rows(1), **node.rows(2)}[2]
        for at in (1, 2):
            node.agree(at, 2, keys)
        for at in (6, 7):
            if at in node.given():
                node.agree(at, 1, keys)
    return node.rows(0)


def _ends(node: _Node) -> Rows:
    """Its result has no rows: whatever is computed from it sees the new number when it runs."""
    return {}


OPERATORS: dict[tuple[str, str], Callable[[_Node], Rows]] = {
    **{("", name): _same for name in ("Cast", "Identity", "Gelu", "Sigmoid", "Tanh", "Relu", "Erf", "Exp", "Log", "Sqrt", "Reciprocal", "Neg", "Abs",
                                     "Softmax", "Swish", "HardSwish", "Not")},
    **{("", name): _elementwise for name in ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where", "Equal", "Less", "Greater", "And", "Or",
                                            "Clip", "CastLike")},
    **{("", name): _norm for name in ("LayerNormalization", "RMSNormalization")},
    **{("", f"Reduce{name}"): _reduce for name in ("Mean", "Sum", "Max", "Min", "L1", "L2")},
    ("", "MatMul"): _matmul, ("", "Reshape"): _reshape, ("", "Expand"): _expand, ("", "Transpose"): _transpose, ("", "Squeeze"): _squeeze,
    ("", "Unsqueeze"): _unsqueeze, ("", "Slice"): _slice, ("", "Gather"): _gather, ("", "Concat"): _concat, ("", "Split"): _split,
    ("", "RotaryEmbedding"): _rotary, ("", "Shape"): _ends,
    (DOMAIN, "Mark"): _same, (DOMAIN, "Attention"): _attention,
}
