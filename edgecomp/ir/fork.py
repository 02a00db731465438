"""Following values through a graph, and computing them a second time from other inputs."""
from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from edgecomp.ir.rewrite import DOMAIN
from edgecomp_runtime.errors import EdgecompError


def downstream(values: Iterable[ir.Value]) -> set[ir.Node]:
    """The nodes that depend on any of the values."""
    found: set[ir.Node] = set()
    waiting = list(values)
    while waiting:
        for node, _ in waiting.pop().uses():
            if node not in found:
                found.add(node)
                waiting += node.outputs
    return found


class Fork:
    """Copies of the nodes between some values and what depends on them, with those values replaced.

    Args:
        model: gets the copies; its graph is to be sorted afterwards.
        replaced: values, and what stands for each in the copies.
        rename: a symbolic dimension and what it is called in the copies.
    """

    def __init__(self, model: ir.Model, replaced: Mapping[ir.Value, ir.Value], rename: tuple[str, str]):
        self._model, self._made, self._rename = model, dict(replaced), rename
        self._depending = downstream(replaced)

    def of(self, value: ir.Value) -> ir.Value:
        """The value as computed from the replacements; itself where it does not depend on any.

        Raises:
            EdgecompError: the way to it leads through attention, which is no matter of single rows.
        """
        node = value.producer()
        if value in self._made or node is None or node not in self._depending:
            return self._made.get(value, value)
        if (node.domain, node.op_type) == (DOMAIN, "Attention"):
            raise EdgecompError(f"a later layer reads {value.name}, which comes from attention before the cut: this decoder cannot be cut there")
        inputs = [v if v is None else self.of(v) for v in node.inputs]
        copy = ir.node(node.op_type, inputs, dict(node.attributes), domain=node.domain, num_outputs=len(node.outputs))
        for old, new in zip(node.outputs, copy.outputs):
            new.type, new.shape = old.type, old.shape
            self._made[old] = new
        rename_dimension([copy], *self._rename)
        self._model.graph.append(copy)
        return self._made[value]


def rename_dimension(nodes: Iterable[ir.Node], old: str, new: str) -> None:
    """Gives a symbolic dimension another name in the results of these nodes: equal names are equal sizes to a backend."""
    for node in nodes:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([new if isinstance(d, ir.SymbolicDim) and d.value == old else d for d in value.shape])
