"""The graph of one certain run: every size is put in, branches that are not taken are gone, and with them what nobody reads then."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass, ShapeInferencePass
from onnxscript.optimizer import fold_constants

from edgecomp.dialects.segments import MICROSOFT
from edgecomp.ir.rewrite import DOMAIN, constant, inputs, nodes, replace
from edgecomp_runtime.cuts import TEXT_ROWS
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import Manifest, PlanInfo

METHODS = "edgecomp.methods"  # the domain of the functions that methods are
SMALL = 64  # elements: shapes and indices are computed, weights are not
OF_METHOD = "edgecomp.of_method"  # marks the nodes of a method's function


@dataclass(frozen=True)
class Run:
    """One run of a graph.

    sizes: of every symbol in its shapes. cached: rows in the caches before, by the first layer of each stretch between cuts.
    pictures: whether there are any among the rows, or rows that see each other both ways.
    """
    sizes: Mapping[str, int]
    cached: Mapping[int, int] = field(default_factory=lambda: {0: 0})
    pictures: bool = False

    def before(self, layer: int) -> int:
        """Rows in a layer's cache before."""
        return self.cached[max(first for first in self.cached if first <= layer)]


def run_of(manifest: Manifest, plan: PlanInfo, phase: str, *, text_rows: int, pictures: int = 1, context: int = 0) -> Run:
    """The run of a phase.

    Args:
        manifest: the bundle's.
        plan: one of its plans.
        phase: 'vision' (of one picture), 'prefill' or 'decode'.
        text_rows: of the prompt, without its visual tokens.
        pictures: of the prompt.
        context: rows in the first layer's cache before one is decoded; prefill begins with an empty one.
    """
    if phase == "vision":
        return Run({"images": 1, "batch": 1}, pictures=True)
    dropped = {first: pictures * (plan.visual_tokens - plan.tokens_at(first)) for first in (0, *(cut.layer for cut in plan.cuts))}
    rows = 1 if phase == "decode" else text_rows + pictures * plan.visual_tokens
    seen = phase == "prefill" and pictures > 0
    sizes = {"batch": 1, "images": pictures if seen else 0, "rows": rows, "logit_rows": 1, "text_rows": max(TEXT_ROWS, text_rows),
             "capacity": max(plan.cache_rows), "bucket": plan.cache_rows[0]}
    for cut in plan.cuts:
        held = plan.cache_rows[cut.layer]
        sizes |= {f"rows.{cut.layer}": rows - dropped[cut.layer] if seen else rows, f"capacity.{cut.layer}": held, f"bucket.{cut.layer}": held}
    cached = {first: context - dropped[first] if phase == "decode" else 0 for first in dropped}
    return Run(sizes, cached, seen or (phase == "prefill" and manifest.decoder.bidirectional == "prompt"))


def resolved(model: ir.Model, run: Run) -> ir.Model:
    """The graph of one run: functions are inlined, the branches taken stand where `If` and `Cut` did, every shape is numbers. In place.

    Raises EdgecompError where a symbol has no size.
    """
    for node in model.graph:
        if node.domain == METHODS:
            node.metadata_props[OF_METHOD] = ""  # handed on to what takes its place
    InlinePass()(model)
    for mark in nodes(model, "Mark", DOMAIN):
        replace(model, mark, inputs(mark)[0])
    for cut in nodes(model, "Cut", DOMAIN):
        count = len(cut.outputs)
        first = 1 if run.pictures else 1 + count
        _stand_in(model, cut, [value for value in cut.inputs[first:first + count] if value is not None])
    for chosen in nodes(model, "If"):
        branch = chosen.attributes["then_branch" if run.pictures else "else_branch"].as_graph()
        results = list(branch.outputs)
        branch.outputs.clear()  # a value is the output of one graph at most
        for node in list(branch):
            branch.remove(node)
            model.graph.insert_before(chosen, node)
        _stand_in(model, chosen, results)
    RemoveUnusedNodesPass()(model)
    for value in (*model.graph.inputs, *(out for node in model.graph for out in node.outputs)):
        if value.shape is not None:
            found = [_size(d, run.sizes) for d in value.shape.dims]
            unknown = [d.value for d in found if not isinstance(d, int)]
            if unknown and value.is_graph_input():
                raise EdgecompError(f"the graph's input {value.name!r} has the dimension {unknown[0]!r}, whose size is not given; "
                                    f"given are {', '.join(run.sizes)}")
            value.shape = None if unknown else ir.Shape(found)  # what is not known by its name follows by inference
    _infer(model)
    if not all(_is_known(value) for node in model.graph for value in node.outputs if value.uses()):
        _known_lengths(model, run)
        _infer(model)
    return model


