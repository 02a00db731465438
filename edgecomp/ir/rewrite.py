"""The few graph edits that passes and dialects share."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

DOMAIN = "edgecomp"
# further inputs of an Attention node, behind query, key, value, past key, past value and length
SEGMENTS, KEYS_BIAS = 6, 7  # which rows see each other both ways; what each key's logits gain, [B, S] float32


def nodes(model: ir.Model, op_type: str, domain: str = "") -> Iterator[ir.Node]:
    """The graph's nodes of one operator, in order. The graph may be edited meanwhile."""
    for node in list(model.graph):
        if node.op_type == op_type and node.domain == domain:
            yield node


def inputs(node: ir.Node) -> list[ir.Value]:
    """A node's inputs where none is left out."""
    return [value for value in node.inputs if value is not None]


def made_by(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that makes a value, if it is of this operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and (node.op_type, node.domain) == (op_type, domain) else None


def dims(value: ir.Value) -> tuple[int | ir.SymbolicDim, ...]:
    """A value's dimensions; the exporter gives every value that passes look at a shape."""
    assert value.shape is not None, f"{value.name} has no shape"
    return value.shape.dims


def ends_as_result(value: ir.Value) -> bool:
    """Whether a value is a result of the graph, or becomes one by a soft cap."""
    readers = [node for node, _ in value.uses()]
    return value.is_graph_output() or (len(readers) == 1 and readers[0].op_type in ("Div", "Tanh", "Mul") and ends_as_result(readers[0].outputs[0]))


def marks(model: ir.Model, signal: str) -> dict[int, ir.Node]:
    """The Mark nodes of a signal by layer (-1 where it has none), in the order of the layers."""
    found = [n for n in nodes(model, "Mark", DOMAIN) if n.attributes["signal"].as_string() == signal]
    by_layer = {n.attributes["layer"].as_int(): n for n in found}
    return {layer: by_layer[layer] for layer in sorted(by_layer)}


def insert(model: ir.Model, before: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict[str, Any] | None = None,
           domain: str = "", outputs: int = 1) -> Sequence[ir.Value]:
    """Adds a node before another and returns its outputs."""
    node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs)
    model.graph.insert_before(before, node)
    return node.outputs


def constant(model: ir.Model, name: str, array: np.ndarray[Any, Any] | np.generic) -> ir.Value:
    """A named initializer; one name is one value."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def replace(model: ir.Model, old: ir.Node, new: ir.Value) -> None:
    """Puts a value where a one-output node stood, keeping type and shape, and removes the node."""
    out = old.outputs[0]
    new.type, new.shape = new.type or out.type, new.shape if new.shape is not None else out.shape
    if out.is_graph_output():
        new.name, out.name = out.name, None
    ir.convenience.replace_all_uses_with(out, new, replace_graph_outputs=True)
    model.graph.remove(old, safe=True)
