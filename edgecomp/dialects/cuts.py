"""Cuts inside the decoder for onnxruntime: an `If`, so that one graph and one session do prefill with pictures, without, and decode."""
from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgecomp.dialects.segments import Branch
from edgecomp.ir.rewrite import constant, inputs, insert


def where_pictures(model: ir.Model, cut: ir.Node) -> None:
    """Turns a `Cut` node into an `If` on its first input having any picture, and what only the cut reads into that branch's nodes."""
    visual, *values = inputs(cut)
    count, layer = len(cut.outputs), cut.attributes["layer"].as_int()
    images, = insert(model, cut, "Shape", [visual], {"start": 0, "end": 1})
    some, = insert(model, cut, "Greater", [images, constant(model, "no_images", np.array([0], np.int64))])
    types = [value.dtype or ir.DataType.INT64 for value in cut.outputs]
    branches = []
    for name, read in (("cut", values[:count]), ("uncut", values[count:])):
        branch = Branch(f"{name}.{layer}")
        branches.append(branch.graph([branch.add("Identity", value) for value in read], types))
    some, = insert(model, cut, "Squeeze", [some])
    chosen = insert(model, cut, "If", [some], {"then_branch": branches[0], "else_branch": branches[1]}, outputs=count)
    for old, new in zip(list(cut.outputs), chosen):
        new.type, new.shape, old.name, new.name = old.type, old.shape, None, old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    model.graph.remove(cut, safe=True)
    _sink(model.graph, branches[0])


def _sink(graph: ir.Graph, branch: ir.Graph) -> None:
    """Moves the graph's nodes into a branch whose results are read there alone, so that they cost nothing where it is not taken."""
    for node in reversed(list(graph)):
        uses = [user for value in node.outputs for user, _ in value.uses()]
        if uses and all(user.graph is branch for user in uses) and not any(value.is_graph_output() for value in node.outputs):
            graph.remove(node)
            branch.insert_before(branch[0], node)