def _infer(model: ir.Model) -> None:
    """Lets every shape follow that does."""
    infer = ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)
    infer(model)
    while _own_shapes(model):
        infer(model)


def _known_lengths(model: ir.Model, run: Run) -> None:
    """Puts in how many rows are cached before and behind the run, for masks and tables are made in their number, and computes the numbers
    that follow."""
    known: dict[str, np.ndarray[Any, Any]] = {}
    for first, rows in run.cached.items():
        layer = f".{first}" if first else ""
        new = run.sizes.get(f"rows{layer}", 0)  # of which a vision graph has none
        known |= {f"length{layer}": np.array([rows]), f"total_rows{layer}": np.array(rows + new, np.int32)}
    for value in model.graph.inputs:
        if value.name in known:
            number = constant(model, f"{value.name}.known", known[value.name])
            ir.convenience.replace_all_uses_with(value, number)
    fold_constants(model, onnx_shape_inference=True, input_size_limit=SMALL, output_size_limit=SMALL)


def _size(dimension: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int | ir.SymbolicDim:
    """Of a number, a symbol, or an expression such as '3*images'."""
    if isinstance(dimension, int):
        return dimension
    return sizes[dimension.value] if dimension.value is not None and dimension.value in sizes else dimension.evaluate(sizes)


def _own_shapes(model: ir.Model) -> bool:
    """Gives results of onnxruntime's own operators their shapes, where they have none: inference knows ONNX's operators."""
    found = False
    for node in model.graph:
        if node.domain != MICROSOFT or node.outputs[0].shape is not None or not all(map(_is_known, inputs(node)[:2])):
            continue
        first, second = inputs(node)[:2]
        out = node.outputs[0]
        if node.op_type == "FusedMatMul":
            (*lead, rows, _), (*others, height, width) = sizes(first), sizes(second)
            batch = [max(pair) for pair in zip([1] * (len(others) - len(lead)) + lead, [1] * (len(lead) - len(others)) + others)]
            out.shape = ir.Shape([*batch, rows, height if node.attributes.get_int("transB", 0) else width])
        elif node.op_type == "MatMulNBits":
            out.shape = ir.Shape([*sizes(first)[:-1], node.attributes["N"].as_int()])
        elif node.op_type == "MultiHeadAttention":
            out.shape = ir.Shape(sizes(first))  # as the queries: values are as wide
        elif node.op_type == "GroupQueryAttention" and node.inputs[3] is not None:  # behind the queries there may be keys and values
            out.shape = ir.Shape([*sizes(first)[:2], node.attributes["num_heads"].as_int() * sizes(node.inputs[3])[-1]])
        else:
            continue
        out.type, found = first.type, True
    return found


def _stand_in(model: ir.Model, node: ir.Node, values: list[ir.Value]) -> None:
    for old, new in zip(list(node.outputs), values):
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def constants(model: ir.Model) -> set[ir.Value]:
    """The weights, and what follows from them alone, which an engine computes when it loads the graph."""
    found = set(model.graph.initializers.values())
    for node in model.graph:
        if node.op_type == "Constant" or (inputs(node) and found.issuperset(inputs(node))):
            found.update(node.outputs)
    return found


def _is_known(value: ir.Value) -> bool:
    return value.shape is not None and all(isinstance(d, int) for d in value.shape.dims)


def sizes(value: ir.Value) -> tuple[int, ...]:
    """A value's shape in numbers. Raises EdgecompError where it has none."""
    if value.shape is None or not _is_known(value):
        raise EdgecompError(f"the shape of {value.name!r} does not follow from the graph's sizes, it is {value.shape}: report the bundle's graph")
    return value.shape.numpy()


def itemsize(value: ir.Value) -> float:
    assert value.dtype is not None, f"{value.name} has no type"
    return value.dtype.itemsize


def nbytes(value: ir.Value) -> float:
    """Bytes of a value."""
    return prod(sizes(value)) * itemsize(value)
