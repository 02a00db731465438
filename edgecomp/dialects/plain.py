"""Operators of ONNX's own domain alone, without a cache: what a prompt needs from its first row on, for readers without fused attention.

TensorRT's parser takes these graphs; it refuses what `REFUSED` names. Decode is not in them: a cut gives its shortened rows always.
"""
from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, InlinePass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from edgecomp.ir.rewrite import DOMAIN, KEYS_BIAS, SEGMENTS, dims, inputs, nodes, replace
from edgecomp.passes.tape import Tape

REFUSED = ("NonZero", "Compress", "Unique", "SequenceAt", "Loop", "Scan")  # by TensorRT 10 and RTX 1.7, seen with RTX
MOST_TOPK = 3840  # NvInfer.h: ITopKLayer
FLOAT = ir.DataType.FLOAT


def lower(model: ir.Model) -> None:
    """Turns a neutral graph into plain operators, in place. Cache inputs go; new keys and values stay outputs."""
    InlinePass()(model)
    for mark in nodes(model, "Mark", DOMAIN):
        replace(model, mark, inputs(mark)[0])
    for cut in nodes(model, "Cut", DOMAIN):
        for old, new in zip(list(cut.outputs), cut.inputs[1:1 + len(cut.outputs)]):
            assert new is not None
            name, old.name = old.name, None
            if old.is_graph_output():
                new.name = name
            new.type, new.shape = old.type, old.shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        model.graph.remove(cut, safe=True)
    masks = _Masks(model)
    for attention in nodes(model, "Attention", DOMAIN):
        _attention(model, attention, masks)
    model.graph.sort()
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    RemoveUnusedOpsetsPass()(model)
    used = {v for node in model.graph for v in node.inputs}
    for value in list(model.graph.inputs):
        if value not in used:
            model.graph.inputs.remove(value)


def refused(model: ir.Model) -> list[str]:
    """What TensorRT refuses of a lowered graph: an operator's name and the reason, for each node."""
    found = []
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain not in ("", "ai.onnx"):
            found.append(f"{node.domain}.{node.op_type}: not ONNX's own")
        elif node.op_type in REFUSED:
            found.append(f"{node.op_type}: has no static shape, or no importer")
        elif node.op_type.startswith("Scatter") and node.attributes.get_string("reduction", "none") != "none":
            found.append(f"{node.op_type}: with a reduction")
        elif node.op_type == "TopK":
            count = ir.convenience.get_const_tensor(inputs(node)[1])
            if count is None or count.numpy().item() > MOST_TOPK:
                found.append(f"TopK: of more than {MOST_TOPK}, or of a number that is no constant")
    return found


class _Masks:
    """What a kind of attention hides, once for all layers that read the same number of rows."""

    def __init__(self, model: ir.Model):
        self._tape = Tape(model)
        self._made: dict[object, ir.Value] = {}

    def of(self, node: ir.Node) -> ir.Value:
        """Whether a row sees another: bool [rows, rows], or [batch, 1, rows, rows] with segments."""
        window, segments = node.attributes["window"].as_int(), node.inputs[SEGMENTS] if len(node.inputs) > SEGMENTS else None
        bounded = "bounded" in node.attributes and bool(node.attributes["bounded"].as_int())
        kind = node.inputs[5], window, segments, bounded
        if kind not in self._made:
            self._made[kind] = self._make(node, window, segments, bounded)
        return self._made[kind]

    def _make(self, node: ir.Node, window: int, segments: ir.Value | None, bounded: bool) -> ir.Value:
        tape = self._tape
        rows = tape.add("Squeeze", tape.add("Shape", node.inputs[0], start=2, end=3))
        other = tape.add("Range", tape.ints(0), rows, tape.ints(1))
        row = tape.add("Unsqueeze", other, tape.ints([1]))
        seen = tape.add("LessOrEqual", other, row)
        near = tape.add("Greater", other, tape.add("Sub", row, tape.ints(window))) if window else None
        if segments is None:
            return tape.add("And", seen, near) if near else seen
        own = tape.add("Unsqueeze", segments, tape.ints([2]))
        same = tape.add("And", tape.add("Equal", own, tape.add("Unsqueeze", segments, tape.ints([1]))), tape.add("Greater", own, tape.ints(0)))
        if near is not None and not bounded:
            seen = tape.add("And", seen, near)
        both = tape.add("Or", seen, same)
        return tape.add("Unsqueeze", tape.add("And", both, near) if near is not None and bounded else both, tape.ints([1]))


def _attention(model: ir.Model, node: ir.Node, masks: _Masks) -> None:
    tape = Tape(model)
    query, key, value = inputs(node)[:3]
    heads, kv_heads = dims(query)[1], dims(key)[1]
    assert isinstance(heads, int) and isinstance(kv_heads, int) and query.dtype is not None
    if heads != kv_heads:  # each key as often as it is read
        which = tape.ints(np.repeat(np.arange(kv_heads), heads // kv_heads))
        key, value = (tape.add("Gather", one, which, axis=1) for one in (key, value))
    scores = tape.add("Cast", tape.add("MatMul", query, tape.add("Transpose", key, perm=[0, 1, 3, 2])), to=FLOAT)
    scores = tape.add("Mul", scores, tape.number(node.attributes["scale"].as_float()))
    if cap := node.attributes["softcap"].as_float():
        scores = tape.add("Mul", tape.add("Tanh", tape.add("Div", scores, tape.number(cap))), tape.number(cap))
    if len(node.inputs) > KEYS_BIAS:
        scores = tape.add("Add", scores, tape.add("Unsqueeze", node.inputs[KEYS_BIAS], tape.ints([1, 2])))
    if node.attributes["causal"].as_int():
        scores = tape.add("Where", masks.of(node), scores, tape.number(-1e30))
    weights = tape.add("Cast", tape.add("Softmax", scores, axis=-1), to=query.dtype)
    replace(model, node, tape.add("MatMul", weights, value))
