"""Attention as TensorRT takes it: which row sees which as a mask, and one Attention operator or two products and a softmax."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgecomp.dialects.plain_operators import scalar
from edgecomp.ir.rewrite import KEYS_BIAS, SEGMENTS, constant, dims, inputs
from edgecomp.passes.tape import Tape
from edgecomp_runtime.errors import EdgecompError

FLOAT = ir.DataType.FLOAT
HIDDEN = -1e30  # the score of what a row does not see; a row always sees itself, so its largest score is far above


@dataclass(frozen=True)
class Piece:
    """Some of what a query looks at: key and value [1, Hkv, columns, D], and which row sees which column, bool [1, 1, rows, columns]: None
    where all are seen, [1, 1, 1, columns] (not `by_row`) where every row sees the same."""
    key: ir.Value
    value: ir.Value
    seen: ir.Value | None = None
    by_row: bool = False


@dataclass(frozen=True)
class Stretch:
    """The decoder's layers between two cuts: rows in their caches [1], 0, 1, .. for as many rows of the caches as are looked at, and 0, 1, ..
    for the new rows, which stand at length + that; None where there is but one.

    A row sees what is not behind it, and of that its window, and what shares its segment: within the window too, where that is `bounded`.
    The masks here are made anew for each layer; equal ones become one when equal nodes do.
    """
    tape: Tape
    length: ir.Value
    places: ir.Value
    rows: ir.Value | None

    def cache(self, node: ir.Node, key: ir.Value, value: ir.Value) -> Piece:
        """The cache with the new rows in it: column c is row c."""
        column, row = self.places, self._at()
        seen = self._segments(node, self.tape.add("LessOrEqual", column, row), column, row, in_cache=True)
        return self._looked_at(key, value, seen, self.rows is not None)

    def past(self, node: ir.Node, key: ir.Value, value: ir.Value) -> Piece:
        """The cache without the new rows."""
        seen, window = self.tape.add("Less", self.places, self.length), node.attributes["window"].as_int()
        if window:
            seen = self.tape.add("And", seen, self._near(self.places, self._at(), window))
        return self._looked_at(key, value, seen, bool(window) and self.rows is not None)

    def new(self, node: ir.Node, key: ir.Value, value: ir.Value) -> Piece:
        """The new rows themselves."""
        if self.rows is None:
            return Piece(key, value)
        row = self._upright(self.rows)
        seen = self._segments(node, self.tape.add("LessOrEqual", self.rows, row), self.rows, row, in_cache=False)
        return Piece(key, value, self._of_heads(seen, True), True)

    def _segments(self, node: ir.Node, seen: ir.Value, column: ir.Value, row: ir.Value, *, in_cache: bool) -> ir.Value:
        """What is seen, less what the window hides, and what shares a segment."""
        tape, window = self.tape, node.attributes["window"].as_int()
        near = self._near(column, row, window) if window else None
        if len(node.inputs) > SEGMENTS and self.rows is not None:  # a single row sees itself whatever its segment
            own = tape.add("Squeeze", node.inputs[SEGMENTS], tape.ints([0]))  # [rows]
            theirs = self._of_columns(own) if in_cache else own
            same = tape.add("And", tape.add("Equal", self._upright(own), theirs), self._upright(tape.add("Greater", own, tape.ints([0]))))
            if near is not None and not node.attributes["bounded"].as_int():
                return tape.add("Or", tape.add("And", seen, near), same)
            seen = tape.add("Or", seen, same)
        return seen if near is None else tape.add("And", seen, near)

    def _of_columns(self, own: ir.Value) -> ir.Value:
        """The segment of each row of the cache: none but for the new ones."""
        tape, none, one = self.tape, self.tape.ints([0]), self.tape.ints([1])
        at = tape.add("Add", tape.add("Sub", self.places, self.length), one)
        at = tape.add("Min", at, tape.add("Add", tape.add("Shape", own), one))
        return tape.add("Gather", tape.add("Concat", none, own, none, axis=0), tape.add("Max", at, none))

    def _at(self) -> ir.Value:
        """Where the new rows stand: [rows, 1], or [1]."""
        return self.length if self.rows is None else self.tape.add("Add", self.length, self._upright(self.rows))

    def _near(self, column: ir.Value, row: ir.Value, window: int) -> ir.Value:
        return self.tape.add("Greater", column, self.tape.add("Sub", row, self.tape.ints([window])))

    def _upright(self, values: ir.Value) -> ir.Value:
        return self.tape.add("Unsqueeze", values, self.tape.ints([1]))

    def _looked_at(self, key: ir.Value, value: ir.Value, seen: ir.Value, by_row: bool) -> Piece:
        """The rows of a cache that have a place."""
        tape = self.tape
        key, value = (tape.add("Slice", cache, tape.ints([0]), tape.add("Shape", self.places), tape.ints([2])) for cache in (key, value))
        return Piece(key, value, self._of_heads(seen, by_row), by_row)

    def _of_heads(self, seen: ir.Value, by_row: bool) -> ir.Value:
        """[rows, columns], or [columns], as a mask for all heads."""
        return self.tape.add("Unsqueeze", seen, self.tape.ints([0, 1] if by_row else [0, 1, 2]))


def attend(tape: Tape, node: ir.Node, pieces: Sequence[Piece], fused: bool) -> ir.Value:
    """What an `edgecomp.Attention` node gives, [B, H, rows, D], over pieces of keys and values side by side.

    Args:
        tape: of the graph.
        node: with its query, scale, soft cap and, in an encoder, what each key's scores gain.
        pieces: what the query looks at.
        fused: the Attention operator may be used; it is not for a soft cap, with which TensorRT refuses it.

    Raises:
        EdgecompError: an encoder layer with a window.
    """
    if (window := node.attributes["window"].as_int()) and not node.attributes["causal"].as_int():
        raise EdgecompError(f"encoder layer {node.attributes['layer'].as_int()} has attention with a window of {window} rows, for which there is "
                            "no mask here: export it with windows as a batch")
    bias = node.inputs[KEYS_BIAS] if len(node.inputs) > KEYS_BIAS else None
    if bias is not None:
        bias = tape.add("Unsqueeze", bias, tape.ints([1, 2]))  # [B, 1, 1, S]
    how = _operator if fused and not node.attributes["softcap"].as_float() else _products
    return how(tape, node, pieces, bias)


def _operator(tape: Tape, node: ir.Node, pieces: Sequence[Piece], bias: ir.Value | None) -> ir.Value:
    query = inputs(node)[0]
    key, value = (_joined(tape, parts, 2) for parts in ([piece.key for piece in pieces], [piece.value for piece in pieces]))
    mask = _mask(tape, pieces, query) if bias is None else _for_rows(tape, tape.add("Cast", bias, to=query.dtype), query)
    return tape.add("Attention", query, key, value, *([mask] if mask is not None else []), scale=node.attributes["scale"].as_float())


def _mask(tape: Tape, pieces: Sequence[Piece], query: ir.Value) -> ir.Value | None:
    """Which row sees which column of all pieces."""
    if len(pieces) == 1:
        return pieces[0].seen
    found = []
    for piece in pieces:
        seen = piece.seen or constant(tape.model, "edgecomp.seen", np.ones((1, 1, 1, 1), np.bool_))  # the one new row
        found.append(_for_rows(tape, seen, query) if not piece.by_row and any(other.by_row for other in pieces) else seen)
    return _joined(tape, found, 3)


def _for_rows(tape: Tape, mask: ir.Value, query: ir.Value) -> ir.Value:
    """What is the same for every row [B, 1, 1, columns], once for each [B, 1, rows, columns]."""
    return tape.add("Expand", mask, tape.add("Concat", tape.ints([1, 1]), tape.add("Shape", query, start=2, end=3), tape.ints([1]), axis=0))


def _products(tape: Tape, node: ir.Node, pieces: Sequence[Piece], bias: ir.Value | None) -> ir.Value:
    """Two products a piece and one softmax in fp32. The rows of heads that share a key stand below each other, so that no key is repeated."""
    query, key = inputs(node)[:2]
    heads, kv_heads, width, dtype = dims(query)[1], dims(key)[1], dims(query)[3], query.dtype
    assert isinstance(heads, int) and isinstance(kv_heads, int) and dtype is not None
    groups, cap = heads // kv_heads, node.attributes["softcap"].as_float()
    query = tape.add("Mul", query, scalar(tape, node.attributes["scale"].as_float(), dtype))  # first, so that no score leaves fp16's range
    if groups > 1:
        query = tape.add("Reshape", query, tape.ints([0, kv_heads, -1, width]))
    parts = []
    for piece in pieces:
        scores = tape.add("MatMul", query, tape.add("Transpose", piece.key, perm=[0, 1, 3, 2]))
        scores = scores if dtype == FLOAT else tape.add("Cast", scores, to=FLOAT)
        if cap:
            scores = tape.add("Mul", tape.add("Tanh", tape.add("Div", scores, tape.number(cap))), tape.number(cap))
        if bias is not None:
            scores = tape.add("Add", scores, bias)
        if piece.seen is not None:
            seen = _joined(tape, [piece.seen] * groups, 2) if piece.by_row else piece.seen
            scores = tape.add("Where", seen, scores, tape.number(HIDDEN))
        parts.append(scores)
    weights = tape.add("Softmax", _joined(tape, parts, 3), axis=-1)
    weights = weights if dtype == FLOAT else tape.add("Cast", weights, to=dtype)
    products, start = list[ir.Value](), tape.ints([0])
    for piece in pieces:
        here = weights
        if len(pieces) > 1:
            end = tape.add("Add", start, tape.add("Shape", piece.key, start=2, end=3))
            here, start = tape.add("Slice", weights, start, end, tape.ints([3])), end
        products.append(tape.add("MatMul", here, piece.value))
    found = products[0] if len(products) == 1 else tape.add("Add", *products)
    return tape.add("Reshape", found, tape.ints([0, heads, -1, width])) if groups > 1 else found


def _joined(tape: Tape, values: Sequence[ir.Value], axis: int) -> ir.Value:
    return values[0] if len(values) == 1 else tape.add("Concat", *values, axis=axis)
