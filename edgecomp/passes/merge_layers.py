"""Merging rows in every layer of the vision tower, between attention and MLP, with attention that knows how many patches a row stands for."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxscript

from edgecomp.ir.rewrite import DOMAIN, KEYS_BIAS, dims, inputs, marks, nodes
from edgecomp.methods import base, tome
from edgecomp.passes.apply import every_place
from edgecomp.passes.encoder import residual
from edgecomp.passes.shapes import shorten
from edgecomp.passes.splice import compose
from edgecomp.passes.tape import Tape
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import VisionInfo

FLOAT = ir.DataType.FLOAT


def in_every_layer(model: ir.Model, vision: VisionInfo, method: base.Method, first_layer: int, keep: int) -> None:
    """Merges a picture's rows in each layer from `first_layer` to the one that the projector takes, in place; gives the output `kept`.

    Args:
        model: the neutral vision graph, not yet shortened.
        vision: the tower's facts.
        method: the rule of a layer.
        first_layer: from 0.
        keep: the visual tokens that go on.

    Raises:
        BudgetError: halving in each layer leaves more.
        EdgecompError: there is no such layer, or rows of this tower cannot be merged.
    """
    _check(model, vision, method, first_layer)
    layers = range(first_layer, vision.select_layer + 1)
    removed = {layer: r for layer, r in zip(layers, tome.schedule(len(layers), vision.tokens, keep)) if r}
    attention = {n.attributes["layer"].as_int(): n for n in nodes(model, "Attention", DOMAIN)}
    tape, state = Tape(model), None
    for layer, remove in removed.items():
        given = marks(model, "hidden")[layer].outputs[0]
        state = state or _start(tape, given, vision)
        state, merged = _merge(tape, state, residual(given), attention[layer], remove, vision.has_cls)
        for later in range(layer + 1, vision.select_layer + 1):
            attention[later].resize_inputs(KEYS_BIAS + 1)
            attention[later].replace_input_with(KEYS_BIAS, state.bias)
        shorten(model, merged, 1, state.rows)
    mark = marks(model, "visual_tokens")[-1]
    features = inputs(mark)[0]
    compose(model, _in_order(tape, mark, state, keep, vision.has_cls) if state else every_place(model, features), keep)
    model.graph.sort()


@dataclass(frozen=True)
class _State:
    """Where the merging stands: size [B, rows, 1], places [B, rows] (CLS has -1), and log(size) [B, rows] once there was a merging."""
    rows: int
    size: ir.Value
    places: ir.Value
    bias: ir.Value | None = None


def _check(model: ir.Model, vision: VisionInfo, method: base.Method, first_layer: int) -> None:
    def refuse(why: str) -> EdgecompError:
        return EdgecompError(f"{method.name} cannot merge in the layers of this vision tower: {why}; put it at the projector, or use another method")

    if not 0 <= first_layer <= vision.select_layer:
        raise EdgecompError(f"the vision tower has layers 0 to {vision.select_layer} before the projector; none is {first_layer}")
    if any(output.name == "kept" for output in model.graph.outputs):
        raise refuse("an earlier step has shortened it already")
    if len(vision.tiles) != 1 or vision.tiles[0].tokens != vision.tokens:
        raise refuse(f"a picture is {len(vision.tiles)} tiles with {vision.tokens} visual tokens, separators among them")
    if any(True for _ in nodes(model, "RotaryEmbedding")):
        raise refuse("its attention rotates by position, and a merged row has no one position")
    if marks(model, "deepstack"):
        raise refuse("the decoder reads features of several of its layers")
    rows = vision.tokens + vision.has_cls
    hidden = dims(marks(model, "hidden")[first_layer].outputs[0])
    if len(hidden) != 3 or hidden[1] != rows:
        raise refuse(f"its rows are {list(map(str, hidden))} where a picture has {vision.tokens} visual tokens, so its projector joins rows")
    for node in nodes(model, "Attention", DOMAIN):
        if dims(node.inputs[1])[2] != rows or node.attributes["window"].as_int():  # type: ignore[arg-type]
            raise refuse("its attention works in windows")


def _start(tape: Tape, hidden: ir.Value, vision: VisionInfo) -> _State:
    """Each row stands for itself."""
    rows, cls = vision.tokens + vision.has_cls, int(vision.has_cls)
    images = tape.add("Shape", hidden, start=0, end=1)
    size = tape.add("Expand", tape.number(1.0), tape.add("Concat", images, tape.ints([rows, 1]), axis=0))
    places = tape.add("Cast", tape.ints(np.arange(-cls, vision.tokens)[None]), to=FLOAT)
    return _State(rows, size, tape.add("Expand", places, tape.add("Concat", images, tape.ints([1]), axis=0)))


def _merge(tape: Tape, state: _State, value: ir.Value, attention: ir.Node, remove: int, has_cls: bool) -> tuple[_State, ir.Value]:
    """Adds one merging behind a value [B, rows, D]; what read that reads the result, which still has the old shape."""
    function = merging(state.rows, remove, has_cls)
    tape.model.functions[function.identifier()] = function
    tape.model.opset_imports[base.DOMAIN] = 1
    readers = list(value.uses())
    merged, size, places, bias = tape.add_many(function.name, 4, value, attention.inputs[1], state.size, state.places, domain=base.DOMAIN)
    for node, at in readers:
        node.replace_input_with(at, merged)
    merged.type, merged.shape = value.type, value.shape
    rows, images = state.rows - remove, dims(value)[0]
    for made, shape in ((size, [images, rows, 1]), (places, [images, rows]), (bias, [images, rows])):
        made.type, made.shape = ir.TensorType(FLOAT), ir.Shape(shape)
    return _State(rows, size, places, bias), merged


def merging(rows: int, remove: int, has_cls: bool) -> ir.Function:
    """One merging: x [B, S, D], keys [B, H, S, d], size, places -> the same of S - r rows, and log(size) [B, S - r]."""
    def build(op: base.Op, x: ir.Value, keys: ir.Value, size: ir.Value, places: ir.Value) -> Sequence[ir.Value]:
        metric = op.ReduceMean(base.wide(op, keys), [1], keepdims=0)
        merged, size, places = tome.merge(op, base.wide(op, x), metric, size, places, rows, remove, has_cls=has_cls)
        return op.CastLike(merged, x), size, places, op.Log(op.Squeeze(size, [2]))

    given = [ir.Value(name=name) for name in ("x", "keys", "size", "places")]
    return onnxscript.build_function(build, given, domain=base.DOMAIN, name=f"tome_{'cls_' if has_cls else ''}{rows}_less_{remove}",
                                     opset_imports=base.OPSETS)


def _in_order(tape: Tape, mark: ir.Node, state: _State, keep: int, has_cls: bool) -> ir.Value:
    """Puts the visual tokens before `mark` in the order of their places, which are returned [B, K]."""
    features = inputs(mark)[0]
    places = tape.add("Slice", state.places, tape.ints([int(has_cls)]), tape.ints([state.rows]), tape.ints([1]))
    found, rank = tape.add_many("TopK", 2, places, tape.ints([keep]), axis=1, largest=0)
    ordered = tape.add("GatherND", features, tape.add("Unsqueeze", rank, tape.ints([2])), batch_dims=1)
    ordered.type, ordered.shape = features.type, features.shape
    mark.replace_input_with(0, ordered)
    return tape.add("Cast", found, to=ir.DataType.INT64)
