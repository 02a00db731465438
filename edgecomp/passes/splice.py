"""Putting a method into a graph: a call of its function at the place that a mark names."""
from __future__ import annotations

import onnx_ir as ir

from edgecomp.ir.rewrite import dims, marks
from edgecomp.methods.base import DOMAIN, Method, Place
from edgecomp.passes.signals import SIGNALS
from edgecomp_runtime.manifest import VisionInfo


def at_projector(model: ir.Model, vision: VisionInfo, method: Method, place: Place, *, expose: bool = False) -> None:
    """Shortens the vision graph's visual tokens to `place.keep`, in place; the graph gains the output `kept` [images, K].

    Args:
        model: the neutral vision graph.
        vision: the tower's facts.
        method: the rule to put in.
        place: its grid and budget.
        expose: add what the rule saw and did as outputs: features, each signal, and the order of choice.
    """
    mark = marks(model, "visual_tokens")[-1]
    features = mark.outputs[0]
    signals = [SIGNALS[name](model, vision) for name in method.taxonomy.signals]
    function = method.function(place)
    model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = 1
    call = ir.node(function.name, [features, *signals], domain=DOMAIN, num_outputs=3)
    model.graph.insert_after(mark, call)
    tokens, kept, order = call.outputs
    images, _, width = dims(features)
    _typed(features, "features", features.dtype, dims(features))
    _typed(tokens, "visual_tokens", features.dtype, [images, place.keep, width])
    _typed(kept, "kept", ir.DataType.INT64, [images, place.keep])
    _typed(order, "order", ir.DataType.INT64, [images, place.keep])
    model.graph.outputs[:] = [tokens, kept]
    if expose:
        for name, signal in zip(method.taxonomy.signals, signals):
            _typed(signal, name, ir.DataType.FLOAT, [images, vision.tokens])
        model.graph.outputs.extend([features, *signals, order])


def _typed(value: ir.Value, name: str, dtype: ir.DataType | None, shape: object) -> None:
    assert dtype is not None
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)  # type: ignore[arg-type]
