"""Rows that see each other both ways, for onnxruntime, whose GroupQueryAttention is causal whatever bias it is given.

GroupQueryAttention stays where it is: it writes the cache in place, and its result is right wherever no segment is open. An `If`
behind it replaces that result while any new row has a segment, by plain attention under a mask. One graph and one session thus do
prefill and decode, and a decoded token pays for two small nodes and an empty branch a layer.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgecomp.ir.rewrite import DOMAIN, SEGMENTS, constant, dims, inputs, insert, nodes

MICROSOFT = "com.microsoft"


class Branch:
    """The nodes of one branch of an `If`; they may read any value of the graph around it."""

    def __init__(self, name: str):
        self.name = name
        self.nodes: list[ir.Node] = []

    def add(self, op_type: str, *inputs: ir.Value, domain: str = "", **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, domain=domain)
        node.outputs[0].name = f"{self.name}.{len(self.nodes)}"  # unlike any name of the graph around it, as ONNX wants it
        self.nodes.append(node)
        return node.outputs[0]

    def graph(self, results: Sequence[ir.Value], types: Sequence[ir.DataType]) -> ir.Graph:
        for result, dtype in zip(results, types):
            result.type = ir.TensorType(dtype)
        return ir.Graph([], results, nodes=self.nodes, name=self.name)


class BothWays:
    """What Attention nodes with segments and one cache length share: whether any segment is open, and which row sees which, once a
    kind of window."""

    def __init__(self, model: ir.Model, length: ir.Value):
        self.model = model
        having = [n for n in nodes(model, "Attention", DOMAIN) if len(n.inputs) > SEGMENTS and n.inputs[5] is length]
        if not having:
            return
        self.length, self.segments = inputs(having[0])[5:7]
        self.kinds = list(dict.fromkeys(_kind(n) for n in having))
        first = having[0]
        largest, = insert(model, first, "ReduceMax", [self.segments], {"keepdims": 0})
        self.open, = insert(model, first, "Cast", [largest], {"to": ir.DataType.BOOL})
        layer = first.attributes["layer"].as_int()
        seeing, blind = Branch(f"segments.{layer}"), Branch(f"no_segments.{layer}")
        types = [ir.DataType.INT64, *[ir.DataType.BOOL] * len(self.kinds)]
        unused = [self._ints("zero", [0]), *[constant(model, "segments_none", np.zeros([1] * 5, np.bool_))] * len(self.kinds)]
        branches = {"then_branch": seeing.graph(self._visible(seeing), types),
                    "else_branch": blind.graph([blind.add("Identity", value) for value in unused], types)}
        self.total, *visible = insert(model, first, "If", [self.open], branches, outputs=len(types))
        self.visible = dict(zip(self.kinds, visible))

    def _visible(self, branch: Branch) -> list[ir.Value]:
        """Rows in all [1], and for each kind of window which new row sees which of them: bool [batch, 1, 1, rows, total].

        A row sees those before it and those of its segment. A window hides what lies that far before it: of the former, or
        (`bounded`) of both.
        """
        zero, one, minus_one, last = (self._ints(name, value) for name, value in
                                      (("zero", [0]), ("one", [1]), ("minus_one", [-1]), ("last_axis", [2])))
        rows = branch.add("Shape", self.segments, start=1, end=2)
        total = branch.add("Add", self.length, rows)
        scalars = [branch.add("Squeeze", value, zero) for value in (self.length, total)]
        start, step = (self._ints(name, value) for name, value in (("row_zero", 0), ("row_step", 1)))
        row = branch.add("Unsqueeze", branch.add("Range", scalars[0], scalars[1], step), one)  # [rows, 1]
        other = branch.add("Range", start, scalars[1], step)  # [total]
        before = branch.add("LessOrEqual", other, row)
        # rows of the cache are in no segment, and 0 is none
        batch = branch.add("Shape", self.segments, start=0, end=1)
        cached = branch.add("Expand", zero, branch.add("Concat", batch, self.length, axis=0))
        theirs = branch.add("Unsqueeze", branch.add("Concat", cached, self.segments, axis=1), one)  # [batch, 1, total]
        own = branch.add("Where", branch.add("Greater", self.segments, zero), self.segments, minus_one)
        same = branch.add("Equal", branch.add("Unsqueeze", own, last), theirs)  # [batch, rows, total]
        found = []
        for window, bounded in self.kinds:
            seen = branch.add("Or", before, same)
            if window:
                near = branch.add("Greater", other, branch.add("Sub", row, self._ints(f"window_{window}", [window])))
                seen = branch.add("And", seen, near) if bounded else branch.add("Or", branch.add("And", before, near), same)
            found.append(branch.add("Unsqueeze", seen, self._ints("head_axes", [1, 2])))
        return [total, *found]

    def attend(self, node: ir.Node, causal: ir.Value, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
        """The result [batch, rows, heads * width] of an Attention node.

        Args:
            node: with segments.
            causal: GroupQueryAttention's result, right where no segment is open.
            query: [batch, rows, heads * width].
            key, value: the cache with the new rows in it, [batch, key/value heads, capacity, width].
        """
        layer, dtype = node.attributes["layer"].as_int(), inputs(node)[0].dtype
        assert dtype is not None
        dense, passed = Branch(f"both_ways.{layer}"), Branch(f"one_way.{layer}")
        branches = {"then_branch": dense.graph([self._dense(dense, node, query, key, value)], [dtype]),
                    "else_branch": passed.graph([passed.add("Identity", causal)], [dtype])}
        return insert(self.model, node, "If", [self.open], branches)[0]

    def _dense(self, branch: Branch, node: ir.Node, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
        """Attention in fp32. Heads that share a key stand side by side, so that no key is copied for them."""
        heads, width, kv_heads = dims(inputs(node)[0])[1], dims(inputs(node)[0])[3], dims(key)[1]
        assert isinstance(heads, int) and isinstance(kv_heads, int)
        zero, last = self._ints("zero", [0]), self._ints("last_axis", [2])
        grouped = self._ints(f"heads_{kv_heads}_of_{heads}", [0, 0, kv_heads, heads // kv_heads, width])
        wide = branch.add("Transpose", branch.add("Reshape", query, grouped), perm=[0, 2, 3, 1, 4])  # [B, Hkv, G, S, D]
        wide = branch.add("Cast", wide, to=ir.DataType.FLOAT)
        keys, values = (branch.add("Cast", branch.add("Unsqueeze", branch.add("Slice", cache, zero, self.total, last), last),
                                   to=ir.DataType.FLOAT) for cache in (key, value))  # [B, Hkv, 1, T, D]
        scores = branch.add("FusedMatMul", wide, keys, domain=MICROSOFT, transB=1, alpha=node.attributes["scale"].as_float())
        if cap := node.attributes["softcap"].as_float():
            most = constant(self.model, f"segments_softcap_{cap}", np.float32(cap))
            scores = branch.add("Mul", branch.add("Tanh", branch.add("Div", scores, most)), most)
        hidden = constant(self.model, "segments_hidden", np.float32(-np.inf))
        weights = branch.add("Softmax", branch.add("Where", self.visible[_kind(node)], scores, hidden), axis=-1)
        rows = branch.add("Transpose", branch.add("MatMul", weights, values), perm=[0, 3, 1, 2, 4])  # [B, S, Hkv, G, D]
        flat = branch.add("Reshape", rows, self._ints("rows_by_hidden", [0, 0, -1]))
        dtype = inputs(node)[0].dtype
        return branch.add("Cast", flat, to=dtype)

    def _ints(self, name: str, values: Any) -> ir.Value:
        return constant(self.model, f"segments_{name}", np.array(values, np.int64))


def _kind(node: ir.Node) -> tuple[int, bool]:
    """A node's window, and whether it bounds segments too."""
    return node.attributes["window"].as_int(), bool(node.attributes["bounded"].as_int())
